"""Errors of latents against full precision, on the same noise."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_l2(x: Tensor, reference: Tensor) -> Tensor:
    """(B, ...) and (B, ...) -> (B,): ||x - reference|| / ||reference|| of each sample."""
    difference = (x.double() - reference.double()).flatten(1).norm(dim=1)
    relative: Tensor = difference / reference.double().flatten(1).norm(dim=1).clamp_min(1e-30)
    return relative


def latent_psnr(x: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the reference's range (max - min)."""
    error = (x.double() - reference.double()).square().mean()
    peak = reference.double().max() - reference.double().min()
    return float(10 * torch.log10(peak.square() / error.clamp_min(1e-30)))
