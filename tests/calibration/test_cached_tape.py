"""Calibration with the cache on, over a tape: exact gradients are those of back-propagation through loop and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import make_pipeline
from torch import Tensor
from zoo.images import flux_dev_two_calls

from accuquant.calibration.objectives.cached_tape import CachedSteps, memories_of, taken_apart
from accuquant.core.forecasts import Memory
from accuquant.core.trajectory import State, full_gradient, group_gradient
from accuquant.pipeline.coordinates import noise_levels
from accuquant.pipeline.record import record
from accuquant.pipeline.tape import Tape
from accuquant.recipe import Cache
from accuquant.runtime.cache.hooks import cached

STEPS = (0, 1, 4, 6, 9)  # of 12
FORECASTS = [
    Cache(schedule=STEPS, estimation="reuse"),
    Cache(schedule=STEPS, estimation="taylor", order=1),
    Cache(schedule=STEPS, estimation="taylor", order=2, differences="newton"),
    Cache(schedule=STEPS, order=2, norm="token"),
]


def setting(solver: Any = None) -> tuple[Tape, list[Tensor]]:
    """DiT with guidance in float64, away from the weights its tape was recorded with; and what is trained of it."""
    pipeline = make_pipeline(dtype=torch.float64)
    pipeline.vae.double()
    if solver is not None:
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    tape = record(pipeline, class_labels=[1, 2], guidance_scale=1.5, num_inference_steps=12, generator=generator)
    return tape, disturbed(pipeline.transformer)


def disturbed(network: torch.nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [p for name, p in network.named_parameters() if p.dim() == 2 and (".attn" in name or ".ff" in name)]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def taken(weights: list[Tensor]) -> Tensor:
    """All gradients in a row, and clear them."""
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    for weight in weights:
        weight.grad = None
    return flat


def states_of(tape: Tape) -> list[State]:
    return [tape.state(i) for i in range(len(tape) + 1)]


def levels_of(tape: Tape, denoiser: str = "transformer") -> list[float]:
    return [calls[0] for calls in noise_levels(tape, denoiser)]


def compared(tape: Tape, steps: CachedSteps, weights: list[Tensor], start: int, stop: int, loss: Any) -> float:
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


@pytest.mark.parametrize("config", FORECASTS, ids=lambda c: f"{c.estimation}-{c.order}-{c.differences}-{c.norm}")
@pytest.mark.parametrize("loss", ["terminal", "dense"])
def test_exact_equals_full_back_propagation_through_the_cache(config: Cache, loss: Any) -> None:
    tape, weights = setting()
    with cached(tape.pipeline.transformer, config) as controller:
        steps = CachedSteps(tape, controller, levels_of(tape), STEPS)
        for start, stop in ((0, 12), (1, 9), (4, 12), (6, 9)):
            assert compared(tape, steps, weights, start, stop, loss) < 1e-10


def test_it_holds_for_a_multistep_solver() -> None:
    tape, weights = setting(DPMSolverMultistepScheduler)
    with cached(tape.pipeline.transformer, FORECASTS[3]) as controller:
        assert compared(tape, CachedSteps(tape, controller, levels_of(tape), STEPS), weights, 1, 9, "terminal") < 1e-10


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
        contexts = {context for context, _ in controller.memories}
    assert contexts == {"cond", "uncond"}


def test_a_rolled_tape_is_the_cached_pipeline() -> None:
    tape, _ = setting()
    call = {"class_labels": [1, 2], "guidance_scale": 1.5, "num_inference_steps": 12}
    with torch.no_grad(), cached(tape.pipeline.transformer, FORECASTS[3]):
        expected = record_of_latents(tape, call)
    with torch.no_grad(), cached(tape.pipeline.transformer, FORECASTS[3]) as controller:
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
    memories = {
        ("call 0", "ff"): (Memory((4, 2), (a, b), input=c, ratio=d), None),
        ("call 1", "ff"): (Memory((4,), (b,)), Memory((4,), (c,), input=a)),
    }
    layout, tensors = taken_apart(memories)
    assert len(tensors) == 7 and memories_of(layout, tensors) == memories
