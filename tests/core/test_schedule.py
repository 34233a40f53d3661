"""Schedules: the published NFC, RCS against a plain loop, and the best list against all lists there are."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from helpers import finite_differences
from torch import Tensor

from accuquant.core.schedule import DIFFUSERS_OFFSET, RCS, best_steps, dps_steps, filled_interval_steps, interval_steps


def gaps(steps: tuple[int, ...], num_steps: int) -> list[int]:
    """Distances between full steps, the end included."""
    return [b - a for a, b in itertools.pairwise((*steps, num_steps))]


# ---- fixed interval


def test_interval_has_the_published_nfc_of_dit() -> None:
    assert [len(interval_steps(50, n, warmup=2)) for n in (4, 5, 6, 7, 9)] == [14, 11, 10, 8, 7]


def test_interval_has_the_published_nfc_of_flux_and_hunyuan_video() -> None:
    for n in range(2, 11):
        assert len(interval_steps(50, n, warmup=3)) == 3 + 47 // n
        assert len(interval_steps(50, n, warmup=1)) == 1 + 49 // n


def test_interval_counts_from_the_last_warmup_step() -> None:
    assert interval_steps(13, 5, warmup=3) == (0, 1, 2, 7, 12)  # as the published code
    assert interval_steps(10, 3, warmup=2) == (0, 1, 4, 7)
    assert interval_steps(4, 1, warmup=1) == (0, 1, 2, 3)
    assert interval_steps(3, 4, warmup=5) == (0, 1, 2)


def test_offset_counts_the_steps_skipped_after_the_warmup() -> None:
    assert interval_steps(12, 4, 2, offset=1) == (0, 1, 3, 7, 11)
    assert interval_steps(12, 4, 2, offset=0) == (0, 1, 2, 6, 10)
    for interval, warmup in itertools.product(range(1, 8), range(1, 5)):
        assert interval_steps(20, interval, warmup) == interval_steps(20, interval, warmup, interval - 1)
        for offset in range(interval):
            found = interval_steps(20, interval, warmup, offset)
            assert found == (*range(warmup), *range(warmup + offset, 20, interval))


@pytest.mark.parametrize("offset", [None, DIFFUSERS_OFFSET])
def test_filled_interval_has_as_many_full_steps_as_asked(offset: int | None) -> None:
    for warmup, num_steps in itertools.product((1, 2, 3), (6, 13, 50)):
        for nfc in range(warmup, num_steps + 1):
            steps = filled_interval_steps(num_steps, nfc, warmup, offset)
            assert len(steps) == nfc and steps == tuple(sorted(set(steps))) and steps[-1] < num_steps
            assert steps[:warmup] == tuple(range(warmup))
    assert filled_interval_steps(50, 14, 2, DIFFUSERS_OFFSET) == (0, 1, *range(3, 50, 4))


# ---- RCS


def smooth_inputs(seed: int, num_steps: int = 30) -> list[Tensor]:
    """Inputs (2, 3, 4) along a few slow waves, fastest at the end."""
    generator = torch.Generator().manual_seed(seed)
    waves = [torch.randn(2, 3, 4, generator=generator) for _ in range(6)]
    times = [4 * (i / num_steps) ** 1.5 for i in range(num_steps)]
    return [sum((w * math.sin((j + 1) * t + j) for j, w in enumerate(waves[1:])), 2 * waves[0]) for t in times]


def plain_rcs(
    inputs: list[Tensor], tau: float, order: int, warmup: int, max_gap: int | None
) -> tuple[list[int], list[float]]:
    """Full steps and e of each step, from all the inputs of the full steps."""
    full, errors, total = list[int](), list[float](), 0.0
    for i, x in enumerate(inputs):
        e = 0.0
        if full:
            factors, k = finite_differences(full, [inputs[j] for j in full])[: order + 1], i - full[-1]
            forecast = sum((k**j / math.factorial(j) * d for j, d in enumerate(factors)), torch.zeros_like(x))
            e = sum(float((a - b).abs().sum() / a.abs().sum()) for a, b in zip(x, forecast, strict=True)) / len(x)
        errors.append(e)
        total += e
        if not full or i < warmup or total > tau or (max_gap is not None and i - full[-1] >= max_gap):
            full.append(i)
            total = 0.0
    return full, errors


def decide(rcs: RCS, inputs: list[Tensor]) -> list[int]:
    return [i for i, x in enumerate(inputs) if rcs.is_full(i, x)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("warmup", "max_gap"), [(1, None), (3, None), (1, 4)])
def test_rcs_decides_as_a_plain_loop_does(seed: int, order: int, warmup: int, max_gap: int | None) -> None:
    inputs, seen = smooth_inputs(seed), set[int]()
    for tau in (0.02, 0.1, 0.3, 1.0):
        rcs = RCS(tau, order, warmup, max_gap)
        full, errors = plain_rcs(inputs, tau, order, warmup, max_gap)
        assert decide(rcs, inputs) == full
        assert rcs.history == pytest.approx(errors, rel=1e-4, abs=1e-6)
        assert max_gap is None or max(gaps(tuple(full), len(inputs))) <= max_gap
        seen.add(len(full))
    assert len(seen) > 1  # thresholds that decide something


def test_rcs_begins_anew_after_reset() -> None:
    rcs, first, second = RCS(0.2, 1, 2), smooth_inputs(0), smooth_inputs(1)
    found = decide(rcs, first)
    rcs.reset()
    assert decide(rcs, second) == plain_rcs(second, 0.2, 1, 2, None)[0] != found
    assert len(rcs.history) == len(second)


def test_small_thresholds_give_all_steps_and_large_ones_the_warmup_alone() -> None:
    inputs = smooth_inputs(0)
    for order, warmup in ((1, 1), (2, 3)):
        assert decide(RCS(1e-9, order, warmup), inputs) == list(range(len(inputs)))
        assert decide(RCS(1e9, order, warmup), inputs) == list(range(warmup))


def test_rcs_weighs_samples_alike() -> None:
    """A sample a thousand times as large does not decide alone."""
    small, large = smooth_inputs(0), smooth_inputs(1)
    plain = [torch.cat([a[:1], b[:1]]) for a, b in zip(small, large, strict=True)]
    scaled = [torch.cat([a[:1], 1000 * b[:1]]) for a, b in zip(small, large, strict=True)]
    assert decide(RCS(0.2, 1, 1), plain) == decide(RCS(0.2, 1, 1), scaled)
    assert decide(RCS(0.2, 1, 1), plain) != decide(RCS(0.2, 1, 1), [b[:1] for b in large])


# ---- the best list


def random_cost(seed: int) -> dict[tuple[int, int, int], float]:
    """Any cost at all of (before, full, next), T <= 10."""
    generator = random.Random(seed)
    return {key: generator.uniform(-1, 1) for key in itertools.product(range(11), repeat=3)}


def total(costs: dict[tuple[int, int, int], float], steps: tuple[int, ...], num_steps: int) -> float:
    ends = (*steps, num_steps)
    return sum(costs[ends[max(0, i - 1)], ends[i], ends[i + 1]] for i in range(len(steps)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("warmup", [1, 2])
@pytest.mark.parametrize("max_gap", [None, 3])
@pytest.mark.parametrize("num_steps", [4, 7, 10])
def test_best_steps_are_the_best_of_all_lists(num_steps: int, max_gap: int | None, warmup: int, seed: int) -> None:
    costs, tried = random_cost(seed), 0
    for num_full in range(warmup, num_steps + 1):
        candidates = [
            (*range(warmup), *rest) for rest in itertools.combinations(range(warmup, num_steps), num_full - warmup)
        ]
        candidates = [c for c in candidates if max_gap is None or max(gaps(c, num_steps)) <= max_gap]
        if not candidates:
            with pytest.raises(ValueError, match="no schedule"):
                best_steps(lambda *key: costs[key], num_steps, num_full, warmup, max_gap)
            continue
        found = best_steps(lambda *key: costs[key], num_steps, num_full, warmup, max_gap)
        assert found == min(candidates, key=lambda c: total(costs, c, num_steps))
        tried += 1
    assert tried > 1


@pytest.mark.parametrize(
    ("num_full", "warmup", "max_gap", "says"),
    [
        (11, 1, None, "10 steps has 11 full"),
        (2, 3, None, "first 3 full"),
        (3, 1, 3, "at most 3"),
        (0, 1, None, "0 full"),
    ],
)
def test_impossible_lists_are_refused_and_why(num_full: int, warmup: int, max_gap: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        best_steps(lambda before, full, after: 0.0, 10, num_full, warmup, max_gap)


def test_the_tightest_list_there_is_is_found() -> None:
    assert best_steps(lambda before, full, after: 0.0, 9, 3, warmup=1, max_gap=3) == (0, 3, 6)


@pytest.mark.parametrize(("num_steps", "interval"), [(8, 2), (10, 3), (12, 3), (12, 4), (11, 5)])
def test_dps_against_brute_force(num_steps: int, interval: int) -> None:
    """CacheQuant's schedule: ceil(T / N) groups of ceil(N / 2) to 2 N steps, least sum of distances to their starts."""
    for seed in range(3):
        features = torch.randn(num_steps, 6, generator=torch.Generator().manual_seed(seed)).cumsum(0)
        distances = torch.cdist(features, features, p=1)
        count, found = -(-num_steps // interval), []
        for inner in itertools.combinations(range(1, num_steps), count - 1):
            groups = list(itertools.pairwise((0, *inner, num_steps)))
            if all(-(-interval // 2) <= b - a <= 2 * interval for a, b in groups):
                total = sum(float((features[t] - features[a]).abs().sum()) for a, b in groups for t in range(a, b))
                found.append((total, (0, *inner)))
        assert dps_steps(distances, interval) == min(found)[1]


def test_dps_says_when_steps_cannot_be_cut_that_way() -> None:
    with pytest.raises(ValueError, match="steps apart"):
        dps_steps(torch.ones(4, 4), 9)


def test_rcs_computes_in_full_where_the_error_is_no_number() -> None:
    rcs, nothing = RCS(1e9, 1, 2), torch.full((1, 4), float("nan"))
    assert [rcs.is_full(i, x) for i, x in enumerate([torch.ones(1, 4)] * 3 + [nothing] * 3)] == [
        True,
        True,
        False,
    ] + 3 * [True]
