"""Forecasts of a cached module's output: Reuse (FORA), Taylor (TaylorSeer) and RFE (RFC). Pure math on tensors.

A full computation at step i calls `update` with the module's input I and output O; a skipped step calls `predict`.
Steps are counted upwards; k is the number of steps since the last full computation, N the gap between the last two.

    Reuse    O(i + k) = O(i)                                                  FORA, arXiv 2407.01425
    Taylor   O(i + k) = sum_{j <= m} k^j / j! D_j,  D_0 = O(i),
             D_{j+1} = (D_j - D_j at the full step before) / N                TaylorSeer, arXiv 2503.06923
    Newton   O(i + k) = the polynomial through the last m + 1 outputs         the same for m <= 1; exact at any gaps
    RFE      O(i + k) = O(i) + s ||I(i + k) - I(i)|| d / ||d||,
             s = ||O(i) - O(i - N)|| / ||I(i) - I(i - N)||, d = Taylor's change  RFC, arXiv 2602.19506, eq. for RFE

The paper leaves the scope of the norms open; ours is one norm for each sample, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Norm = Literal["sample", "token", "channel", "batch"]
Differences = Literal["taylor", "newton"]
TINY = 1e-20


@dataclass(frozen=True)
class Memory:
    """What one tensor's forecast keeps between full computations.

    Attributes:
        steps: of the full computations that the factors come from, newest first.
        factors: D_0 ... D_j (divided differences with ``newton``), each of the output's shape.
        input: of the last full computation; only RFE keeps it.
        ratio: s, one value for each norm; None until there were two full computations.
    """

    steps: tuple[int, ...]
    factors: tuple[Tensor, ...]
    input: Tensor | None = None
    ratio: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [*self.factors, *(t for t in (self.input, self.ratio) if t is not None)]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def restart(self) -> Memory:
        """The last output alone, without the history that led to it."""
        return Memory(self.steps[:1], self.factors[:1], self.input)


@final
@dataclass(frozen=True)
class Reuse:
    """Order 0: the last output again."""

    order: int = 0

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        return Memory((step,), (output,))

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        return memory.factors[0]


@final
@dataclass(frozen=True)
class Taylor:
    """Finite differences up to ``order``; the orders build up, one with each full computation."""

    order: int
    differences: Differences = "taylor"

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        return _difference(memory, step, output, self.order, self.differences)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        return memory.factors[0] + _change(memory, step, self.differences)


@final
@dataclass(frozen=True)
class RFE:
    """Direction from Taylor, magnitude from how far the input has moved. Plain Taylor until there is a ratio."""

    order: int
    differences: Differences = "taylor"
    norm: Norm = "sample"

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        found, ratio = _difference(memory, step, output, self.order, self.differences), None
        if memory is not None and memory.input is not None and len(found.factors) > 1:
            moved = norm_of(input - memory.input, self.norm)
            ratio = norm_of(output - memory.factors[0], self.norm) / moved  # inf or nan where the input stood still
        return Memory(found.steps, found.factors, input, ratio)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        change = _change(memory, step, self.differences)
        if memory.ratio is None or memory.input is None:
            return memory.factors[0] + change
        moved = norm_of(input - memory.input, self.norm)
        scale = memory.ratio * moved / norm_of(change, self.norm).clamp_min(TINY)
        scale = torch.where(memory.ratio.isfinite(), scale, 1.0)  # Taylor's change
        return memory.factors[0] + (scale * change).to(change.dtype)


Forecast = Reuse | Taylor | RFE


def norm_of(x: Tensor, scope: Norm) -> Tensor:
    """L2 norm in float32 (float64 stays), in a shape that multiplies x (B, ..., C).

    ``sample``: one for each of B; ``token``: over the last dimension; ``channel``: over all between first and last;
    ``batch``: one for all. A tensor without a middle, (B, C), has one norm a sample in the first three cases.
    """
    x = x if x.dtype == torch.float64 else x.float()
    middle = tuple(range(1, x.dim() - 1))
    dims = {
        "sample": (*middle, x.dim() - 1),
        "token": (x.dim() - 1,),
        "channel": middle or (x.dim() - 1,),
        "batch": tuple(range(x.dim())),
    }[scope]
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return norm


def _difference(memory: Memory | None, step: int, output: Tensor, order: int, differences: Differences) -> Memory:
    """The factors after a full computation, each from one of the last and one of the new."""
    factors, steps = [output], (step, *(memory.steps if memory else ()))[: order + 1]
    for j, old in enumerate(memory.factors[:order] if memory else ()):
        # Newton divides by the distance of the outermost of the j + 2 steps, TaylorSeer by the last gap
        distance = step - steps[j + 1] if differences == "newton" else step - steps[1]
        factors.append((factors[j] - old) / distance)
    return Memory(steps, tuple(factors))


def _change(memory: Memory, step: int, differences: Differences) -> Tensor:
    """What the factors of order 1 and more add, at ``step``."""
    change, k, weight = torch.zeros_like(memory.factors[0]), step - memory.steps[0], 1.0
    for j, factor in enumerate(memory.factors[1:], 1):
        weight = weight * (step - memory.steps[j - 1]) if differences == "newton" else k**j / math.factorial(j)
        change = change + weight * factor
    return change
