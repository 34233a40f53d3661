"""Tapes of pipelines in other types, under autocast, offloaded, with named calls, with several networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from pipelines import make_flux, make_pipeline
from torch import Tensor

from accuquant.pipeline.record import record
from accuquant.pipeline.seams import unwrapped
from tools.benchmarks.pipelines.sweep import replayed

DIT = {"class_labels": [1, 2], "guidance_scale": 1.5, "num_inference_steps": 3}


def call(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"generator": torch.Generator().manual_seed(1)}


def make_flux_pipeline() -> FluxPipeline:
    """FLUX without text encoders, with an autoencoder of one channel."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), transformer=make_flux(), **none)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_call(guided: bool) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    given = {
        "prompt_embeds": torch.randn(2, 5, 12, generator=draw),
        "pooled_prompt_embeds": torch.randn(2, 10, generator=draw),
        "height": 16,
        "width": 16,
        "num_inference_steps": 3,
    }
    if guided:
        given |= {
            "negative_prompt_embeds": torch.randn(2, 5, 12, generator=draw),
            "negative_pooled_prompt_embeds": torch.randn(2, 10, generator=draw),
            "true_cfg_scale": 3.0,
        }
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    pipeline = make_pipeline(dtype=dtype)
    pipeline.vae.to(dtype)
    tape = record(pipeline, **call(DIT))
    assert tape.state(1).latents[0].dtype == dtype and replayed(tape)


def test_networks_are_called_in_the_mixed_precision_of_the_run() -> None:
    pipeline = make_pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        tape = record(pipeline, **call(DIT))
    plain = record(pipeline, **call(DIT))
    last = len(tape)
    assert replayed(tape) and replayed(plain)
    assert not torch.equal(tape.state(last).latents[0], plain.state(last).latents[0])
    with torch.autocast("cpu", torch.bfloat16):  # whatever is on around a replay
        assert replayed(plain)


def test_an_offloaded_network() -> None:
    pipeline = make_pipeline()
    expected = record(pipeline, **call(DIT)).state(3).latents[0]
    cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in pipeline.transformer.transformer_blocks[0].ff.parameters())
    tape = record(pipeline, **call(DIT))
    assert torch.equal(tape.state(3).latents[0], expected) and replayed(tape)


@pytest.mark.parametrize("guided", [False, True])
def test_named_calls_are_entered_again(guided: bool) -> None:
    """FLUX names its calls for diffusers' caches; with guidance of two calls each has its own."""
    pipeline = make_flux_pipeline()
    tape = record(pipeline, **call(flux_call(guided)))
    names = ["cond", "uncond"] if guided else ["cond"]
    assert all([one.around.context for one in step.calls] == names for step in tape.steps) and replayed(tape)
    entered: list[str] = []
    inner = pipeline.transformer.cache_context

    def watched(name: str) -> Any:
        entered.append(name)
        return inner(name)

    pipeline.transformer.cache_context = watched
    tape.step(1, tape.state(1))
    assert entered == names


def test_packed_latents_and_images_of_the_tail() -> None:
    pipeline = make_flux_pipeline()
    with torch.no_grad():
        expected = unwrapped(pipeline)(**call(flux_call(True)), output_type="pt").images
        tape = record(pipeline, **call(flux_call(True)), output_type="pt")
        images = tape.images(tape.state(len(tape)))
    assert tape.state(0).latents[0].shape == (2, 16, 4)
    assert images is not None and torch.equal(images, expected)


def test_other_networks_can_be_given() -> None:
    """A quantized twin, say, in the place of the pipeline's own."""
    pipeline, other = make_pipeline(), make_pipeline(seed=5)
    tape = record(pipeline, **call(DIT))
    found = tape.step(0, tape.state(0), {"transformer": other.transformer})
    expected = record(with_network(pipeline, other.transformer), **call(DIT))
    assert torch.equal(found.latents[0], expected.state(1).latents[0])


def with_network(pipeline: DiffusionPipeline, network: torch.nn.Module) -> DiffusionPipeline:
    pipeline.register_modules(transformer=network)
    return pipeline


def test_the_step_follows_the_network_the_pipeline_holds_now() -> None:
    pipeline = make_pipeline()
    tape = record(pipeline, **call(DIT))
    before: Tensor = tape.step(0, tape.state(0)).latents[0]
    with torch.no_grad():
        pipeline.transformer.proj_out_2.weight.mul_(1.5)
    assert not torch.equal(tape.step(0, tape.state(0)).latents[0], before)
