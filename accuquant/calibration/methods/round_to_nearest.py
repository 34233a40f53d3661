"""The whole range of what was seen: nothing is clipped."""

from __future__ import annotations

from typing import final

from torch import Tensor

from accuquant.calibration.layers import Trainable, TrainableLayer
from accuquant.calibration.methods.base import Method


@final
class RoundToNearest(Method):
    """From the least to the largest value (`core.numerics.range_to_scale`)."""

    def weights(self, layer: TrainableLayer) -> None:
        layer.set_weight_scale(search=False)

    def activations(self, layer: Trainable, samples: list[Tensor]) -> None:
        layer.set_activation_scale(samples, search=False)
