"""How near final latents are to those of full precision."""

from __future__ import annotations

from accuquant.core.metrics import latent_psnr, relative_l2
from accuquant.evaluation.metrics.base import Metric, Sides


def _relative_l2(sides: Sides) -> dict[str, float]:
    found = relative_l2(sides.quantized, sides.full)
    spread = {"mean": found.mean(), "std": found.std(), "min": found.min(), "max": found.max()}
    return {name: float(value) for name, value in spread.items()}


def _psnr(sides: Sides) -> float:
    return latent_psnr(sides.quantized, sides.full)


RELATIVE_L2 = Metric(
    "final_relative_l2",
    "Relative L2 error",
    "latents",
    _relative_l2,
    unit="fraction",
    higher_is_better=False,
    text="Distance of the final latents from full precision; {min} to {max} over samples, standard deviation {std}.",
    main="mean",
    label="relative L2 of the final latent",
    figure="{mean:.4f} ± {std:.4f}",
)
PSNR = Metric(
    "latent_psnr",
    "Latent PSNR",
    "latents",
    _psnr,
    unit="dB",
    higher_is_better=True,
    text="Signal to noise of the final latents. Higher is better; 6 dB more is half the error.",
    label="latent PSNR",
)
