"""Calls told apart: of modules that work several times in one of a denoiser, of other shapes, of a film's pieces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.models import StableCascadeUNet
from helpers import images
from pipelines import make_pipeline, make_stable_diffusion
from torch import Tensor, nn
from zoo.images import TEXT

from accuquant.caching.enable import cache_stats, denoisers_in, disable_cache, enable_cache
from accuquant.core.coordinate import Coordinate
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import attach_cache, cached
from tools.benchmarks.pipelines.parts import matters, t5_encoder, t5_tokenizer

REUSE, TAYLOR, RFE = (Cache(interval=4, warmup=1, estimation=kind, order=n) for kind, n in
                      (("reuse", 0), ("taylor", 1), ("rfe", 1)))  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def cogview4() -> tuple[nn.Module, dict[str, Any]]:
    """One MLP of each block serves both streams, of images and of text."""
    torch.manual_seed(0)
    network = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    sizes = {name: torch.tensor([[8.0, 8.0]] * 2) for name in ("original_size", "target_size", "crop_coords")}
    return network, {"hidden_states": random(2, 4, 8, 8), "encoder_hidden_states": random(2, 5, 12), **sizes}


def stable_cascade() -> tuple[nn.Module, dict[str, Any]]:
    """A level of blocks is gone through more than once, as in the published decoder."""
    torch.manual_seed(0)
    network = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(3, 2),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_pooled_in_channels=16,
        dropout=(0.0, 0.0),
        timestep_ratio_embedding_dim=8,
        timestep_conditioning_type=("sca",),
        switch_level=None,
        kernel_size=3,
    )
    return network, {"sample": random(2, 4, 8, 8), "clip_text_pooled": random(2, 1, 16)}


# ---- several times in a call


@pytest.mark.parametrize("config", [REUSE, TAYLOR, RFE], ids=lambda config: config.estimation)
@pytest.mark.parametrize("made", [cogview4, stable_cascade])
@torch.no_grad()
def test_a_module_that_works_several_times_is_forecast_each_time(
    made: Callable[[], tuple[nn.Module, dict[str, Any]]], config: Cache
) -> None:
    """From what it gave at that very place: a call that is forecast from itself gives the same."""
    network, given = made()
    matters(network)
    level = Coordinate.usual(inspect.signature(network.forward).parameters)
    assert level is not None
    with cached(network, config) as controller:
        found, steps = list[Tensor](), ((0, True), (1, True), (2, False))
        for step, full in steps:
            controller.drive(step, 1.0 - step / 4, full, controller.state.memories)
            found.append(network(**given, **{level.argument: torch.full((2,), 0.5)}, return_dict=False)[0])
        times = max(controller.state.made.values())
    assert times > 1
    assert found[0].isfinite().all() and torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)


def test_an_mlp_that_two_blocks_share() -> None:
    pipeline = make_pipeline()
    blocks = pipeline.transformer.transformer_blocks
    blocks[1].ff = blocks[0].ff
    plain = images(pipeline)
    enable_cache(pipeline, TAYLOR.changed(interval=1))
    assert (images(pipeline) == plain).all()
    disable_cache(pipeline)
    enable_cache(pipeline, TAYLOR.changed(interval=2))
    found = images(pipeline)
    assert cache_stats(pipeline).nfc == 5
    assert torch.as_tensor(found).isfinite().all() and 0 < abs(found - plain).mean() < 0.1


# ---- of another form


@torch.no_grad()
def test_latents_of_another_shape_are_computed() -> None:
    """As where pictures are given beside the latents at the first step only."""
    unet = make_stable_diffusion().unet
    text = random(2, 5, unet.config.cross_attention_dim)
    expected = unet(random(2, 4, 16, 16), 700.0, text).sample
    controller = attach_cache(unet, REUSE)
    unet(random(2, 4, 8, 8), 900.0, text)
    assert torch.equal(unet(random(2, 4, 16, 16), 700.0, text).sample, expected)
    assert controller.stats().full_steps == (0, 1)
    unet(random(2, 4, 16, 16), 500.0, text)
    assert controller.stats().full_steps == (0, 1)


# ---- films made piece by piece


def far() -> Any:
    """Three pieces of one latent frame; each attends to the keys and values of those before."""
    torch.manual_seed(0)
    transformer = d.AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=256,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        deltatime_type="r",
        chunk_partition=(1, 1, 1),
    )
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = d.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    parts = {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer(), "vae": vae.eval(), "scheduler": scheduler}
    pipeline = d.AnyFlowFARPipeline(transformer=matters(transformer), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def film(pipeline: Any) -> Tensor:
    size = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 8, "num_inference_steps": 3}
    noise = torch.Generator().manual_seed(0)
    latents: Tensor = pipeline(**TEXT, **size, guidance_scale=3.0, output_type="latent", generator=noise).frames
    return latents


def test_each_piece_of_a_film_begins_anew_and_its_keys_and_values_are_computed() -> None:
    pipeline = far()
    plain = film(pipeline)
    enable_cache(pipeline, Cache(schedule=[0, 1, 2], estimation="reuse"))
    assert torch.equal(film(pipeline), plain)  # keys and values are made in a fourth call, which no schedule names
    disable_cache(pipeline)
    enable_cache(pipeline, REUSE)
    found, stats = film(pipeline), cache_stats(pipeline)
    assert (stats.full_steps, stats.num_steps) == ((0,), 3)  # of the last piece
    assert not torch.equal(found, plain) and torch.equal(found, film(pipeline))


# ---- what says which step a call is of


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("hidden_states", "r_timestep", "timestep"), "timestep"),
        (inspect.signature(d.Cosmos3OmniTransformer.forward).parameters, "vision_timesteps"),
        (("hidden_states", "num_timesteps_total"), None),
    ],
)
def test_the_argument_that_says_the_noise_level(names: Any, expected: str | None) -> None:
    found = Coordinate.usual(names)
    assert (found and found.argument) == expected


def test_a_denoiser_of_several_kinds_of_latents_is_found() -> None:
    torch.manual_seed(0)
    transformer = d.Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        latent_channel=4,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=4,
        rope_axes_dim=(2, 1, 1),
        vocab_size=10,
    )
    pipeline = make_pipeline()
    pipeline.register_modules(transformer=transformer)
    assert denoisers_in(pipeline) == {"transformer": transformer}
    plan = enable_cache(transformer, REUSE)
    assert plan.interval == 4 and len(cache_stats(transformer).modules) == 3
