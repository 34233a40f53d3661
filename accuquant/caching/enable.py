"""The caches' public functions: putting one on a pipeline, taking it off, and asking what it did."""

from __future__ import annotations

import inspect
import json
import random
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from accuquant.caching.search import CHOICE_SAMPLES, search_on_rows
from accuquant.core.coordinate import Coordinate
from accuquant.errors import CacheError
from accuquant.pipeline.denoisers import several
from accuquant.pipeline.recorder import Recorder, usual_sampling
from accuquant.pipeline.rows import Row, as_row, classes_of, is_unconditional
from accuquant.pipeline.seams import takes
from accuquant.progress import Reporter
from accuquant.recipe import Cache
from accuquant.recipe.file import shipped_folder
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.features import attends
from accuquant.runtime.cache.hooks import hook_of
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats
from accuquant.runtime.calls import follow

HELPERS = re.compile(r"ControlNet|Adapter|Autoencoder|VQ|Encoder")  # may be told the noise level, and do not denoise


def enable_cache(
    target: DiffusionPipeline | nn.Module,
    config: Cache | CachePlan,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    inputs: list[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CachePlan:
    """Put a feature cache on a pipeline's denoiser.

    The keyword arguments matter where the config has a target: they say what is sampled to search for it (some dozens
    of trajectories of eight samples, and for `estimation: auto` one of 64 for each forecast).

    Args:
        target: a diffusers pipeline, or its denoiser.
        config: `FORAConfig`, `TaylorSeerConfig`, `RFCConfig`, or a recipe's `Cache`; or a plan, as this returns it.
        num_inference_steps, guidance_scale: by default the pipeline's own. A number of steps that is given is checked
            against the order and the schedule, also without a target.
        inputs: for the search, rows such as ``{"prompt": "a fox", "height": 512}``, what the pipeline is called with; a
            prompt or the number of a class stands for one. By default the model's classes, or shipped prompts.
        seed: of the search's noise.
        progress: show bars.

    Returns:
        the plan in effect, with the settings of the config as its attributes: a target is replaced by what was found.

    Raises:
        CacheError: there is a cache already, nothing to cache, or a target for a pipeline that cannot be sampled.
    """
    if not isinstance(config, Cache | CachePlan):
        raise CacheError(f"config must be a FORAConfig, TaylorSeerConfig or RFCConfig, found {config!r}")
    denoiser = denoiser_of_any(target)
    if num_inference_steps is not None:
        try:
            config.check_steps(num_inference_steps)
        except ValueError as error:
            raise CacheError(str(error)) from error
    if isinstance(config, Cache) and config.searches:
        if not isinstance(target, DiffusionPipeline):
            raise CacheError("a target is searched by sampling: give enable_cache the whole pipeline, or set tau")
        if controller_of(denoiser) is not None:
            raise CacheError(f"{type(denoiser).__name__} has a cache already; call disable_cache first")
        recorder = Recorder(target, usual_sampling(target, num_inference_steps, guidance_scale))
        rows = [as_row(value) for value in inputs] if inputs else known_rows(target)
        config = search_on_rows(recorder, rows, seed, config, Reporter(quiet=not progress))
    if isinstance(target, DiffusionPipeline):
        follow(target)
    return attach_cache(denoiser, config, measures=True).plan


def disable_cache(target: DiffusionPipeline | nn.Module) -> None:
    """Take the cache off again; nothing of it stays.

    Raises:
        CacheError: there is none.
    """
    detach_cache(denoiser_of_any(target))


def reset_cache(target: DiffusionPipeline | nn.Module) -> None:
    """Begin a new trajectory: for sampling loops of one's own. Calls of pipelines each begin one by themselves.

    Raises:
        CacheError: there is no cache.
    """
    _controller(target).reset()


def compile_cached(target: DiffusionPipeline | nn.Module, **options: Any) -> None:
    """Compile what the cache computes, each cached module below the hook that decides whether it runs.

    A denoiser with a cache is no single graph: `torch.compile` of it stops at every hook. Ends with `disable_cache`.

    Args:
        options: of `torch.compile`.

    Raises:
        CacheError: there is no cache.
    """
    denoiser = denoiser_of_any(target)
    cache_stats(denoiser)
    for module in denoiser.modules():
        hook = hook_of(module)
        if hook is not None and hook.fn_ref.original_forward is not None:
            hook.compiled = torch.compile(hook.fn_ref.original_forward, **options)


def cache_stats(target: DiffusionPipeline | nn.Module) -> CacheStats:
    """What the cache did in the last trajectory; ``.nfc`` is the number of its full computations.

    Raises:
        CacheError: there is no cache.
    """
    return _controller(target).stats()


def _controller(target: DiffusionPipeline | nn.Module) -> Controller:
    denoiser = denoiser_of_any(target)
    if (controller := controller_of(denoiser)) is None:
        raise CacheError(f"{type(denoiser).__name__} has no cache of accuquant; call enable_cache first")
    return controller


def denoiser_of_any(target: DiffusionPipeline | nn.Module) -> nn.Module:
    """The only component of a pipeline that denoises; a module is its own.

    Raises:
        CacheError: there is none, or there are several.
    """
    if isinstance(target, nn.Module):
        inner = getattr(target, "_orig_mod", target)  # of a module that torch.compile has wrapped
        assert isinstance(inner, nn.Module)
        return inner
    found = denoisers_in(target)
    if len(found) == 1:
        return next(iter(found.values()))
    name = type(target).__name__
    if not found:
        raise CacheError(f"no component of {name} both attends and is told how noisy its input is: nothing to cache")
    raise CacheError(several(name, found))


def denoisers_in(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that denoise, by name, as far as their types tell."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: denoiser_of_any(part) for name, part in parts.items() if _denoises(part)}


def _denoises(part: nn.Module) -> bool:
    """Whether a component is called at every noise level and is what the others serve, as far as its type tells."""
    inner = getattr(part, "_orig_mod", part)
    told = Coordinate.usual(inspect.signature(inner.forward).parameters) is not None
    return told and HELPERS.search(type(inner).__name__) is None and any(attends(module) for module in inner.modules())


def known_rows(pipeline: DiffusionPipeline) -> list[Row]:
    """Classes the model was trained on, or shipped prompts; nothing, for an unconditional one.

    Raises:
        CacheError: the pipeline takes neither.
    """
    if is_unconditional(pipeline):
        return [{}]
    if takes(pipeline, "class_labels"):
        classes = classes_of(pipeline)
        return [{"class_labels": one} for one in random.Random(0).sample(classes, min(len(classes), CHOICE_SAMPLES))]
    if not takes(pipeline, "prompt"):
        raise CacheError(
            f"{type(pipeline).__name__} takes no prompt: say what it is searched with, as inputs=[{{...}}]"
        )
    lines = (shipped_folder("calib_data") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
