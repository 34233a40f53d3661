"""The AccuQuant objective: match a group of M denoising steps at its end, in the memory of one step.

Full precision gives the latents x_s ... x_e of a group (e = s + M). The quantized model starts from the same x_s, makes
M steps to x~_e, and the loss compares the ends (AccuQuant, NeurIPS 2025, arXiv 2510.20348):

    L = ||x~_e - x_e||^2 / ||x_e - x_s||^2.

A step maps a state to the next one: latents, the solver's history, and with a cache on the features that it keeps. The
group is run once without gradient and its states are kept. Walking back, one step at a time is run again from its kept
state and differentiated against the cotangent of the state after it, which gives that of the state before it. So memory
holds one step's graph and the states, whatever M is. History and features are always followed exactly; three ways for
the latents' cotangent v_i:

    identity   v_i = v_{i+1}                            the paper's approximation
    variance   v_i = sqrt(var_{i+1} / var_i) v_{i+1}    the same, scaled by how much a latent shrinks on the way
    exact      v_i = what the step's own graph gives    equal to full back-propagation

`dense` compares the latents after every step of the group: L = 1/M sum_k ||x~_k - x_k||^2 / ||x_e - x_s||^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Gradient = Literal["identity", "variance", "exact"]
Loss = Literal["terminal", "dense"]


@dataclass(frozen=True)
class State:
    """What crosses the boundary between two steps.

    Attributes:
        latents: one tensor, or one for each modality.
        history: what the solver uses of earlier steps beside them.
        features: what a feature cache keeps of them; the same tensors until a step computes new ones.
    """

    latents: tuple[Tensor, ...]
    history: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.latents + self.history + self.features


StepFunction = Callable[[int, State], State]
"""(i, state before step i) -> state after it; differentiable in the weights and in the state."""


def group_gradient(
    step: StepFunction,
    reference: Sequence[State],
    start: int,
    stop: int,
    gradient: Gradient = "identity",
    loss: Loss = "terminal",
    variances: Sequence[Tensor] | None = None,
    initial: State | None = None,
    scale: float = 1.0,
) -> float:
    """Add one group's gradient to ``.grad`` of whatever ``step`` depends on, and return the loss.

    Args:
        reference: full precision's states, T + 1 of them.
        start, stop: the group is steps start ... stop - 1, M = stop - start.
        variances: for each latent of a state its marginal variance (T + 1,), needed by ``gradient="variance"``.
        initial: the state to start from instead of ``reference[start]``.
        scale: what is added is the gradient times this; the share of one element is too small for float16.
    """
    if gradient == "variance" and variances is None:
        raise ValueError("gradient='variance' needs the latents' variances")
    states = {start: reference[start] if initial is None else initial}
    with torch.no_grad():  # all but the last step; that one's graph is needed at once
        for i in range(start, stop - 1):
            states[i + 1] = step(i, states[i])

    before = _leaves(states[stop - 1], gradient, stop - 1 > start)
    after = step(stop - 1, before)
    states[stop] = _detached(after)
    value, errors = group_errors(states, reference, start, stop, loss)

    errors = {k: tuple(scale * error for error in of) for k, of in errors.items()}
    cotangents: list[Tensor | None] = [*errors[stop], *(None for _ in after.history + after.features)]
    for i in reversed(range(start, stop)):
        if i < stop - 1:
            before = _leaves(states[i], gradient, i > start)
            after = step(i, before)
        _backward(after.tensors, cotangents)  # frees this step's graph
        del after
        if i > start:
            passed = [t.grad for t in before.tensors]
            for k in range(len(before.latents)):
                if gradient != "exact":
                    later = cotangents[k]
                    assert later is not None
                    shrunk = 1.0 if variances is None or gradient == "identity" else _shrink(variances[k], i)
                    passed[k] = shrunk * later
                if i in errors:
                    own = passed[k]
                    passed[k] = errors[i][k] if own is None else own + errors[i][k].to(own.dtype)
            cotangents = passed
        states.pop(i + 1)
    return float(value)


def full_gradient(
    step: StepFunction, reference: Sequence[State], start: int, stop: int, loss: Loss = "terminal"
) -> float:
    """The same loss by plain back-propagation through all M steps; memory grows with M. Oracle and baseline."""
    states = {start: reference[start]}
    for i in range(start, stop):
        states[i + 1] = step(i, states[i])
    value, _ = group_errors(states, reference, start, stop, loss)
    value.backward()
    return float(value.detach())


def group_errors(
    states: dict[int, State], reference: Sequence[State], start: int, stop: int, loss: Loss
) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
    """Loss value, and its own gradient at the latents of each compared state.

    The squared displacement of the latents over the batch is the unit: groups that move the latents far and groups that
    do not then weigh alike. Several latents weigh by their own displacements.
    """
    compared = list(range(start + 1, stop + 1)) if loss == "dense" else [stop]
    ends = zip(reference[stop].latents, reference[start].latents, strict=True)
    count = len(reference[stop].latents)
    norms = [(wide(e) - wide(s)).square().sum().clamp_min(1e-12) * len(compared) * count for e, s in ends]
    values, errors = [], {}
    for k in compared:
        differences = [wide(a) - wide(b) for a, b in zip(states[k].latents, reference[k].latents, strict=True)]
        values += [d.square().sum() / norm for d, norm in zip(differences, norms, strict=True)]
        errors[k] = tuple(2 * d / norm for d, norm in zip(differences, norms, strict=True))
    return torch.stack(values).sum(), errors


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: the squares of a batch of latents, summed, are too large for float16."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def groups(num_steps: int, steps_per_group: int) -> list[tuple[int, int]]:
    """Cut T steps into consecutive groups of M (start, stop); the last one is shorter when M does not divide T."""
    return [(s, min(s + steps_per_group, num_steps)) for s in range(0, num_steps, steps_per_group)]


def cached_groups(full_steps: Sequence[int], num_steps: int, steps_per_group: int) -> list[tuple[int, int]]:
    """Cut T steps into groups that begin at full steps and have at least M steps; the last one may be shorter."""
    cuts = [0]
    for full in full_steps[1:]:
        if full - cuts[-1] >= steps_per_group:
            cuts.append(full)
    return list(itertools.pairwise((*cuts, num_steps)))


def _shrink(variances: Tensor, i: int) -> float:
    return float((variances[i + 1] / variances[i]).sqrt())


def _leaves(state: State, gradient: Gradient, follows: bool) -> State:
    """The state as leaves of a graph: history and features are followed, latents where the mode is exact."""

    def leaf(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.detach().requires_grad_(wanted and follows and tensor.is_floating_point())

    return State(
        tuple(leaf(t, gradient == "exact") for t in state.latents),
        tuple(leaf(t, True) for t in state.history),
        tuple(leaf(t, True) for t in state.features),
    )


def _detached(state: State) -> State:
    history, features = (tuple(t.detach() for t in group) for group in (state.history, state.features))
    return State(tuple(t.detach() for t in state.latents), history, features)


def _backward(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> None:
    """Into weights and leaves; an output that nothing learned enters has no graph."""
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
