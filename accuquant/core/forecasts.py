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

Quantization makes O and I noisy, and a forecast k steps past a gap of N amplifies the noise. `NoiseAware` knows its
energy and takes the share of the change that is best in least squares; without noise it is Taylor or RFE itself.
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


@final
@dataclass(frozen=True)
class NoiseAware:
    """Taylor's or RFE's change, as much of it as the noise leaves worth taking.

    With O = true + n, E||n||^2 = sigma^2 and the change d = sum_l c_l O(i_l), c_0 that of the last output, the multiple
    of d with the least expected error is (gamma ||true d||^2 - c_0 sigma^2) / ||d||^2, where ||true d||^2 is
    ||d||^2 - sigma^2 sum c_l^2 and gamma the ratio of the true change's length to it: 1 for Taylor, and for RFE
    s ||I moved|| / ||true d|| with the noise taken out of each length. At order 1 this is
    beta = ((k/N)(||dO||^2 - 2 sigma^2) - sigma^2) / ||dO||^2 in the place of k/N (derived).

    Args:
        relational: RFE's magnitude; else Taylor's.
        output_noise, input_noise: sigma^2 over ||O||^2 and over ||I||^2.
    """

    order: int
    differences: Differences
    norm: Norm
    relational: bool
    output_noise: float
    input_noise: float

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        found, ratio = _difference(memory, step, output, self.order, self.differences), None
        if self.relational and memory is not None and memory.input is not None and len(found.factors) > 1:
            own_out, own_in = self._noise(output, input)
            changed = norm_of(output - memory.factors[0], self.norm) ** 2 - 2 * own_out
            moved = norm_of(input - memory.input, self.norm) ** 2 - 2 * own_in
            ratio = (changed.clamp_min(0) / moved.clamp_min(0)).sqrt()  # inf or nan where the input stood still
        return Memory(found.steps, found.factors, input if self.relational else None, ratio)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        change = _change(memory, step, self.differences)
        weights = change_weights(memory, step, self.differences)
        if not weights:
            return memory.factors[0]
        own_out, own_in = self._noise(memory.factors[0], input)
        length = (norm_of(change, self.norm) ** 2).clamp_min(TINY)
        true = (length - own_out * sum(c * c for c in weights)).clamp_min(0)
        gamma = torch.ones_like(true)
        if memory.ratio is not None and memory.input is not None:
            moved = (norm_of(input - memory.input, self.norm) ** 2 - 2 * own_in).clamp_min(0).sqrt()
            gamma = memory.ratio * moved / true.sqrt().clamp_min(TINY)
            gamma = torch.where(memory.ratio.isfinite(), gamma, 1.0)
        share = ((gamma * true - weights[0] * own_out) / length).clamp_min(0)
        return memory.factors[0] + (share * change).to(change.dtype)

    def _noise(self, output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.output_noise * norm_of(output, self.norm) ** 2, self.input_noise * norm_of(input, self.norm) ** 2


Forecast = Reuse | Taylor | RFE | NoiseAware


def weighted(forecast: Tensor, last: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a O(i) + b (forecast - O(i)): learned shares of the last output and of the change that a forecast adds to it.

    Args:
        a, b: scalars; both 1 is the forecast itself.
    """
    change, kept = (b - 1).to(forecast), (a - b).to(forecast)  # small numbers: half types round less so
    return torch.addcmul(torch.addcmul(forecast, last, kept), forecast, change)  # each is one pass over the output


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
    weights = _factor_weights(memory, step, differences)
    terms = [weight * factor for weight, factor in zip(weights, memory.factors[1:], strict=True)]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(memory.factors[0])


def _factor_weights(memory: Memory, step: int, differences: Differences) -> list[float]:
    """Of the factors of order 1 and more."""
    weights, k, product = list[float](), step - memory.steps[0], 1.0
    for j in range(1, len(memory.factors)):
        product *= step - memory.steps[j - 1]
        weights.append(product if differences == "newton" else k**j / math.factorial(j))
    return weights


def change_weights(memory: Memory, step: int, differences: Differences) -> list[float]:
    """c_l: the change at ``step`` as a sum over the outputs it comes from, newest first; none before two of them."""
    total = [0.0] * len(memory.factors)
    for order, weight in enumerate(_factor_weights(memory, step, differences), 1):
        for index, coefficient in enumerate(_mix(memory.steps, order, differences)):
            total[index] += weight * coefficient
    return total if len(total) > 1 else []


def _mix(steps: tuple[int, ...], order: int, differences: Differences) -> tuple[float, ...]:
    """The factor of this order as coefficients of the outputs at ``steps``; the recursion of `_difference`."""
    if order == 0:
        return (1.0,)
    newer, older = (*_mix(steps, order - 1, differences), 0.0), (0.0, *_mix(steps[1:], order - 1, differences))
    distance = steps[0] - (steps[order] if differences == "newton" else steps[1])
    return tuple((a - b) / distance for a, b in zip(newer, older, strict=True))
