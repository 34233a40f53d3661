"""The group gradient against full back-propagation, on a real DiT with guidance, in float64."""

from __future__ import annotations

import pytest
import torch
from pipelines import make_pipeline
from torch import Tensor

from accuquant.calibration.layers import quantize_model
from accuquant.core.objective import Gradient, Loss, full_gradient, group_gradient, groups
from accuquant.pipeline.loading import set_scheduler
from accuquant.model.rollout import Rollout
from accuquant.recipe import Sampling
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

STEPS = 8


class Problem:
    """A quantized random DiT and its full-precision trajectory, all in float64."""

    def __init__(self, scheduler: str, learned_variance: bool = True) -> None:
        pipeline = make_pipeline(learned_variance=learned_variance, dtype=torch.float64)
        set_scheduler(pipeline, scheduler)
        self.rollout = Rollout(pipeline, Sampling(num_inference_steps=STEPS, guidance_scale=1.5))
        self.conditions = self.rollout.conditions([1, 2, 3], [1, 2, 3])
        self.latents, self.predictions = self.rollout.trajectory(self.conditions)
        assert self.latents.dtype == torch.float64
        clock = StepClock.from_timesteps(self.rollout.timesteps, 4)
        names = [
            n
            for n, m in pipeline.transformer.named_modules()
            if isinstance(m, torch.nn.Linear) and (".attn1." in n or ".ff." in n)
        ]
        specs = {
            n: LayerSpec(
                "int4",
                "int6" if k % 2 else "int8",
                activation_scale="static" if k % 3 else "dynamic",
                activation_symmetric=not k % 3,
            )
            for k, n in enumerate(names)
        }
        for p in pipeline.transformer.parameters():
            p.requires_grad_(False)
        self.layers = quantize_model(pipeline.transformer, specs, clock, search=True)
        for layer in self.layers.values():
            if layer.spec.static:
                layer.set_activation_scale([torch.randn(2000, dtype=torch.float64) * 2] * clock.num_groups, search=True)
        self.parameters = [p for layer in self.layers.values() for p in layer.parameters()]

    def gradients(self, start: int, stop: int, mode: Gradient | None, loss: Loss = "terminal") -> tuple[float, Tensor]:
        for p in self.parameters:
            p.grad = None
        arguments = (
            lambda i, x: self.rollout.predict(i, x, self.conditions),
            self.rollout.solver,
            self.latents,
            self.predictions,
            start,
            stop,
        )
        if mode is None:
            value = full_gradient(*arguments, loss=loss)
        else:
            value = group_gradient(
                *arguments, gradient=mode, loss=loss, variances=self.latents.square().flatten(1).mean(1)
            )
        return value, torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        )


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("loss", ["terminal", "dense"])
def test_exact_equals_full_backpropagation(scheduler: str, loss: Loss) -> None:
    problem = Problem(scheduler)
    for start, stop in [(0, 1), (2, 5), (3, STEPS)]:
        expected_loss, expected = problem.gradients(start, stop, None, loss)
        found_loss, found = problem.gradients(start, stop, "exact", loss)
        assert found_loss == pytest.approx(expected_loss, rel=1e-12)
        assert expected.norm() > 0
        assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_one_step_is_exact_in_every_mode() -> None:
    problem = Problem("DDIMScheduler")
    _, expected = problem.gradients(4, 5, None)
    for mode in ("identity", "variance", "exact"):
        _, found = problem.gradients(4, 5, mode)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-18)


def test_identity_weighs_a_step_by_b_alone() -> None:
    """Each step's cotangent is b_i g: the network's own gradients, summed with these weights, give the same.

    Detaching only the network's input would put prod a_j on early steps instead.
    """
    problem = Problem("DDIMScheduler")
    start, stop = 1, 5
    solver, rollout = problem.rollout.solver, problem.rollout
    x = problem.latents[start]
    xs = []
    with torch.no_grad():
        for i in range(start, stop):
            xs.append(x)
            x = float(solver.A[i, i]) * x + float(solver.B[i, i]) * rollout.predict(i, x, problem.conditions)
    norm = (problem.latents[stop] - problem.latents[start]).square().sum()
    g = 2 * (x - problem.latents[stop]) / norm
    for p in problem.parameters:
        p.grad = None
    for i, latent in zip(range(start, stop), xs, strict=True):
        (rollout.predict(i, latent, problem.conditions) * float(solver.B[i, i]) * g).sum().backward()
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in problem.parameters])
    _, found = problem.gradients(start, stop, "identity")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    weight_of_trap = float(torch.stack([solver.A[i, i] for i in range(start + 1, stop)]).prod())
    assert abs(weight_of_trap - 1) > 0.05  # or this test would not tell the two apart


def test_variance_mode_scales_identity_for_two_steps() -> None:
    """With M = 2 the variance mode differs from identity only in the first step's factor sqrt(v_e / v_1)."""
    problem = Problem("DDIMScheduler")
    variances = problem.latents.square().flatten(1).mean(1)
    _, identity = problem.gradients(2, 4, "identity")
    _, variance = problem.gradients(2, 4, "variance")
    factor = float((variances[4] / variances[3]).sqrt())
    # identity = first + last, variance = factor * first + last
    first = (variance - identity) / (factor - 1)
    last = identity - first
    _, alone = problem.gradients(3, 4, "identity")
    assert float(torch.nn.functional.cosine_similarity(last, alone, dim=0)) > 0.5
    assert float((variance - (factor * first + last)).norm()) < 1e-9 * float(identity.norm())


def test_memory_of_the_gradient_does_not_grow_with_steps() -> None:
    """Live saved-for-backward bytes peak at the same value for M = 2 and M = 8; full back-propagation grows."""
    problem = Problem("DDIMScheduler")

    def peak(mode: Gradient | None, stop: int) -> int:
        live, highest = 0, 0

        def pack(t: Tensor) -> tuple[Tensor, object]:
            nonlocal live, highest
            size = t.numel() * t.element_size()
            live += size
            highest = max(highest, live)

            class Token:
                def __del__(self) -> None:
                    nonlocal live
                    live -= size

            return t, Token()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda pair: pair[0]):
            problem.gradients(0, stop, mode)
        return highest

    for mode in ("identity", "variance", "exact"):
        assert peak(mode, 8) <= 1.02 * peak(mode, 2)
    assert peak(None, 8) > 3.5 * peak(None, 2)


def test_groups_cover_every_step_once() -> None:
    assert groups(50, 5)[-1] == (45, 50) and len(groups(50, 5)) == 10
    assert groups(7, 3) == [(0, 3), (3, 6), (6, 7)]
