"""The range that quantizes with the least squared error."""

from __future__ import annotations

from typing import final

from torch import Tensor

from accuquant.calibration.layers import Trainable, TrainableLayer
from accuquant.calibration.methods.base import Method


@final
class LeastSquares(Method):
    """Each range is shrunk step by step to a fifth, and what errs least is kept (`core.numerics.search_scale`)."""

    def weights(self, layer: TrainableLayer) -> None:
        layer.set_weight_scale(search=True)

    def activations(self, layer: Trainable, samples: list[Tensor]) -> None:
        layer.set_activation_scale(samples, search=True)
