"""The group's gradient over states: `exact` is full back-propagation, the others are what they say they are.

On a toy with all that a state can hold, and on the tape of a real DiT with guidance; in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from pipelines import make_pipeline
from torch import Tensor, nn

from accuquant.calibration.layers import quantize_model
from accuquant.calibration.reference import states_of
from accuquant.core.trajectory import Gradient, Loss, State, full_gradient, group_errors, group_gradient, groups
from accuquant.pipeline.loading import set_scheduler
from accuquant.pipeline.record import record
from accuquant.runtime.clock import StepClock
from accuquant.runtime.observe import observed
from accuquant.runtime.spec import LayerSpec

STEPS = 6
DIT_STEPS = 8


class Toy(nn.Module):
    """Two latents, a solver that remembers the last prediction and the latent before, a cache that forecasts.

    Steps 0, 2 and 5 compute features in full, the others use what is kept.
    """

    def __init__(self, clips: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: nn.Parameter(0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.inner, self.outer, self.slope = draw(6, 6), draw(6, 6), draw(3)
        self.clips = clips

    def forward(self, i: int, state: State) -> State:
        x = torch.cat([state.latents[0], state.latents[1].flatten(1)], dim=1)
        if i in (0, 2, 5):
            feature = torch.tanh(x @ self.inner + 0.3 * i)
            slope = feature - state.features[0] if state.features else torch.zeros_like(feature)
            features: tuple[Tensor, ...] = (feature, slope)
            used = feature
        else:
            features = state.features
            used = features[0] + self.slope[i % 3] * features[1]
        prediction = torch.sin(used @ self.outer) + 0.1 * x
        former, earlier = state.history if state.history else (prediction, x)
        moved = 0.9 * x + 0.3 * prediction - 0.1 * former + 0.05 * earlier  # multistep, and not linear when it clips
        if self.clips:
            moved = moved.clamp(-0.8, 0.8) / moved.abs().amax(dim=1, keepdim=True).clamp_min(0.5)
        return State((moved[:, :4], moved[:, 4:].reshape(-1, 1, 2)), (prediction, x), features)


def reference(toy: Toy) -> list[State]:
    """What other weights give."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    states = [State((draw(3, 4), draw(3, 1, 2)))]
    other = Toy(toy.clips)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * draw(*parameter.shape))
        for i in range(STEPS):
            states.append(other(i, states[-1]))
    return states


def gradients(toy: Toy) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in toy.parameters()]
    toy.zero_grad()
    return found


def replaced(toy: Toy, states: Sequence[State], start: int, stop: int, gradient: Gradient, loss: Loss) -> list[Tensor]:
    """By autograd over the whole group, with the latents' Jacobian replaced: cut there, the cotangent put in."""
    variances = marginal(states)
    made, rolled = {start: states[start]}, {start: states[start]}
    for i in range(start, stop):
        given = State(tuple(t.detach() for t in made[i].latents), made[i].history, made[i].features)
        made[i + 1] = toy(i, given)
        rolled[i + 1] = State(tuple(t.detach() for t in made[i + 1].latents))
    _, errors = group_errors(rolled, states, start, stop, loss)
    v = {stop: errors[stop]}
    for i in reversed(range(start + 1, stop)):
        shrink = [float((s[i + 1] / s[i]).sqrt()) if gradient == "variance" else 1.0 for s in variances]
        own = errors.get(i, tuple(torch.zeros(()) for _ in shrink))
        v[i] = tuple(s * later + e for s, later, e in zip(shrink, v[i + 1], own, strict=True))
    pairs = [(x, c) for i in range(start + 1, stop + 1) for x, c in zip(made[i].latents, v[i], strict=True)]
    torch.stack([(x * c).sum() for x, c in pairs]).sum().backward()
    return gradients(toy)


def marginal(states: Sequence[State]) -> list[Tensor]:
    return [torch.stack([s.latents[k].square().mean() for s in states]) for k in range(2)]


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("loss", ["terminal", "dense"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 6), (2, 5), (2, 6), (5, 6)])
def test_exact_is_full_back_propagation(start: int, stop: int, loss: Loss, clips: bool) -> None:
    toy = Toy(clips)
    states = reference(toy)
    expected_value = full_gradient(toy, states, start, stop, loss)
    expected = gradients(toy)
    value = group_gradient(toy, states, start, stop, "exact", loss)
    assert value == pytest.approx(expected_value, rel=1e-12)
    assert sum(g.abs().sum() for g in expected) > 1e-3
    for a, b in zip(gradients(toy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("loss", ["terminal", "dense"])
@pytest.mark.parametrize("gradient", ["identity", "variance"])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5), (2, 6)])
def test_the_others_replace_the_latents_jacobian(
    start: int, stop: int, gradient: Gradient, loss: Loss, clips: bool
) -> None:
    toy = Toy(clips)
    states = reference(toy)
    expected = replaced(toy, states, start, stop, gradient, loss)
    group_gradient(toy, states, start, stop, gradient, loss, marginal(states))
    found = gradients(toy)
    full_gradient(toy, states, start, stop, loss)
    true = gradients(toy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert any((a - t).norm() > 1e-3 * t.norm() for a, t in zip(found, true, strict=True))  # they are approximations


def test_a_group_may_start_elsewhere() -> None:
    """Compared with the same end, in units of full precision's displacement."""
    toy = Toy()
    states = reference(toy)
    elsewhere = State(tuple(t + 0.1 for t in states[2].latents), states[2].history, states[2].features)
    end = toy(3, toy(2, elsewhere))
    trios = zip(end.latents, states[4].latents, states[2].latents, strict=True)
    value = torch.stack([(x - e).square().sum() / (e - s).square().sum() / 2 for x, e, s in trios]).sum()
    value.backward()
    expected, whole = gradients(toy), float(value.detach())
    assert group_gradient(toy, states, 2, 4, "exact", initial=elsewhere) == pytest.approx(whole, rel=1e-12)
    for a, b in zip(gradients(toy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert group_gradient(toy, states, 2, 4) != pytest.approx(whole, rel=1e-2)


def test_variance_needs_variances() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="variances"):
        group_gradient(toy, reference(toy), 0, 2, "variance")


def test_groups_cover_every_step_once() -> None:
    assert groups(50, 5)[-1] == (45, 50) and len(groups(50, 5)) == 10
    assert groups(7, 3) == [(0, 3), (3, 6), (6, 7)]


# ---- on the tape of a quantized DiT


class Problem:
    """A quantized random DiT and its full-precision tape, all in float64."""

    def __init__(self, scheduler: str) -> None:
        pipeline = make_pipeline(learned_variance=True, dtype=torch.float64)
        pipeline.vae.double()
        set_scheduler(pipeline, scheduler)
        self.network = pipeline.transformer
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
        call = {"class_labels": [1, 2, 3], "guidance_scale": 1.5, "num_inference_steps": DIT_STEPS}
        self.tape = record(pipeline, **call, generator=generators)
        self.reference = states_of(self.tape)
        assert self.reference[-1].latents[0].dtype == torch.float64
        self.variances = [torch.stack([state.latents[0].square().mean() for state in self.reference])]
        pipeline.scheduler.set_timesteps(DIT_STEPS)
        clock = StepClock.from_timesteps(pipeline.scheduler.timesteps, 4)
        names = [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and (".attn1." in name or ".ff." in name)
        ]
        specs = {
            name: LayerSpec(
                "int4",
                "int6" if k % 2 else "int8",
                activation_scale="static" if k % 3 else "dynamic",
                activation_symmetric=not k % 3,
            )
            for k, name in enumerate(names)
        }
        self.network.requires_grad_(False)
        layers = quantize_model(self.network, specs, clock, search=True)
        for layer in layers.values():
            if layer.spec.static:
                layer.set_activation_scale([torch.randn(2000, dtype=torch.float64) * 2] * clock.num_groups, search=True)
        self.parameters = [p for layer in layers.values() for p in layer.parameters()]

    def gradients(self, start: int, stop: int, mode: Gradient | None, loss: Loss = "terminal") -> tuple[float, Tensor]:
        """Of a group; without a mode by back-propagation through all of it."""
        self.taken()
        if mode is None:
            value = full_gradient(self.tape.step, self.reference, start, stop, loss)
        else:
            value = group_gradient(self.tape.step, self.reference, start, stop, mode, loss, self.variances)
        return value, self.taken()

    def taken(self) -> Tensor:
        """All gradients in a row, and clear them."""
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        return found

    def predicted(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What guidance makes of the network's output at a step, and the latents after it."""
        with observed(self.network, [""]) as seen:
            after = self.tape.step(i, State((latents,), self.reference[i].history))
        conditional, unconditional = seen[""].returned[0][:, :4].chunk(2)
        guided = unconditional + 1.5 * (conditional - unconditional)
        return torch.cat([guided, guided]), after.latents[0]

    def coefficients(self, i: int) -> tuple[float, float]:
        """DDIM's a and b of x' = a x + b eps at a step, as the scheduler itself computes them."""
        scheduler, zero = self.tape.pipeline.scheduler, torch.zeros(1, dtype=torch.float64)
        scheduler.set_timesteps(DIT_STEPS)
        t = scheduler.timesteps[i]
        a, b = (float(scheduler.step(eps, t, x).prev_sample) for eps, x in ((zero, zero + 1), (zero + 1, zero)))
        return a, b


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("loss", ["terminal", "dense"])
def test_exact_is_full_back_propagation_through_a_quantized_dit(scheduler: str, loss: Loss) -> None:
    problem = Problem(scheduler)
    for start, stop in [(0, 1), (2, 5), (3, DIT_STEPS)]:
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


def test_ddim_steps_are_the_closed_form() -> None:
    problem = Problem("DDIMScheduler")
    scheduler = problem.tape.pipeline.scheduler
    scheduler.set_timesteps(DIT_STEPS)
    for i, t in enumerate(scheduler.timesteps):
        at, previous = scheduler.alphas_cumprod[t].double(), int(t) - 1000 // DIT_STEPS
        after = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        scale = float((after.double() / at).sqrt())
        weight = float((1 - after.double()).sqrt() - (after.double() * (1 - at) / at).sqrt())
        a, b = problem.coefficients(i)
        assert a == pytest.approx(scale, rel=1e-5) and b == pytest.approx(weight, rel=1e-4, abs=1e-6)
        x = problem.reference[i].latents[0]
        with torch.no_grad():
            eps, found = problem.predicted(i, x)
        torch.testing.assert_close(found, scale * x + weight * eps, rtol=1e-5, atol=1e-5)


def test_identity_weighs_a_step_by_b_alone() -> None:
    """Each step's cotangent is b_i g: the network's own gradients, summed with these weights, give the same.

    Detaching only the network's input would put prod a_j on early steps instead.
    """
    problem = Problem("DDIMScheduler")
    start, stop = 1, 5
    target, x = problem.reference[stop].latents[0], problem.reference[start].latents[0]
    norm, xs = (target - x).square().sum(), dict[int, Tensor]()
    with torch.no_grad():
        for i in range(start, stop):
            xs[i] = x
            a, b = problem.coefficients(i)
            x = a * x + b * problem.predicted(i, x)[0]
    g = 2 * (x - target) / norm
    problem.taken()
    for i, latents in xs.items():
        (problem.predicted(i, latents)[0] * problem.coefficients(i)[1] * g).sum().backward()
    expected = problem.taken()
    _, found = problem.gradients(start, stop, "identity")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    weight_of_trap = math.prod(problem.coefficients(i)[0] for i in range(start + 1, stop))
    assert abs(weight_of_trap - 1) > 0.05  # or this test would not tell the two apart


def test_variance_mode_scales_identity_for_two_steps() -> None:
    """With M = 2 the variance mode differs from identity only in the first step's factor sqrt(v_e / v_1)."""
    problem = Problem("DDIMScheduler")
    _, identity = problem.gradients(2, 4, "identity")
    _, variance = problem.gradients(2, 4, "variance")
    factor = float((problem.variances[0][4] / problem.variances[0][3]).sqrt())
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
