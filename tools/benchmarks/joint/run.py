"""Quantization and cache together, at equal numbers of full computations: naive stacking, CacheQuant, calibration with
the cache on, and the tuner; and which order of forecast each bit width wants.

Every figure is on held-out classes and noise. All methods of one (types, seed) start from the same calibrated model, so
that only what the cache adds differs; the tuner may also calibrate with the cache on, with as many updates as (c) has.
Each run is one line of results.jsonl and is not repeated; several shards can work at once:

    python -m tools.benchmarks.joint.run run --shard 0/2 & python -m tools.benchmarks.joint.run run --shard 1/2
    python -m tools.benchmarks.joint.run stacking         # quantization and cache each at its best alone
    python -m tools.benchmarks.joint.run orders           # forecast order against bit width
    python -m tools.benchmarks.joint.run shares           # how far forecasts have to look to learn
    python -m tools.benchmarks.joint.run latency          # on a machine that does nothing else
    python -m tools.benchmarks.joint.run table            # Markdown; and plot
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.caching.correct import fit_correction
from accuquant.caching.noise import measure_noise
from accuquant.caching.search import searched
from accuquant.calibration.updates import calibrate_cached
from accuquant.core.schedule import filled_interval_steps
from accuquant.pipeline.tape import Tape
from accuquant.programs.tune import learn, model_as
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.tuning.budget import TIMED_SAMPLES, Combination, base_settings, step_times, type_combinations
from accuquant.tuning.candidates import TUNING_SAMPLES, Place
from accuquant.tuning.choice import choose, settle
from accuquant.tuning.tried import NAIVE, Candidate, Tried
from tools.benchmarks.accuracy.run import pairs_of
from tools.benchmarks.joint.bench import QUIET, TUNED, Bench, bench_recipe
from tools.benchmarks.joint.report import draw_runs, print_choice, print_latency, print_tables
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
TYPES = "W8A8,W4A8,W4A4"
NFC = (25, 14, 10, 7)
SEEDS = (0, 1, 2)
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Types = Annotated[str, typer.Option(help="Comma-separated.")]
Seeds = Annotated[str, typer.Option(help="Comma-separated.")]
Threads = Annotated[int, typer.Option(help="Torch threads.")]
Shard = Annotated[str, typer.Option(help="i/n: every n-th (types, seed) pair from the i-th.")]
DEFAULT_OUT = Path("tools/benchmarks/joint/results")


@app.command()
def run(
    out: Out = DEFAULT_OUT,
    types: Types = TYPES,
    seeds: Seeds = "0,1,2",
    nfcs: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(map(str, NFC)),
    threads: Threads = 1,
    shard: Shard = "0/1",
) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(threads)
    for name, seed in pairs_of(types, seeds, shard):
        wanted = [n for n in map(int, nfcs.split(",")) if key_of("run", name, seed, n, "(d) tuner") not in done_in(out)]
        if not wanted:
            continue
        bench = Bench(name, seed, Path("build/bench_joint"))
        write(out, shard, key_of("run", name, seed, 0, "E_q"), bench.judge(None))
        for nfc in wanted:
            for method, found in compare(bench, name, seed, nfc):
                write(out, shard, key_of("run", name, seed, nfc, method), found)


def compare(bench: Bench, types: str, seed: int, nfc: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(a) to (d) at one number of full computations."""
    session, section = bench.session, bench_recipe(types, seed, nfc).tune
    assert section is not None
    kept = bench.kept.inside(str(nfc))
    combination: Combination = type_combinations(bench_recipe(types, seed, nfc))[0]
    settings = base_settings(combination.recipe.cache)
    full, skipped = kept.json("seconds.json", lambda: step_times(session, settings, section))
    tried = Tried(kept.path("tried.jsonl"))

    session.restore(bench.start)
    place = Place(combination, section, session, (full, skipped), tried, QUIET, kept)
    place.naive(nfc)
    place.cachequant(nfc)
    for rival in [candidate for candidate in place.tried.candidates if candidate.rival]:
        plan = rival.plan
        yield ("(a) naive: TaylorSeer" if rival.rival == NAIVE else f"(b) {rival.rival}"), bench.judge(plan)
        if rival.rival == NAIVE:
            naive = plan
            yield "E_c of (a)", bench.full_precision(plan)
        elif rival.rival == "CacheQuant" and nfc == 14:
            own = replace(plan, measured_on="quantized")
            yield "(b') CacheQuant, corrected on its own trajectory", bench.judge(own)

    started = time.monotonic()
    calibrate_cached(session, bench.objective, naive, Fitted(), bench.alone, kept, QUIET)
    spent = time.monotonic() - started
    yield "(c) calibrated with the cache of (a)", bench.judge(naive) | {"seconds": spent}

    session.restore(bench.start)
    started = time.monotonic()
    place.try_forecasts(nfc)
    for forecast in place.best_forecasts(nfc, section.finalists):
        place.refine(forecast, nfc)
    place.correct(nfc)
    as_tried = partial(model_as, place, bench.alone, nfc, kept)
    best = choose(settle(place, place.own(nfc), False, as_tried)).best
    about = {"cache": best.cache, "validation": statistics.mean(best.latent_errors)}
    as_tried(best.calibrated)
    yield "(d') tuner without calibration", bench.judge(best.plan, best.fitted) | about
    learn(place, bench.alone, nfc, kept)
    best = choose(settle(place, place.own(nfc), False, as_tried)).best
    about = {"cache": best.cache, "validation": statistics.mean(best.latent_errors), "calibrated": best.calibrated}
    as_tried(best.calibrated)
    found = bench.judge(best.plan, best.fitted.with_learned(place.learned))
    yield "(d) tuner", found | about | {"seconds": time.monotonic() - started}
    session.restore(bench.start)


@app.command()
def stacking(
    out: Out = DEFAULT_OUT,
    types: Types = TYPES,
    seeds: Seeds = "0,1,2",
    threads: Threads = 1,
    shard: Shard = "0/1",
) -> None:
    """Rows (a') of the runs: full steps that are searched in full precision, under weights calibrated alone."""
    torch.set_num_threads(threads)
    cells = [(nfc, "(a') naive: TaylorSeer, its steps searched alone") for nfc in NFC]
    for bench, key in _missing(out, "run", pairs_of(types, seeds, shard), cells):
        config = Cache(estimation="taylor", order=2, schedule="best", target_nfc=key[3], trials=TUNED["trials"])
        with bench.session.full_precision():
            plan, fitted = searched(config, bench.session, QUIET, samples=TUNING_SAMPLES)
        write(out, shard, key, bench.judge(plan, fitted))


@app.command()
def orders(
    out: Out = DEFAULT_OUT,
    types: Types = "W8A8,W8A6,W4A8,W4A4,W4A16",
    seeds: Seeds = "0,1,2",
    threads: Threads = 1,
    shard: Shard = "0/1",
) -> None:
    """Forecasts at fixed intervals, quantized by MSE search, with E_q and E_c; and what `auto` takes."""
    torch.set_num_threads(threads)
    for name, seed in pairs_of(types, seeds, shard):
        if key_of("orders", name, seed, 7, "auto, learned") in done_in(out):
            continue
        bench = Bench(name, seed, Path("build/bench_joint_orders"), iterations=0)
        e_q = bench.judge(None)["relative_l2"]
        for nfc in (14, 7):
            steps = filled_interval_steps(50, nfc, 2)
            for order in range(4):
                plan = CachePlan.of(Cache(estimation="taylor", order=order, schedule=steps))
                both, only = bench.judge(plan), bench.full_precision(plan)["relative_l2"]
                write(out, shard, key_of("orders", name, seed, nfc, f"order {order}"), both | {"E_q": e_q, "E_c": only})
            chosen, measured = searched(
                Cache(estimation="auto", noise_aware=True, schedule=steps), bench.session, QUIET
            )
            fitted = Fitted(noise=measure_noise(bench.session, round(50 / nfc), QUIET))
            others = {
                "RFE 1": Cache(order=1, schedule=steps),
                "RFE 2": Cache(order=2, schedule=steps),
                "order 2 noise-aware": Cache(estimation="taylor", schedule=steps, noise_aware=True),
                "RFE 2 noise-aware": Cache(schedule=steps, noise_aware=True),
            }
            plans = {method: (CachePlan.of(config), fitted) for method, config in others.items()}
            for method, (plan, known) in (plans | {"auto": (chosen, measured)}).items():
                about = {"cache": f"{plan.estimation} {plan.order}{' aware' if plan.noise_aware else ''}"}
                found = bench.judge(plan, known) | {"E_q": e_q} | about
                write(out, shard, key_of("orders", name, seed, nfc, method), found)
            shared = bench.learned_shares(chosen.uncorrected, bench.session.num_steps, fitted=measured)
            found = bench.judge(shared.cache, shared.learned) | {"E_q": e_q}
            write(out, shard, key_of("orders", name, seed, nfc, "auto, learned"), found)


@app.command()
def shares(
    out: Out = DEFAULT_OUT,
    types: Types = "W8A8,W4A8",
    seeds: Seeds = "0,1,2",
    updates: Annotated[int, typer.Option(help="Updates of the shares; no weight is learned.")] = 40,
    threads: Threads = 1,
    shard: Shard = "0/1",
) -> None:
    """Shares of (a)'s forecasts, learned over groups of M steps: one gap, several, the whole trajectory."""
    torch.set_num_threads(threads)
    lengths = {f"M = {m}" if m else "plain": m for m in (0, 1, 10, 25, 50)}
    cells = list(itertools.product((14, 7), lengths))
    for bench, key in _missing(out, "shares", pairs_of(types, seeds, shard), cells):
        config, m = Cache(estimation="taylor", order=2, schedule=filled_interval_steps(50, key[3], 2)), lengths[key[4]]
        started = time.monotonic()
        shared = bench.learned_shares(CachePlan.of(config), max(1, m), updates if m else 0)
        seconds = round(time.monotonic() - started, 1)
        write(out, shard, key, bench.judge(shared.cache, shared.learned) | {"seconds": seconds})


@app.command()
def latency(
    out: Out = DEFAULT_OUT,
    types: Types = TYPES,
    seed: Annotated[
        int, typer.Option(help="Of the runs whose choices are timed, in the folder they were made in.")
    ] = 0,
    repeats: Annotated[int, typer.Option(help="Trajectories timed of each, alternating.")] = 5,
    threads: Threads = 2,
) -> None:
    """Seconds of one trajectory of eight samples, by the layers as exported, with what the runs have chosen."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, list[float]]] = {}
    for name in types.split(","):
        chosen = dict(_chosen(Path(f"build/bench_joint/{name}-{seed}")))
        bench = Bench(name, seed, Path("build/bench_joint_orders"), iterations=0)  # which takes as long as calibrated
        (tape,) = bench.session.few(TIMED_SAMPLES, TIMED_SAMPLES)
        times: dict[str, list[float]] = {key: [] for key in ("float32", "quantized", *chosen)}
        plans = {}
        for key, candidate in chosen.items():
            plan = replace(candidate.plan, learned=False)  # shares cost two products more, which do not show
            fitted = candidate.fitted
            plans[key] = plan, fit_correction(bench.session, plan, QUIET, fitted) if plan.fits else fitted
        for _ in range(repeats + 1):  # the first is a warm-up
            with bench.session.full_precision():
                times["float32"].append(_seconds(tape))
            with bench.session.hardened():
                times["quantized"].append(_seconds(tape))
                for key, (plan, fitted) in plans.items():
                    with cached(bench.session.network, plan, fitted):
                        times[key].append(_seconds(tape))
        found[name] = {key: values[1:] for key, values in times.items()}
        for key, values in found[name].items():
            median = statistics.median(values)
            faster = statistics.median(found[name]["float32"]) / median
            print(f"{name} {key:36} {median:.3f} s ({min(values):.3f} to {max(values):.3f}) {faster:.2f}x", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "latency.json").write_text(json.dumps({"threads": threads, "seconds": found}, indent=1), encoding="utf-8")


def _chosen(folder: Path) -> Iterator[tuple[str, Candidate]]:
    """Both rivals and the tuner's choice at every NFC that was run."""
    for nfc in NFC:
        tried = Tried(folder / str(nfc) / "tried.jsonl").candidates
        for candidate in tried:
            if candidate.rival in (NAIVE, "CacheQuant"):
                yield f"{candidate.rival}, NFC {nfc}", candidate
        if any(not candidate.rival for candidate in tried):
            yield f"tuner, NFC {nfc}", choose(tried).best


def _seconds(tape: Tape) -> float:
    started = time.perf_counter()
    tape.rolled()
    return time.perf_counter() - started


def _missing(
    out: Path, part: str, pairs: list[tuple[str, int]], cells: list[tuple[int, str]]
) -> Iterator[tuple[Bench, tuple[Any, ...]]]:
    """Keys of the cells (NFC, method) that have no line yet, with the calibrated model, made where there are any."""
    for name, seed in pairs:
        keys = [key for cell in cells if (key := key_of(part, name, seed, *cell)) not in done_in(out)]
        if keys:
            bench = Bench(name, seed, Path("build/bench_joint"))
            yield from ((bench, key) for key in keys)


def done_in(out: Path) -> set[tuple[Any, ...]]:
    return {tuple(row[k] for k in ("part", "types", "seed", "nfc", "method")) for row in read_rows(out)}


def key_of(part: str, types: str, seed: int, nfc: int, method: str) -> tuple[Any, ...]:
    return part, types, seed, nfc, method


def write(out: Path, shard: str, key: tuple[Any, ...], found: dict[str, Any]) -> None:
    if key in done_in(out):
        return
    row = dict(zip(("part", "types", "seed", "nfc", "method"), key, strict=True)) | found
    add_row(out, row, shard)
    print(*key, f"error {found['relative_l2']:.4f} image PSNR {found['psnr']:.2f}", found.get("cache", ""), flush=True)


@app.command()
def plot(out: Out = DEFAULT_OUT) -> None:
    """Error over full computations for each pair of types: joint.png."""
    draw_runs(read_rows(out), out / "joint.png")


@app.command()
def table(
    out: Out = DEFAULT_OUT, seeds: Annotated[str, typer.Option(help="Those that count; all if empty.")] = ""
) -> None:
    """Markdown: E_qc in %, image PSNR and Fréchet distance, mean ± standard deviation over seeds; and latency."""
    wanted = {int(seed) for seed in seeds.split(",") if seed}
    print_tables(rows := [row for row in read_rows(out) if not wanted or row["seed"] in wanted])
    print_choice(rows)
    if (kept := out / "latency.json").is_file():
        print_latency(kept)


if __name__ == "__main__":
    app()
