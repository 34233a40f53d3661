"""Feature caches side by side at equal NFC: FORA, TaylorSeer, RFE and RCS apart and together, and searched schedules.

Every figure is against full compute on the same held-out classes and noise. RCS decides for each sample alone, as its
tau was searched; the other schedules are the same for all. Each run is one line of results.jsonl and is not repeated:

    python -m tools.benchmarks.cache.run run              # the table's runs
    python -m tools.benchmarks.cache.run details          # norms, differences, warm-up, and what RCS watches
    python -m tools.benchmarks.cache.run latency          # on a machine that does nothing else
    python -m tools.benchmarks.cache.run table            # Markdown
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from accuquant.caching.runs import Runs, errors_from
from accuquant.caching.search import SEARCH_SAMPLES, search_cache
from accuquant.calibration.opened import open_model
from accuquant.core.forecasts import Differences, Norm
from accuquant.core.metrics import latent_psnr, relative_l2
from accuquant.core.schedule import DIFFUSERS_OFFSET, RCS, filled_interval_steps, interval_steps
from accuquant.core.trajectory import State
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.images import image_metrics
from accuquant.evaluation.measure import sample
from accuquant.pipeline.data import Samples, calibration_samples, held_out_samples
from accuquant.pipeline.loading import resolve
from accuquant.pipeline.rows import asked_for, call_of
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Cache
from accuquant.recipe.file import load_recipe
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.features import cached_modules
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats
from accuquant.runtime.observe import observed
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
QUIET = Reporter(quiet=True)
# NFC -> interval, with two leading full steps; 14 to 7 are those of the published table
INTERVALS = {26: 2, 18: 3, 14: 4, 11: 5, 10: 6, 8: 7, 7: 9, 6: 12, 5: 16}
SEEDS = (0, 1, 2)
HELD_OUT = 30
TRIALS = 24  # that refine a searched schedule; the default of 60 gains a little more
Out = Annotated[Path, typer.Option(help="Folder of results and plots.")]
DEFAULT_OUT = Path("tools/benchmarks/cache/results")


class Bench:
    """The bundled model at one seed: a calibration set to search on, a held-out set to judge by.

    Attributes:
        searched: tapes of the first calibration samples, by their number and how many are in a tape; judged: of the
            held-out samples, by how many are in a tape.
    """

    def __init__(self, seed: int) -> None:
        recipe = load_recipe("dit_w8a8", [f"data.seed={seed}", f"data.num_samples={SEARCH_SAMPLES}"])
        self.model = model = open_model(recipe)
        self.denoiser = model.only.network
        self.classifier = DigitClassifier.from_folder(Path(resolve(recipe.model.id)) / "classifier").eval()
        calibration = calibration_samples(model.split, recipe.data)
        self.held_out = held_out = held_out_samples(model.split, recipe.data, HELD_OUT)

        def recorded(samples: Samples, batch_size: int) -> list[Tape]:
            return model.recorder.tapes(samples, batch_size, QUIET, "", images=True)

        self.searched = functools.cache(lambda count, size: recorded(calibration.first(count), size))
        self.judged = functools.cache(lambda size: recorded(held_out, size))
        self.runs = Runs(self.denoiser, model.levels, SEARCH_SAMPLES, self.searched, lambda: [self.calibration])

    @property
    def calibration(self) -> Tape:
        """Of all calibration samples."""
        (tape,) = self.searched(SEARCH_SAMPLES, SEARCH_SAMPLES)
        return tape

    def search(self, config: Cache) -> CachePlan:
        return search_cache(self.runs, config, QUIET)

    def judge(self, config: Cache | CachePlan) -> dict[str, Any]:
        """Figures of a cache on the held-out set, and, to choose by, its errors on the calibration set."""
        tapes, traces = self.judged(1 if config.tau is not None else HELD_OUT), list[CacheStats]()
        with cached(self.denoiser, config) as controller:
            made = sample(tapes, QUIET, "", after=lambda: traces.append(controller.stats()))
        full_steps = {"full_steps": list(traces[0].full_steps)} if len(traces) == 1 else {}
        nfc = [trace.nfc for trace in traces]
        row = {"nfc_mean": statistics.mean(nfc), "nfc_std": statistics.pstdev(nfc), "nbytes": traces[0].nbytes}
        images = torch.cat([images_of(tape, state) for tape, state in zip(tapes, made.finals, strict=True)])
        return row | self.figures(made.latents, images) | full_steps | self.calibration_errors(config)

    def calibration_errors(self, config: Cache | CachePlan) -> dict[str, float]:
        if config.tau is not None:
            return {}
        tape = self.calibration
        wanted = images_of(tape, tape.state(len(tape)))
        with cached(self.denoiser, config):
            latents, images = errors_from(tape, tape.end(), wanted)
        return {"calibration_l2": float(latents.mean()), "calibration_image_error": float(images.mean())}

    def figures(self, final: Tensor, images: Tensor) -> dict[str, Any]:
        """Of the last latents (B, N) of all held-out samples, and their images."""
        (tape,) = self.judged(HELD_OUT)
        last = tape.state(len(tape))
        reference, inputs = tape.per_sample(last), [asked_for(row) for row in self.held_out.rows]
        with torch.no_grad():
            found = image_metrics(images, images_of(tape, last), inputs, self.classifier)
        each = relative_l2(final, reference)
        return {
            "relative_l2": float(each.mean()),
            "relative_l2_std": float(each.std()),
            "latent_psnr": latent_psnr(final, reference),
            "psnr": found["psnr"],
            "frechet_distance": found["frechet_distance"],
        }


def images_of(tape: Tape, state: State) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of a tape's last state."""
    images = tape.images(state)
    assert images is not None
    return images


def methods(nfc: int, order: int) -> Iterator[tuple[str, Cache]]:
    """Name and config (perhaps with a target) of what the table compares."""
    interval = INTERVALS[nfc]
    if order == 1:
        yield "FORA", Cache(estimation="reuse", interval=interval)
        yield "FORA, CacheQuant's steps", Cache(estimation="reuse", schedule="dps", target_nfc=nfc)
    yield "TaylorSeer", Cache(estimation="taylor", order=order, interval=interval)
    for name, warmup in (("TaylorSeer, diffusers' offset", 2), ("TaylorSeer, diffusers' offset and warm-up of 3", 3)):
        steps = filled_interval_steps(50, nfc, warmup, DIFFUSERS_OFFSET)
        yield name, Cache(estimation="taylor", order=order, schedule=steps)
    yield "+ RFE", Cache(order=order, interval=interval)
    yield "+ RCS", Cache(estimation="taylor", order=order, schedule="rcs", target_nfc=nfc)
    yield "RFC", Cache(order=order, schedule="rcs", target_nfc=nfc)
    if order == 2:
        yield "TaylorSeer, best steps", Cache(estimation="taylor", order=order, target_nfc=nfc, trials=TRIALS)
    yield "RFC, best steps", Cache(order=order, target_nfc=nfc, trials=TRIALS)


@app.command()
def run(
    out: Out = DEFAULT_OUT,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "3,4,5",
    nfcs: Annotated[str, typer.Option(help="Comma-separated.")] = "14,11,10,8,7",
    orders: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2",
    only: Annotated[str, typer.Option(help="Regular expression: methods that are run.")] = ".*",
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Make the missing runs of the table."""
    torch.set_num_threads(threads)
    for seed in map(int, seeds.split(",")):
        bench, done = None, {_key(row) for row in read_rows(out)}
        for nfc in map(int, nfcs.split(",")):
            for order in map(int, orders.split(",")):
                wanted: list[tuple[str, Callable[[Bench], dict[str, Any]]]] = [
                    (name, lambda b, c=config: b.judge(b.search(c) if c.searches else c))  # type: ignore[misc]
                    for name, config in methods(nfc, order)
                ]
                wanted.append(("diffusers' TaylorSeer", lambda b, n=nfc, m=order: diffusers_taylorseer(b, n, m)))  # type: ignore[misc]
                if importlib.util.find_spec("cache_dit"):
                    wanted.append(("cache-dit", lambda b, n=nfc, m=order: cache_dit_taylorseer(b, n, m)))  # type: ignore[misc]
                for name, judged in wanted:
                    key = {"part": "table", "seed": seed, "nfc": nfc, "order": order, "method": name}
                    if re.fullmatch(only, name) and _key(key) not in done:
                        bench = bench or Bench(seed)
                        _write(out, key, judged(bench))


def diffusers_taylorseer(bench: Bench, nfc: int, order: int) -> dict[str, Any]:
    """diffusers' own hook, given our module pattern (its default hooks nothing here) and float32 factors."""
    config = TaylorSeerCacheConfig(
        cache_interval=INTERVALS[nfc],
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(map(re.escape, cached_modules(bench.denoiser)[0])),
    )
    denoiser, counted, (tape,) = bench.denoiser, [0], bench.judged(HELD_OUT)
    name = cached_modules(denoiser)[0][-1]
    handle = denoiser.get_submodule(f"{name}.net.0").register_forward_hook(lambda *_: counted.append(1))
    apply_taylorseer_cache(denoiser, config)
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    _set_cache_context(denoiser, CacheContext("both"))
    try:
        final = tape.end()
    finally:
        registry.remove_hook("taylorseer_cache", recurse=True)
        handle.remove()
    figures = bench.figures(tape.per_sample(final), images_of(tape, final))
    return {"nfc_mean": sum(counted), "nfc_std": 0.0, "nbytes": 0} | figures


def cache_dit_taylorseer(bench: Bench, nfc: int, order: int) -> dict[str, Any]:
    """cache-dit with TaylorSeer at our full steps; it forecasts whole blocks, and always computes one (of six here)."""
    rival, recorder = importlib.import_module("cache_dit"), bench.model.recorder
    pipe: Any = recorder.pipeline
    made = list[tuple[Tensor, Tensor]]()  # last latents and their images
    mask = [int(i in interval_steps(50, INTERVALS[nfc], 2)) for i in range(50)]
    config = rival.DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=1e9,
        max_warmup_steps=2,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        num_inference_steps=50,
    )
    rival.enable_cache(
        pipe, cache_config=config, calibrator_config=rival.TaylorSeerCalibratorConfig(taylorseer_order=order)
    )
    counted, decode = [0], pipe.vae.decode
    net = bench.denoiser.get_submodule("transformer_blocks.3.ff.net.0")
    handle = net.register_forward_hook(lambda *_: counted.append(1))

    def record(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded = decode(latents, *args, **kwargs)
        final = (latents * pipe.vae.config.scaling_factor).flatten(1)
        made.append((final, (decoded.sample / 2 + 0.5).clamp(0, 1)))
        return decoded

    pipe.vae.decode = record  # DiTPipeline returns no latents
    try:
        setting = recorder.sampling.model_dump(include={"num_inference_steps", "guidance_scale"})
        pipe(**call_of(pipe, bench.held_out.rows, bench.held_out.seeds, setting, recorder.folder))
    finally:
        del pipe.vae.decode
        handle.remove()
        rival.disable_cache(pipe)
    return {"nfc_mean": sum(counted), "nfc_std": 0.0, "nbytes": 0} | bench.figures(*made[0])


@app.command()
def details(out: Out = DEFAULT_OUT, threads: Annotated[int, typer.Option(help="Torch threads.")] = 1) -> None:
    """The choices that the papers leave open, each against ours, at NFC 14, 10 and 7."""
    torch.set_num_threads(threads)
    for seed in SEEDS:
        bench, done = None, {_key(row) for row in read_rows(out)}
        for nfc in (14, 10, 7):
            interval = INTERVALS[nfc]
            norms: tuple[Norm, ...] = ("sample", "token", "channel", "batch")
            schemes: tuple[Differences, ...] = ("taylor", "newton")
            chosen = {f"norm {norm}": Cache(interval=interval, norm=norm) for norm in norms}
            for estimation in ("taylor", "rfe"):
                for scheme in schemes:
                    one = Cache(estimation=estimation, differences=scheme, schedule="rcs", target_nfc=nfc)
                    chosen[f"RCS, {estimation}, {scheme} differences"] = one
            chosen |= {f"RCS, warm-up {w}": Cache(schedule="rcs", target_nfc=nfc, warmup=w) for w in (1, 3)}
            chosen[f"RCS, gap at most {2 * interval}"] = Cache(schedule="rcs", target_nfc=nfc, max_gap=2 * interval)
            for name, config in chosen.items():
                key = {"part": "details", "seed": seed, "nfc": nfc, "order": 2, "method": name}
                if _key(key) not in done:
                    bench = bench or Bench(seed)
                    _write(out, key, bench.judge(bench.search(config) if config.searches else config))
            for index in range(12):
                key = {"part": "watch", "seed": seed, "nfc": nfc, "order": 2, "method": f"watch {index}"}
                if _key(key) not in done:
                    bench = bench or Bench(seed)
                    _write(out, key, bench.judge(Cache(schedule=watched_steps(bench, index, nfc))))


@torch.no_grad()
def watched_steps(bench: Bench, index: int, nfc: int) -> tuple[int, ...]:
    """The list RCS would choose if it watched the ``index``-th cached module, on a full-precision trajectory."""
    name, inputs = cached_modules(bench.denoiser)[0][index], list[Tensor]()
    tape = bench.calibration
    with observed(bench.denoiser, [name], lambda _, call: inputs.append(call.input.clone())):
        tape.rolled()

    def chosen(tau: float) -> tuple[int, ...]:
        rcs = RCS(tau, 2, 2)
        return tuple(i for i, x in enumerate(inputs) if rcs.is_full(i, x))

    low, high = 1e-4, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if len(chosen(middle)) > nfc else (low, middle)
    return chosen(high)


@app.command()
def latency(
    out: Out = DEFAULT_OUT,
    repeats: Annotated[int, typer.Option(help="Trajectories timed of each, alternating.")] = 10,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
) -> None:
    """One trajectory of eight samples: seconds (medians of alternating runs), multiply-adds, memory of the factors."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    bench = Bench(0)
    tape = bench.calibration  # recorded before anything is timed
    configs: dict[str, Cache] = {"full": Cache(schedule=tuple(range(50)))}
    for nfc, interval in ((14, 4), (10, 6), (7, 9)):
        configs |= {
            f"FORA {nfc}": Cache(estimation="reuse", interval=interval),
            f"TaylorSeer {nfc}": Cache(estimation="taylor", interval=interval),
            f"RFC forecast {nfc}": Cache(interval=interval),
        }
    configs["RFC tau 0.2"] = Cache(tau=0.2)
    times: dict[str, list[float]] = {"no cache": [], **{name: [] for name in configs}}
    for _ in range(repeats):
        started = time.perf_counter()
        tape.rolled()
        times["no cache"].append(time.perf_counter() - started)
        for name, config in configs.items():
            with cached(bench.denoiser, config):
                started = time.perf_counter()
                tape.rolled()
                times[name].append(time.perf_counter() - started)
    plain = statistics.median(times["no cache"])
    found = {name: {"seconds": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}
    for name, config in configs.items():
        with cached(bench.denoiser, config) as controller, FlopCounterMode(display=False) as counter:
            tape.rolled()
            stats = controller.stats()
        found[name] |= {"nfc": stats.nfc, "nbytes": stats.nbytes, "multiply_adds": counter.get_total_flops() / 2}
    (out / "latency.json").write_text(json.dumps({"threads": threads, "repeats": repeats, "runs": found}, indent=1))
    for name, row in found.items():
        costs = (
            f"{row['multiply_adds'] / 1e9:.1f} G multiply-adds, {row['nbytes'] / 1e6:.1f} MB" if "nbytes" in row else ""
        )
        spread = f"{row['seconds']:.3f} s ({row['min']:.3f} to {row['max']:.3f})"
        print(f"{name:16} {spread} {plain / row['seconds']:.2f}x  {costs}")


@app.command()
def table(
    out: Out = DEFAULT_OUT, seeds: Annotated[str, typer.Option(help="Comma-separated; those that count.")] = "3,4,5"
) -> None:
    """Markdown: relative L2 in percent, mean ± standard deviation over seeds; then the other figures at each NFC."""
    rows = [row for row in read_rows(out) if row["seed"] in {*map(int, seeds.split(","))}]
    for part, orders in (("table", (1, 2)), ("details", (2,)), ("watch", (2,))):
        for order in orders:
            here = [r for r in rows if r["part"] == part and r["order"] == order]
            columns, names = (
                sorted({r["nfc"] for r in here}, reverse=True),
                list(dict.fromkeys(r["method"] for r in here)),
            )
            print(f"\n### {part}, order {order}: relative L2 of the final latent in %\n")
            print(f"| method | {' | '.join(f'NFC {c}' for c in columns)} |\n|---|{'---|' * len(columns)}")
            for name in names:
                print(f"| {name} | {' | '.join(_cell(here, name, c, 'relative_l2', 100, 2) for c in columns)} |")
            if part == "table":
                print("\nimage PSNR in dB / Fréchet distance x 1000 / NFC where it is not the column's\n")
                print(f"| method | {' | '.join(f'NFC {c}' for c in columns)} |\n|---|{'---|' * len(columns)}")
                for name in names:
                    cells = [
                        f"{_cell(here, name, c, 'psnr', 1, 1)} / {_cell(here, name, c, 'frechet_distance', 1000, 2)}"
                        + _other_nfc(here, name, c)
                        for c in columns
                    ]
                    print(f"| {name} | {' | '.join(cells)} |")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("part", "seed", "nfc", "order", "method"))


def _write(out: Path, key: dict[str, Any], found: dict[str, Any]) -> None:
    add_row(out, key | found)
    print(*key.values(), f"NFC {found['nfc_mean']:.2f} error {found['relative_l2']:.4f}", flush=True)


def _cell(rows: list[dict[str, Any]], name: str, nfc: int, key: str, factor: float, digits: int) -> str:
    found = [r[key] * factor for r in rows if r["method"] == name and r["nfc"] == nfc]
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}" if found else ""


def _other_nfc(rows: list[dict[str, Any]], name: str, nfc: int) -> str:
    found = [r["nfc_mean"] for r in rows if r["method"] == name and r["nfc"] == nfc]
    return f" / {statistics.mean(found):.2f}" if found and abs(statistics.mean(found) - nfc) > 0.02 else ""


if __name__ == "__main__":
    app()
