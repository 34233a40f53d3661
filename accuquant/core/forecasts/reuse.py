"""FORA (arXiv 2407.01425)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from accuquant.core.forecasts.base import Forecast, Memory, Settings


@final
@dataclass(frozen=True)
class Reuse(Forecast):
    """Order 0: the last output again."""

    order: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Forecast:
        return cls()

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        return Memory((step,), (output,))

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        return memory.factors[0]
