"""Which modules of a denoiser a cache takes: attention and MLP of every block, or runs of blocks."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from accuquant.core.forecasts import FORECASTS
from accuquant.errors import CacheError
from accuquant.recipe import Cache
from accuquant.runtime.cache.plan import CachePlan

BLOCKS = r"(transformer_blocks|blocks|.*attentions\.\d+\.transformer_blocks)\.\d+"
MODULES = BLOCKS + r"\.(attn\d?|ff|ffn|ff_context|img_mlp|txt_mlp)"
FUSED = r"single_transformer_blocks\.\d+"  # attention and MLP side by side, and one projection of both


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


def cached_modules(denoiser: nn.Module, pattern: str | None = None) -> tuple[list[str], list[str]]:
    """Names of the modules a cache takes, and of the fused blocks.

    Raises:
        CacheError: the pattern, or ours, matches none.
    """
    names = [name for name, _ in denoiser.named_modules() if name]
    try:
        re.compile(pattern or MODULES)
    except re.error as error:
        raise CacheError(f"cache.modules: {pattern!r} is no regular expression: {error}") from error
    found = list[str]()
    for name in names:  # a module inside one that is cached already never runs alone
        if re.fullmatch(pattern or MODULES, name) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    fused = [
        name
        for name in names
        if re.fullmatch(FUSED, name)
        and all(hasattr(denoiser.get_submodule(name), part) for part in ("norm", "attn", "proj_mlp", "proj_out"))
        and re.fullmatch(pattern or ".*", f"{name}.proj_out")
    ]
    # attention with the MLP in it (Flux2) is a cached module like any other; parts of fused blocks are not
    singles = [f"{name}.attn" for name in names if re.fullmatch(FUSED, name) and name not in fused]
    found += [name for name in singles if name in names and re.fullmatch(pattern or ".*", name) and name not in found]
    found = [name for name in found if not any(name == block or name.startswith(f"{block}.") for block in fused)]
    if not found and not fused:
        shown = ", ".join(name for name in names if name.count(".") == 2) or ", ".join(names[:8])
        raise CacheError(
            f"no module of {type(denoiser).__name__} matches {pattern or MODULES!r}, the cache would do nothing; "
            f"its modules include {shown[:200]}"
        )
    return found, fused


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
        if name == outer or name.startswith(f"{outer}.") or name.startswith((f"{block}.proj_mlp", f"{block}.attn.")):
            return True
    return False
