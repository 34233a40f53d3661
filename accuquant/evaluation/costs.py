"""What a model costs: bytes, bit-operations, seconds, and what its cache saves of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from accuquant.calibration.plan import PlannedModule
from accuquant.pipeline.tape import Components, Tape
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.features import in_cache
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.stats import CacheStats

LEAST_CALLS, MOST_CALLS, CALLS_SECONDS = 3, 40, 3.0  # of the denoiser, to know how long one takes
MOST_ALONE = 5.0


def cost_metrics(planned: list[PlannedModule], denoiser: nn.Module, sizes: dict[str, int]) -> dict[str, Any]:
    """Size of the whole denoiser and of its quantized layers, whose bytes are ``sizes``; bit-operations of one call."""
    inside = [p for p in planned if p.spec is not None or p.attention is not None]
    float_layers, packed = sum(p.float_bytes for p in inside), sum(sizes[p.name] for p in inside)
    macs = {kind: sum(p.macs for p in planned if p.kind == kind) for kind in ("attention", "other")}
    quantized = [p for p in planned if p.attention is not None]
    float_bytes = sum(4 * p.numel() for p in denoiser.parameters())
    operations, planned_operations = sum(p.macs * 32 * 32 for p in planned), sum(p.bit_operations for p in planned)
    return {
        "size": {
            "float_bytes": float_bytes,
            "quantized_bytes": float_bytes - float_layers + packed,
            "ratio": (float_bytes - float_layers + packed) / float_bytes,
            "layers_ratio": packed / max(float_layers, 1),
        },
        "bit_operations": {
            "float": operations,
            "quantized": planned_operations,
            "ratio": planned_operations / max(operations, 1),
        },
        # shares of all multiply-adds that are of no layer, and how many modules have quantized products of their own
        "products": {kind: 32 * 32 * n / max(operations, 1) for kind, n in macs.items()}
        | {"quantized_attention": len(quantized)},
    }


class CallSeconds(NamedTuple):
    """Of one call of the denoiser: were all cores free, as far as can be told, and beside what else runs now."""

    free: float
    now: float

    @property
    def slowdown(self) -> float:
        return self.now / self.free


@torch.no_grad()
def call_seconds(tape: Tape) -> CallSeconds:
    """Time of one step: the least of several after one that warms up, for other work comes and goes.

    Where it stays, no call is quiet, and threads that wait for each other's cores make each many times slower. So on a
    CPU calls of one thread are measured too, by the time that this thread had a core: free cores do not take longer.
    Not of a model so large that one thread would take `MOST_ALONE` seconds.
    """
    state = tape.state(0)
    is_cuda = state.latents[0].is_cuda

    def least(clock: Callable[[], float]) -> float:
        tape.step(0, state)
        found, begun = list[float](), time.perf_counter()
        while len(found) < LEAST_CALLS or (len(found) < MOST_CALLS and time.perf_counter() - begun < CALLS_SECONDS):
            started = clock()
            tape.step(0, state)
            if is_cuda:
                torch.cuda.synchronize()
            found.append(clock() - started)
        return min(found)

    now = least(time.perf_counter)
    threads = torch.get_num_threads()
    if is_cuda or threads * now > MOST_ALONE:
        return CallSeconds(now, now)
    torch.set_num_threads(1)
    try:
        alone = least(time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return CallSeconds(min(now, alone), now)


def step_seconds(tape: Tape, components: Components | None = None) -> list[float]:
    """Wall time of each step of one run of a tape."""
    marks = list[float]()
    for state in tape.rolling(components):
        if state.latents[0].is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


def cache_metrics(
    controller: Controller,
    traces: list[CacheStats],
    planned: list[PlannedModule],
    seconds: list[float],
    input_errors: list[float],
    fitted: Fitted | None = None,
) -> dict[str, Any]:
    """Full computations, memory and step times of the cache, its learned shares, bit-operations of a trajectory."""
    shares = None  # least, mean and largest of all modules, at each skipped step: of the last output and of its change
    if fitted is not None and fitted.learned_timesteps:
        sides = torch.stack(list(fitted.learned)).double().cpu().unbind(-1)
        shares = [torch.stack([s.amin(1), s.mean(1), s.amax(1)], 1).tolist() for s in sides]
    full_steps = set(controller.stats().full_steps)
    times: dict[bool, list[float]] = {True: [], False: []}
    for i, each in enumerate(seconds):
        times[i in full_steps].append(each)
    nfc = torch.tensor([float(trace.nfc) for trace in traces], dtype=torch.float64)
    steps = traces[0].num_steps
    skipped = [p for p in planned if in_cache(p.name, controller.skipped)]
    operations, inside = sum(p.bit_operations for p in planned), sum(p.bit_operations for p in skipped)
    with_cache = operations - inside * (1 - float(nfc.mean()) / steps)
    return {
        "cache": {
            "estimation": controller.plan.estimation,
            "order": controller.plan.order,
            "nfc": {"mean": float(nfc.mean()), "std": float(nfc.std(correction=0))},
            "num_steps": steps,
            "full_steps": list(traces[0].full_steps),
            "input_errors": input_errors,
            "tau": controller.plan.tau,
            "nbytes": max(trace.nbytes for trace in traces),
            "modules": len(controller.modules),
            "shares": shares,
            "seconds": {
                "full_step": statistics.median(times[True]),
                "cached_step": statistics.median(times[False]) if times[False] else None,
            },
            "bit_operations_ratio": with_cache / max(1, sum(p.macs * 32 * 32 for p in planned)),
        }
    }


def module_row(p: PlannedModule, error: float | None, size: int | None) -> dict[str, Any]:
    return {
        "name": p.name,
        "kind": p.kind,
        "weight": p.spec.weight if p.spec else "float",
        "activation": p.spec.activation if p.spec else "float",
        "group_size": p.spec.group_size if p.spec else None,
        "relative_error": error,
        "float_bytes": p.float_bytes,
        "quantized_bytes": p.float_bytes if size is None else size,
    }
