"""Pipelines that make videos and sound, of real classes and tiny random weights."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tools.benchmarks.pipelines.parts import (
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    language_model,
    matters,
    t5_encoder,
    t5_tokenizer,
)
from zoo.images import TEXT, Example, flow


def _wan_transformer(seed: int, channels: int) -> Any:
    network = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return matters(network, seed)


def _wan(kind: Any, channels: int, experts: bool) -> Any:
    torch.manual_seed(0)
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(multilingual=True),
        vae=vae.eval(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=_wan_transformer(0, channels),
        **({"transformer_2": _wan_transformer(1, channels), "boundary_ratio": 0.9} if experts else {}),
    )


WAN = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8, "guidance_scale": 5.0}


def wan_text_to_video() -> Example:
    return _wan(d.WanPipeline, 16, False), TEXT, WAN


def wan_two_experts() -> Example:
    return _wan(d.WanPipeline, 16, True), TEXT, WAN | {"guidance_scale_2": 3.0}


def wan_image_to_video() -> Example:
    return _wan(d.WanImageToVideoPipeline, 36, True), TEXT | {"image": "in.png"}, WAN


def ltx_video() -> Example:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    pipeline = d.LTXPipeline(
        scheduler=flow(),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=matters(transformer),
    )
    settings = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "guidance_scale": 3.0}
    return pipeline, TEXT, settings


def cogvideox() -> Example:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    pipeline = d.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae.eval(),
        transformer=matters(transformer),
        scheduler=d.CogVideoXDDIMScheduler(),
    )
    settings = {"height": 16, "width": 16, "num_frames": 8, "max_sequence_length": 16, "guidance_scale": 6.0}
    return pipeline, TEXT, settings


def mochi() -> Example:
    transformer = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    )
    pipeline = d.MochiPipeline(
        scheduler=flow(),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=matters(transformer),
    )
    settings = {"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16, "guidance_scale": 4.5}
    return pipeline, TEXT, settings


def hunyuan_video() -> Example:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    torch.manual_seed(0)
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipeline = d.HunyuanVideoPipeline(
        text_encoder=language_model("LlamaModel"),
        tokenizer=byte_tokenizer(),
        transformer=matters(transformer),
        vae=vae.eval(),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip_encoder(8, projected=False, max_length=77),
        tokenizer_2=clip_tokenizer(77),
    )
    settings = {
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 16,
        "guidance_scale": 4.5,
        "prompt_template": {"template": "{}", "crop_start": 0},
    }
    return pipeline, TEXT, settings


def stable_audio() -> Example:
    transformer = d.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    torch.manual_seed(0)
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    from diffusers import StableAudioProjectionModel

    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 16
    pipeline = d.StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        projection_model=StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32),
        tokenizer=tokenizer,
        transformer=matters(transformer),
        scheduler=d.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    )
    return pipeline, TEXT, {"guidance_scale": 6.0}


VIDEOS = (
    wan_text_to_video,
    wan_two_experts,
    wan_image_to_video,
    ltx_video,
    cogvideox,
    mochi,
    hunyuan_video,
    stable_audio,
)
