"""The caches' public functions: putting one on a pipeline, taking it off, and asking what it did."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from accuquant.caching.search import CHOICE_SAMPLES, search_on_inputs
from accuquant.errors import CacheError
from accuquant.model.families import FAMILIES, family_of
from accuquant.model.rollout import Rollout
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Sampling
from accuquant.recipe.file import shipped_folder
from accuquant.runtime.cache.hooks import attach_cache, controller_of, detach_cache, hook_of
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats


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
        inputs: class ids or prompts for the search; by default the model's classes or the shipped prompts.
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
        if type(target).__name__ not in (known := [family.pipeline for family in FAMILIES]):
            raise CacheError(
                f"a target or auto can be searched for with {' and '.join(known)}, not for {type(target).__name__}; "
                "set interval, tau or a list of steps as schedule"
            )
        usual = inspect.signature(type(target).__call__).parameters
        steps = num_inference_steps or usual["num_inference_steps"].default
        guidance = usual["guidance_scale"].default if guidance_scale is None else guidance_scale
        rollout = Rollout(target, Sampling(num_inference_steps=steps, guidance_scale=float(guidance)))
        config = search_on_inputs(rollout, inputs or known_inputs(target), seed, config, Reporter(quiet=not progress))
    return attach_cache(denoiser, config).plan


def disable_cache(target: DiffusionPipeline | nn.Module) -> None:
    """Take the cache off again; nothing of it stays.

    Raises:
        CacheError: there is none.
    """
    detach_cache(denoiser_of_any(target))


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
    denoiser = denoiser_of_any(target)
    controller = controller_of(denoiser)
    if controller is None:
        raise CacheError(f"{type(denoiser).__name__} has no cache of accuquant; call enable_cache first")
    return controller.stats()


def denoiser_of_any(target: DiffusionPipeline | nn.Module) -> nn.Module:
    """The transformer or U-Net of any pipeline; a module is its own."""
    if isinstance(target, nn.Module):
        inner = getattr(target, "_orig_mod", target)  # of a module that torch.compile has wrapped
        assert isinstance(inner, nn.Module)
        return inner
    if getattr(target, "transformer_2", None) is not None:
        raise CacheError(
            f"{type(target).__name__} has two denoisers; enable a cache on pipeline.transformer and on "
            "pipeline.transformer_2, each apart"
        )
    for name in ("transformer", "unet"):
        if isinstance(module := getattr(target, name, None), nn.Module):
            return denoiser_of_any(module)
    raise CacheError(f"{type(target).__name__} has neither a transformer nor a unet to cache")


def known_inputs(pipeline: DiffusionPipeline) -> list[Any]:
    """Classes the model was trained on, or shipped prompts."""
    if family_of(pipeline).condition == "prompt":
        lines = (shipped_folder("calib_data") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines if line.strip()]
    classes = sorted(set(pipeline.labels.values())) or list(range(int(pipeline.transformer.config.num_embeds_ada_norm)))
    return random.Random(0).sample(classes, min(len(classes), CHOICE_SAMPLES))
