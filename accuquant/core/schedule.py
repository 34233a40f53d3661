"""Which steps of a trajectory are computed in full: fixed interval, RCS, and the best list for measured errors.

Steps count from 0 to T - 1. NFC is the number of full computations in a trajectory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from accuquant.core.forecasts import Memory, Taylor

DIFFUSERS_OFFSET = 1  # of diffusers' TaylorSeer hook: after the warm-up one step is skipped, and the next is full


def interval_steps(num_steps: int, interval: int, warmup: int, offset: int | None = None) -> tuple[int, ...]:
    """Full at the first ``warmup`` steps, then every ``interval``, at warmup + offset first.

    Args:
        offset: steps skipped between the warm-up and the first full step after it, below ``interval``; None is
            ``interval`` - 1, as TaylorSeer's authors have it. With T = 50 that gives the published NFC: ``warmup`` 2
            for DiT (2 + 48 // N), 3 for FLUX, 1 for HunyuanVideo. diffusers has `DIFFUSERS_OFFSET`.
    """
    return tuple(i for i in range(num_steps) if interval_is_full(i, interval, warmup, offset))


def interval_is_full(step: int, interval: int, warmup: int, offset: int | None = None) -> bool:
    skipped = interval - 1 if offset is None else offset
    return step < warmup or (step - warmup - skipped) % interval == 0


def filled_interval_steps(num_steps: int, nfc: int, warmup: int, offset: int | None = None) -> tuple[int, ...]:
    """The fixed interval that comes nearest to ``nfc`` full steps from below; the longest gaps get what is left."""
    lists = (interval_steps(num_steps, n, warmup, offset) for n in range(1, num_steps + 1))
    # with an offset the step at warmup + offset is full in all of them, and may be one too many
    steps = next((steps for steps in lists if len(steps) <= nfc), tuple(range(warmup)))
    while len(steps) < nfc:
        gap, start = max((b - a, a) for a, b in itertools.pairwise((*steps, num_steps)))
        steps = tuple(sorted((*steps, start + gap // 2)))
    return steps


@final
class RCS:
    """Relational cache scheduling (RFC, arXiv 2602.19506): full when the input's forecast error has added up.

    e = ||I - I_Taylor||_1 / ||I||_1 of the watched module's input, which is known before any heavy work; per sample,
    averaged. The step is full when the sum of e since the last full step exceeds tau; then the sum starts again.

    Args:
        tau: threshold.
        order: of the input's Taylor forecast.
        warmup: leading steps that are full anyway; at least one, there is nothing to forecast from.
        max_gap: a step this far from the last full one is full too; None is no limit.
    """

    def __init__(self, tau: float, order: int, warmup: int, max_gap: int | None = None) -> None:
        self.tau, self.warmup, self.max_gap = tau, max(1, warmup), max_gap
        self.forecast = Taylor(order)
        self.reset()

    def reset(self) -> None:
        self.memory: Memory | None = None
        self.accumulated = 0.0
        self.history: list[float] = []  # e of each step, for plots

    def is_full(self, step: int, input: Tensor, forced: bool = False) -> bool:
        """Decide step ``step`` from the watched input (B, ..., C), and remember it if the step is full."""
        full = forced or self.memory is None or step < self.warmup
        error = 0.0
        if self.memory is not None:
            error = input_error(input, self.forecast.predict(self.memory, step, input))
            far = self.max_gap is not None and step - self.memory.steps[0] >= self.max_gap
            full = full or far or not self.accumulated + error <= self.tau  # an error that is no number is full too
        self.history.append(error)
        self.accumulated = 0.0 if full else self.accumulated + error
        if full:
            self.memory = self.forecast.update(self.memory, step, input, input)
        return full


def input_error(input: Tensor, forecast: Tensor) -> float:
    """Relative L1 error, (B, ...) twice -> mean over samples."""
    apart = (input.float() - forecast.float()).abs().flatten(1).sum(1)
    return float((apart / input.float().abs().flatten(1).sum(1).clamp_min(1e-20)).mean())


def best_steps(
    cost: Callable[[int, int, int], float],
    num_steps: int,
    num_full: int,
    warmup: int = 1,
    max_gap: int | None = None,
    min_gap: int = 1,
) -> tuple[int, ...]:
    """The list of ``num_full`` full steps with the least total cost, by dynamic programming; O(T^3 K) costs.

    Args:
        cost: ``cost(before, full, next)``: what the skipped steps full + 1 ... next - 1 lose, when ``before`` was the
            full step ahead of ``full`` (equal to it at the first one). ``next`` may be T.
        warmup: leading steps that are full in every list.
        max_gap, min_gap: distances that two full steps may have, and the last one and the end; by default any.

    Raises:
        ValueError: no list has that many steps.
    """
    longest = max_gap or num_steps
    if not warmup <= num_full <= num_steps or longest * (num_full - warmup + 1) < num_steps - warmup + 1:
        raise ValueError(
            f"no schedule of {num_steps} steps has {num_full} full ones with the first {warmup} full and gaps "
            f"of at most {longest}"
        )
    # paths[before, full] = (cost so far, full steps), where `full` is the last of them
    first = tuple(range(warmup))
    paths = {(max(0, warmup - 2), warmup - 1): (0.0, first)}
    for _ in range(num_full - warmup):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (before, full), (total, steps) in paths.items():
            for after in range(full + min_gap, min(num_steps, full + longest + 1)):
                found = (total + cost(before, full, after), (*steps, after))
                if (full, after) not in longer or found < longer[full, after]:
                    longer[full, after] = found
        paths = longer
    ends = [
        (total + cost(before, full, num_steps), steps)
        for (before, full), (total, steps) in paths.items()
        if min_gap <= num_steps - full <= longest
    ]
    if not ends:
        raise ValueError(
            f"no schedule of {num_steps} steps has {num_full} full ones {min_gap} to {longest} steps apart"
        )
    return min(ends)[1]


def dps_steps(distances: Tensor, interval: float) -> tuple[int, ...]:
    """CacheQuant's schedule (arXiv 2503.01323): K = ceil(T / N) groups, least sum of ||F_t - F_i||_1 from their starts.

    Groups have between ceil(N / 2) and 2 N steps. An N that is not whole gives every K: T / K does.

    Args:
        distances: (T, T), ||F_t - F_i||_1 of the cached features at row i and column t.
        interval: N.

    Raises:
        ValueError: T steps cannot be cut that way.
    """
    num_steps = len(distances)
    sums = torch.cat([torch.zeros(num_steps, 1, dtype=torch.float64), distances.double().cumsum(1)], 1).tolist()

    def cost(before: int, full: int, after: int) -> float:
        return float(sums[full][after] - sums[full][full])

    num_full = math.ceil(num_steps / interval - 1e-9)
    return best_steps(cost, num_steps, num_full, 1, math.floor(2 * interval), math.ceil(interval / 2))


class ForecastErrors:
    """Errors of forecasts along a recorded trajectory, for any two full steps, from Gram matrices alone.

    An order-1 forecast is a linear combination of recorded outputs, O_i + a (O_i - O_p), so its squared error needs
    only inner products; so does RFE's a = ||I_j - I_i|| / ||I_i - I_p||. Nothing is run again.

    Args:
        inputs: (modules, B, T, T), <I_i, I_j> of each module's input; outputs: likewise, of its output.
        order: 0 takes the last output again; higher orders are judged by order 1.
        relational: RFE's magnitude instead of Taylor's.
        emphasis: rate at which an error's weight grows over the trajectory, exp(emphasis j / T).
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, order: int, relational: bool, emphasis: float) -> None:
        self.inputs, self.outputs = inputs.double(), outputs.double()
        self.order, self.relational = order, relational
        steps = torch.arange(outputs.shape[-1], dtype=torch.float64)
        self.weights = torch.exp(emphasis * steps / len(steps))
        self.sums: dict[tuple[int, int], list[float]] = {}

    def at(self, before: int, full: int) -> Tensor:
        """(T,): squared error relative to the output at each step, mean over modules and samples."""
        i, p, gram = full, before, self.outputs
        own = gram.diagonal(dim1=-2, dim2=-1)
        scale = own.clamp_min(1e-30)  # a projection may still be all zeros
        reuse = own + own[..., i : i + 1] - 2 * gram[..., i, :]
        if self.order == 0 or p == i:
            return (reuse / scale).mean((0, 1))
        if self.relational:
            moved = self.inputs.diagonal(dim1=-2, dim2=-1)
            moved = (moved + moved[..., i : i + 1] - 2 * self.inputs[..., i, :]).clamp_min(0)
            a = (moved / moved[..., p : p + 1].clamp_min(1e-30)).sqrt()
        else:
            a = ((torch.arange(gram.shape[-1]) - i).double() / (i - p)).expand_as(own)
        along = gram[..., i : i + 1, i] - gram[..., i, :] - gram[..., p : p + 1, i] + gram[..., p, :]
        change = own[..., i : i + 1] + own[..., p : p + 1] - 2 * gram[..., i : i + 1, p]
        return ((reuse + 2 * a * along + a**2 * change) / scale).mean((0, 1))

    def cost(self, before: int, full: int, after: int) -> float:
        """Weighted sum over the skipped steps, as `best_steps` asks it."""
        if (before, full) not in self.sums:
            self.sums[before, full] = [0.0, *(self.at(before, full).clamp_min(0) * self.weights).cumsum(0).tolist()]
        sums = self.sums[before, full]
        return sums[after] - sums[full + 1]
