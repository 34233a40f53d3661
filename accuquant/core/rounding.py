"""AdaRound: learn whether each weight is rounded down or up (Nagel et al. 2020, arXiv 2004.10568).

The grid is fixed at the scales of initialisation: a floor taken at a moving scale would make the learned logits
meaningless. ``w_soft = scale * clamp(floor(w / scale) + h(V) + zero_point - zero_point)`` with the rectified sigmoid h.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # gamma and zeta of the paper, eq. 23


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(V) in [0, 1], reaching both ends exactly (eq. 23)."""
    return (torch.sigmoid(logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def initial_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """Logits for which the soft rounding reproduces the float weight: ``h(V) = w / scale - floor(w / scale)``."""
    fraction = weight / scale - torch.floor(weight / scale)
    p = ((fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).clamp(1e-4, 1 - 1e-4)
    return torch.log(p / (1 - p))


def rounds_up(logits: Tensor) -> Tensor:
    """What is decided in the end: up where h(V) is nearer to 1."""
    return rectified_sigmoid(logits) >= 0.5


def decided(logits: Tensor) -> Tensor:
    """Logits of the same decisions for which h(V) is 0 or 1."""
    return torch.where(rounds_up(logits), 10.0, -10.0).to(logits.dtype)


def regulariser(logits: Tensor, beta: float) -> Tensor:
    """``mean(1 - |2 h(V) - 1|^beta)`` (eq. 24): 0 when every rounding is decided."""
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).mean()


def annealed_beta(progress: float, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float | None:
    """Exponent of the regulariser at ``progress`` in [0, 1]; None during the first ``warmup``, without it."""
    if progress < warmup:
        return None
    return end + (start - end) * (1 - (progress - warmup) / (1 - warmup))
