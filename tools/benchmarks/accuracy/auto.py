"""Does `objective.target: auto` pick the better objective? Every candidate at its full budget, and what auto takes.

Two models on which different objectives are ahead: the bundled digits transformer (50 steps, W4A8, groups of 32) and a
small U-Net (`tools/train_small_unet.py`; 20 steps, int4 a scale per output channel). Each candidate is run with each
rung's share of its updates and with all of them, from the same start; the choice is then made of the trials'
validation errors by `accuquant.calibration.choice` itself, and judged by held-out error. A line of results.jsonl is a
run; one that is there is not repeated, so the tool can be stopped and started at will, and several can work at once:

    python tools/train_small_unet.py --out build/small-unet
    python -m tools.benchmarks.accuracy.auto run --unet build/small-unet
    python -m tools.benchmarks.accuracy.auto table
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.calibration.choice import LEAST_UPDATES, RUNGS, Candidate, Trial, candidates, halve, try_candidate
from accuquant.calibration.session import open_session
from accuquant.calibration.updates import STATE
from accuquant.core.metrics import latent_psnr, relative_l2
from accuquant.evaluation.measure import HeldOut, held_out_reference, sample
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import load_recipe, parse_recipe
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
QUIET = Reporter(quiet=True)
HELD_OUT, BATCH = 24, 12
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
DEFAULT_OUT = Path("tools/benchmarks/accuracy/results/auto")

DIT_RULES = [
    {
        "modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*",
        "weight": "int4",
        "activation": "int8",
        "granularity": "group",
        "group_size": 32,
    },
    {"modules": r"transformer_blocks\.\d+\.norm1\.linear", "weight": "int8", "tune": False},
]
UNET_RULES = [{"modules": r"(down_blocks|mid_block|up_blocks)\..*", "weight": "int4", "activation": "int8"}]


def bench_recipe(model: str, seed: int, evaluations: int, unet: Path) -> Recipe:
    """Of one of the two models; no update is made by itself."""
    tree = load_recipe("dit_w8a8").model_dump(mode="json")
    tree["data"] |= {"num_samples": 16, "seed": seed}
    tree["quantization"] |= {"rules": DIT_RULES}
    if model == "unet":
        tree["model"]["id"], tree["data"]["path"] = str(unet.resolve()), str((unet / "prompts.jsonl").resolve())
        tree["sampling"] |= {"num_inference_steps": 20, "guidance_scale": 3.0}
        tree["quantization"] |= {"rules": UNET_RULES, "timestep_groups": 5}
    tree["objective"] = {"target": "auto", "iterations": evaluations, "batch_size": 4}
    tree["evaluation"] |= {"num_samples": HELD_OUT, "batch_size": BATCH, "reconstruct": False}
    return parse_recipe(tree, "benchmark")


def held_out_error(held_out: HeldOut) -> dict[str, float]:
    final, reference = sample(held_out.tapes, QUIET, "").latents, held_out.latents
    return {"held_out": float(relative_l2(final, reference).mean()), "psnr": latent_psnr(final, reference)}


def shares_of(updates: int) -> list[float]:
    """Those that are a trial."""
    return [s for s in (*RUNGS, 1.0) if int(s * updates) >= LEAST_UPDATES]


@app.command()
def run(
    out: Out = DEFAULT_OUT,
    unet: Annotated[Path, typer.Option(help="Folder of the small U-Net.")] = Path("build/small-unet"),
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "dit,unet",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1",
    evaluations: Annotated[int, typer.Option(help="Network evaluations of the whole budget.")] = 480,
) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, seeds.split(",")):
        for model in models.split(","):
            recipe = bench_recipe(model, seed, evaluations, unet)
            kept = KeptFiles(out, QUIET).inside(f"{model}-{seed}")
            session = open_session(recipe, QUIET, kept)
            with session.full_precision():
                held_out = held_out_reference(session.model, recipe, QUIET)
            about = {"model": model, "seed": seed, "evaluations_asked": evaluations}
            if not any(same(row, about | {"share": 0}) for row in read_rows(out)):
                write(out, about | {"share": 0} | held_out_error(held_out))
            start = session.snapshot()
            for candidate in candidates(recipe.objective, session.num_steps):
                updates = candidate.updates(session.job(recipe.objective), evaluations)
                for share in shares_of(updates):
                    key = about | asdict(candidate) | {"share": share}
                    if any(same(row, key) for row in read_rows(out)):
                        continue
                    began, each = time.monotonic(), int(share * updates)
                    trial = try_candidate(session, recipe.objective, candidate, each, kept, STATE)
                    kept.path(STATE).unlink(missing_ok=True)
                    about_it = {"updates_of_each": each, "seconds": round(time.monotonic() - began, 1)}
                    row = key | asdict(trial) | about_it
                    write(out, row | (held_out_error(held_out) if share == 1.0 else {}))
                    session.restore(start)


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row.get(k) == v for k, v in key.items())


def write(out: Path, row: dict[str, Any]) -> None:
    add_row(out, row)
    print(json.dumps(row), flush=True)


def as_trial(row: dict[str, Any]) -> Trial:
    return Trial(**{k: row[k] for k in Trial.__dataclass_fields__})


@app.command()
def table(out: Out = DEFAULT_OUT) -> None:
    """Print Markdown: gain of each candidate over the first scales, held out, and what auto took."""
    rows = read_rows(out)
    points = sorted({(r["model"], r["seed"], r["evaluations_asked"]) for r in rows})
    columns = list(dict.fromkeys(as_trial(r).candidate for r in rows if r["share"]))
    print("| model, seed | MSE search | " + " | ".join(f"{c.name}, x {c.rate:g}" for c in columns), end="")
    print(" | auto takes | behind the best |\n|---|---|" + "---|" * (len(columns) + 2))
    for model, seed, evaluations in points:
        here = [r for r in rows if (r["model"], r["seed"], r["evaluations_asked"]) == (model, seed, evaluations)]
        base = next(r["psnr"] for r in here if r["share"] == 0)
        runs = {(as_trial(r).candidate, r["share"]): r for r in here if r["share"]}
        full = {c: runs[c, 1.0]["psnr"] - base for c in columns if (c, 1.0) in runs}
        whole = {c: runs[c, 1.0]["updates_of_each"] for c in full}

        def attempt(c: Candidate, count: int, runs: Any = runs) -> Trial:
            return next(as_trial(r) for (one, _), r in runs.items() if one == c and r["updates_of_each"] == count)

        choice, _ = halve(whole, attempt)
        cells = [f"{full[c]:+.2f}" if c in full else "" for c in columns]
        print(f"| {model}, {seed} | {base:.2f} dB | {' | '.join(cells)} | {choice.name}, x {choice.rate:g}", end="")
        print(f" | {max(full.values()) - full[choice]:.2f} dB |")


if __name__ == "__main__":
    app()
