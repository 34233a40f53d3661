"""What a cached or quantized denoiser remembers belongs to one call of a pipeline, whatever else shares the module."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from helpers import aborted, images
from peft import LoraConfig
from pipelines import flux_arguments, make_flux, make_pipeline, make_stable_diffusion
from torch import Tensor

import accuquant
from accuquant.calibration.layers import quantize_model
from accuquant.errors import CacheError
from accuquant.export.native import harden_model
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.calls import current_run, follow
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

EVERY_THIRD = Cache(interval=3, warmup=2, order=1)  # of 10 steps, full at 0, 1, 4, 7


@pytest.fixture
def pipeline() -> DiTPipeline:
    return make_pipeline()


# ---- calls are followed


def test_a_call_has_a_run_of_its_own_and_leaves_none(pipeline: DiTPipeline) -> None:
    outside, seen = current_run(), list[Any]()
    follow(pipeline)
    pipeline.transformer.register_forward_hook(lambda *_: seen.append(current_run()))
    images(pipeline)
    assert len({id(run) for run in seen}) == 1 and seen[0] is not outside and seen[0].pipeline is pipeline
    assert seen[0].scheduler_steps == 10 == len(seen)
    assert current_run() is outside
    aborted(pipeline.transformer, 2, lambda: images(pipeline))
    assert current_run() is outside


def test_following_changes_nothing_that_can_be_seen(pipeline: DiTPipeline) -> None:
    before, signature = images(pipeline), inspect.signature(type(pipeline).__call__)
    for _ in range(3):
        follow(pipeline)
    assert (images(pipeline) == before).all()
    assert inspect.signature(type(pipeline).__call__) == signature
    assert inspect.unwrap(type(pipeline).__call__).__code__.co_filename.endswith("pipeline_dit.py")


@pytest.mark.parametrize("calls", [1, 2, 3, 7])
@pytest.mark.parametrize("by_pipeline", [True, False])
def test_an_aborted_call_is_forgotten(pipeline: DiTPipeline, calls: int, by_pipeline: bool) -> None:
    """Also where the next begins at the very timestep that the aborted one was at."""
    if by_pipeline:
        accuquant.enable_cache(pipeline, EVERY_THIRD)
    else:  # as a loaded export: the pipeline was not there yet
        attach_cache(pipeline.transformer, EVERY_THIRD)
        images(pipeline)
    fresh = make_pipeline()
    accuquant.enable_cache(fresh, EVERY_THIRD)
    expected = images(fresh)
    aborted(pipeline.transformer, calls, lambda: images(pipeline))
    assert (images(pipeline) == expected).all()
    assert accuquant.cache_stats(pipeline).full_steps == (0, 1, 4, 7)


def test_equal_timesteps_are_two_steps(pipeline: DiTPipeline) -> None:
    """As bfloat16 rounds them: the scheduler's steps are counted."""
    accuquant.enable_cache(pipeline, EVERY_THIRD)
    model, times = pipeline.transformer, list[float]()

    def round_down(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs | {"timestep": kwargs["timestep"] // 200 * 200}
        times.append(float(kwargs["timestep"].max()))
        return args, kwargs

    model.register_forward_pre_hook(round_down, with_kwargs=True, prepend=True)
    images(pipeline)
    assert len(set(times)) < len(times) == 10
    stats = accuquant.cache_stats(pipeline)
    assert stats.num_steps == 10 and stats.full_steps == (0, 1, 4, 7)


@pytest.mark.filterwarnings("ignore:a skipped step saves")  # of a U-Net, whose convolutions go on
def test_guidance_may_be_dropped_midway() -> None:
    """diffusers' documented callback: the batch is halved, the step after it is full, and the count goes on."""
    pipeline = make_stable_diffusion()

    def drop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    call = {"num_inference_steps": 10, "output_type": "latent", "callback_on_step_end": drop}
    call["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]

    def run() -> Tensor:
        made: Tensor = pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images
        return made

    plain = run()
    accuquant.enable_cache(pipeline, Cache(interval=1, order=1))
    assert torch.equal(run(), plain)
    accuquant.disable_cache(pipeline)
    accuquant.enable_cache(pipeline, EVERY_THIRD)
    found = run()
    stats = accuquant.cache_stats(pipeline)
    assert stats.num_steps == 10 and stats.full_steps == (0, 1, 4, 5, 7)
    assert not torch.equal(found, plain) and float((found - plain).norm() / plain.norm()) < 0.5


def test_a_step_may_call_with_other_batches(pipeline: DiTPipeline) -> None:
    """Skip-layer guidance of SD3 calls with 2 N samples and then with N: two calls of one step, each remembered."""
    accuquant.enable_cache(pipeline, EVERY_THIRD)
    model, made = pipeline.transformer, list[int]()

    def once_more(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        made.append(len(args[0]))
        if len(args[0]) == 4:
            half = {name: value[:2] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            module(args[0][:2], **half)

    model.register_forward_hook(once_more, with_kwargs=True)
    images(pipeline)
    stats = accuquant.cache_stats(pipeline)
    assert made == [2, 4] * 10 or made == [4, 2] * 10
    assert stats.num_steps == 10 and stats.full_steps == (0, 1, 4, 7)


# ---- threads


def in_threads(runs: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(runs)

    def one(i: int) -> None:
        found[i] = runs[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def shared(pipeline: DiTPipeline) -> DiTPipeline:
    """Another pipeline of the same components with a scheduler of its own, as diffusers advises for threads."""
    other = DiTPipeline(pipeline.transformer, pipeline.vae, copy.deepcopy(pipeline.scheduler))
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("quantized", [False, True])
def test_threads_may_share_a_denoiser(pipeline: DiTPipeline, quantized: bool) -> None:
    if quantized:
        specs = {"transformer_blocks.0.ff.net.2": LayerSpec("int8", "int8"), "proj_out_1": LayerSpec("int8", "int8")}
        clock = StepClock([800.0, 500.0, 200.0])
        for layer in quantize_model(pipeline.transformer, specs, clock, search=True).values():
            assert layer.log_activation_scale is not None
            layer.log_activation_scale.data.copy_(torch.tensor([-2.0, -3.0, -4.0, -5.0]))
        harden_model(pipeline.transformer, clock)
    accuquant.enable_cache(pipeline, EVERY_THIRD)
    expected = [images(pipeline, class_labels=[i, i + 1]) for i in range(4)]
    pipelines = [pipeline, *(shared(pipeline) for _ in range(3))]
    for _ in range(3):
        found = in_threads([lambda i=i: images(pipelines[i], class_labels=[i, i + 1]) for i in range(4)])  # type: ignore[misc]
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert accuquant.cache_stats(pipeline).full_steps == (0, 1, 4, 7)


def test_a_clock_is_of_its_thread() -> None:
    clock = StepClock([500.0])
    clock.set(900.0)
    both = in_threads([lambda: clock.set(100.0) or clock.group, lambda: clock.set(700.0) or clock.group])  # type: ignore[func-returns-value]
    assert both == [1, 0] and clock.group == 0
    assert copy.deepcopy(clock).group in (0, 1)


# ---- loops of one's own


def flux_loop(model: Any, seed: int = 0) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    latent = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(latent, timestep=(t / 1000).expand(2), **flux_arguments()).sample
            latent = scheduler.step(velocity, t, latent).prev_sample
    return latent


def test_a_loop_of_ones_own_begins_where_it_says() -> None:
    model = make_flux()
    accuquant.enable_cache(model, EVERY_THIRD)
    expected = flux_loop(model)
    with torch.no_grad():  # a loop that ends early, at a later timestep than the next begins with
        model(torch.randn(2, 16, 4), timestep=torch.tensor([0.1, 0.1]), **flux_arguments())
    accuquant.reset_cache(model)
    assert torch.equal(flux_loop(model), expected)
    accuquant.disable_cache(model)
    with pytest.raises(CacheError, match="has no cache"):
        accuquant.reset_cache(model)


# ---- adapters


def adapted(model: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["proj_out", "proj_mlp", "to_q"], init_lora_weights=False)
    model.add_adapter(config)


def test_adapters_may_come_before_and_after_the_cache_and_go_again() -> None:
    """The fused blocks of FLUX are forecast at their last projection, which an adapter is put around."""
    plain = make_flux()
    plain_loop, first = flux_loop(plain), copy.deepcopy(plain)
    adapted(first)
    uncached = flux_loop(first)
    assert not torch.equal(uncached, plain_loop)
    accuquant.enable_cache(first, Cache(interval=1, order=1))
    assert torch.equal(flux_loop(first), uncached)
    accuquant.disable_cache(first)
    accuquant.enable_cache(first, EVERY_THIRD)
    expected = flux_loop(first)

    later = copy.deepcopy(plain)
    accuquant.enable_cache(later, EVERY_THIRD)
    without = flux_loop(later)
    adapted(later)
    assert torch.equal(flux_loop(later), expected)
    later.unload_lora()
    assert torch.equal(flux_loop(later), without)
    accuquant.disable_cache(later)
    assert torch.equal(flux_loop(later), plain_loop)
    assert not any("_diffusers_hook" in vars(module) for module in later.modules())


# ---- graphs


def test_a_whole_graph_says_what_to_call_instead() -> None:
    model = make_flux()
    accuquant.enable_cache(model, EVERY_THIRD)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="compile_cached"):
        flux_loop(compiled)
    torch._dynamo.reset()


def test_states_of_other_schedulers_are_their_own(pipeline: DiTPipeline) -> None:
    """The scheduler's class is followed, not one of its instances."""
    accuquant.enable_cache(pipeline, EVERY_THIRD)
    first = images(pipeline)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert (images(pipeline) == first).all()
    controller = controller_of(pipeline.transformer)
    assert controller is not None and controller.stats().num_steps == 10
    detach_cache(pipeline.transformer)
