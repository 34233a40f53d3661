"""Accuracy of the objectives, side by side, at equal cost: initial scales, block reconstruction, and M = 1, 2, 5, 10.

Cost is counted in network evaluations: forward calls of the denoiser that calibration makes. One update with M steps
makes 2 M - 1 of them (M of these with a backward pass), so at equal evaluations M = 1 makes 2 M - 1 times more updates.
Block reconstruction makes as many updates of each block as are left when its inputs and targets are paid for.
Figures are of the hardened model on held-out classes and noise. Every run is one line of results.jsonl; a run that is
there is not repeated, so the tool can be stopped and started at will, and several shards can work at once:

    python -m tools.benchmarks.accuracy.run run --shard 0/2 & python -m tools.benchmarks.accuracy.run run --shard 1/2
    python -m tools.benchmarks.accuracy.run table
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.calibration.choice import Candidate
from accuquant.calibration.session import Session, open_session, validation_error
from accuquant.evaluation.measure import HeldOut, held_out_reference, latent_metrics, sample
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.recipe import Objective, Recipe
from accuquant.recipe.file import load_recipe, parse_recipe
from accuquant.runtime.arithmetic import set_arithmetic
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
QUIET = Reporter(quiet=True)

ATTENTION_AND_MLP = r"transformer_blocks\.\d+\.(attn1|ff)\..*"
ADALN = {"modules": r"transformer_blocks\.\d+\.norm1\.linear", "weight": "int8", "tune": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight": "int8", "activation": "int8"},
    "W4A8": {"weight": "int4", "activation": "int8", "granularity": "group", "group_size": 32},
    "W4A4": {
        "weight": "int4",
        "activation": "int4",
        "activation_scale": "dynamic",
        "granularity": "group",
        "group_size": 32,
    },
    "W3A6": {
        "weight": "int3",
        "activation": "int6",
        "activation_scale": "dynamic",
        "granularity": "group",
        "group_size": 32,
    },
}
METHODS: dict[str, dict[str, Any] | None] = {
    "round to nearest": None,
    "MSE search": None,
    "M=1": {"steps_per_group": 1},
    **{
        f"M={m} {gradient}": {"steps_per_group": m, "gradient": gradient}
        for m in (2, 5, 10)
        for gradient in ("identity", "variance", "exact")
    },
    "M=5 exact dense": {"steps_per_group": 5, "gradient": "exact", "loss": "dense"},
    "M=5 identity dense": {"steps_per_group": 5, "loss": "dense"},
    "M=1 on given quantized inputs": {"inputs": "quantized"},
    "M=1 then 5 exact": {"steps_per_group": 5, "gradient": "exact", "warmup_fraction": 0.8},
    "M=1 AdaRound at its rate": {"learn": ["rounding", "activation_scale"]},
    "blocks": {"target": "blocks"},
    "blocks AdaRound at its rate": {"target": "blocks", "learn": ["rounding", "activation_scale"]},
}
# of AdaRound's logits: how far they have to go, and what they bear, differs with objective, bits and number of updates
ROUNDING_RATES = (0.003, 0.01, 0.03, 0.1)


def bench_recipe(base: Recipe, config: str, seed: int, batch: int, samples: int, initialization: str) -> Recipe:
    tree = base.model_dump(mode="json")
    tree["data"] |= {"num_samples": samples, "seed": seed}
    tree["quantization"] |= {
        "rules": [{"modules": ATTENTION_AND_MLP, **CONFIGS[config]}, ADALN],
        "initialization": initialization,
    }
    tree["objective"] = {"iterations": 0, "batch_size": batch}
    tree["evaluation"] |= {"num_samples": 12, "batch_size": 12, "reconstruct": False}
    return parse_recipe(tree, "benchmark")


def updates(session: Session, objective: Objective, method: dict[str, Any], evaluations: int) -> int:
    """Updates (of each block, where blocks are reconstructed) that ``evaluations`` pay for.

    The rival on quantized inputs has as many as M = 1 on full-precision ones: sampling its inputs is not charged to it.
    """
    m, target = int(method.get("steps_per_group", 1)), method.get("target", "trajectory")
    job = session.job(objective)
    changes = {"warmup_fraction": float(method.get("warmup_fraction", 0.0))}
    job = replace(job, objective=job.objective.model_copy(update=changes))
    found = Candidate(target, m, 1.0).updates(job, evaluations)
    if not found:
        raise typer.BadParameter(f"--evaluations {evaluations}: too few for one update of {target}, M = {m}")
    return found


def pairs_of(configs: str, seeds: str, shard: str) -> list[tuple[str, int]]:
    """(config, seed) pairs of comma-separated lists that shard i/n has to run: every n-th from the i-th."""
    index, count = map(int, shard.split("/"))
    return [(c, int(s)) for s in seeds.split(",") for c in configs.split(",")][index::count]


def hardened_error(session: Session, held_out: HeldOut) -> dict[str, Any]:
    """Held-out figures of the hardened model; the trainable layers are put back afterwards."""
    with session.hardened():
        set_arithmetic(session.network, "reference")
        made = sample(held_out.tapes, QUIET, "")
    found = latent_metrics(made, held_out.latents)
    return {"relative_l2": found["final_relative_l2"]["mean"], "psnr": found["latent_psnr"]}


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("build/bench_accuracy"),
    recipe: Annotated[str, typer.Option(help="Recipe that gives model, sampling and data.")] = "dit_w8a8",
    configs: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(CONFIGS),
    methods: Annotated[str, typer.Option(help="Comma-separated; all if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    evaluations: Annotated[int, typer.Option(help="Network evaluations per run.")] = 400,
    batch: Annotated[int, typer.Option(help="Samples per update.")] = 4,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 16,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: every n-th (config, seed) pair from the i-th.")] = "0/1",
) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    base, chosen = load_recipe(recipe), methods.split(",") if methods else list(METHODS)
    for config, seed in pairs_of(configs, seeds, shard):
        done = {(r["config"], r["seed"], r["method"], r["evaluations"]) for r in read_rows(out)}
        missing = [m for m in chosen if (config, seed, m, evaluations if METHODS[m] else 0) not in done]
        for initialization in ("round_to_nearest", "mse"):
            wanted = [m for m in missing if (m == "round to nearest") == (initialization == "round_to_nearest")]
            if wanted:
                one = bench_recipe(base, config, seed, batch, samples, initialization)
                _run_methods(one, wanted, config, seed, evaluations, out, shard)


def _run_methods(
    recipe: Recipe, methods: list[str], config: str, seed: int, evaluations: int, out: Path, shard: str
) -> None:
    """All methods of one model, from one preparation."""
    session = open_session(recipe, QUIET, KeptFiles(out, QUIET).inside(f"seed-{seed}"))
    with session.full_precision():
        held_out = held_out_reference(session.model, recipe, QUIET)
    start = session.snapshot()
    for name in methods:
        method = METHODS[name]
        session.restore(start)
        began = time.monotonic()
        row: dict[str, Any] = {
            "config": config,
            "seed": seed,
            "method": name,
            "evaluations": 0,
            "updates": 0,
            "seconds": 0.0,
        }
        if method is not None:
            count = updates(session, recipe.objective, method, evaluations)
            fields = recipe.objective.model_dump(mode="json") | method | {"iterations": count}
            made = _calibrate(session, fields)
            row |= {"evaluations": evaluations, "updates": count, "seconds": round(time.monotonic() - began, 1)} | made
        row |= hardened_error(session, held_out)
        add_row(out, row, shard)
        print(
            f"{config} seed {seed} {name:26} {row['relative_l2']:.4f} {row['psnr']:.2f} dB  {row['seconds']} s",
            flush=True,
        )


def _calibrate(session: Session, fields: dict[str, Any]) -> dict[str, Any]:
    """Make the updates; where roundings are learned, at the rate that is best on validation noise."""
    start, tried = session.snapshot(), list[tuple[float, float, Any, int]]()
    for rate in ROUNDING_RATES if "rounding" in fields["learn"] else (None,):
        session.restore(start)
        rates = fields["learning_rates"] | ({} if rate is None else {"rounding": rate})
        objective = Objective.model_validate_json(json.dumps(fields | {"learning_rates": rates}))
        assert objective.steps_per_group != "auto"
        loop = session.loop(objective, objective.steps_per_group)
        loop.run()
        if rate is None:
            return {"made": loop.network_evaluations}
        with session.hardened():
            set_arithmetic(session.network, "reference")
            error = validation_error(session)
        tried.append((error, rate, session.snapshot(), loop.network_evaluations))
    _, rate, snapshot, made = min(tried, key=lambda t: t[0])
    session.restore(snapshot)
    return {"made": made, "rounding_rate": rate, "tried": {t[1]: t[0] for t in tried}}


@app.command()
def table(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("build/bench_accuracy"),
) -> None:
    """Print Markdown: latent PSNR of MSE search, and every method's gain over it, paired by seed."""
    rows = read_rows(out)
    base = {(r["config"], r["seed"]): r["psnr"] for r in rows if r["method"] == "MSE search"}
    for evaluations in sorted({r["evaluations"] for r in rows} - {0}):
        print(f"\n{evaluations} network evaluations; dB over MSE search (itself in the first row: dB), mean ± standard")
        print("deviation over seeds (number of seeds)\n")
        print("| method | " + " | ".join(CONFIGS) + " | updates |\n|---|" + "---|" * (len(CONFIGS) + 1))
        shown = {"MSE search": "**MSE search**"}
        for method in sorted(METHODS, key=lambda m: m != "MSE search"):
            cells = []
            for config in CONFIGS:
                here = [r for r in rows if r["config"] == config and r["method"] == method]
                found = [
                    r["psnr"] - (0 if method == "MSE search" else base[config, r["seed"]])
                    for r in here
                    if r["evaluations"] in (0, evaluations) and (config, r["seed"]) in base
                ]
                spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
                sign = "" if method == "MSE search" else "+"
                cells.append(f"{statistics.mean(found):{sign}.2f}{spread} ({len(found)})" if found else "")
            made = {r["updates"] for r in rows if r["method"] == method and r["evaluations"] in (0, evaluations)}
            if any(cells):
                print(f"| {shown.get(method, method)} | {' | '.join(cells)} | {'/'.join(map(str, sorted(made)))} |")


if __name__ == "__main__":
    app()
