"""Pipelines that change images, are steered by them, or are conditioned on something else than a prompt."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from pipelines import make_ddpm, make_ldm

from tools.benchmarks.pipelines.parts import (
    autoencoder,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    language_model,
    matters,
    t5_encoder,
    t5_tokenizer,
)
from zoo.images import TEXT, Example, _flux, flow

SIZE = {"height": 32, "width": 32}


def _unet(channels: int = 4, width: int = 32, **config: Any) -> Any:
    network = d.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=channels,
        out_channels=min(channels, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )
    return matters(network)


def _stable_diffusion(kind: Any, channels: int = 4, scheduler: Any = None, **more: Any) -> Any:
    none = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
    return kind(
        vae=autoencoder(),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        unet=_unet(channels),
        scheduler=scheduler or d.DDIMScheduler(clip_sample=False, steps_offset=1),
        **none,
        **more,
    )


def stable_diffusion() -> Example:
    pipeline = _stable_diffusion(d.StableDiffusionPipeline, scheduler=d.PNDMScheduler(skip_prk_steps=True))
    return pipeline, TEXT, SIZE | {"guidance_scale": 7.5}


def image_to_image() -> Example:
    return _stable_diffusion(d.StableDiffusionImg2ImgPipeline), TEXT | {"image": "in.png"}, {"strength": 0.99}


def inpaint() -> Example:
    row = TEXT | {"image": "in.png", "mask_image": "mask.png"}
    return _stable_diffusion(d.StableDiffusionInpaintPipeline), row, SIZE | {"strength": 0.99}


def controlnet() -> Example:
    network = d.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
        norm_num_groups=4,
    )
    pipeline = _stable_diffusion(d.StableDiffusionControlNetPipeline, controlnet=matters(network, 1))
    return pipeline, TEXT | {"image": "in.png"}, {"guidance_scale": 5.0}


def flux_kontext() -> Example:
    settings = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 3.5, "max_area": 256}
    return _flux(d.FluxKontextPipeline, True), TEXT | {"image": "in.png"}, settings | {"_auto_resize": False}


def kandinsky() -> Example:
    torch.manual_seed(0)
    unet = d.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 32),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    movq = d.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    scheduler = d.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    draw = torch.Generator().manual_seed(0)
    row = {name: torch.randn(1, 32, generator=draw) for name in ("image_embeds", "negative_image_embeds")}
    pipeline = d.KandinskyV22Pipeline(unet=matters(unet), scheduler=scheduler, movq=movq.eval())
    return pipeline, row, SIZE | {"guidance_scale": 4.0}


def stable_cascade_prior() -> Example:
    from diffusers.models import StableCascadeUNet

    prior = StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_image_in_channels=32,
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=32,
        dropout=(0.0, 0.0),
        in_channels=4,
        out_channels=4,
        self_attn=True,
        timestep_ratio_embedding_dim=8,
    )
    pipeline = d.StableCascadePriorPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip_encoder(),
        prior=matters(prior),
        scheduler=d.DDPMWuerstchenScheduler(),
        resolution_multiple=42.67,
    )
    return pipeline, TEXT, {"height": 128, "width": 128, "guidance_scale": 4.0}


def latent_diffusion() -> Example:
    pipeline = d.LDMTextToImagePipeline(
        vqvae=autoencoder(),
        bert=clip_encoder(projected=False, max_length=77),
        tokenizer=clip_tokenizer(77),
        unet=_unet(),
        scheduler=d.DDIMScheduler(clip_sample=False),
    )
    return pipeline, TEXT, SIZE | {"guidance_scale": 3.0}


class ClassConditionalLDM(d.DiffusionPipeline):  # type: ignore[misc]
    """LDM on ImageNet: a label is a token that the U-Net attends to. diffusers has the parts, and no such pipeline."""

    def __init__(
        self,
        vqvae: d.VQModel,
        label_encoder: transformers.CLIPTextModel,
        unet: d.UNet2DConditionModel,
        scheduler: d.DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, label_encoder=label_encoder, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        config, count = self.unet.config, len(class_labels)
        none = self.label_encoder.config.vocab_size - 1
        labels = torch.tensor([*class_labels, *[none] * count], device=self.device)[:, None]
        tokens = self.label_encoder(labels)[0]
        size = (count, config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(size, generator=generator, device=self.device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            given, without = self.unet(torch.cat([latents] * 2), t, encoder_hidden_states=tokens).sample.chunk(2)
            noise = without + guidance_scale * (given - without)
            latents = self.scheduler.step(noise, t, latents, eta=eta, generator=generator).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        images = (self.vqvae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        return ImagePipelineOutput(images if output_type == "pt" else self.numpy_to_pil(images.permute(0, 2, 3, 1)))


d.ClassConditionalLDM = ClassConditionalLDM  # where `from_pretrained` looks for what a folder names


def class_conditional_latent_diffusion() -> Example:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=1001, eos_token_id=1000, num_attention_heads=4, **sizes)
    encoder = transformers.CLIPTextModel(config).eval()
    pipeline = ClassConditionalLDM(make_ldm().vqvae, encoder, _unet(3), d.DDIMScheduler(clip_sample=False))
    return pipeline, {"class_labels": 3}, {"guidance_scale": 3.0}


def unconditional_latent_diffusion() -> Example:
    return make_ldm(), {}, {}


def ddpm() -> Example:
    return make_ddpm(), {}, {}


def hidream() -> Example:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    pipeline = d.HiDreamImagePipeline(
        scheduler=flow(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=language_model("LlamaForCausalLM"),
        tokenizer_4=byte_tokenizer(),
        transformer=matters(transformer),
    )
    return pipeline, TEXT, SIZE | {"guidance_scale": 5.0, "max_sequence_length": 16}


def flux_2() -> Example:
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLFlux2(
        latent_channels=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = d.Flux2KleinPipeline(
        scheduler=flow(),
        vae=vae.eval(),
        text_encoder=language_model("Qwen3ForCausalLM"),
        tokenizer=byte_tokenizer(),
        transformer=matters(transformer),
    )
    settings = {"height": 16, "width": 16, "max_sequence_length": 64, "text_encoder_out_layers": (1,)}
    return pipeline, TEXT, settings | {"guidance_scale": 4.0}


OTHERS = (
    stable_diffusion,
    image_to_image,
    inpaint,
    controlnet,
    flux_kontext,
    kandinsky,
    stable_cascade_prior,
    latent_diffusion,
    class_conditional_latent_diffusion,
    unconditional_latent_diffusion,
    ddpm,
    hidream,
    flux_2,
)
