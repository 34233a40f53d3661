"""TaylorSeer (arXiv 2503.06923), and Newton's form of it for uneven gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from accuquant.core.forecasts.base import Differences, Forecast, Memory, Settings, change_at, difference
from accuquant.core.forecasts.noise_aware import NoiseAware


@final
@dataclass(frozen=True)
class Taylor(Forecast):
    """Finite differences up to ``order``; the orders build up, one with each full computation."""

    order: int
    differences: Differences = "taylor"

    @classmethod
    def of(cls, settings: Settings) -> Forecast:
        if settings.noise is not None:
            return NoiseAware.of(settings)
        return cls(settings.order, settings.differences)

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        return difference(memory, step, output, self.order, self.differences)

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        return memory.factors[0] + change_at(memory, step, self.differences)
