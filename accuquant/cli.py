"""Command line. Exit codes: 0 done, 1 failed, 2 something in the recipe or arguments has to change, 130 interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from accuquant import __version__
from accuquant.console import Reporter
from accuquant.export import figures
from accuquant.model.checkpoint import CheckpointError
from accuquant.recipe import Recipe, RecipeError, list_shipped, load_recipe, shipped_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make diffusion models small and fast after training: quantize, calibrate over several denoising steps, export "
    "to a folder that plain diffusers loads.\n\nStart with:  accuquant calibrate dit_w8a8",
)
out = Console(highlight=False)

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (see `accuquant recipes`).")]
Folder = Annotated[Path, typer.Argument(help="A folder written by `accuquant calibrate`.", metavar="DIR")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set objective.steps_per_group=5. May be repeated.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is being done.")]


@app.command()
def calibrate(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write, instead of export.output.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same recipe.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output (when the new one is whole); drop a partial run.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model by a recipe, tune it, evaluate it and export it.

    The output folder appears when it is whole. Interrupt with Ctrl-C and continue later with --resume.
    """
    with _readable_errors():
        from accuquant.calibrate import calibrate as run
        from accuquant.calibrate import describe

        sets = [*(overrides or []), *([f"export.output={output}"] if output else [])]
        loaded = load_recipe(recipe, sets)
        beside = Path(recipe).parent if Path(recipe).is_file() else None
        if dry_run:
            planned, costs = describe(loaded, beside)
            _print_plan(loaded, planned, costs)
            return
        folder = run(loaded, Reporter(quiet, verbose), beside, resume, overwrite)
        _print_metrics(folder)
        out.print(f"\nexport: {folder}\nreport: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def evaluate(
    folder: Folder,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare an export with full precision on held-out classes and noise; rewrites metrics.json and report.html."""
    with _readable_errors():
        from accuquant.evaluate import evaluate as run
        from accuquant.evaluate import recipe_of

        run(folder, recipe_of(folder, overrides), Reporter(quiet, verbose))
        _print_metrics(folder)
        out.print(f"\nreport: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def generate(
    folder: Folder,
    inputs: Annotated[
        list[str] | None, typer.Option("--class", "--prompt", "-c", help="Class id or prompt; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed of the first image; the next ones count up.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG to write [default: DIR/samples.png].")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Compute in float on the dequantized weights.")] = False,
    quiet: Quiet = False,
) -> None:
    """Sample images from an export and write them as one PNG grid."""
    with _readable_errors():
        from accuquant.generate import generate as run

        target = output or folder / "samples.png"
        run(folder, inputs or [], seed, target, reference, Reporter(quiet))
        out.print(f"images: {target}", soft_wrap=True)


@app.command()
def inspect(folder: Folder) -> None:
    """Print what an export holds: each module's types, scales and size."""
    with _readable_errors():
        from accuquant.evaluate import load_export, recipe_of
        from accuquant.model.families import denoiser_of
        from accuquant.model.layers import quantized_layers

        denoiser = denoiser_of(load_export(folder, recipe_of(folder, ["model.device=cpu"])))
        table = Table(box=None, header_style="bold")
        for column in ("module", "shape", "weight", "group", "activation", "weight scale", "activation scale", "kB"):
            table.add_column(column, overflow="fold")
        total = 0
        for name, layer in quantized_layers(denoiser).items():
            spec = layer.spec
            size = sum(p.numel() * p.element_size() for p in layer.parameters())
            total += size
            scales = layer.activation_scale if spec.activation != "float" else None
            table.add_row(
                name,
                f"{layer.out_features}x{layer.in_features}",
                spec.weight + ("" if spec.symmetric else " asym"),
                str(spec.group_size or "row"),
                f"{spec.activation} {spec.activation_scale}" if spec.activation != "float" else "float",
                _span(layer.weight_scale),
                "" if scales is None else ("clip " if not spec.static else f"{len(scales)}: ") + _span(scales),
                f"{size / 1e3:.1f}",
            )
        out.print(table)
        rest = sum(p.numel() * p.element_size() for p in denoiser.parameters()) - total
        clock = denoiser.step_clock
        out.print(f"\nquantized layers {total / 1e6:.3f} MB, float rest {rest / 1e6:.3f} MB", soft_wrap=True)
        out.print(f"timestep groups: {clock.num_groups}, edges {[round(e, 2) for e in clock.edges]}", soft_wrap=True)  # type: ignore[union-attr, operator]


@app.command()
def recipes() -> None:
    """List the recipes that travel with the package."""
    for name in list_shipped("recipes"):
        first = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        out.print(f"{name:24} {first.lstrip('# ')}", soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _print_plan(recipe: Recipe, planned: list[Any], costs: dict[str, Any]) -> None:
    groups = recipe.quantization.timestep_groups
    table = Table(box=None, header_style="bold")
    for column in ("module", "kind", "shape", "weight", "activation", "tuned", "float kB", "export kB"):
        table.add_column(column, overflow="fold")
    for p in planned:
        weight = "float" if p.spec is None else p.spec.weight + (f"/{p.spec.group_size}" if p.spec.group_size else "")
        activation = "float" if p.spec is None or p.spec.activation == "float" else f"{p.spec.activation} {p.spec.activation_scale}"
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
        ("size of these modules", f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB (quantized ones {layers:.3f} of float32)"),
        ("bit-operations", f"{operations:.3f} of float32"),
        ("network evaluations", f"{evaluations['tuning']} tuning + {evaluations['sampling']} sampling"),
        ("memory beside the model", f"about {costs['memory_bytes'] / 1e9:.2f} GB + one step's activations"),
        ("estimated time", f"about {_duration(costs['seconds'])}"),
        ("output", recipe.export.output),
    ]
    out.print()
    for name, value in rows:
        out.print(f"{name:26} {value}", soft_wrap=True)
    out.print("\ndry run: nothing was written")


def _print_metrics(folder: Path) -> None:
    import json

    table = Table(box=None, show_header=False)
    for row in figures(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))):
        table.add_row(*row)
    out.print(table)


def _span(values: Any) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors the user can act on become one message and exit code 2; a kill is an interruption."""
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        yield
    except (RecipeError, CheckpointError) as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing is lost: the same command with --resume goes on", markup=False)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
