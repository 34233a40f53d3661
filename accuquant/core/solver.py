"""A sampler's update as a table of numbers.

Every solver handled here is linear in the latents and the predictions seen so far (DDIM, DPM-Solver++ multistep with
its history, Euler for noise and flow models):

    x_{i+1} = sum_{j <= i} A[i, j] x_j + B[i, j] eps_j.

The table is not transcribed from papers but probed: the scheduler itself is run once on basis vectors, so whatever
prediction type, spacing or order it is configured with is what we differentiate through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[int, Tensor, Tensor], Tensor]


class NotLinear(ValueError):
    """The scheduler's update is not a fixed linear map of latents and predictions."""


@dataclass(frozen=True)
class LinearSolver:
    """Coefficients of a trajectory of T steps; ``A`` and ``B`` are (T, T) float64, lower triangular."""

    A: Tensor
    B: Tensor

    @property
    def num_steps(self) -> int:
        return self.A.shape[0]

    def terms(self, i: int) -> list[int]:
        """Steps whose latent or prediction enters update ``i``; ``[i]`` alone for one-step solvers."""
        used = (self.A[i] != 0) | (self.B[i] != 0)
        return [int(j) for j in used.nonzero().flatten()]

    def step(self, i: int, x: dict[int, Tensor], eps: dict[int, Tensor]) -> Tensor:
        """x_{i+1} from the latents and predictions of the steps named by `terms`."""
        total: Tensor | None = None
        for j in self.terms(i):
            for coefficient, value in ((self.A[i, j], x), (self.B[i, j], eps)):
                if coefficient != 0:
                    part = float(coefficient) * value[j]
                    total = part if total is None else total + part
        if total is None:
            raise NotLinear(f"step {i} does not depend on any latent or prediction")
        return total


def probe(make_step: Callable[[], Step], num_steps: int) -> LinearSolver:
    """Find the coefficients by running the scheduler on basis vectors.

    Args:
        make_step: gives a fresh ``step(i, eps, x) -> x_next`` (state reset), called with i = 0 ... num_steps - 1.

    Raises:
        NotLinear: the update has a constant part, is random, or bends with the size of its input (clipping).
    """
    basis = torch.eye(2 * num_steps, dtype=torch.float64)
    x, eps = basis[:num_steps], basis[num_steps:]
    step = make_step()
    # the basis lies in one flat sample, so that one pass of T steps reads every coefficient; the last entry is zero
    rows = torch.stack([step(i, _padded(eps[i]), _padded(x[i])).double().flatten() for i in range(num_steps)])
    if bool((rows[:, -1].abs() > 1e-6).any()):
        raise NotLinear("it adds a constant or random term")
    solver = LinearSolver(rows[:, :num_steps].clone(), rows[:, num_steps : 2 * num_steps].clone())
    for magnitude in (1e-2, 30.0):
        generator = torch.Generator().manual_seed(0)
        xs = magnitude * torch.randn(num_steps, 8, generator=generator, dtype=torch.float64)
        es = magnitude * torch.randn(num_steps, 8, generator=generator, dtype=torch.float64)
        step = make_step()
        found = torch.stack([step(i, _shaped(es[i]), _shaped(xs[i])).double().flatten() for i in range(num_steps)])
        expected = solver.A @ xs + solver.B @ es
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            raise NotLinear("its update changes with the size of the latents (clipping or thresholding), or is random")
    return solver


def _padded(row: Tensor) -> Tensor:
    return _shaped(torch.cat([row, row.new_zeros(1)]))


def _shaped(row: Tensor) -> Tensor:
    return row.view(1, 1, 1, -1)
