"""A method: one pass over a model before any update, which gives the layers their first scales. One class a file.

To add one, write a file with a final subclass of `Method` and a line in `METHODS` of this package:
`quantization.initialization` is then its name there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from accuquant.calibration.layers import Trainable, TrainableLayer


class Method(ABC):
    """Visits each layer once, in the order in which the model lists them, before and after activations are seen."""

    @abstractmethod
    def weights(self, layer: TrainableLayer) -> None:
        """Give one layer's weights, as they were in full precision, their scales."""

    @abstractmethod
    def activations(self, layer: Trainable, samples: list[Tensor]) -> None:
        """Give what one layer reads its static scales.

        Args:
            samples: values seen along full-precision trajectories, 1-d, for each timestep group.
        """
