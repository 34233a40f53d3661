"""Which modules of a denoiser a cache takes: attention and MLP of every block, or runs of blocks.

They are found by what a model is made of, not by its names: a module that calls itself attention and has projections of
its own attends; a block is what has one at hand, and its other parts of several layers are its MLPs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from accuquant.core.forecasts import FORECASTS
from accuquant.errors import CacheError
from accuquant.recipe import Cache
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.spec import Layer
from accuquant.runtime.split import SplitLayer

ATTENDS = re.compile(r"Attention|Attn")
NO_MLP = re.compile(r"Norm|Embed|Resnet|ResBlock|Modulat|Ada(LN|Group)|Attention|Attn|Transformer|Sampl")
CONDITIONS = re.compile(r"[Ee]mbed")  # what is around attention that serves conditions: refiners of text
LAYERS = (nn.Linear, _ConvNd, Layer, SplitLayer)
FUSED = {"norm", "attn", "proj_mlp", "proj_out"}  # attention and MLP side by side, and one projection of both


def cached_features(
    denoiser: nn.Module, config: Cache | CachePlan
) -> tuple[tuple[str, ...], list[str], tuple[str, ...], dict[str, str]]:
    """Names of what is forecast, of the fused blocks at its end, of what is bypassed, and where deviations begin.

    Raises:
        CacheError: see `cached_modules` and `cached_blocks`.
    """
    if config.feature == "blocks":
        modules, bypassed, begins = cached_blocks(denoiser, config)
        return modules, [], bypassed, begins
    names, fused = cached_modules(denoiser, config.modules)
    return (*names, *(f"{block}.proj_out" for block in fused)), fused, (), {}


def skipped_modules(denoiser: nn.Module, config: Cache | CachePlan) -> tuple[str, ...]:
    """Names of what does not run at skipped steps, see `in_cache`.

    Raises:
        CacheError: see `cached_features`.
    """
    modules, _, bypassed, _ = cached_features(denoiser, config)
    return (*modules, *bypassed)


def cached_modules(denoiser: nn.Module, pattern: str | None = None) -> tuple[list[str], list[str]]:
    """Names of the modules a cache takes, and of the fused blocks.

    Args:
        pattern: the modules, or the last projections of fused blocks; by default attention and MLP of every block.

    Raises:
        CacheError: the pattern matches none, or nothing attends.
    """
    try:
        asked = re.compile(pattern or ".*")
    except re.error as error:
        raise CacheError(f"cache.modules: {pattern!r} is no regular expression: {error}") from error
    modules = {name: module for name, module in denoiser.named_modules() if name}
    fused = [name for name, module in modules.items() if module._modules.keys() >= FUSED]
    inside = [f"{block}." for block in fused]
    found, outer = list[str](), tuple(inside)
    for name in modules if pattern else _attention_and_mlps(denoiser, ""):
        if name not in modules:  # it has a name already, in a block that shares it
            continue
        # a module inside one that is cached already never runs alone
        if asked.fullmatch(name) and name not in fused and not name.startswith(outer):
            found.append(name)
            outer = (*outer, f"{name}.")
    fused = [block for block in fused if asked.fullmatch(f"{block}.proj_out")]
    if not found and not fused:
        shown = ", ".join(name for name in modules if name.count(".") == 2) or ", ".join(list(modules)[:8])
        what = f"no module of {type(denoiser).__name__} " + (f"matches {pattern!r}" if pattern else "attends")
        raise CacheError(f"{what}, the cache would do nothing; its modules include {shown[:200]}")
    return found, fused


def _attention_and_mlps(block: nn.Module, name: str) -> Iterator[str]:
    """Of every block, but for those that serve conditions: they may do so before the first step as well."""
    children = block._modules
    is_block = not attends(block) and any(module is not None and attends(module) for module in children.values())
    for child, module in children.items():
        full = f"{name}.{child}" if name else child
        if module is None or CONDITIONS.search(child) or CONDITIONS.search(type(module).__name__):
            continue
        if attends(module) or (is_block and _is_mlp(module)):
            yield full
        else:
            yield from _attention_and_mlps(module, full)


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention: it says so, and projects by itself."""
    own = sum(is_layer(child) for child in module.children())
    return own > 1 and ATTENDS.search(type(module).__name__) is not None


def _is_mlp(module: nn.Module) -> bool:
    several = not is_layer(module) and _num_layers(module) > 1
    return several and not isinstance(module, nn.ModuleList) and NO_MLP.search(type(module).__name__) is None


def _num_layers(module: nn.Module) -> int:
    """One that is split, or has an adapter around it, is one."""
    return 1 if is_layer(module) else sum(map(_num_layers, module.children()))


def is_layer(module: nn.Module) -> bool:
    """Whether it multiplies with weights: a layer of torch's or ours, or one that an adapter is around."""
    return isinstance(module, LAYERS) or "base_layer" in module._modules


def cached_blocks(
    denoiser: nn.Module, config: Cache | CachePlan
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """CacheQuant's variants: the one cached block, those bypassed with it, and where its deviation begins (DiT).

    Of a U-Net the feature is the input of the last up-block, that is the output of the one before it (DeepCache's
    branch); all between the first down-block and it is bypassed.

    Raises:
        CacheError: there are no such blocks, or the forecast needs what is not there at skipped steps.
    """
    name = type(denoiser).__name__
    if isinstance(ups := getattr(denoiser, "up_blocks", None), nn.ModuleList):
        downs: Any = denoiser.down_blocks
        if config.blocks is not None:
            raise CacheError(f"blocks: of {name}, a U-Net, the last up-block's input is cached; leave blocks out")
        if config.estimation in FORECASTS and FORECASTS[config.estimation].needs_input:
            raise CacheError(
                f"estimation: {config.estimation} needs an input that a U-Net does not compute at skipped steps; "
                "use taylor"
            )
        if len(ups) < 2:
            raise CacheError(f"feature: blocks: {name} has one up-block, there is nothing to skip before it")
        before = [f"down_blocks.{i}" for i in range(1, len(downs))] + ["mid_block"] * (denoiser.mid_block is not None)
        return (f"up_blocks.{len(ups) - 2}",), (*before, *(f"up_blocks.{i}" for i in range(len(ups) - 2))), {}
    found = next(((n, b) for n in ("transformer_blocks", "blocks") if (b := getattr(denoiser, n, None))), None)
    if found is None:
        raise CacheError(f"feature: blocks: {name} has neither transformer_blocks nor up_blocks; use feature: modules")
    prefix, count = found[0], len(found[1])
    first, last = config.blocks or ((1, count - 2) if count > 2 else (0, count - 1))
    if last >= count:
        raise CacheError(f"blocks: {name} has blocks 0 to {count - 1} (found {[first, last]})")
    names = tuple(f"{prefix}.{i}" for i in range(first, last + 1))
    return names[-1:], names[:-1], {names[-1]: names[0]}


def in_cache(name: str, cached: tuple[str, ...]) -> bool:
    """Whether a module does not run where the cached ones are forecast: it is inside one, or fused into its input."""
    for outer in cached:
        block = outer.removesuffix(".proj_out")
        if name in (outer, f"{block}.attn") or name.startswith((f"{outer}.", f"{block}.proj_mlp", f"{block}.attn.")):
            return True
    return False
