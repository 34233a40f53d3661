"""The gradient of calibration with the cache on equals back-propagation through rollout and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from pipelines import make_pipeline
from torch import Tensor

from accuquant.calibration.layers import quantize_model
from accuquant.calibration.objectives.cached_steps import CachedSteps
from accuquant.core.cached_objective import cached_group_gradient, cached_groups, full_cached_gradient
from accuquant.core.objective import group_gradient
from accuquant.model.rollout import Conditions, Rollout
from accuquant.recipe import Cache, Sampling
from accuquant.runtime.cache.hooks import cached
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


def setting(scheduler: Any = None) -> tuple[Rollout, Conditions, Tensor, Tensor, list[Tensor]]:
    """A quantized DiT in float64 with guidance: rollout, conditions, full-precision trajectory, trained parameters."""
    pipeline = make_pipeline(dtype=torch.float64)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    rollout = Rollout(pipeline, Sampling(num_inference_steps=12, guidance_scale=1.5))
    conditions = rollout.conditions([1, 2], [5, 6])
    conditions = Conditions(conditions.noise.double(), conditions.kwargs)
    latents, predictions = rollout.trajectory(conditions)
    names = [
        n
        for n, m in rollout.denoiser.named_modules()
        if isinstance(m, torch.nn.Linear) and (".attn1." in n or ".ff." in n)
    ]
    clock = StepClock.from_timesteps(rollout.timesteps, 3)
    layers = quantize_model(rollout.denoiser, dict.fromkeys(names, LayerSpec("int4", "float")), clock, True)
    rollout.denoiser.double()
    for parameter in rollout.denoiser.parameters():
        parameter.requires_grad_(False)
    weights = [w for layer in layers.values() if (w := layer.learnable("weight")) is not None]
    for weight in weights:
        weight.requires_grad_(True)
    return rollout, conditions, latents, predictions, weights


def taken(weights: list[Tensor]) -> Tensor:
    """All gradients in a row, and clear them."""
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    for weight in weights:
        weight.grad = None
    return flat


@pytest.mark.parametrize("config", FORECASTS, ids=lambda c: f"{c.estimation}-{c.order}-{c.differences}-{c.norm}")
@pytest.mark.parametrize("loss", ["terminal", "dense"])
def test_exact_equals_full_back_propagation_through_the_cache(config: Cache, loss: Any) -> None:
    rollout, conditions, latents, predictions, weights = setting()
    for start, stop in ((0, 12), (1, 9), (4, 12), (6, 9)):
        with cached(rollout.denoiser, config) as controller:
            steps = CachedSteps(rollout, controller, conditions, STEPS)
            args = (steps, rollout.solver, latents, predictions, start, stop, STEPS)
            ours = cached_group_gradient(*args, gradient="exact", loss=loss)
            gradient = taken(weights)
            theirs = full_cached_gradient(*args, loss=loss)
            expected = taken(weights)
        assert ours == pytest.approx(theirs, rel=1e-12)
        assert expected.norm() > 0
        assert (gradient - expected).norm() / expected.norm() < 1e-10


def test_it_holds_for_a_multistep_solver() -> None:
    rollout, conditions, latents, predictions, weights = setting(DPMSolverMultistepScheduler)
    with cached(rollout.denoiser, FORECASTS[4]) as controller:
        steps = CachedSteps(rollout, controller, conditions, STEPS)
        args = (steps, rollout.solver, latents, predictions, 1, 9, STEPS)
        cached_group_gradient(*args, gradient="exact")
        gradient = taken(weights)
        full_cached_gradient(*args)
        expected = taken(weights)
    assert (gradient - expected).norm() / expected.norm() < 1e-10


@pytest.mark.parametrize("gradient", ["identity", "variance", "exact"])
def test_with_every_step_full_it_is_the_uncached_objective(gradient: Any) -> None:
    rollout, conditions, latents, predictions, weights = setting()
    variances = latents.square().flatten(1).mean(1)
    everything = tuple(range(12))
    how: dict[str, Any] = {"gradient": gradient, "variances": variances}
    with cached(rollout.denoiser, Cache(schedule=everything, order=1)) as controller:
        steps = CachedSteps(rollout, controller, conditions, everything)
        ours = cached_group_gradient(steps, rollout.solver, latents, predictions, 2, 6, everything, **how)
    found = taken(weights)
    theirs = group_gradient(
        lambda i, x: rollout.predict(i, x, conditions), rollout.solver, latents, predictions, 2, 6, **how
    )
    expected = taken(weights)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert (found - expected).norm() / expected.norm() < 1e-12


def test_identity_gives_a_full_step_the_sum_over_the_steps_it_serves() -> None:
    """Order 0, one group from one full step: the gradient is that of sum_j c_j eps_j with every latent held fixed."""
    rollout, conditions, latents, predictions, weights = setting()
    config = FORECASTS[0]
    with cached(rollout.denoiser, config) as controller:
        steps = CachedSteps(rollout, controller, conditions, STEPS)
        cached_group_gradient(steps, rollout.solver, latents, predictions, 1, 4, STEPS)
        found = taken(weights)

        x, eps, state = {1: latents[1]}, dict[int, Tensor](), {}
        for i in (1, 2, 3):
            if i == 1:
                eps[1], state = steps.full(1, x[1], state)
            else:
                eps[i] = steps.skipped(i, x[i].detach(), state)
            x[i + 1] = rollout.solver.step(i, x, eps).detach()
        end = 2 * (x[4] - latents[4]) / (latents[4] - latents[1]).square().sum()
        sum((float(rollout.solver.B[i, i]) * end * eps[i]).sum() for i in (1, 2, 3)).backward()  # type: ignore[union-attr]
        expected = taken(weights)
    assert (found - expected).norm() / expected.norm() < 1e-10


def test_driven_steps_are_those_of_the_cached_trajectory() -> None:
    rollout, conditions, *_ = setting()
    for config in FORECASTS:
        with cached(rollout.denoiser, config):
            latents, predictions = rollout.trajectory(conditions)
        with cached(rollout.denoiser, config) as controller, torch.no_grad():
            steps, state = CachedSteps(rollout, controller, conditions, STEPS), {}
            for i in range(12):
                if i in STEPS:
                    prediction, state = steps.full(i, latents[i], state)
                else:
                    prediction = steps.skipped(i, latents[i], state)
                assert torch.equal(prediction, predictions[i])


@pytest.mark.parametrize("m", [1, 2, 3, 5, 12])
def test_groups_begin_at_full_steps_and_cover_all(m: int) -> None:
    cut = cached_groups(STEPS, 12, m)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == 12
    assert all(start in STEPS for start, _ in cut)
    assert all(stop - start >= m for start, stop in cut[:-1])


def test_memory_does_not_grow_with_the_group() -> None:
    """Most bytes that autograd keeps at once: as many for six segments as for two, unlike the oracle."""

    def peak(run: Any) -> int:
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

    rollout, conditions, latents, predictions, weights = setting()
    found: dict[tuple[str, int], int] = {}
    everything = (0, 2, 4, 6, 8, 10)
    with cached(rollout.denoiser, Cache(schedule=everything, order=1)) as controller:
        steps = CachedSteps(rollout, controller, conditions, everything)
        for stop in (4, 12):
            args = (steps, rollout.solver, latents, predictions, 0, stop, everything)
            found["ours", stop] = peak(lambda args=args: cached_group_gradient(*args, gradient="exact"))  # type: ignore[misc]
            found["full", stop] = peak(lambda args=args: full_cached_gradient(*args))  # type: ignore[misc]
            taken(weights)
    assert found["ours", 12] < 1.1 * found["ours", 4]
    assert found["full", 12] > 2 * found["full", 4]
