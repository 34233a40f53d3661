"""Taylor and RFE that know how noisy quantization makes what they start from (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from accuquant.core.forecasts.base import (
    TINY,
    Differences,
    Forecast,
    Memory,
    Norm,
    Settings,
    change_at,
    change_weights,
    difference,
    norm_of,
)


@final
@dataclass(frozen=True)
class NoiseAware(Forecast):
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

    @classmethod
    def of(cls, settings: Settings) -> Forecast:
        """Taylor's; RFE makes its own."""
        return cls(settings.order, settings.differences, settings.norm, False, *(settings.noise or (0.0, 0.0)))

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        found, ratio = difference(memory, step, output, self.order, self.differences), None
        if self.relational and memory is not None and memory.input is not None and len(found.factors) > 1:
            own_out, own_in = self._noise(output, input)
            changed = norm_of(output - memory.factors[0], self.norm) ** 2 - 2 * own_out
            moved = norm_of(input - memory.input, self.norm) ** 2 - 2 * own_in
            ratio = (changed.clamp_min(0) / moved.clamp_min(0)).sqrt()  # inf or nan where the input stood still
        return Memory(found.steps, found.factors, input if self.relational else None, ratio)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        change = change_at(memory, step, self.differences)
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
