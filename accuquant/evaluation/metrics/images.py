"""How near decoded images are to those of full precision, pixel by pixel and in structure."""

from __future__ import annotations

from accuquant.evaluation.metrics.base import Metric, Sides


def _psnr(sides: Sides) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(sides.quantized, sides.full, data_range=1.0))


def _ssim(sides: Sides) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    return float(ssim(sides.quantized, sides.full, data_range=1.0))  # type: ignore[arg-type]


PSNR = Metric(
    "psnr",
    "Image PSNR",
    "images",
    _psnr,
    unit="dB",
    higher_is_better=True,
    text="The same for decoded images. Above about 30 dB, differences are hard to see.",
    label="image PSNR",
)
SSIM = Metric(
    "ssim",
    "SSIM",
    "images",
    _ssim,
    unit="",
    higher_is_better=True,
    text="Structural similarity of decoded images; 1 means identical.",
)
