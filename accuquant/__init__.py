"""accuquant: post-training quantization of diffusion models, calibrated over several denoising steps.

Importing the package makes diffusers' `from_pretrained` understand the checkpoints it exports.
"""

import accuquant.quiet  # noqa: F401 (before all that imports diffusers)
from accuquant.caching.enable import cache_stats, compile_cached, disable_cache, enable_cache
from accuquant.errors import CacheError, CheckpointError, RecipeError
from accuquant.recipe import Cache, FORAConfig, Recipe, RFCConfig, TaylorSeerConfig
from accuquant.recipe.file import load_recipe
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats
from accuquant.runtime.checkpoint import AccuQuantConfig, register
from accuquant.runtime.layer import set_arithmetic
from accuquant.version import __version__

register()

__all__ = [
    "AccuQuantConfig",
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
    "set_arithmetic",
]
