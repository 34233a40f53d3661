"""Rows of calibration data as calls of a pipeline: a row is what a person would pass to it.

    {"prompt": "a cat"}    {"class_labels": 3}    {"prompt": "a cat", "image": "in.png", "strength": 0.6}    {}

Several rows are one call. What a pipeline takes a list of, one for each sample, is gathered; of anything else all rows
have to say the same. An unconditional pipeline is called with nothing, and told how many samples to make.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from accuquant.errors import RecipeError, nearest
from accuquant.pipeline.seams import required, takes, unwrapped

FORMER = {"class_id": "class_labels"}  # names of earlier versions
FOR_PEOPLE = "label"  # what a row is of, in words, where its keys do not say it
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CONDITIONS = ("prompt", "class_labels", "image", "video")  # what samples are of
COUNT = "batch_size"  # how many samples an unconditional pipeline makes
Row = dict[str, Any]


def call_of(
    pipeline: DiffusionPipeline, rows: Sequence[Row], seeds: Sequence[int], sampling: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The arguments of one call for a batch of rows.

    Args:
        seeds: one for the noise of each row, which then does not depend on its batch.
        sampling: what is the same for all rows of a recipe: steps, guidance, sizes.
        folder: that paths in rows are relative to.

    Raises:
        RecipeError: a key that the pipeline's call does not take, rows that differ in what is one for all, a picture
            that cannot be read.
    """
    parameters = inspect.signature(unwrapped(pipeline)).parameters
    name = type(pipeline).__name__
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != FOR_PEOPLE]
    call: dict[str, Any] = {}
    for key in keys:
        argument = FORMER.get(key, key)
        if argument not in parameters:
            raise RecipeError(f"data: {_takes_no(pipeline, key)}")
        if missing := [i for i, row in enumerate(rows) if key not in row]:
            raise RecipeError(f"data: row {missing[0]} of a batch has no {key!r}, and others have: {rows[missing[0]]}")
        values = [opened(row[key], folder) for row in rows]
        if one_each(parameters[argument]) and not isinstance(values[0], list | NoneType):
            # many that animate or edit one picture say that they take several, and do not
            call[argument] = values[0] if len(values) == 1 and isinstance(values[0], Image.Image) else values
        elif any(value != values[0] for value in values):
            raise RecipeError(f"data: {key!r} is one for a whole call of {name}, and rows of a batch differ in it")
        else:
            call[argument] = values[0]
    for key, value in sampling.items():
        if key in parameters:
            call.setdefault(key, value)
    if is_unconditional(pipeline):
        call[COUNT] = len(rows)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call["generator"] = generators if one_each(parameters["generator"]) else generators[0]
    return call


def as_row(value: Any) -> Row:
    """A row; a prompt alone, or the number of a class, stands for one.

    Raises:
        RecipeError: it is none of these.
    """
    if isinstance(value, str):
        return {"prompt": value}
    if type(value) is int:
        return {"class_labels": value}
    if not isinstance(value, dict):
        raise RecipeError(f"data: a row is what the pipeline is called with, such as {{'prompt': 'a fox'}} ({value!r})")
    return value


def check_row(pipeline: DiffusionPipeline, row: Row) -> None:
    """Whether the pipeline can be called with a row, as far as that can be told without doing it.

    Raises:
        RecipeError: a key is no argument of its call, or its value cannot be one.
    """
    parameters = inspect.signature(unwrapped(pipeline)).parameters
    for key, value in row.items():
        argument = FORMER.get(key, key)
        if key == FOR_PEOPLE:
            continue
        if argument not in parameters:
            raise RecipeError(_takes_no(pipeline, key))
        if argument in given_with_noise(pipeline):
            raise RecipeError(
                f"{type(pipeline).__name__} takes no {key!r} of a row: noise and the number of samples follow from "
                "data.seed and data.num_samples"
            )
        if argument == "prompt" and not isinstance(value, str):
            raise RecipeError(f"{key} must be text")
        if argument == "class_labels":
            classes = number_of_classes(pipeline)
            if type(value) is not int or not 0 <= value < (classes or 2**31):
                known = f"one of this model's classes, 0 to {classes - 1}" if classes else "a whole number from 0 on"
                raise RecipeError(f"{key} must be {known} (found {value!r})")
    if not set(row) - {FOR_PEOPLE} and not is_unconditional(pipeline):
        raise RecipeError("it says nothing that the pipeline could be called with")


def is_unconditional(pipeline: DiffusionPipeline) -> bool:
    """Whether nothing but noise tells samples of a pipeline apart: it is told how many to make, and of what never."""
    conditioned = required(pipeline) or any(takes(pipeline, name) for name in CONDITIONS)
    return takes(pipeline, COUNT) and not conditioned


def given_with_noise(pipeline: DiffusionPipeline) -> set[str]:
    """The arguments of a call that neither data nor recipe name: they follow from seeds."""
    return {"generator", COUNT} if is_unconditional(pipeline) else {"generator"}


def check_arguments(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> None:
    """Whether the pipeline's call takes what a recipe gives it for all samples.

    Raises:
        RecipeError: it does not, or that is given elsewhere.
    """
    parameters = inspect.signature(unwrapped(pipeline)).parameters
    for key in arguments:
        if key in ("num_inference_steps", "guidance_scale"):
            raise RecipeError(f"sampling.arguments: {key} has a key of its own: sampling.{key}")
        if key not in parameters or key in given_with_noise(pipeline):
            raise RecipeError(f"sampling.arguments: {_takes_no(pipeline, key)}")


def _takes_no(pipeline: DiffusionPipeline, key: str) -> str:
    """What is wrong with a key that is no argument of the pipeline's call, and what its arguments are."""
    parameters = inspect.signature(unwrapped(pipeline)).parameters
    known = ", ".join(name for name in parameters if name not in given_with_noise(pipeline))
    return f"{type(pipeline).__name__} takes no {key!r}{nearest(key, parameters)}; its call takes {known}"


def number_of_classes(pipeline: DiffusionPipeline) -> int | None:
    """Of a class-conditional transformer or U-Net, where its config says it."""
    for component in pipeline.components.values():
        config = getattr(component, "config", None)
        for key in ("num_embeds_ada_norm", "num_class_embeds"):
            if isinstance(found := getattr(config, key, None), int):
                return found
    return None


def classes_of(pipeline: DiffusionPipeline) -> list[int]:
    """The numbers of the classes that a pipeline was trained on: those that have names, or all there are."""
    labels: dict[str, int] = getattr(pipeline, "labels", {})
    return sorted(set(labels.values())) or list(range(number_of_classes(pipeline) or 0))


def asked_for(row: Row) -> Any:
    """What a row asks for, as reports name it: its only value, or all it says."""
    values = [value for key, value in row.items() if key != FOR_PEOPLE]
    return values[0] if len(values) == 1 else json.dumps(row, sort_keys=True)


def needs_single_calls(pipeline: DiffusionPipeline, rows: Sequence[Row]) -> bool:
    """Whether rows differ in something that the pipeline takes one of for a whole call, or hold pictures.

    Of a list of pictures each pipeline makes something else: samples, references of one sample, frames, or an error.
    """
    parameters = inspect.signature(unwrapped(pipeline)).parameters
    keys = {key for row in rows for key in row} - {FOR_PEOPLE}
    single = [key for key in keys if (p := parameters.get(FORMER.get(key, key))) is not None and not one_each(p)]
    differ = any(row.get(key) != rows[0].get(key) for key in single for row in rows)
    return differ or any(is_picture(value) for row in rows for value in row.values())


def one_each(parameter: inspect.Parameter) -> bool:
    """Whether a pipeline takes a list of this, with one for each sample."""
    return "list" in str(parameter.annotation).lower()


def is_picture(value: Any) -> bool:
    """Whether a row's value names one."""
    return isinstance(value, str) and value.lower().endswith(PICTURES) and "\n" not in value


def opened(value: Any, folder: Path) -> Any:
    """A row's value; the name of a picture is the picture.

    Raises:
        RecipeError: it cannot be read.
    """
    if not is_picture(value):
        return value
    path = folder / value
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise RecipeError(f"data: the picture {path} cannot be read ({error})") from error
