"""The AccuQuant objective: match a group of M denoising steps at its end, in the memory of one step.

Full precision gives the latents x_s ... x_e of a group (e = s + M). The quantized model starts from the same x_s, runs
M steps to x~_e, and the loss compares the ends (AccuQuant, NeurIPS 2025, arXiv 2510.20348):

    L = ||x~_e - x_e||^2 / ||x_e - x_s||^2,         g = dL/dx~_e.

With the solver x_{i+1} = sum_j A_ij x_j + B_ij eps_j, the gradient in the weights is a sum over steps of the network's
own gradient against a cotangent c_i = sum_k B_ki v_{k+1}, where v_k = dL/dx~_k. Three ways to the v_k:

    identity   v_k = g                              the paper's approximation
    variance   v_k = sqrt(var_e / var_k) g          the same, scaled by how much a latent shrinks on the way
    exact      v_k = sum_i A_ik v_{i+1} + J_k' c_k  the true one, J_k = d eps_k / d x~_k

Each step's network is differentiated alone, from a latent that was kept from a rollout without gradient. So memory
holds one step's graph and M small latents, whatever M is. `exact` costs a backward pass into x at each step and equals
full back-propagation to rounding error: it is a mode and the test oracle's counterpart.

`dense` compares the trajectories after every step of the group: L = 1/M sum_k ||x~_k - x_k||^2 / ||x_e - x_s||^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from accuquant.core.solver import LinearSolver

Gradient = Literal["identity", "variance", "exact"]
Loss = Literal["terminal", "dense"]
Denoise = Callable[[int, Tensor], Tensor]
"""(step index, latent (B, C, H, W)) -> guided prediction eps (B, C, H, W), differentiable in weights and latent."""


def group_gradient(
    denoise: Denoise,
    solver: LinearSolver,
    latents: Tensor,
    predictions: Tensor,
    start: int,
    stop: int,
    gradient: Gradient = "identity",
    loss: Loss = "terminal",
    variances: Tensor | None = None,
    initial: Tensor | None = None,
) -> float:
    """Add one group's gradient to ``.grad`` of whatever ``denoise`` depends on, and return the loss.

    Args:
        latents: (T + 1, B, C, H, W), the full-precision trajectory.
        predictions: (T, B, C, H, W), its guided predictions; read only for the history of multistep solvers.
        start, stop: the group is steps start ... stop - 1, M = stop - start.
        variances: (T + 1,) marginal variance of the latents, needed by ``gradient="variance"``.
        initial: (B, C, H, W) latent to start from instead of ``latents[start]``.
    """
    x, eps = group_history(solver, latents, predictions, start, stop)
    if initial is not None:
        x[start] = initial
    with torch.no_grad():  # all but the last step; that one's graph is needed at once
        for i in range(start, stop - 1):
            eps[i] = denoise(i, x[i])
            x[i + 1] = solver.step(i, x, eps)

    last_latent = x[stop - 1].detach().requires_grad_(gradient == "exact" and stop - 1 > start)
    last = denoise(stop - 1, last_latent)
    eps[stop - 1] = last.detach()
    x[stop] = solver.step(stop - 1, x, eps)
    value, error = group_errors(x, latents, start, stop, loss)

    # v[k] = dL/dx~_k as the chosen mode sees it
    v: dict[int, Tensor] = {stop: error[stop]}
    for i in reversed(range(start, stop)):
        cotangent = prediction_cotangent(solver, v, i, stop)
        if i == stop - 1:
            latent, prediction = last_latent, last
        else:
            latent = x[i].detach().requires_grad_(gradient == "exact" and i > start)
            prediction = denoise(i, latent)
        torch.autograd.backward([prediction], [cotangent])  # frees this step's graph
        if i > start:
            v[i] = latent_cotangent(gradient, solver, v, error, latent, i, stop, variances)
    return float(value.detach())


def prediction_cotangent(solver: LinearSolver, v: dict[int, Tensor], i: int, stop: int) -> Tensor:
    """c_i = sum_k B_ki v_{k+1}: what the group's loss wants of the prediction at step i."""
    cotangent = torch.zeros_like(v[stop])
    for k in range(i, stop):
        if solver.B[k, i] != 0:
            cotangent += float(solver.B[k, i]) * v[k + 1]
    return cotangent


def latent_cotangent(
    gradient: Gradient,
    solver: LinearSolver,
    v: dict[int, Tensor],
    error: dict[int, Tensor],
    latent: Tensor,
    i: int,
    stop: int,
    variances: Tensor | None,
) -> Tensor:
    """v_i from the v of later latents; ``error[k]`` is the loss's own gradient at latent k."""
    if gradient == "identity":
        passed = v[i + 1]
    elif gradient == "variance":
        if variances is None:
            raise ValueError("gradient='variance' needs the latents' variances")
        passed = float((variances[i + 1] / variances[i]).sqrt()) * v[i + 1]
    else:
        if latent.grad is None:
            raise RuntimeError(f"the prediction of step {i} does not depend on its latent")
        passed = latent.grad.clone()
        for k in range(i, stop):
            if solver.A[k, i] != 0:
                passed += float(solver.A[k, i]) * v[k + 1]
    return passed + error[i] if i in error else passed


def full_gradient(
    denoise: Denoise,
    solver: LinearSolver,
    latents: Tensor,
    predictions: Tensor,
    start: int,
    stop: int,
    loss: Loss = "terminal",
) -> float:
    """The same loss by plain back-propagation through all M steps; memory grows with M. Oracle and baseline."""
    x, eps = group_history(solver, latents, predictions, start, stop)
    for i in range(start, stop):
        eps[i] = denoise(i, x[i])
        x[i + 1] = solver.step(i, x, eps)
    value, _ = group_errors(x, latents, start, stop, loss)
    value.backward()
    return float(value.detach())


def group_history(
    solver: LinearSolver, latents: Tensor, predictions: Tensor, start: int, stop: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Full-precision latents and predictions that the group's updates read, the group's first latent among them."""
    read = {j for i in range(start, stop) for j in solver.terms(i) if j < start}
    return {j: latents[j] for j in read | {start}}, {j: predictions[j] for j in read}


def _displacement(latents: Tensor, start: int, stop: int) -> Tensor:
    """||x_e - x_s||^2 over the batch: groups that move the latent far and groups that do not then weigh alike."""
    return (latents[stop] - latents[start]).square().sum().clamp_min(1e-12)


def group_errors(
    x: dict[int, Tensor], latents: Tensor, start: int, stop: int, loss: Loss
) -> tuple[Tensor, dict[int, Tensor]]:
    """Loss value and its own gradient at each compared latent."""
    compared = list(range(start + 1, stop + 1)) if loss == "dense" else [stop]
    norm = _displacement(latents, start, stop) * len(compared)
    difference = {k: x[k] - latents[k] for k in compared}
    value = torch.stack([d.square().sum() for d in difference.values()]).sum() / norm
    return value, {k: 2 * d / norm for k, d in difference.items()}


def groups(num_steps: int, steps_per_group: int) -> list[tuple[int, int]]:
    """Cut T steps into consecutive groups of M (start, stop); the last one is shorter when M does not divide T."""
    return [(s, min(s + steps_per_group, num_steps)) for s in range(0, num_steps, steps_per_group)]
