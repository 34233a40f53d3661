"""A first recipe for a model that nobody here has heard of: what each rule catches, and what stays float and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from accuquant.calibration.opened import opened
from accuquant.calibration.plan import PlannedModule, deciding
from accuquant.errors import RecipeError
from accuquant.files import write_text
from accuquant.pipeline.loading import load_pipeline
from accuquant.pipeline.rows import classes_of, is_unconditional
from accuquant.pipeline.seams import default_of, required, takes
from accuquant.recipe import Model, Recipe, Rule
from accuquant.recipe.file import find_shipped, load_recipe, parse_recipe
from accuquant.recipe.presets import PRESETS
from accuquant.recipe.rule import patterns_of

WHY = {"first": "reads the latents", "last": "writes the output", "embedding": "embeds conditions"}
STEPS, GROUPS = 50, 10  # where a pipeline's call has no default, and as recipes have
IMAGENET = 1000


@dataclass(frozen=True)
class Caught:
    """What one rule decides; of no rule, what none names.

    Attributes:
        products, weights: share of all multiply-adds of Linear and Conv2d, and of their weights.
    """

    rule: Rule | None
    modules: list[PlannedModule]
    products: float
    weights: float


def new_recipe(
    model_id: str, preset: str, output: Path, data: str | None = None, steps: int | None = None, overwrite: bool = False
) -> list[Caught]:
    """Write a recipe for a model, and data beside it where none is shipped that fits.

    Args:
        model_id: as a recipe's ``model.id``.
        data: JSON-lines file; by default shipped prompts, or the numbers of the model's classes.
        steps: by default the pipeline's own.

    Returns:
        What each rule catches, and at last what none names.

    Raises:
        RecipeError: the file exists, nothing is known to call the pipeline with, it cannot be loaded or recorded, or a
            rule does not fit.
    """
    if output.exists() and not overwrite:
        raise RecipeError(f"{output} exists; name another file with --output, or replace it with --overwrite")
    pipeline = load_pipeline(Model(id=model_id))
    name, file = given_data(data) if data else usual_data(pipeline, output)
    sampling = usual_sampling(pipeline) | ({"num_inference_steps": steps} if steps else {})
    tree: dict[str, Any] = {
        "model": {"id": model_id},
        "sampling": sampling,
        "data": {"path": str(file)},
        "quantization": {"timestep_groups": min(GROUPS, sampling["num_inference_steps"]), "preset": preset},
        "objective": usual_objective(preset),
        "export": {"output": f"out/{output.stem}"},
    }
    recipe = parse_recipe(tree, f"a recipe for {model_id}")
    model = opened(pipeline, recipe)
    planned = model.counted(model.plan(recipe))
    found = caught(planned, recipe.quantization.rules)
    write_text(output, as_yaml(recipe, name, found, planned, never(model.network)))
    load_recipe(output)
    return found


def usual_sampling(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The steps and the guidance that the pipeline's call has by default."""
    return {
        "num_inference_steps": default_of(pipeline, "num_inference_steps") or STEPS,
        "guidance_scale": default_of(pipeline, "guidance_scale"),
    }


def given_data(data: str) -> tuple[str, Path]:
    """What a recipe calls data that the user names, and where that is."""
    file = find_shipped("calib_data", data).resolve()
    return (str(file) if Path(data).is_file() else data), file


def usual_data(pipeline: DiffusionPipeline, output: Path) -> tuple[str, Path]:
    """What a recipe calls its data, and where that is: shipped, or the model's classes, written beside the recipe.

    Raises:
        RecipeError: the pipeline wants something else than prompts, classes or nothing.
    """
    if is_unconditional(pipeline):
        return "unconditional.jsonl", find_shipped("calib_data", "unconditional.jsonl")
    others = [name for name in required(pipeline) if name not in ("prompt", "class_labels")]
    pictures = [name for name in ("image", "video") if takes(pipeline, name)]
    classes = classes_of(pipeline)
    if others or pictures or not (takes(pipeline, "prompt") or (takes(pipeline, "class_labels") and classes)):
        wants = ", ".join([*others, *pictures, *(n for n in ("prompt", "class_labels") if takes(pipeline, n))])
        raise RecipeError(
            f"{type(pipeline).__name__} is called with {wants or 'what only you know'}; write a JSON-lines file of "
            'rows such as {"prompt": "a fox", "image": "fox.png"} and give it as --data'
        )
    if takes(pipeline, "prompt"):
        return "prompts.jsonl", find_shipped("calib_data", "prompts.jsonl")
    if len(classes) == IMAGENET:
        return "imagenet_classes.jsonl", find_shipped("calib_data", "imagenet_classes.jsonl")
    file = output.with_suffix(".jsonl")
    if not file.exists():
        write_text(file, "".join(json.dumps({"class_labels": number}) + "\n" for number in classes))
    return file.name, file.resolve()


def usual_objective(preset: str) -> dict[str, Any]:
    """What the updates learn, which depends on whether activations have scales."""
    activations = any(rule.get("activation", "float") != "float" for rule in PRESETS.get(preset, []))
    learn = ["weight", "weight_scale", *(["activation_scale"] if activations else [])]
    return {"target": "auto", "iterations": 300, "learn": learn}


def caught(planned: list[PlannedModule], rules: Sequence[Rule]) -> list[Caught]:
    """What each rule decides, and at last what none does."""
    planned = [p for p in planned if p.is_layer]
    products = sum(p.macs for p in planned) or 1
    weights = sum(p.shape[0] * p.shape[1] for p in planned) or 1
    by_rule: dict[int | None, list[PlannedModule]] = {}
    for p in planned:
        by_rule.setdefault(deciding(rules, p.module, p.kinds), []).append(p)
    found = list[Caught]()
    for i, rule in [*enumerate(rules), (None, None)]:
        own = by_rule.get(i, [])
        shares = sum(p.macs for p in own) / products, sum(p.shape[0] * p.shape[1] for p in own) / weights
        found.append(Caught(rule, own, *shares))
    return found


def never(network: nn.Module) -> dict[str, int]:
    """How many modules there are of each type that holds weights and is never quantized, but for norms."""
    names = (
        type(m).__name__
        for m in network.modules()
        if not isinstance(m, nn.Linear | nn.Conv2d) and next(m.parameters(recurse=False), None) is not None
    )
    return {name: count for name, count in Counter(names).items() if "Norm" not in name}


def as_yaml(recipe: Recipe, data: str, found: list[Caught], planned: list[PlannedModule], never: dict[str, int]) -> str:
    """The recipe as a person would write it, with what is known of it in comments."""
    rules = list[str]()
    for one in found:
        if one.rule is not None:
            rules += [f"    # {line}" for line in words(one)] + [f"    - {_flow(one.rule)}"]
    named_by_none = found[-1]
    if named_by_none.modules:
        rules += [f"    # no rule names: {words(named_by_none)[0]} (it never runs, or cannot be quantized)"]
    if never:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(never.items()))
        rules += [f"    # always float, since only Linear and Conv2d are quantized: {kinds}"]
    if split := {p.module for p in planned if p.split}:
        rules += [f"  split_inputs: true  # {len(split)} modules read a concatenation: {min(split)} ..."]
    attention = sum(p.macs for p in planned if p.kind == "attention") / (sum(p.macs for p in planned) or 1)
    if attention:
        rules += [f"  # attention: {{activation: int8}}  # its own products, {attention:.1%} of all, stay float"]
    sampling, objective = recipe.sampling, recipe.objective
    return "\n".join(
        [
            f"# {recipe.model.id}, found from one recorded call; --dry-run says what it costs",
            f"model:\n  id: {json.dumps(recipe.model.id)}\n",
            f"sampling:\n  num_inference_steps: {sampling.num_inference_steps}\n"
            f"  guidance_scale: {'null' if sampling.guidance_scale is None else sampling.guidance_scale}\n",
            f"data:\n  path: {json.dumps(data)}\n",
            f"quantization:\n  timestep_groups: {recipe.quantization.timestep_groups}\n  rules:",
            *rules,
            f"\nobjective:\n  target: {objective.target}  # tries every objective on validation noise",
            f"  iterations: {objective.iterations}\n  learn: [{', '.join(objective.learn)}]\n",
            f"export:\n  output: {json.dumps(recipe.export.output)}\n",
        ]
    )


def words(one: Caught) -> list[str]:
    """What a rule catches, and where they stay float why."""
    count, first = len(one.modules), one.modules[0].name if one.modules else "none"
    said = f"{count} modules, {one.products:.1%} of the products, {one.weights:.1%} of the weights: {first}"
    lines = [said + (" ..." if count > 1 else "")]
    if one.rule is not None and one.rule.weight == "float":
        kinds = [kind for kind in patterns_of(one.rule.modules) if any(kind in p.kinds for p in one.modules)]
        lines.append("float: " + ", ".join(f"{kind} {WHY[kind]}" for kind in kinds if kind in WHY))
    return lines


def _flow(rule: Rule) -> str:
    """A rule in one line of YAML, without what it has by default."""
    given = rule.model_dump(mode="json", exclude_defaults=True)
    given["modules"] = rule.modules if isinstance(rule.modules, str) else list(rule.modules)

    def value(of: Any) -> str:
        if isinstance(of, list):
            return f"[{', '.join(map(value, of))}]"
        return str(of).lower() if isinstance(of, bool) else str(of)

    return "{" + ", ".join(f"{key}: {value(of)}" for key, of in given.items()) + "}"
