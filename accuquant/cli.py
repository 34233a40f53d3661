"""Command line. Exit codes: 0 done, 1 failed, 2 something in the recipe or arguments has to change, 130 interrupted."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table

from accuquant import __version__
from accuquant.console import Reporter
from accuquant.export import figures
from accuquant.model.checkpoint import CheckpointError
from accuquant.recipe import Cache, Recipe, RecipeError
from accuquant.recipe.file import list_shipped, load_recipe, shipped_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make diffusion models small and fast after training: quantize, calibrate over several denoising steps, "
    "export to a folder that plain diffusers loads.",
    epilog="Start with:\n\naccuquant calibrate dit_w8a8\n\naccuquant generate out/dit_w8a8 --class 3 --class 7",
)
# wide, so that names and paths stay in one piece in pipes; folding is the terminal's business
out = Console(highlight=False, markup=False, emoji=False, width=1000)
errors = Console(highlight=False, markup=False, emoji=False, width=1000, stderr=True)

CHANGEABLE = ("sampling.num_inference_steps", "sampling.guidance_scale", "model.", "data.path", "evaluation.", "cache")
CHANGEABLE_WORDS = ", ".join(key + "*" * (key[-1] == ".") for key in CHANGEABLE) + ".*"

RecipeName = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped one (see `accuquant recipes`).")
]
Folder = Annotated[
    Path,
    typer.Argument(help="A folder written by `accuquant calibrate`.", metavar="DIR", exists=True, file_okay=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: --set objective.steps_per_group=5. May be repeated."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help=f"Override a key of the export's recipe: {CHANGEABLE_WORDS}."),
]
OutputFolder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write, instead of export.output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same recipe.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing output (when the new one is whole); drop a partial run."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is being done.")]


@app.command(
    epilog="Examples:\n\naccuquant calibrate dit_w8a8 --dry-run\n\n"
    "accuquant calibrate mine.yaml --set objective.steps_per_group=5 --set quantization.rules.0.weight=int4 -o out/m5"
)
def calibrate(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: OutputFolder = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model by a recipe, tune it, evaluate it and export it.

    The output folder appears when it is whole. Interrupt with Ctrl-C and continue later with --resume.
    Exit codes: 0 done, 1 failed, 2 something in the recipe or the arguments has to change, 130 interrupted.
    """
    with _readable_errors(verbose):
        from accuquant.calibrate import calibrate as run
        from accuquant.calibrate import describe

        loaded = load_recipe(recipe, _with_output(overrides, output))
        if dry_run:
            planned, costs = describe(loaded)
            _print_plan(loaded, planned, costs)
            return
        with _nothing_lost(loaded, ".partial"):
            folder = run(loaded, Reporter(quiet, verbose), resume=resume, overwrite=overwrite)
        _print_metrics(folder)
        out.print(f"\nexport: {folder}\nreport: {folder / 'report.html'}")


@app.command(
    epilog="Examples:\n\naccuquant tune dit_tune --dry-run\n\naccuquant tune dit_tune --set tune.bit_operations=0.02"
)
def tune(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: OutputFolder = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose bit widths and feature cache together, under the budget in the recipe's section `tune`, and export it.

    Every candidate is confirmed by sampling; the report shows them all. The export's recipe.yaml makes the chosen point
    again with `accuquant calibrate`. Interrupt with Ctrl-C and continue later with --resume.
    """
    with _readable_errors(verbose):
        loaded = load_recipe(recipe, _with_output(overrides, output))
        if dry_run:
            _print_tuning_plan(loaded)
            return
        from accuquant.tune import tune as run

        with _nothing_lost(loaded, ".tuning"):
            folder = run(loaded, Reporter(quiet, verbose), resume=resume, overwrite=overwrite)
        _print_tried(json.loads((folder / "tuning.json").read_text(encoding="utf-8")))
        _print_metrics(folder)
        out.print(f"\nexport: {folder}\nrecipe: {folder / 'recipe.yaml'}\nreport: {folder / 'report.html'}")


@app.command(epilog="Example:\n\naccuquant evaluate out/dit_w8a8 --set evaluation.num_samples=200")
def evaluate(
    folder: Folder,
    overrides: Settings = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare an export with full precision on held-out classes and noise; rewrites metrics.json and report.html."""
    with _readable_errors(verbose):
        from accuquant.evaluate import evaluate as run
        from accuquant.evaluate import recipe_of

        run(folder, recipe_of(folder, _changeable(overrides)), Reporter(quiet, verbose))
        _print_metrics(folder)
        out.print(f"\nreport: {folder / 'report.html'}")


@app.command(epilog="Example:\n\naccuquant generate out/dit_w8a8 --class 3 --class 7 --seed 1 -o digits.png")
def generate(
    folder: Folder,
    inputs: Annotated[
        list[str] | None, typer.Option("--class", "--prompt", "-c", help="Class id or prompt; may be repeated.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Noise seed of the first image; the next ones count up.", min=0, max=2**31 - 1)
    ] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG to write, if not DIR/samples.png.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Compute in float on the dequantized weights.")
    ] = False,
    overrides: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Sample images from an export and write them as one PNG grid."""
    with _readable_errors():
        from accuquant.generate import generate as run

        target = output or folder / "samples.png"
        run(folder, inputs or [], seed, target, reference, Reporter(quiet), _changeable(overrides))
        out.print(f"images: {target}")


@app.command()
def inspect(folder: Folder) -> None:
    """Print what an export holds: each module's types, scales and size, and the path that computes it here."""
    with _readable_errors():
        from accuquant.contents import contents

        table, lines = contents(folder)
        out.print(table)
        out.print("\n" + "\n".join(lines))


@app.command()
def recipes() -> None:
    """List the recipes that travel with the package."""
    for name in list_shipped("recipes"):
        first = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        out.print(f"{name:24} {first.lstrip('# ')}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _print_plan(recipe: Recipe, planned: list[Any], costs: dict[str, Any]) -> None:
    groups = recipe.quantization.timestep_groups
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "kind", "shape", "weight", "activation", "tuned", "float kB", "export kB"):
        table.add_column(column)
    for p in planned:
        weight = "float" if p.spec is None else p.spec.weight + (f"/{p.spec.group_size}" if p.spec.group_size else "")
        activation = (
            "float"
            if p.spec is None or p.spec.activation == "float"
            else f"{p.spec.activation} {p.spec.activation_scale}"
        )
        sizes = (f"{p.float_bytes / 1e3:.1f}", f"{p.quantized_bytes(groups) / 1e3:.1f}")
        tuned = "yes" if p.tune else ""
        table.add_row(p.name, p.kind, f"{p.shape[0]}x{p.shape[1]}", weight, activation, tuned, *sizes)
    out.print(table)
    inside = [p for p in planned if p.spec]
    before, after = sum(p.float_bytes for p in planned), sum(p.quantized_bytes(groups) for p in planned)
    layers = sum(p.quantized_bytes(groups) for p in inside) / sum(p.float_bytes for p in inside)
    operations = sum(p.bit_operations for p in planned) / max(1, sum(p.macs * 32 * 32 for p in planned))
    evaluations = costs["network_evaluations"]
    rows = [
        ("modules", f"{len(inside)} quantized, {len(planned) - len(inside)} stay float"),
        (
            "size of these modules",
            f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB (quantized ones {layers:.3f} of float32)",
        ),
        ("bit-operations", f"{operations:.3f} of float32"),
        *([("cache", _cache_words(recipe.cache))] if recipe.cache else []),
        ("network evaluations", f"{evaluations['tuning']} tuning + {evaluations['sampling']} sampling"),
        ("memory beside the model", f"about {costs['memory_bytes'] / 1e9:.2f} GB + one step's activations"),
        ("estimated time", f"about {_duration(costs['seconds'])}"),
        ("output", recipe.export.output),
    ]
    out.print()
    for name, value in rows:
        out.print(f"{name:26} {value}")
    out.print("\ndry run: nothing was written")


def _cache_words(cache: Cache) -> str:
    """Forecast and schedule, as the recipe has them."""
    keys = ("interval", "tau", "target_nfc", "target_seconds", "schedule")
    how = ", ".join(f"{key} {getattr(cache, key)}" for key in keys if getattr(cache, key) is not None)
    return f"{cache.estimation}, order {cache.forecast_order}, {how}"


def _print_metrics(folder: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in figures(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))):
        table.add_row(*row)
    out.print(table)


def _print_tuning_plan(recipe: Recipe) -> None:
    from accuquant.budget import describe_tuning

    if recipe.tune is None:
        raise RecipeError("tune: the recipe has no such section; give it a budget, for example --set tune.nfc=14")
    rows, costs = describe_tuning(recipe)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("types", "full steps", "bit-operations"):
        table.add_column(column)
    for name, nfc, operations in rows:
        table.add_row(name, str(nfc), f"{operations:.4f}")
    out.print(table)
    budget = {key: getattr(recipe.tune, key) for key in ("nfc", "bit_operations", "seconds")}
    shown = ", ".join(f"{key} {value:g}" for key, value in budget.items() if value is not None)
    out.print(f"\n{'budget':26} {shown}")
    if recipe.tune.seconds:
        out.print(f"{'':26} seconds are measured when the search begins, and may pay for fewer full steps than above")
    out.print(f"{'calibrated':26} {costs['combinations']} of {len(rows)} combinations of types")
    out.print(f"{'rollouts':26} about {costs['rollouts']:.0f}")
    out.print(f"{'estimated time':26} about {_duration(costs['seconds'])}")
    out.print(f"{'output':26} {recipe.export.output}")
    out.print("\ndry run: nothing was written")


def _print_tried(tuning: dict[str, Any]) -> None:
    """The Pareto front of what was tried, the chosen point, what is equal to it, and the rivals."""
    rows = tuning["tried"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (
        "",
        "types",
        "cache",
        "calibrated",
        "NFC",
        "bit-operations",
        "seconds",
        "E_qc",
        "images",
        "log ratio",
        "tried in",
    ):
        table.add_column(column)
    for row in sorted(rows, key=lambda row: float(row["E_qc"])):
        own = next((name for name in ("chosen", "equal", "front") if row[name]), None)
        mark = ", ".join(name for name in (own, row["rival"]) if name)
        if mark:
            costs = (
                f"{row['nfc']:g}",
                f"{row['bit_operations']:.4f}",
                f"{row['seconds']:.2f}",
                f"{row['E_qc']:.4f}",
                f"{row['image_error']:.4f}",
                f"{row['ratio']['mean']:.3f} ± {row['ratio']['standard_error']:.3f}",
            )
            table.add_row(mark, row["types"], row["cache"], row["calibrated"], *costs, f"{row['elapsed']:.1f} s")
    out.print(table)
    out.print(
        "chosen by the log ratio to naive stacking, mean of both errors, latents (E_qc) and images, over samples, "
        "with its standard error"
    )
    if (equal := sum(row["equal"] for row in rows)) > 1:
        out.print(
            f"{equal} candidates are equal to the best within the standard error on {tuning['leaders_samples']} "
            "samples; the cheapest was taken"
        )
    out.print(f"{len(rows)} candidates were tried; the report shows them all\n")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _with_output(overrides: list[str] | None, output: Path | None) -> list[str]:
    target = [f"export.output={json.dumps(str(output), ensure_ascii=False)}"] if output else []
    return [*(overrides or []), *target]


def _changeable(overrides: list[str] | None) -> list[str]:
    """Overrides of an export's recipe; what its tensors or its held-out split hang on stays.

    Raises:
        RecipeError: a key that calibration has fixed.
    """
    for override in overrides or []:
        if not override.strip().startswith(CHANGEABLE):
            raise RecipeError(f"--set {override}: fixed by calibration; an export can change {CHANGEABLE_WORDS}")
    return overrides or []


@contextmanager
def _nothing_lost(recipe: Recipe, suffix: str) -> Iterator[None]:
    """Say of an interrupted run that it can go on, where it has left its folder."""
    try:
        yield
    except KeyboardInterrupt:
        if Path(f"{recipe.export.output}{suffix}").is_dir():
            errors.print("nothing is lost: the same command with --resume goes on")
        raise


@contextmanager
def _readable_errors(verbose: bool = False) -> Iterator[None]:
    """Errors the user can act on become one message and an exit code; a kill is an interruption."""
    if not verbose:
        diffusers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        yield
    except (RecipeError, CheckpointError) as error:
        errors.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from None
    except (OSError, FloatingPointError) as error:  # a full disk, no permission, a loss that is not a number
        errors.print(f"failed: {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    except torch.OutOfMemoryError as error:
        errors.print(f"failed: {error}\nLower objective.batch_size and evaluation.batch_size")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
