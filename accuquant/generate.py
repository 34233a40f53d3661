"""Sample from an export with its own pipeline and lay the images out in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from accuquant.console import Reporter
from accuquant.data import load_split
from accuquant.evaluate import load_export, recipe_of
from accuquant.model.families import denoiser_of, family_of
from accuquant.model.layers import set_arithmetic
from accuquant.recipe import RecipeError

MIN_TILE = 96  # pixels; smaller images are enlarged by whole factors, so that a person can see them
DEFAULT_IMAGES = 10


def generate(folder: Path, inputs: list[str], seed: int, target: Path, reference: bool, reporter: Reporter) -> None:
    """Write a grid of one image for each input to ``target``.

    Args:
        inputs: class ids or prompts as text; empty takes the first ones of the recipe's data.
        reference: compute in float on the dequantized values instead of integers.

    Raises:
        RecipeError: the folder is no export, or a class id is no whole number of this model.
    """
    recipe = recipe_of(folder)
    pipeline = load_export(folder, recipe)
    family = family_of(pipeline)
    if reference:
        set_arithmetic(denoiser_of(pipeline), "reference")
    conditions: list[Any] = list(inputs)
    if family.condition == "class_id":
        conditions = [_class_id(text, pipeline) for text in inputs]
    if not conditions:
        split = load_split(recipe.data, family.condition)
        conditions = sorted(split.calibration + split.held_out)[:DEFAULT_IMAGES]
    reporter.say(f"sampling {len(conditions)} images, {recipe.sampling.num_inference_steps} steps")
    pipeline.set_progress_bar_config(disable=reporter.quiet)
    images = pipeline(
        conditions,
        guidance_scale=recipe.sampling.guidance_scale,
        num_inference_steps=recipe.sampling.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(conditions))],
    ).images
    target.parent.mkdir(parents=True, exist_ok=True)
    grid(images).save(target)


def grid(images: list[Image.Image]) -> Image.Image:
    """Images of one size on a near-square sheet."""
    width, height = images[0].size
    factor = max(1, math.ceil(MIN_TILE / max(width, height)))
    columns = min(len(images), max(1, math.ceil(math.sqrt(2 * len(images)))))
    rows = math.ceil(len(images) / columns)
    step = (width * factor + 4, height * factor + 4)
    sheet = Image.new("RGB", (columns * step[0] - 4, rows * step[1] - 4), "white")
    for i, image in enumerate(images):
        tile = image.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(tile, ((i % columns) * step[0], (i // columns) * step[1]))
    return sheet


def _class_id(text: str, pipeline: Any) -> int:
    count = int(pipeline.transformer.config.num_embeds_ada_norm)
    if text in pipeline.labels:
        return int(pipeline.labels[text])
    if not text.isdigit() or int(text) >= count:
        raise RecipeError(f"--class {text!r}: give a class id from 0 to {count - 1}, or a label of this model")
    return int(text)
