"""RFC's relational feature estimation (arXiv 2602.19506)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

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
    difference,
    norm_of,
)
from accuquant.core.forecasts.noise_aware import NoiseAware


@final
@dataclass(frozen=True)
class RFE(Forecast):
    """Direction from Taylor, magnitude from how far the input has moved. Plain Taylor until there is a ratio."""

    order: int
    differences: Differences = "taylor"
    norm: Norm = "sample"
    needs_input: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Settings) -> Forecast:
        if settings.noise is not None:
            return NoiseAware(settings.order, settings.differences, settings.norm, True, *settings.noise)
        return cls(settings.order, settings.differences, settings.norm)

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        found, ratio = difference(memory, step, output, self.order, self.differences), None
        if memory is not None and memory.input is not None and len(found.factors) > 1:
            moved = norm_of(input - memory.input, self.norm)
            ratio = norm_of(output - memory.factors[0], self.norm) / moved  # inf or nan where the input stood still
        return Memory(found.steps, found.factors, input, ratio)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        change = change_at(memory, step, self.differences)
        if memory.ratio is None or memory.input is None:
            return memory.factors[0] + change
        moved = norm_of(input - memory.input, self.norm)
        scale = memory.ratio * moved / norm_of(change, self.norm).clamp_min(TINY)
        scale = torch.where(memory.ratio.isfinite(), scale, 1.0)  # Taylor's change
        return memory.factors[0] + (scale * change).to(change.dtype)
