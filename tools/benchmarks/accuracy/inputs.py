"""What is gained by scales for each part of a concatenated input, and lost by quantizing attention's own products.

First scales only (MSE search), no update: a model's error of each single step, from full precision's own latents, and
of the final latents, over validation samples. A line of results.jsonl is a run; one that is there is not repeated:

    python -m tools.benchmarks.accuracy.inputs run
    python -m tools.benchmarks.accuracy.inputs table
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.calibration.session import Session, final_errors, open_session
from accuquant.core.metrics import relative_l2
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import load_recipe, parse_recipe
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
QUIET = Reporter(quiet=True)
DEFAULT_OUT = Path("tools/benchmarks/accuracy/results/inputs")
Out = Annotated[Path, typer.Option(help="Folder of the results.")]

MODELS = {
    "emoji-unet": ("emoji_w8a8", 20, {}),
    "emoji-sd3": ("emoji_w8a8", 28, {"max_sequence_length": 1}),
    "digits-dit": ("dit_w8a8", 50, {}),
}
TYPES = {"W8A8": ("int8", "int8"), "W4A8": ("int4", "int8"), "W4A6": ("int4", "int6")}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole inputs": {"split_inputs": False},
    "split": {"split_inputs": True},
    "attention, softmax float": {"split_inputs": False, "attention": {"softmax": "float"}},
    "attention": {"split_inputs": False, "attention": {}},
    "split, attention": {"split_inputs": True, "attention": {}},
}


def bench_recipe(model: str, types: str, variant: str, seed: int) -> Recipe:
    name, steps, arguments = MODELS[model]
    weight, activation = TYPES[types]
    tree = load_recipe(name).model_dump(mode="json")
    tree["model"]["id"] = f"bundled:{model}"
    tree["sampling"] |= {"num_inference_steps": steps, "arguments": arguments}
    tree["data"] |= {"num_samples": 8, "validation_samples": 16, "seed": seed}
    rules = [
        {"modules": ["first", "last", "embedding"], "weight": "float", "optional": True},
        {"modules": "modulation", "weight": "int8", "tune": False, "optional": True},
        {"modules": ["linear", "conv"], "weight": weight, "activation": activation},
    ]
    section = {
        key: value | {"activation": activation} if key == "attention" else value
        for key, value in VARIANTS[variant].items()
    }
    tree["quantization"] = {"timestep_groups": 5, "rules": rules} | section
    tree["objective"] = {"iterations": 0, "batch_size": 8}
    return parse_recipe(tree, "benchmark")


@torch.no_grad()
def step_errors(tapes: list[Tape]) -> float:
    """Mean relative L2 of what each step adds to the latents, from full precision's own."""
    found = [
        relative_l2(tape.per_sample(tape.step(i, tape.state(i))) - before, tape.per_sample(tape.state(i + 1)) - before)
        for tape in tapes
        for i in range(len(tape))
        for before in [tape.per_sample(tape.state(i))]
    ]
    return float(torch.cat(found).mean())


@app.command()
def run(
    models: Annotated[str, typer.Option(help="Which, with commas.")] = "emoji-unet",
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    out: Out = DEFAULT_OUT,
) -> None:
    """Measure what is not there yet."""
    known = {(row["model"], row["types"], row["variant"], row["seed"]) for row in read_rows(out)}
    for seed, model, types, variant in itertools.product(range(seeds), models.split(","), TYPES, VARIANTS):
        if (model, types, variant, seed) in known or ("split" in variant and model != "emoji-unet"):
            continue
        recipe = bench_recipe(model, types, variant, seed)
        session: Session = open_session(recipe, QUIET)
        steps = step_errors(list(session.reference.tapes))
        finals = final_errors(list(session.validation.tapes))
        row = {"model": model, "types": types, "variant": variant, "seed": seed}
        add_row(out, row | {"step": steps, "final": float(finals.mean()), "median": float(finals.median())})
        print(json.dumps(read_rows(out)[-1]))


@app.command()
def table(out: Out = DEFAULT_OUT) -> None:
    """Mean and spread over seeds, in per cent."""
    rows = read_rows(out)
    print("| model | types | | error of a step | of the final latents | median of samples |\n|---|---|---|---|---|---|")
    for model, types, variant in itertools.product(MODELS, TYPES, VARIANTS):
        own = [r for r in rows if (r["model"], r["types"], r["variant"]) == (model, types, variant)]
        if own:
            cells = [torch.tensor([100 * r[key] for r in own]) for key in ("step", "final", "median")]
            shown = [f"{float(c.mean()):.2f} ± {float(c.std()) if len(c) > 1 else 0:.2f}" for c in cells]
            print(f"| {model} | {types} | {variant} | {' | '.join(shown)} |")


if __name__ == "__main__":
    app()
