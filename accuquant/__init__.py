"""accuquant: post-training quantization of diffusion models, calibrated over several denoising steps.

Importing the package makes diffusers' `from_pretrained` understand the checkpoints it exports, whichever of the two is
imported first. What is named here is loaded when it is first used: importing it brings neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accuquant.errors import AccuQuantError, CacheError, CheckpointError, RecipeError
from accuquant.registration import register
from accuquant.version import __version__

if TYPE_CHECKING:
    from accuquant.caching.enable import cache_stats, compile_cached, disable_cache, enable_cache, reset_cache
    from accuquant.recipe import Cache, FORAConfig, Recipe, RFCConfig, TaylorSeerConfig
    from accuquant.recipe.file import load_recipe
    from accuquant.runtime.arithmetic import set_arithmetic
    from accuquant.runtime.cache.plan import CachePlan
    from accuquant.runtime.cache.stats import CacheStats
    from accuquant.runtime.checkpoint import AccuQuantConfig

register()

_HOMES = {
    "AccuQuantConfig": "accuquant.runtime.checkpoint",
    "Cache": "accuquant.recipe",
    "CachePlan": "accuquant.runtime.cache.plan",
    "CacheStats": "accuquant.runtime.cache.stats",
    "FORAConfig": "accuquant.recipe",
    "RFCConfig": "accuquant.recipe",
    "Recipe": "accuquant.recipe",
    "TaylorSeerConfig": "accuquant.recipe",
    "cache_stats": "accuquant.caching.enable",
    "compile_cached": "accuquant.caching.enable",
    "disable_cache": "accuquant.caching.enable",
    "enable_cache": "accuquant.caching.enable",
    "load_recipe": "accuquant.recipe.file",
    "reset_cache": "accuquant.caching.enable",
    "set_arithmetic": "accuquant.runtime.arithmetic",
}

__all__ = [
    "AccuQuantConfig",
    "AccuQuantError",
    "Cache",
    "CacheError",
    "CachePlan",
    "CacheStats",
    "CheckpointError",
    "FORAConfig",
    "RFCConfig",
    "Recipe",
    "RecipeError",
    "TaylorSeerConfig",
    "__version__",
    "cache_stats",
    "compile_cached",
    "disable_cache",
    "enable_cache",
    "load_recipe",
    "reset_cache",
    "set_arithmetic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'accuquant' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
