"""Calibration with the cache on, over a tape: exact gradients are those of back-propagation through loop and cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import make_pipeline
from torch import Tensor, nn
from zoo.images import flux_dev_two_calls

from accuquant.calibration.layers import quantize_model
from accuquant.calibration.objectives.cached_steps import CachedSteps, memories_of, taken_apart
from accuquant.calibration.reference import states_of
from accuquant.core.forecasts import Memory
from accuquant.core.trajectory import Gradient, Loss, State, cached_groups, full_gradient, group_gradient
from accuquant.pipeline.coordinates import noise_levels
from accuquant.pipeline.record import record
from accuquant.pipeline.tape import Tape
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.state import Key, Memories
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

STEPS = (0, 1, 4, 6, 9)  # of 12
FORECASTS = [
    Cache(schedule=STEPS, estimation="reuse"),
    Cache(schedule=STEPS, estimation="taylor", order=1),
    Cache(schedule=STEPS, estimation="taylor", order=2),
    Cache(schedule=STEPS, estimation="taylor", order=2, differences="newton"),
    Cache(schedule=STEPS, order=1),
    Cache(schedule=STEPS, order=2, norm="token"),
]
every_forecast = pytest.mark.parametrize(
    "config", FORECASTS, ids=lambda c: f"{c.estimation}-{c.order}-{c.differences}-{c.norm}"
)


def setting(solver: Any = None) -> tuple[Tape, list[Tensor]]:
    """DiT with guidance in float64, quantized after its tape was recorded; and what is trained of it."""
    pipeline = make_pipeline(dtype=torch.float64)
    pipeline.vae.double()
    if solver is not None:
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    tape = record(pipeline, class_labels=[1, 2], guidance_scale=1.5, num_inference_steps=12, generator=generator)
    network = pipeline.transformer
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and (".attn1." in n or ".ff." in n)]
    clock = StepClock.from_timesteps(levels_of(tape), 3)
    layers = quantize_model(network, dict.fromkeys(names, LayerSpec("int4", "float")), clock, True)
    network.double().requires_grad_(False)
    weights = [w.requires_grad_(True) for layer in layers.values() if (w := layer.learnable("weight")) is not None]
    return tape, list[Tensor](weights)


def disturbed(network: nn.Module) -> list[Tensor]:
    """What is trained of a network, moved away from the weights that its tape was recorded with."""
    generator = torch.Generator().manual_seed(2)
    weights = [p for name, p in network.named_parameters() if p.dim() == 2 and (".attn" in name or ".ff" in name)]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    for weight in weights:
        weight.requires_grad_(True)
    return list[Tensor](weights)


def taken(weights: list[Tensor]) -> Tensor:
    """All gradients in a row, and clear them."""
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    for weight in weights:
        weight.grad = None
    return flat


def levels_of(tape: Tape, denoiser: str = "transformer") -> list[float]:
    return [calls[0] for calls in noise_levels(tape, denoiser)]


def compared(tape: Tape, steps: CachedSteps, weights: list[Tensor], start: int, stop: int, loss: Loss) -> float:
    """How far the exact gradient of a group is from that of autograd through all of it."""
    reference = states_of(tape)
    begin = steps.before(start, reference)
    ours = group_gradient(steps, reference, start, stop, "exact", loss, initial=begin)
    found = taken(weights)
    reference[start] = begin
    theirs = full_gradient(steps, reference, start, stop, loss)
    expected = taken(weights)
    assert ours == pytest.approx(theirs, rel=1e-12) and expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


@every_forecast
@pytest.mark.parametrize("loss", ["terminal", "dense"])
def test_exact_equals_full_back_propagation_through_the_cache(config: Cache, loss: Loss) -> None:
    tape, weights = setting()
    with cached(tape.pipeline.transformer, config) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), STEPS)
        for start, stop in ((0, 12), (1, 9), (4, 12), (6, 9)):
            assert compared(tape, steps, weights, start, stop, loss) < 1e-10


@pytest.mark.parametrize("config", FORECASTS[4:], ids=lambda c: f"{c.estimation}-{c.order}-{c.norm}")
def test_it_holds_for_a_multistep_solver(config: Cache) -> None:
    tape, weights = setting(DPMSolverMultistepScheduler)
    with cached(tape.pipeline.transformer, config) as controller:
        assert compared(tape, CachedSteps(tape, controller, levels_of(tape), STEPS), weights, 1, 9, "terminal") < 1e-10


@pytest.mark.parametrize("gradient", ["identity", "variance", "exact"])
def test_with_every_step_full_it_is_the_uncached_objective(gradient: Gradient) -> None:
    tape, weights = setting()
    reference, everything = states_of(tape), tuple(range(12))
    variances = [torch.stack([state.latents[0].square().mean() for state in reference])]
    with cached(tape.pipeline.transformer, Cache(schedule=everything, order=1)) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), everything)
        begin = steps.before(2, reference)
        ours = group_gradient(steps, reference, 2, 6, gradient, variances=variances, initial=begin)
    found = taken(weights)
    theirs = group_gradient(tape.step, reference, 2, 6, gradient, variances=variances)
    expected = taken(weights)
    assert ours == pytest.approx(theirs, rel=1e-12) and expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 1e-12


def test_identity_gives_a_full_step_the_sum_over_the_steps_it_serves() -> None:
    """Order 0, one group from one full step: the gradient is that of sum_j <v, x_j> with latents held fixed.

    Only the predictions depend on the weights then: that of the full step and those that are forecast from it.
    """
    tape, weights = setting()
    reference = states_of(tape)
    with cached(tape.pipeline.transformer, FORECASTS[0]) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), STEPS)
        begin = steps.before(1, reference)
        group_gradient(steps, reference, 1, 4, initial=begin)
        found = taken(weights)

        made = [begin]
        for i in (1, 2, 3):
            latents = tuple(t.detach() for t in made[-1].latents)
            made.append(steps(i, State(latents, made[-1].history, made[-1].features)))
        end, target, first = (state.latents[0] for state in (made[-1], reference[4], reference[1]))
        cotangent = 2 * (end - target).detach() / (target - first).square().sum()
        torch.stack([(cotangent * state.latents[0]).sum() for state in made[1:]]).sum().backward()
        expected = taken(weights)
    assert expected.norm() > 0 and (found - expected).norm() / expected.norm() < 1e-10


def test_two_calls_of_a_step_are_remembered_apart() -> None:
    """FLUX with negative prompts: the network is called twice in each step."""
    pipeline, row, settings = flux_dev_two_calls()
    pipeline.to(torch.float64)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.set_progress_bar_config(disable=True)
    tape = record(pipeline, **row, **settings, num_inference_steps=12, generator=torch.Generator().manual_seed(1))
    weights = disturbed(pipeline.transformer)
    with cached(pipeline.transformer, FORECASTS[1]) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), STEPS)
        assert compared(tape, steps, weights, 1, 9, "terminal") < 1e-10
        contexts = {key.context for key in controller.state.memories}
    assert contexts == {"cond", "uncond"}


@every_forecast
def test_a_rolled_tape_is_the_cached_pipeline(config: Cache) -> None:
    tape, _ = setting()
    call = {"class_labels": [1, 2], "guidance_scale": 1.5, "num_inference_steps": 12}
    with torch.no_grad(), cached(tape.pipeline.transformer, config):
        expected = record_of_latents(tape, call)
    with torch.no_grad(), cached(tape.pipeline.transformer, config) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), STEPS)
        state = tape.state(0)
        for i in range(len(tape)):
            state = steps(i, state)
            assert torch.equal(state.latents[0], expected[i])
    assert steps.full_evaluations == len(STEPS)


def record_of_latents(tape: Tape, call: dict[str, Any]) -> list[Tensor]:
    """What the pipeline's own loop gives with the cache on."""
    scheduler, found = type(tape.pipeline.scheduler), list[Tensor]()
    step = scheduler.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        found.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    scheduler.step = watched
    try:
        tape.pipeline(**call, generator=torch.Generator().manual_seed(1))
    finally:
        scheduler.step = step
    return found


def test_memories_are_taken_apart_and_put_together() -> None:
    a, b, c, d = (torch.randn(2, 3) for _ in range(4))
    memories: Memories = {
        Key("call 0", "ff"): (Memory((4, 2), (a, b), input=c, ratio=d), None),
        Key("call 1", "ff"): (Memory((4,), (b,)), Memory((4,), (c,), input=a)),
    }
    layout, tensors = taken_apart(memories)
    assert len(tensors) == 7 and memories_of(layout, tensors) == memories


@pytest.mark.parametrize("m", [1, 2, 3, 5, 12])
def test_groups_begin_at_full_steps_and_cover_all(m: int) -> None:
    cut = cached_groups(STEPS, 12, m)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == 12
    assert all(start in STEPS for start, _ in cut)
    assert all(stop - start >= m for start, stop in cut[:-1])


def test_memory_does_not_grow_with_the_group() -> None:
    """Most bytes that autograd keeps at once: as many for six segments as for two, unlike the oracle."""

    def peak(run: Callable[[], object]) -> int:
        alive, most = dict[int, int](), [0]

        class Kept:
            def __init__(self, t: Tensor) -> None:
                self.t, self.key = t, t.untyped_storage().data_ptr()
                alive[self.key] = t.untyped_storage().nbytes()
                most[0] = max(most[0], sum(alive.values()))

            def __del__(self) -> None:
                alive.pop(self.key, None)

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            run()
        return most[0]

    tape, weights = setting()
    reference, everything = states_of(tape), (0, 2, 4, 6, 8, 10)
    found: dict[tuple[str, int], int] = {}
    with cached(tape.pipeline.transformer, Cache(schedule=everything, order=1)) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), everything)
        for stop in (4, 12):
            found["ours", stop] = peak(partial(group_gradient, steps, reference, 0, stop, "exact"))
            found["full", stop] = peak(partial(full_gradient, steps, reference, 0, stop))
            taken(weights)
    assert found["ours", 12] < 1.1 * found["ours", 4]
    assert found["full", 12] > 2 * found["full", 4]
