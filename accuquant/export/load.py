"""An export loaded as a user does, on the device and with the cache that its recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from accuquant.caching.enable import denoiser_of_any
from accuquant.caching.search import search_on_rows
from accuquant.errors import CheckpointError, RecipeError
from accuquant.export.torchao import INSTALL_TORCHAO, torchao_installed, torchao_layers
from accuquant.pipeline.data import load_split
from accuquant.pipeline.loading import left_out, pick_device
from accuquant.pipeline.recorder import Recorder
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import load_recipe
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.layer import quantized_layers


def load_export(folder: Path, recipe: Recipe, reporter: Reporter | None = None) -> DiffusionPipeline:
    """Load an export with plain diffusers onto the recipe's device, with its cache, or the recipe's where that differs.

    Raises:
        RecipeError: the folder is no export of this package, or has several denoisers and is to have another cache.
        CheckpointError: its denoiser is not what its config promises.
    """
    if not (folder / "model_index.json").is_file():
        raise RecipeError(f"{folder} is no export: it has no model_index.json")
    if recipe.export.format == "torchao" and not torchao_installed():
        raise RecipeError(f"{folder} is in torchao's format, and torchao is not installed: {INSTALL_TORCHAO}")
    try:
        dtype = getattr(torch, recipe.model.dtype)
        pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **left_out(str(folder)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:  # diffusers' own
        raise RecipeError(f"{folder} cannot be loaded: {error}") from error
    if not exported_networks(pipeline):
        raise RecipeError(f"{folder} holds no quantized layer: it was not written by accuquant")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(pick_device(recipe.model.device))
    if recipe.cache != recipe_of(folder).cache:
        denoiser = denoiser_of_any(pipeline)
        if controller_of(denoiser) is not None:
            detach_cache(denoiser)
        if recipe.cache is not None:
            if recipe.cache.fits:
                key = "cache.corrected" if recipe.cache.corrected else "cache.corrected_quantization"
                raise RecipeError(
                    f"{key}: the correction belongs to the cache that this export was calibrated with; "
                    f"another one needs --set {key}=false"
                )
            plan: Cache | CachePlan = recipe.cache
            if recipe.cache.searches:
                plan = _searched(recipe.cache, pipeline, recipe, reporter or Reporter(quiet=True))
            attach_cache(denoiser, plan)
    return pipeline


def exported_networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that hold quantized layers."""
    parts: dict[str, Any] = pipeline.components
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module) and exported_layers(part)}


def exported_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The quantized modules of a loaded export, of whichever format."""
    return {**quantized_layers(denoiser), **torchao_layers(denoiser)}


def _searched(config: Cache, pipeline: DiffusionPipeline, recipe: Recipe, reporter: Reporter) -> CachePlan:
    """A target given on the command line: searched on calibration samples, against the export without a cache."""
    split = load_split(recipe.data, pipeline)
    recorder = Recorder(pipeline, recipe.sampling, split.folder)
    return search_on_rows(recorder, split.calibration, recipe.data.seed * 100_000, config, reporter)


def recipe_of(folder: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe an export was made with.

    Raises:
        RecipeError: there is none in the folder.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is no export: it has no recipe.yaml")
    return load_recipe(folder / "recipe.yaml", overrides)
