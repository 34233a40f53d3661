"""Sample from an export with its own pipeline and lay the images out in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from accuquant.errors import RecipeError, first_line, nearest
from accuquant.export.load import exported_networks, load_export, recipe_of
from accuquant.pipeline.data import Samples, draw, load_split
from accuquant.pipeline.record import drawing_from
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.rows import FOR_PEOPLE, FORMER, Row, asked_for, call_of, classes_of, is_unconditional
from accuquant.pipeline.seams import takes
from accuquant.progress import Reporter
from accuquant.runtime.arithmetic import set_arithmetic

MIN_TILE = 96  # pixels; smaller images are enlarged by whole factors, so that a person can see them
DEFAULT_IMAGES = 10


def generate(
    folder: Path,
    inputs: list[str],
    seed: int,
    target: Path,
    reference: bool,
    reporter: Reporter,
    overrides: list[str] | None = None,
) -> None:
    """Write a grid of one image for each input to ``target``.

    Args:
        inputs: class ids or prompts as text; empty takes the first ones of the recipe's data.
        reference: compute in float on the dequantized values instead of integers.

    Raises:
        RecipeError: the folder is no export, this model has no such class, the pipeline wants more than that or gives
            no pictures, or ``target`` is no name of a PNG.
    """
    if target.suffix.lower() != ".png":
        raise RecipeError(f"--output {target}: the grid is a PNG; give a file name that ends in .png")
    recipe = recipe_of(folder, overrides)
    pipeline = load_export(folder, recipe, reporter)
    if reference:
        if recipe.export.format == "torchao":
            raise RecipeError(
                "--reference: is the arithmetic of accuquant's own format; this export computes in torchao"
            )
        for network in exported_networks(pipeline).values():
            set_arithmetic(network, "reference")
    classes = takes(pipeline, "class_labels")
    split = load_split(recipe.data, pipeline)
    if is_unconditional(pipeline) and inputs:
        name = type(pipeline).__name__
        raise RecipeError(f"--class {inputs[0][:60]!r}: {name} is unconditional; leave it out, and vary --seed")
    known = split.calibration[0]  # what a row has beside what is asked for: a size, a picture
    asking = ("class_labels", "prompt", FOR_PEOPLE)
    beside = {key: value for key, value in known.items() if FORMER.get(key, key) not in asking}
    asked: list[Row] = [{"class_labels": _class_id(t, pipeline)} if classes else {"prompt": t} for t in inputs]
    rows = [beside | row for row in asked]
    if not rows:
        rows = sorted(split.calibration + split.held_out, key=lambda row: str(asked_for(row)))[:DEFAULT_IMAGES]
    if is_unconditional(pipeline):
        rows = draw(rows, DEFAULT_IMAGES, seed).rows
    target.parent.mkdir(parents=True, exist_ok=True)
    reporter.say(f"sampling {len(rows)} image(s), {recipe.sampling.num_inference_steps} steps")
    pipeline.set_progress_bar_config(disable=reporter.quiet or None)  # None: on terminals only
    setting = recipe.sampling.settings
    samples, images = Samples(rows, [seed + i for i in range(len(rows))]), list[Image.Image]()
    for part in Recorder(pipeline, recipe.sampling, split.folder).batches(samples, len(samples)):
        with drawing_from(part.seeds[0], pipeline):
            images += pictures(called(pipeline, call_of(pipeline, part.rows, part.seeds, setting, split.folder)))
    grid(images).save(target)


def called(pipeline: Any, call: dict[str, Any]) -> Any:
    """What the pipeline gives.

    Raises:
        RecipeError: it does not take this call.
    """
    try:
        return pipeline(**call)
    except (ValueError, TypeError) as error:
        what = f"{type(pipeline).__name__} cannot be called with {', '.join(call)}"
        raise RecipeError(f"{what}: {first_line(error)}") from error


def pictures(made: Any) -> list[Image.Image]:
    """One of each sample: its image, or the frame in the middle of its film.

    Raises:
        RecipeError: the pipeline gives neither.
    """
    if isinstance(found := getattr(made, "images", None), list):
        return found
    if isinstance(films := getattr(made, "frames", None), list):
        return [film[len(film) // 2] for film in films]
    if isinstance(films, np.ndarray):  # (B, F, H, W, C) in [0, 1]
        return [Image.fromarray((255 * film[len(film) // 2]).round().astype("uint8")) for film in films]
    raise RecipeError(f"{type(made).__name__} holds neither images nor frames: load the export with diffusers instead")


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
    """A label of the model, or the number of a class it was trained on."""
    labels = pipeline.labels
    known = classes_of(pipeline)
    if text in labels:
        return int(labels[text])
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) in known:
        return int(text)
    hint = nearest(text[:60], labels)
    raise RecipeError(f"--class {text[:60]!r}: this model has the classes {known[0]} to {known[-1]}{hint}")
