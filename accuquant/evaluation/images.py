"""How near images are to those of full precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.metrics import Sides, measured


def image_metrics(
    quantized: Tensor, full: Tensor, inputs: list[Any], classifier: DigitClassifier | None
) -> dict[str, Any]:
    """Every metric of frames (B, F, C, H, W) in [0, 1] by its name; those of a classifier only where there is one."""
    each = [asked for asked in inputs for _ in range(full.shape[1])]
    return dict(measured("images", Sides(quantized.flatten(0, 1), full.flatten(0, 1), each, classifier)))
