"""Command line. Exit codes: 0 done, 1 failed, 2 something in the recipe or arguments has to change, 130 interrupted."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from accuquant.errors import AccuQuantError, RecipeError
from accuquant.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make diffusion models small and fast after training: quantize, calibrate over several denoising steps, "
    "export to a folder that plain diffusers loads.",
    epilog="Start with:\n\naccuquant calibrate dit_w8a8\n\naccuquant generate out/dit_w8a8 --class 3 --class 7",
)
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
    with _readable_errors():
        from accuquant.recipe.file import load_recipe

        loaded = load_recipe(recipe, _with_output(overrides, output))
        _quiet_diffusers(verbose)
        from accuquant.cli.plan_view import print_metrics, print_plan
        from accuquant.programs.calibrate import calibrate as run
        from accuquant.programs.describe import describe
        from accuquant.progress import Reporter

        if dry_run:
            planned, costs = describe(loaded)
            print_plan(loaded, planned, costs)
            return
        with _nothing_lost(loaded.export.output, ".partial"):
            folder = run(loaded, Reporter(quiet, verbose), resume=resume, overwrite=overwrite)
        print_metrics(folder)
        typer.echo(f"\nexport: {folder}\nreport: {folder / 'report.html'}")


@app.command(
    epilog="Examples:\n\naccuquant tune dit_tune --dry-run\n\naccuquant tune dit_tune --set tune.bit_operations=0.03"
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
    with _readable_errors():
        from accuquant.recipe.file import load_recipe

        loaded = load_recipe(recipe, _with_output(overrides, output))
        _quiet_diffusers(verbose)
        from accuquant.cli.plan_view import print_metrics, print_tried, print_tuning_plan
        from accuquant.programs.tune import tune as run
        from accuquant.progress import Reporter

        if dry_run:
            print_tuning_plan(loaded)
            return
        with _nothing_lost(loaded.export.output, ".tuning"):
            folder = run(loaded, Reporter(quiet, verbose), resume=resume, overwrite=overwrite)
        print_tried(json.loads((folder / "tuning.json").read_text(encoding="utf-8")))
        print_metrics(folder)
        typer.echo(f"\nexport: {folder}\nrecipe: {folder / 'recipe.yaml'}\nreport: {folder / 'report.html'}")


@app.command(epilog="Example:\n\naccuquant evaluate out/dit_w8a8 --set evaluation.num_samples=200")
def evaluate(
    folder: Folder,
    overrides: Settings = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare an export with full precision on held-out classes and noise; rewrites metrics.json and report.html."""
    with _readable_errors():
        changes = _changeable(overrides)
        _quiet_diffusers(verbose)
        from accuquant.cli.plan_view import print_metrics
        from accuquant.export.load import recipe_of
        from accuquant.programs.evaluate import evaluate as run
        from accuquant.progress import Reporter

        run(folder, recipe_of(folder, changes), Reporter(quiet, verbose))
        print_metrics(folder)
        typer.echo(f"\nreport: {folder / 'report.html'}")


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
        changes, target = _changeable(overrides), output or folder / "samples.png"
        _quiet_diffusers()
        from accuquant.cli.generate import generate as run
        from accuquant.progress import Reporter

        run(folder, inputs or [], seed, target, reference, Reporter(quiet), changes)
        typer.echo(f"images: {target}")


@app.command(epilog="Example:\n\naccuquant inspect out/dit_w8a8 --measure")
def inspect(
    folder: Folder,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the paths on this machine, and use the fastest from now on.")
    ] = False,
) -> None:
    """Print what an export holds: each module's types, scales and size, the path that computes it here and why.

    Paths are chosen by a rule. With --measure the fastest are kept in the cache folder ($ACCUQUANT_CACHE, or accuquant
    in the user's) for this CPU, number of threads and versions, and every load takes them; delete the file to go back.
    The environment variable ACCUQUANT_PATH fixes one path for all layers that it can compute.
    """
    with _readable_errors():
        _quiet_diffusers()
        from accuquant.cli.inspect import contents
        from accuquant.cli.plan_view import out

        table, lines = contents(folder, measure)
        out.print(table)
        typer.echo("\n" + "\n".join(lines))


@app.command(
    epilog="Examples:\n\naccuquant new bundled:emoji-sd3\n\naccuquant new ./my-flux --preset w4a8 -o my_flux.yaml"
)
def new(
    model: Annotated[str, typer.Argument(help="`bundled:NAME`, a local folder in diffusers format, or a hub id.")],
    preset: Annotated[str, typer.Option(help="w8a8, w4a8, w8a16, w4a16 or fp8.")] = "w8a8",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Recipe to write, if not MODEL_PRESET.yaml here.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON-lines file of rows that the pipeline is called with; shipped if absent.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="num_inference_steps; the pipeline's own if absent.", min=2)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing recipe.")] = False,
) -> None:
    """Write a recipe for any diffusers pipeline: rules by kind of module, found from one recorded call.

    The recipe's comments say how many modules each rule catches, what share of the products they are, and what stays
    float and why.
    """
    with _readable_errors():
        _quiet_diffusers()
        from accuquant.cli.plan_view import print_caught
        from accuquant.programs.new import new_recipe

        target = output or Path(f"{re.sub('[^A-Za-z0-9]+', '_', model.rpartition(':')[2]).strip('_')}_{preset}.yaml")
        print_caught(new_recipe(model, preset, target, data, steps, overwrite))
        typer.echo(f"\nrecipe: {target}\nnext: accuquant calibrate {target} --dry-run")


@app.command()
def recipes() -> None:
    """List the recipes that travel with the package."""
    from accuquant.recipe.file import list_shipped, shipped_folder

    for name in list_shipped("recipes"):
        first = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:24} {first.lstrip('# ')}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


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
def _nothing_lost(output: str, suffix: str) -> Iterator[None]:
    """Say of an interrupted run that it can go on, where it has left its folder."""
    try:
        yield
    except KeyboardInterrupt:
        if Path(f"{output}{suffix}").is_dir():
            typer.echo("nothing is lost: the same command with --resume goes on", err=True)
        raise


def _quiet_diffusers(verbose: bool = False) -> None:
    """Import diffusers, which takes seconds, and leave its bars and warnings to those who ask for them."""
    for library in ("diffusers", "transformers"):  # of which the core has the first only
        if not verbose and find_spec(library) is not None:
            logging = import_module(f"{library}.utils.logging")
            logging.disable_progress_bar()
            logging.set_verbosity_error()


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors the user can act on become one message and an exit code; a kill is an interruption."""
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        yield
    except AccuQuantError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (OSError, FloatingPointError) as error:  # a full disk, no permission, a loss that is not a number
        typer.echo(f"failed: {error}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        typer.echo(f"failed: {error}\nLower objective.batch_size and evaluation.batch_size", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
