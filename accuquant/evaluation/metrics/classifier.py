"""What a classifier sees in both sets of images; for models that have one beside them.

The Frechet distance is between the classifier's features of both image sets. On few samples it is biased upwards, for
both sides alike; read it against another run of the same size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.metrics.base import Metric, Sides


class _Features(nn.Module):
    """What torchmetrics asks of a feature extractor: images in, features out, and their number."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, 64

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W), uint8 or [0, 1] -> (B, 64)."""
        unit = images.double() / 255 if images.dtype == torch.uint8 else images.double()
        return self.classifier.features(unit * 2 - 1)


def _frechet(sides: Sides) -> float | None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    if sides.classifier is None:
        return None
    features = _Features(copy.deepcopy(sides.classifier))
    frechet = FrechetInceptionDistance(feature=features, normalize=True, antialias=False)
    frechet.set_dtype(torch.float64)  # the copy too
    frechet.update(sides.full, real=True)
    frechet.update(sides.quantized, real=False)
    return float(frechet.compute())


def _agreement(sides: Sides) -> dict[str, float] | None:
    if sides.classifier is None:
        return None
    full, quantized = (sides.classifier(images * 2 - 1).argmax(1) for images in (sides.full, sides.quantized))
    asked = torch.tensor(sides.inputs, device=full.device)
    return {
        "full_precision": float((full == asked).double().mean()),
        "quantized": float((quantized == asked).double().mean()),
        "same_prediction": float((full == quantized).double().mean()),
    }


FRECHET = Metric(
    "frechet_distance",
    "Fréchet distance",
    "images",
    _frechet,
    unit="",
    higher_is_better=False,
    text="Distance between the feature statistics of the two image sets; 0 means the same distribution.",
    label="Fréchet distance to full precision",
)
AGREEMENT = Metric(
    "agreement",
    "Classifier agreement",
    "images",
    _agreement,
    unit="fraction",
    higher_is_better=True,
    text="Image pairs a classifier sees alike. It finds the requested class in {full_precision} of full-precision and "
    "{quantized} of quantized images.",
    main="same_prediction",
    label="classifier agrees with asked class",
    figure="{quantized:.1%} (full {full_precision:.1%})",
)
