"""How near images are to those of full precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.evaluation.digit_classifier import DigitClassifier


def image_metrics(
    quantized: Tensor, full: Tensor, inputs: list[Any], classifier: DigitClassifier | None
) -> dict[str, Any]:
    """PSNR, SSIM and, with a classifier, Frechet distance and agreement; images (B, C, H, W) in [0, 1].

    The Frechet distance is between the classifier's features of both image sets. On few samples it is biased upwards,
    for both sides alike; read it against another run of the same size.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    from torchmetrics.image.fid import FrechetInceptionDistance

    found: dict[str, Any] = {
        "psnr": float(peak_signal_noise_ratio(quantized, full, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(quantized, full, data_range=1.0)),  # type: ignore[arg-type]
    }
    if classifier is None:
        return found
    frechet = FrechetInceptionDistance(feature=_Features(copy.deepcopy(classifier)), normalize=True, antialias=False)
    frechet.set_dtype(torch.float64)  # the copy too
    frechet.update(full, real=True)
    frechet.update(quantized, real=False)
    predictions = [classifier(images * 2 - 1).argmax(1) for images in (full, quantized)]
    asked = torch.tensor(inputs, device=full.device)
    found["frechet_distance"] = float(frechet.compute())
    found["agreement"] = {
        "full_precision": float((predictions[0] == asked).double().mean()),
        "quantized": float((predictions[1] == asked).double().mean()),
        "same_prediction": float((predictions[0] == predictions[1]).double().mean()),
    }
    return found


class _Features(nn.Module):
    """What torchmetrics asks of a feature extractor: images in, features out, and their number."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, 64

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W), uint8 or [0, 1] -> (B, 64)."""
        unit = images.double() / 255 if images.dtype == torch.uint8 else images.double()
        return self.classifier.features(unit * 2 - 1)
