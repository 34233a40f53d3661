"""Pipelines that make images from text, of real classes and tiny random weights.

Each function gives a pipeline, a row of calibration data, and the settings of a call.
"""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers

from tools.benchmarks.pipelines.parts import (
    VOCABULARY,
    autoencoder,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    language_model,
    matters,
    t5_encoder,
    t5_tokenizer,
)

Example = tuple[Any, dict[str, Any], dict[str, Any]]
TEXT = {"prompt": "a cat"}


def flow(**config: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**config)


def stable_diffusion_xl() -> Example:
    torch.manual_seed(0)
    unet = d.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    scheduler = d.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    pipeline = d.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(projected=False),
        text_encoder_2=clip_encoder(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=matters(unet),
        scheduler=scheduler,
    )
    return pipeline, TEXT, {"height": 32, "width": 32, "guidance_scale": 5.0}


def stable_diffusion_3() -> Example:
    transformer = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    pipeline = d.StableDiffusion3Pipeline(
        transformer=matters(transformer),
        scheduler=flow(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(),
        text_encoder_3=t5_encoder(64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    return pipeline, TEXT, {"height": 32, "width": 32, "max_sequence_length": 8, "guidance_scale": 4.0}


def _flux_transformer(guidance: bool) -> Any:
    return matters(
        d.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        )
    )


def _flux(kind: Any, guidance: bool) -> Any:
    return kind(
        scheduler=flow(shift=3.0, use_dynamic_shifting=guidance),
        vae=autoencoder(channels=1, levels=2, shift_factor=0.1),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=_flux_transformer(guidance),
    )


def flux_dev() -> Example:
    return (
        _flux(d.FluxPipeline, True),
        TEXT,
        {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 3.5},
    )


def flux_dev_two_calls() -> Example:
    settings = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 3.5, "true_cfg_scale": 3.0}
    return _flux(d.FluxPipeline, True), TEXT | {"negative_prompt": "a dog"}, settings


def flux_schnell() -> Example:
    settings = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 0.0}
    return _flux(d.FluxPipeline, False), TEXT, settings


def chroma() -> Example:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipeline = d.ChromaPipeline(
        scheduler=flow(),
        vae=autoencoder(channels=1, shift_factor=0.1),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=matters(transformer),
    )
    settings = {"height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 4.0}
    return pipeline, TEXT | {"negative_prompt": "a dog"}, settings


def auraflow() -> Example:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipeline = d.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(multilingual=True),
        vae=autoencoder(),
        transformer=matters(transformer),
        scheduler=flow(),
    )
    return pipeline, TEXT, {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 4.0}


def sana() -> Example:
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    torch.manual_seed(0)
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    pipeline = d.SanaPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=language_model("Gemma2Model"),
        vae=vae.eval(),
        transformer=matters(transformer),
        scheduler=flow(shift=3.0),
    )
    settings = {
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "guidance_scale": 4.5,
        "complex_human_instruction": None,
    }
    return pipeline, TEXT, settings | {"use_resolution_binning": False}


def lumina2() -> Example:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    )
    pipeline = d.Lumina2Pipeline(
        transformer=matters(transformer),
        scheduler=flow(),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=language_model("Gemma2Model"),
        tokenizer=byte_tokenizer(),
    )
    return pipeline, TEXT, {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 4.0}


def z_image() -> Example:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipeline = d.ZImagePipeline(
        scheduler=flow(),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=language_model("Qwen3Model"),
        tokenizer=byte_tokenizer(),
        transformer=matters(transformer),
    )
    return pipeline, TEXT, {"height": 32, "width": 32, "max_sequence_length": 64, "guidance_scale": 3.0}


def pixart_sigma() -> Example:
    transformer = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        caption_channels=32,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )
    pipeline = d.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=matters(transformer),
        scheduler=d.DPMSolverMultistepScheduler(),
    )
    settings = {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 4.5}
    return pipeline, TEXT, settings | {"use_resolution_binning": False, "clean_caption": False}


def qwen_image() -> Example:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=6, vision_start_token_id=4, vision_end_token_id=5
    )
    pipeline = d.QwenImagePipeline(
        scheduler=flow(),
        vae=vae.eval(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=byte_tokenizer(),
        transformer=matters(transformer),
    )
    settings = {"height": 32, "width": 32, "max_sequence_length": 16, "true_cfg_scale": 3.0}
    return pipeline, TEXT | {"negative_prompt": "a dog"}, settings


IMAGES = (
    stable_diffusion_xl,
    stable_diffusion_3,
    flux_dev,
    flux_dev_two_calls,
    flux_schnell,
    chroma,
    auraflow,
    sana,
    lumina2,
    z_image,
    pixart_sigma,
    qwen_image,
)
