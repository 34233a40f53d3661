"""CacheQuant's decoupled error correction, the cache part: an affine map of each channel of a forecast.

At a skipped step h <- a h + b, with a = Cov(h, y) / Var(h) and b = mean y - a mean h over a calibration batch
(CVPR 2025, arXiv 2503.01323), where h is the forecast and y what a full computation gives. On few samples and wide gaps
the plain fit does worse than none on held-out ones; ours draws the slope half way to 1 (measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1.0  # weight of the slope 1 against the fitted one


def fit_affine(forecast: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """(..., C), or images (B, C, H, W), twice -> (2, C) float32: slope and intercept of each channel.

    A channel that is constant in the forecast keeps the slope 1.
    """
    h, y = (_channels_last(x).double().flatten(0, -2) for x in (forecast, target))
    mean_h, mean_y = h.mean(0), y.mean(0)
    variance = (h - mean_h).square().mean(0)
    covariance = ((h - mean_h) * (y - mean_y)).mean(0)
    slope = (covariance + ridge * variance) / ((1 + ridge) * variance).clamp_min(1e-30)
    slope = torch.where(variance > 1e-12 * mean_h.square() + 1e-30, slope, 1.0)
    return torch.stack([slope, mean_y - slope * mean_h]).float()


def apply_affine(correction: Tensor, forecast: Tensor) -> Tensor:
    """(2, C) and (..., C), or images (B, C, H, W) -> the same shape, in the forecast's type."""
    slope, intercept = correction.to(forecast.dtype)
    corrected: Tensor = slope * _channels_last(forecast) + intercept
    return corrected.movedim(-1, 1) if forecast.dim() > 3 else corrected


def _channels_last(x: Tensor) -> Tensor:
    """A U-Net's blocks give images, a transformer's modules tokens."""
    return x.movedim(1, -1) if x.dim() > 3 else x
