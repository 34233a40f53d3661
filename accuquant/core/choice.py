"""Which of several candidates errs least, as far as their samples can tell.

A candidate errs in K ways on each of B samples: in latents and in images, say. Its measure is, of each sample, the mean
over the K errors of their logarithm: halving one and doubling the other is even, whatever their sizes are. A rival's
measure taken off it gives the mean log ratio to the rival, and drops out where two candidates are compared.

Two are compared sample by sample, d_b = a_b - c_b: how hard a sample is drops out too. They are told apart where the
mean of d is more than two of its standard errors, std(d) / sqrt(B), from 0; and equal within the standard error where
it is less than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_ERROR = 1e-12  # an error of nothing has no logarithm
TOLD_APART = 2.0  # standard errors
SMALL = 0.005  # of the error's logarithm: a standard error of half a percent tells all apart that differ by one


def log_error(*errors: Tensor) -> Tensor:
    """K errors of B samples, each (B,) -> (B,), the mean over the K of log(error); infinite where a sample diverged."""
    given = torch.stack([error.double() for error in errors])
    return given.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(LEAST_ERROR).log().mean(0)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a - b, each (B,) of the same samples, and its standard error, which one sample does not have: 0."""
    gaps = a - b
    return float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0


def leaders(measures: Sequence[Tensor], width: float = TOLD_APART) -> list[int]:
    """Those within ``width`` standard errors of the least mean, (B,) of each on the same samples; the least first.

    What diverges on one sample is none of them, unless all do.
    """
    means = [float(measure.mean()) for measure in measures]
    order = sorted(range(len(measures)), key=means.__getitem__)
    gaps = [difference(measures[k], measures[order[0]]) for k in order[1:]]
    near = [k for k, (gap, error) in zip(order[1:], gaps, strict=True) if gap <= width * error]
    return [*order[:1], *near]


def undecided(measures: Sequence[Tensor], small: float = SMALL) -> bool:
    """Whether more samples may show a difference between the first and the others that matters."""
    return any(difference(measure, measures[0])[1] > small for measure in measures[1:])


def cheapest_equal(measures: Sequence[Tensor], costs: Sequence[tuple[float, ...]]) -> int:
    """Of those that are equal to the least within the standard error, the cheapest; the least of as cheap ones."""
    return min(leaders(measures, 1.0), key=costs.__getitem__)  # the first of equals, and these come in order
