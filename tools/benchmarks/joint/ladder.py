"""Naive stacking and CacheQuant, each from what it was first to its best: a row for every part that is added.

CacheQuant is quantization with FORA's forecast at the full steps of its DPS, then its corrections (DEC), then weights
that learn with the cache on. All rows of one (types, seed) start from the same calibrated model, that of `joint.run`.
Every row has its errors on validation samples beside those that are reported, so that a choice need not look at these;
on the digits model validation has other noise than calibration, but the same classes. Lines go to its
results, and its table shows them:

    python -m tools.benchmarks.joint.ladder --nfcs 14,10,7
    python -m tools.benchmarks.joint.run table --seeds 3,4,5
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.caching.runs import errors_from
from accuquant.caching.search import searched
from accuquant.calibration.session import Session
from accuquant.calibration.updates import calibrate_cached
from accuquant.core.schedule import DIFFUSERS_OFFSET, filled_interval_steps
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.tuning.candidates import TUNING_SAMPLES, Checked
from tools.benchmarks.accuracy.run import pairs_of
from tools.benchmarks.joint.bench import QUIET, TUNED, Bench
from tools.benchmarks.joint.run import DEFAULT_OUT, Out, Seeds, Shard, Threads, Types, done_in, key_of, write

app = typer.Typer(add_completion=False, help=__doc__)
Rung = tuple[Callable[[int], dict[str, Any]], bool]  # NFC -> settings of the cache; whether weights learn with it on


def _cachequant(more: dict[str, Any], reconstructs: bool = False, exact: bool = True) -> Rung:
    """CacheQuant's reuse at the steps of its DPS, on full precision as published unless ``more`` says otherwise."""
    plain = {"estimation": "reuse", "schedule": "dps", "measured_on": "full_precision"}

    def config(nfc: int) -> dict[str, Any]:
        return plain | ({"target_nfc": nfc} if exact else {"interval": -(-50 // nfc)}) | more

    return config, reconstructs


def _stacked(estimation: str, offset: int | None = None) -> Rung:
    """A fixed interval, filled up to the number of full steps that is asked for."""
    return lambda nfc: {"estimation": estimation, "schedule": filled_interval_steps(50, nfc, 2, offset)}, False


_BOTH = {"corrected": True, "corrected_quantization": True, "dps_samples": 16}
_OWN = _BOTH | {"measured_on": "quantized"}
LADDER: dict[str, Rung] = {
    "FORA": _stacked("reuse"),
    "TaylorSeer, published offset": _stacked("taylor"),
    "TaylorSeer, diffusers' offset": _stacked("taylor", DIFFUSERS_OFFSET),
    "TaylorSeer, steps searched alone": (
        lambda nfc: {"estimation": "taylor", "schedule": "best", "target_nfc": nfc, "trials": TUNED["trials"]},
        False,
    ),
    "DPS, 2 samples, NFC by interval": _cachequant({"dps_samples": 2}, exact=False),
    "DPS, 2 samples": _cachequant({"dps_samples": 2}),
    "DPS, 16 samples": _cachequant({"dps_samples": 16}),
    "DPS, 16 samples, quantized": _cachequant({"dps_samples": 16, "measured_on": "quantized"}),
    "+ DEC, ridge 1, DPS by 2 samples": _cachequant(_BOTH | {"dps_samples": 2}),
    "+ DEC, ridge 1": _cachequant(_BOTH),
    "+ DEC, ridge 0": _cachequant(_BOTH | {"correction_ridge": 0}),
    "+ DEC, ridge 1, on its own trajectory": _cachequant(_OWN),
    "+ DEC, ridge 0, on its own trajectory": _cachequant(_OWN | {"correction_ridge": 0}),
    "+ reconstruction, DEC ridge 1": _cachequant(_BOTH, True),
    "+ reconstruction, DEC ridge 0": _cachequant(_BOTH | {"correction_ridge": 0}, True),
    "+ reconstruction, DEC ridge 1, on its own trajectory": _cachequant(_OWN, True),
    "+ reconstruction, DEC ridge 0, on its own trajectory": _cachequant(_OWN | {"correction_ridge": 0}, True),
}


@app.command()
def main(
    out: Out = DEFAULT_OUT,
    types: Types = "W8A8",
    seeds: Seeds = "3,4,5",
    nfcs: Annotated[str, typer.Option(help="Comma-separated.")] = "14",
    threads: Threads = 1,
    shard: Shard = "0/1",
) -> None:
    """Naive stacking, and CacheQuant from DPS alone to corrections and reconstruction, each with validation errors."""
    torch.set_num_threads(threads)
    for name, seed in pairs_of(types, seeds, shard):
        keys = {(n, m): key_of("ladder", name, seed, n, m) for n in map(int, nfcs.split(",")) for m in LADDER}
        todo = {cell: key for cell, key in keys.items() if key not in done_in(out)}
        if not todo:
            continue
        bench = Bench(name, seed, Path("build/bench_joint"))
        alone = key_of("ladder", name, seed, 0, "E_q")
        if alone not in done_in(out):
            write(out, shard, alone, bench.judge(None) | validation_errors(bench.session, None, None))
        for (nfc, method), key in todo.items():
            config, reconstructs = LADDER[method]
            write(out, shard, key, climb(bench, Cache(**config(nfc)), reconstructs, nfc))


def climb(bench: Bench, config: Cache, reconstructs: bool, nfc: int) -> dict[str, Any]:
    """One rung: the list of full steps is found first, then weights are reconstructed, then corrections fitted."""
    session, started = bench.session, time.monotonic()
    session.restore(bench.start)
    with session.full_precision() if config.schedule == "best" else nullcontext():
        plan, known = searched(config, session, QUIET, samples=TUNING_SAMPLES)
    if reconstructs:
        kept = bench.kept.inside(f"ladder-{nfc}-{config.measured_on}")
        calibrate_cached(session, bench.objective, plan.uncorrected, known, bench.alone, kept, QUIET)
    fitted = bench.fitted(plan, known)
    found = bench.figures(*fitted) | validation_errors(session, *fitted)
    session.restore(bench.start)
    return found | {"seconds": round(time.monotonic() - started, 1)}


def validation_errors(session: Session, plan: CachePlan | None, fitted: Fitted | None) -> dict[str, float]:
    checked = Checked.of(session.validation.tapes)
    with nullcontext() if plan is None else cached(session.network, plan, fitted):
        parts = [errors_from(t, t.end(), i) for t, i in zip(checked.tapes, checked.images, strict=True)]
    latents, images = (torch.cat(errors).mean() for errors in zip(*parts, strict=True))
    return {"validation": float(latents), "validation_image": float(images)}


if __name__ == "__main__":
    app()
