"""Tables of the command line: plans, what was tried, figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from accuquant.calibration.plan import PlannedModule
from accuquant.errors import RecipeError
from accuquant.evaluation.card import figures
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.rule import patterns_of
from accuquant.runtime.cache.controller import LEAST_SAVED

BUSY = 2.0  # times that a call of the denoiser takes longer than on a free machine, from which on it is said

# wide, so that names and paths stay in one piece in pipes; folding is the terminal's business
out = Console(highlight=False, markup=False, emoji=False, width=1000)


def print_plan(recipe: Recipe, planned: list[PlannedModule], costs: dict[str, Any]) -> None:
    groups = recipe.quantization.timestep_groups
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "kind", "shape", "weight", "activation", "tuned", "float kB", "export kB"):
        table.add_column(column)
    layers_planned = [p for p in planned if p.is_layer]
    for p in layers_planned:
        sizes = (f"{p.float_bytes / 1e3:.1f}", f"{p.quantized_bytes(groups) / 1e3:.1f}")
        shape, tuned = f"{p.shape[0]}x{p.shape[1]}", "yes" if p.tune else ""
        table.add_row(p.name, p.kind, shape, *_types(p), tuned, *sizes)
    out.print(table)
    inside = [p for p in planned if p.spec]
    before, after = sum(p.float_bytes for p in planned), sum(p.quantized_bytes(groups) for p in planned)
    layers = sum(p.quantized_bytes(groups) for p in inside) / sum(p.float_bytes for p in inside)
    operations = sum(p.bit_operations for p in planned) / max(1, sum(p.macs * 32 * 32 for p in planned))
    evaluations = costs["network_evaluations"]
    rows = [
        ("modules", f"{len(inside)} quantized, {len(layers_planned) - len(inside)} stay float"),
        (
            "size of these modules",
            f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB (quantized ones {layers:.3f} of float32)",
        ),
        ("attention's own products", _attention_words(planned)),
        ("bit-operations", f"{operations:.3f} of float32"),
        *([("cache", _cache_words(recipe.cache, costs["saved"]))] if recipe.cache else []),
        ("network evaluations", f"{evaluations['tuning']} tuning + {evaluations['sampling']} sampling"),
        ("memory beside the model", f"about {costs['memory_bytes'] / 1e9:.2f} GB + one step's activations"),
        ("estimated time", time_words(costs)),
        ("output", recipe.export.output),
    ]
    out.print()
    for name, value in rows:
        out.print(f"{name:26} {value}")
    out.print("\ndry run: nothing was written")


def _types(p: PlannedModule) -> tuple[str, str]:
    """What weight and activation become."""
    if (spec := p.spec) is None:
        return "float", "float"
    weight = spec.weight + (f"/{spec.group_size}" if spec.group_size else "")
    return weight, "float" if spec.activation == "float" else f"{spec.activation} {spec.activation_scale}"


def _attention_words(planned: list[PlannedModule]) -> str:
    """What share of all they are, and what Q with K and the softmax with V become."""
    own = [p for p in planned if p.kind == "attention"]
    share = sum(p.macs for p in own) / max(1, sum(p.macs for p in planned))
    types = {f"{of.activation} x {of.activation}, {of.softmax} x {of.activation}" for p in own if (of := p.attention)}
    count = sum(p.attention is not None for p in own)
    return f"{share:.0%} of all; " + (f"{' and '.join(sorted(types))} in {count} of {len(own)}" if types else "float")


def print_caught(found: list[Any]) -> None:
    """What each rule of a new recipe catches."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("modules", "weight", "activation", "count", "of the products", "of the weights"):
        table.add_column(column)
    for one in found:
        if one.rule is None and not one.modules:
            continue
        named = "no rule names them" if one.rule is None else ", ".join(patterns_of(one.rule.modules))
        types = ("float", "float") if one.rule is None else (one.rule.weight, one.rule.activation)
        table.add_row(named, *types, str(len(one.modules)), f"{one.products:.1%}", f"{one.weights:.1%}")
    out.print(table)


def time_words(costs: dict[str, Any]) -> str:
    """Of the run, and what other work on the machine does to it."""
    words = f"about {_duration(costs['seconds'])}"
    if costs["slowdown"] < BUSY:
        return words
    return f"{words} on a free machine; beside what runs here now a call takes {costs['slowdown']:.0f} times as long"


def _cache_words(cache: Cache, saved: float) -> str:
    """Forecast and schedule, as the recipe has them, and what a skipped step saves."""
    keys = ("interval", "tau", "target_nfc", "target_seconds", "schedule")
    how = ", ".join(f"{key} {getattr(cache, key)}" for key in keys if getattr(cache, key) is not None)
    little = " (less than half: name more cache.modules, or use feature: blocks)" if saved < LEAST_SAVED else ""
    words = f"{cache.estimation}, order {cache.forecast_order}, {how}"
    return f"{words}; a skipped step saves {saved:.0%} of the products{little}"


def print_metrics(folder: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in figures(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))):
        table.add_row(*row)
    out.print(table)


def print_tuning_plan(recipe: Recipe) -> None:
    from accuquant.tuning.budget import describe_tuning

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
    out.print(f"{'estimated time':26} {time_words(costs)}")
    out.print(f"{'output':26} {recipe.export.output}")
    out.print("\ndry run: nothing was written")


def print_tried(tuning: dict[str, Any]) -> None:
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
