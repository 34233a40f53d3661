"""What a way of computing a quantized layer has to say of itself: one final class a file, and a line in `select`.

With q the stored integers, z zero points and s scales, a layer is

    y[b, o] = s_x[b] * sum_g s_w[o, g] * sum_{i in g} (q_x[b, i] - z_x) * (q_w[o, i] - z_w[o, g])  + bias[o].

A backend makes the operand q_x of an input, lays q_w out as its product wants it, and computes y.

Shape legend: M rows of the input, I inputs, O outputs, G groups of a weight's row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accuquant.core.numerics import QType, dynamic_scale, quantize
from accuquant.core.packing import unpack

ROWS = 256  # of weights that are looked at together


@dataclass(frozen=True)
class Facts:
    """All of a layer that the choice of a backend may rest on."""

    weight: QType
    activation: QType | None  # None: not quantized
    inputs: int
    outputs: int
    groups: int
    symmetric: bool  # weights without zero points
    dynamic: bool  # one scale a row of the input, made when it comes
    shifted: bool  # the input has a zero point
    device: torch.device

    @property
    def plain(self) -> bool:
        """Whether weights are eight bits wide, with one scale a row and no zero points: as most libraries have them."""
        return self.weight.bits == 8 and self.symmetric and self.groups == 1

    @property
    def integers(self) -> bool:
        """Whether inputs and weights are integers."""
        return self.activation is not None and self.weight.floating is None

    def __str__(self) -> str:
        """One line that tells any two of them apart, save by the index of a device."""
        scale = "dynamic" if self.dynamic else "static"
        activation = f"{self.activation.name} {scale}{' shifted' * self.shifted}" if self.activation else "float"
        weight = f"{self.weight.name}{'' if self.symmetric else ' asymmetric'} / {self.inputs // self.groups}"
        return f"{weight} x {activation}, {self.outputs} x {self.inputs}, {self.device.type}"


class Weights(NamedTuple):
    """The tensors of a layer. ``q`` is (O, packed columns) as files have it, or as a backend has laid it out."""

    q: Tensor
    scale: Tensor  # (O, G) float32
    zero: Tensor | None  # (O, G) int8
    sums: Tensor | None  # whatever a backend knows beforehand to take account of the input's zero point
    bias: Tensor | None  # (O,)


class Grid(NamedTuple):
    """The scale of an input, (1,), or the clip ratio of a dynamic one; and its zero point, (1,), or None."""

    scale: Tensor
    zero: Tensor | None


class Operand(NamedTuple):
    """What a backend makes of an input: numbers, their scale, (1,) or (M, 1), and zero point, as its product wants."""

    q: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


class Backend(ABC):
    """Stateless; layers hold one and call it."""

    name: str
    shares = True  # layers that read one tensor may use one operand

    @abstractmethod
    def refusal(self, facts: Facts) -> str:
        """Why such a layer cannot be computed, as the end of "it has ..."; empty where it can."""

    def takes(self, facts: Facts) -> bool:
        return not self.refusal(facts)

    def pays(self, facts: Facts) -> bool:
        """Whether it is faster, for such a layer on this machine, than what stands below it in the table of `select`.

        A rule that was measured before and ships with the package: nothing is timed.
        """
        return True

    def takes_input(self, x: Tensor, facts: Facts) -> bool:
        """Whether this input of a layer that was taken is computed; if not, `select.FLOAT` computes it."""
        return True

    def copies(self, facts: Facts) -> bool:
        """Whether laying out may copy the weight."""
        return False

    def holds(self, q: Tensor, x: Tensor) -> bool:
        """Whether ``q`` is still laid out, and where the input is: others may have carried it to another device."""
        return True

    def lay_out(self, weights: Weights, facts: Facts) -> Weights:
        """Weights as files have them, without sums -> as `linear` wants them."""
        return weights

    def stored(self, q: Tensor) -> Tensor:
        """The weight as files have it, again."""
        return q

    @abstractmethod
    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        """Of an input (..., I). ``grid`` is None where activations are not quantized."""

    @abstractmethod
    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        """(M, O) or (..., O), at best in ``dtype``, the input's; the layer casts."""

    def __deepcopy__(self, memo: Any) -> Backend:
        return self


def quantized(x: Tensor, grid: Grid | None, facts: Facts) -> tuple[Tensor, Tensor, Tensor | None]:
    """(..., I) -> the stored numbers, as floats, their scale, (1,) or (..., 1), and zero point."""
    assert grid is not None and facts.activation is not None
    scale = dynamic_scale(x, facts.activation, grid.scale) if facts.dynamic else grid.scale
    return quantize(x, scale, 0 if grid.zero is None else grid.zero, facts.activation), scale, grid.zero


def integer_weight(weights: Weights, facts: Facts, rows: slice = slice(None)) -> Tensor:
    """(O, I) int8, or small floats, or only some rows of it, of weights as files have them."""
    return unpack(weights.q[rows], facts.inputs, facts.weight)


def dequantized(weights: Weights, facts: Facts, rows: slice = slice(None)) -> Tensor:
    """(O, I) float32, or only some rows of it, of weights as files have them."""
    scale = weights.scale[rows].reshape(-1, 1)
    q = integer_weight(weights, facts, rows).reshape(len(scale), -1).float()
    if weights.zero is not None:
        q.sub_(weights.zero[rows].reshape(-1, 1))
    return q.mul_(scale).view(-1, facts.inputs)


def blocks(facts: Facts) -> list[slice]:
    """All outputs, some rows at a time, so that no second copy of a weight is made."""
    return [slice(start, start + ROWS) for start in range(0, facts.outputs, ROWS)]
