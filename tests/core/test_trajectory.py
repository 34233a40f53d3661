"""The group's gradient over states: `exact` is full back-propagation, the others are what they say they are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from accuquant.core.trajectory import Gradient, Loss, State, full_gradient, group_errors, group_gradient, groups

STEPS = 6


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
            features = (feature, slope)
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
        own = errors.get(i, tuple(0.0 for _ in shrink))
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
    toy = Toy()
    states = reference(toy)
    elsewhere = State(tuple(t + 0.1 for t in states[2].latents), states[2].history, states[2].features)
    moved = group_gradient(toy, states, 2, 4, initial=elsewhere)
    gradients(toy)
    assert moved != group_gradient(toy, states, 2, 4)


def test_variance_needs_variances() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="variances"):
        group_gradient(toy, reference(toy), 0, 2, "variance")


def test_groups() -> None:
    assert groups(7, 3) == [(0, 3), (3, 6), (6, 7)]
