"""The AccuQuant objective with a feature cache on: the rollout computes a few steps in full and forecasts the others.

The target stays full precision without a cache. A full step i writes its modules' outputs into the cache's state s_i,
from which the skipped steps up to the next full one are forecast, and from which that one's differences are taken:

    full     eps_i, s_i = F(i, x_i, s_before)        skipped     eps_j = G(j, x_j, s_i),   i < j < next.

So the loss reaches a full step by its own prediction and by its state. With cotangents c_j of the predictions (as in
`core.objective`) and w of the state,

    w_i = sum_{i < j < next} (dG_j / ds_i)' c_j + (dF_next / ds_i)' (c_next, w_next),

and the full step is differentiated against (c_i, w_i). With `identity` this is the paper's gradient where the features
of step i serve several steps: its cotangent is the sum of solver coefficient times forecast coefficient over them.
`exact` also carries the latents' cotangents and equals full back-propagation through rollout and cache.

Memory holds the graphs of one full and one skipped step, two states, and at most KEPT_BYTES of further states, whatever
M is: where the group's do not fit, they are made again from the latents of the full steps they come from (no other step
enters them).
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from accuquant.core.objective import (
    Gradient,
    Loss,
    group_errors,
    group_history,
    latent_cotangent,
    prediction_cotangent,
)
from accuquant.core.solver import LinearSolver

State = dict[tuple[str, ...], Tensor]
KEPT_BYTES = 1 << 30


class CachedDenoiser(Protocol):
    """A denoiser and its cache. States are tensors by name; an empty one is a cache that knows nothing."""

    history: int
    """Full steps before a full one that its state depends on."""

    def full(self, i: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Step i computed in full: guided prediction (B, C, H, W), and the state after it."""

    def skipped(self, i: int, x: Tensor, state: State) -> Tensor:
        """Step i forecast: guided prediction (B, C, H, W)."""


def cached_groups(full_steps: tuple[int, ...], num_steps: int, steps_per_group: int) -> list[tuple[int, int]]:
    """Cut T steps into groups that begin at full steps and have at least M steps; the last one may be shorter."""
    cuts = [0]
    for full in full_steps[1:]:
        if full - cuts[-1] >= steps_per_group:
            cuts.append(full)
    return list(itertools.pairwise((*cuts, num_steps)))


def cached_group_gradient(
    denoiser: CachedDenoiser,
    solver: LinearSolver,
    latents: Tensor,
    predictions: Tensor,
    start: int,
    stop: int,
    full_steps: tuple[int, ...],
    gradient: Gradient = "identity",
    loss: Loss = "terminal",
    variances: Tensor | None = None,
) -> float:
    """Add one group's gradient to ``.grad`` of what ``denoiser`` depends on, and return the loss.

    Args: as of `core.objective.group_gradient`; ``full_steps`` of the whole trajectory, ``start`` among them. States
    from before the group are made on full-precision latents, and are constants.
    """
    x, eps = group_history(solver, latents, predictions, start, stop)
    inside = [i for i in full_steps if start <= i < stop]
    with torch.no_grad():
        at_start = _state_before(denoiser, full_steps, start, latents, x)
        kept = _roll(denoiser, solver, x, eps, at_start, start, stop, full_steps)
    value, error = group_errors(x, latents, start, stop, loss)

    follows = gradient == "exact"
    v: dict[int, Tensor] = {stop: error[stop]}  # v[k] = dL/dx~_k as the chosen mode sees it
    carried: State = {}  # w of the segment's state, from the full step after it
    for full, after in reversed(list(itertools.pairwise((*inside, stop)))):
        with torch.no_grad():
            before = kept.pop(full) if full in kept else _state_before(denoiser, full_steps, full, latents, x)
        before = {key: t.detach().requires_grad_(full > start) for key, t in before.items()}
        latent = x[full].detach().requires_grad_(follows and full > start)
        prediction, state = denoiser.full(full, latent, before)
        leaves = {key: t.detach().requires_grad_() for key, t in state.items()}

        for j in reversed(range(full + 1, after)):
            skipped_latent = x[j].detach().requires_grad_(follows)
            forecast = denoiser.skipped(j, skipped_latent, leaves)
            _backward([forecast], [prediction_cotangent(solver, v, j, stop)])
            v[j] = latent_cotangent(gradient, solver, v, error, skipped_latent, j, stop, variances)

        cotangents = {key: leaf.grad for key, leaf in leaves.items()}
        for key, more in carried.items():
            own = cotangents.get(key)
            cotangents[key] = more if own is None else own + more
        reached = {k: c for k, c in cotangents.items() if c is not None}
        _backward(
            [prediction, *(state[key] for key in reached)],
            [prediction_cotangent(solver, v, full, stop), *reached.values()],
        )
        carried = {key: t.grad for key, t in before.items() if t.grad is not None}
        if full > start:
            v[full] = latent_cotangent(gradient, solver, v, error, latent, full, stop, variances)
    return float(value)


def full_cached_gradient(
    denoiser: CachedDenoiser,
    solver: LinearSolver,
    latents: Tensor,
    predictions: Tensor,
    start: int,
    stop: int,
    full_steps: tuple[int, ...],
    loss: Loss = "terminal",
) -> float:
    """The same loss by plain back-propagation through rollout and cache; memory grows with M. The oracle."""
    x, eps = group_history(solver, latents, predictions, start, stop)
    with torch.no_grad():
        state = _state_before(denoiser, full_steps, start, latents, x)
    _roll(denoiser, solver, x, eps, state, start, stop, full_steps)
    value, _ = group_errors(x, latents, start, stop, loss)
    value.backward()
    return float(value.detach())


def _backward(outputs: list[Tensor], cotangents: list[Tensor]) -> None:
    """Into what is learned; where only forecasts learn, nothing before a full step does."""
    pairs = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [c for _, c in pairs])


def _roll(
    denoiser: CachedDenoiser,
    solver: LinearSolver,
    x: dict[int, Tensor],
    eps: dict[int, Tensor],
    state: State,
    start: int,
    stop: int,
    full_steps: tuple[int, ...],
) -> dict[int, State]:
    """Write the group's latents into ``x`` and its predictions into ``eps``; return the states that full steps find."""
    found, count = dict[int, State](), sum(start <= i < stop for i in full_steps)
    for i in range(start, stop):
        if i in full_steps:
            if i == start or (denoiser.history and count * sum(t.nbytes for t in state.values()) <= KEPT_BYTES):
                found[i] = state
            eps[i], state = denoiser.full(i, x[i], state)
        else:
            eps[i] = denoiser.skipped(i, x[i], state)
        x[i + 1] = solver.step(i, x, eps)
    return found


def _state_before(
    denoiser: CachedDenoiser, full_steps: tuple[int, ...], step: int, latents: Tensor, x: dict[int, Tensor]
) -> State:
    """The state that full step ``step`` finds: of the group's own latents, or full precision's before the group."""
    state: State = {}
    for i in [i for i in full_steps if i < step][-denoiser.history :] if denoiser.history else []:
        _, state = denoiser.full(i, x.get(i, latents[i]), state)
    return state
