"""What an export is measured by. A new metric is a file here and a line in `METRICS`; report and card show it."""

from __future__ import annotations

from accuquant.evaluation.metrics import classifier, images, latents
from accuquant.evaluation.metrics.base import Metric, Sides, Value

METRICS: tuple[Metric, ...] = (
    latents.RELATIVE_L2,
    latents.PSNR,
    images.PSNR,
    images.SSIM,
    classifier.FRECHET,
    classifier.AGREEMENT,
)


def measured(of: str, sides: Sides) -> dict[str, Value]:
    """Every metric of latents or of images, by its name in metrics.json; without those that do not apply."""
    found = {metric.name: metric.measure(sides) for metric in METRICS if metric.of == of}
    return {name: value for name, value in found.items() if value is not None}


__all__ = ["METRICS", "Metric", "Sides", "Value", "measured"]
