"""Small random pipelines, of the same classes as the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)


def make_pipeline(
    seed: int = 0, learned_variance: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32
) -> DiTPipeline:
    """DiT of random weights, 8x8 latents, with adaLN that is not zero: every module matters."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    for parameter in transformer.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    pipeline = DiTPipeline(
        transformer.eval().to(dtype), vae.eval(), scheduler, id2label={i: f"class {i}" for i in range(10)}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_pixart() -> Any:
    """PixArt-alpha with a T5 of its own, all random and tiny; skips where the `text` extra is not installed."""
    transformers = pytest.importorskip("transformers", reason="text pipelines need accuquant[text]")
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    words = ["a", "red", "cat", "dog", "the", "photo", "of"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{w}", -1.0) for w in words), ("▁", -5.0)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=32,
        patch_size=8,
        caption_channels=16,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    encoder = transformers.T5EncoderModel(config).eval()
    pipeline = PixArtAlphaPipeline(tokenizer, encoder, vae, transformer.eval(), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """Three down-blocks and three up-blocks, random."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def make_stable_diffusion() -> Any:
    """Stable Diffusion with a CLIP of its own, all random and tiny; skips where the `text` extra is not installed."""
    transformers = pytest.importorskip("transformers", reason="text pipelines need accuquant[text]")
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    unet = make_unet(cross_attention_dim=16)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    encoder = transformers.CLIPTextModel(config).eval()
    pipeline = StableDiffusionPipeline(vae.eval(), encoder, tokenizer, unet.eval(), scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_unconditional_unet() -> UNet2DModel:
    """A down-block and an up-block that attend, and one of each that do not."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return randomize(unet)


def make_ddpm() -> DDPMPipeline:
    """Unconditional, of pixels."""
    pipeline = DDPMPipeline(make_unconditional_unet(), DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_ldm() -> LDMPipeline:
    """Unconditional, of latents of a quantizing autoencoder, 32x32 pixels."""
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=64,
    )
    pipeline = LDMPipeline(vqvae.eval(), make_unconditional_unet(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize(model: torch.nn.Module, seed: int = 0) -> Any:
    """Weights that keep the size of what they multiply, none of them zero: every module matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def make_flux(layers: int = 1, single_layers: int = 2) -> FluxTransformer2DModel:
    """FLUX of random weights: joint blocks, and blocks with attention and MLP side by side."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    return randomize(model)


def flux_arguments(batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """What FLUX is called with beside the latent (B, 16, 4) and the timestep."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }
