"""Forecasts of a cached module's output, one a file: Reuse (FORA), Taylor (TaylorSeer), RFE (RFC). Math on tensors.

A full computation at step i calls `update` with the module's input I and output O; a skipped step calls `predict`.
Steps are counted upwards; k is the number of steps since the last full computation, N the gap between the last two.

    Reuse    O(i + k) = O(i)                                                  FORA, arXiv 2407.01425
    Taylor   O(i + k) = sum_{j <= m} k^j / j! D_j,  D_0 = O(i),
             D_{j+1} = (D_j - D_j at the full step before) / N                TaylorSeer, arXiv 2503.06923
    Newton   O(i + k) = the polynomial through the last m + 1 outputs         the same for m <= 1; exact at any gaps
    RFE      O(i + k) = O(i) + s ||I(i + k) - I(i)|| d / ||d||,
             s = ||O(i) - O(i - N)|| / ||I(i) - I(i - N)||, d = Taylor's change  RFC, arXiv 2602.19506, eq. for RFE

The paper leaves the scope of the norms open; ours is one norm for each sample, in float32.

Quantization makes O and I noisy, and a forecast k steps past a gap of N amplifies the noise. `NoiseAware` knows its
energy and takes the share of the change that is best in least squares; without noise it is Taylor or RFE itself.

A new forecast is a file beside these, its line in `FORECASTS`, and its word with its orders in `recipe.ESTIMATIONS`.
"""

from __future__ import annotations

from accuquant.core.forecasts.base import (
    Differences,
    Forecast,
    Memory,
    Norm,
    Settings,
    change_weights,
    norm_of,
    weighted,
)
from accuquant.core.forecasts.noise_aware import NoiseAware
from accuquant.core.forecasts.reuse import Reuse
from accuquant.core.forecasts.rfe import RFE
from accuquant.core.forecasts.taylor import Taylor

FORECASTS: dict[str, type[Forecast]] = {  # by `cache.estimation`
    "reuse": Reuse,
    "taylor": Taylor,
    "rfe": RFE,
}

__all__ = [
    "FORECASTS",
    "RFE",
    "Differences",
    "Forecast",
    "Memory",
    "NoiseAware",
    "Norm",
    "Reuse",
    "Settings",
    "Taylor",
    "change_weights",
    "norm_of",
    "weighted",
]
