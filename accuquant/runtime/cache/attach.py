"""Putting a cache on a denoiser, and taking it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from accuquant.errors import CacheError
from accuquant.recipe import Cache
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.features import cached_features
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import (
    FITTED,
    Bypassed,
    Cached,
    Calls,
    Deviation,
    Hook,
    Skipped,
    Tap,
    hook_of,
    hooked,
    unhooked,
)
from accuquant.runtime.cache.plan import CachePlan


def attach_cache(
    denoiser: nn.Module, plan: CachePlan | Cache, fitted: Fitted | None = None, measures: bool = False
) -> Controller:
    """Put a cache on a denoiser.

    Args:
        plan: of the cache; what is asked for is one too, where it leaves nothing open.
        fitted: what the plan's forecasts use; by default that of the loaded checkpoint.
        measures: what a skipped step saves, in the first call.

    Raises:
        CacheError: it has one already, no module matches, something is asked for that has to be searched for first, or
            nothing was fitted of what the plan uses.
    """
    if controller_of(denoiser) is not None or getattr(denoiser, "is_cache_enabled", False):
        raise CacheError(f"{type(denoiser).__name__} has a cache already; call disable_cache first")
    found = fitted or getattr(denoiser, FITTED, None)
    noise = found.noise if found is not None else None
    if isinstance(plan, Cache):
        noise = {name: (pair[0], pair[1]) for name, pair in plan.noise.items()} if plan.noise else noise
        plan = CachePlan.of(plan)
    modules, fused, bypassed, begins = cached_features(denoiser, plan)
    if unknown := [name for name in modules if plan.knows_noise(name) and name not in (noise or {})]:
        raise CacheError(f"noise_aware: no noise was measured for {', '.join(unknown[:3])}; `accuquant calibrate` does")
    controller = Controller(plan, modules, bypassed, begins, noise)
    controller.fitted = found
    if plan.fits:
        if found is None or not set(modules) <= set(found.channels):
            raise CacheError("corrected: nothing was fitted for this model; `accuquant calibrate` does")
        asked = {True: plan.corrected_quantization, False: plan.corrected}

        def correct(module: str, output: Tensor, computed: bool) -> Tensor:
            return found.correct(module, output, controller.state.timestep, computed) if asked[computed] else output

        controller.correct = correct
    if plan.learned:
        if found is None or not set(modules) <= set(found.learned_modules):
            raise CacheError("learned_timesteps: nothing was learned for this model; `accuquant calibrate` does")
        controller.weigh = lambda module, output, last: found.weigh(module, output, last, controller.state.timestep)
    parts: dict[str, Callable[[], Hook]] = {}
    for name in modules[: len(modules) - len(fused)]:
        parts[name] = partial(Deviation if begins else Cached, controller, name)
    for name in bypassed:
        parts[name] = partial(Bypassed, controller, modules[0], name in begins.values())
    for block in fused:
        parts[f"{block}.norm"] = partial(Tap, controller, block)
        parts |= dict.fromkeys((f"{block}.proj_mlp", f"{block}.attn"), partial(Skipped, controller, block))
        parts[f"{block}.proj_out"] = partial(Cached, controller, f"{block}.proj_out", tap=block)
    registry, calls = HookRegistry.check_if_exists_or_initialize(denoiser), Calls(controller, parts, measures)
    hooked(denoiser, calls)
    calls.handle = denoiser.register_forward_pre_hook(calls.follow, with_kwargs=True)
    calls.hook_parts(denoiser)
    registry.invalidate_child_registries_cache()
    if hasattr(denoiser, "_cache_config"):
        denoiser._cache_config = plan  # type: ignore[assignment]  # so that diffusers' own caches refuse to join
    if not hasattr(denoiser, "_reset_stateful_cache"):  # pipelines call it where it exists; DiT, PixArt, SD3 lack it
        denoiser._reset_stateful_cache = registry.reset_stateful_hooks
    return controller


def detach_cache(denoiser: nn.Module) -> None:
    """Take the cache off; nothing of it stays.

    Raises:
        CacheError: there is none.
    """
    if controller_of(denoiser) is None:
        raise CacheError(f"{type(denoiser).__name__} has no cache of accuquant")
    for module in denoiser.modules():
        unhooked(module)
    if "_cache_config" in vars(denoiser):
        del denoiser._cache_config
    vars(denoiser).pop("_reset_stateful_cache", None)
    if "_diffusers_hook" in vars(denoiser):
        denoiser._diffusers_hook.invalidate_child_registries_cache()  # type: ignore[union-attr, operator]


@contextmanager
def cached(denoiser: nn.Module, plan: CachePlan | Cache, fitted: Fitted | None = None) -> Iterator[Controller]:
    """A cache for as long as the block runs; see `attach_cache`."""
    controller = attach_cache(denoiser, plan, fitted)
    try:
        yield controller
    finally:
        detach_cache(denoiser)


@contextmanager
def uncached(denoiser: nn.Module) -> Iterator[None]:
    """Without its cache, if it has one, for as long as the block runs."""
    controller = controller_of(denoiser)
    if controller is not None:
        detach_cache(denoiser)
    try:
        yield
    finally:
        if controller is not None:
            attach_cache(denoiser, controller.plan, controller.fitted)


def controller_of(denoiser: nn.Module) -> Controller | None:
    hook = hook_of(denoiser)
    return hook.controller if isinstance(hook, Calls) else None
