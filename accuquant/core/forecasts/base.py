"""What all forecasts have in common: what they remember of full computations, and differences between those."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

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


@dataclass(frozen=True)
class Settings:
    """What a cache asks of any forecast; each takes of it what it knows.

    Attributes:
        noise: sigma^2 over ||O||^2 and over ||I||^2 of the module; None where the forecast is to know no noise.
    """

    order: int
    differences: Differences = "taylor"
    norm: Norm = "sample"
    noise: tuple[float, float] | None = None


class Forecast(ABC):
    """A module's output at skipped steps. Subclasses are final.

    Attributes:
        needs_input: it asks for the module's input at the skipped step itself.
    """

    needs_input: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, settings: Settings) -> Forecast:
        """The forecast of these settings.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        """The memory after a full computation at ``step``.

        Args:
            memory: before it; None at the first.
            output, input: of the module, (B, ..., C); tensors of the memory share their dtype and device.
        """

    @abstractmethod
    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        """The output at the skipped ``step``, in the shape of the remembered ones."""


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


def difference(memory: Memory | None, step: int, output: Tensor, order: int, differences: Differences) -> Memory:
    """The factors after a full computation, each from one of the last and one of the new."""
    factors, steps = [output], (step, *(memory.steps if memory else ()))[: order + 1]
    for j, old in enumerate(memory.factors[:order] if memory else ()):
        # Newton divides by the distance of the outermost of the j + 2 steps, TaylorSeer by the last gap
        distance = step - steps[j + 1] if differences == "newton" else step - steps[1]
        factors.append((factors[j] - old) / distance)
    return Memory(steps, tuple(factors))


def change_at(memory: Memory, step: int, differences: Differences) -> Tensor:
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
    """The factor of this order as coefficients of the outputs at ``steps``; the recursion of `difference`."""
    if order == 0:
        return (1.0,)
    newer, older = (*_mix(steps, order - 1, differences), 0.0), (0.0, *_mix(steps[1:], order - 1, differences))
    distance = steps[0] - (steps[order] if differences == "newton" else steps[1])
    return tuple((a - b) / distance for a, b in zip(newer, older, strict=True))
