"""accuquant: post-training quantization of diffusion models, calibrated over several denoising steps.

Importing the package makes diffusers' `from_pretrained` understand the checkpoints it exports.
"""

__version__ = "0.1.0"

import accuquant.quiet  # noqa: F401 (before all that imports diffusers)
from accuquant.enable import cache_stats, compile_cached, disable_cache, enable_cache
from accuquant.model.cache_state import CacheError, CacheStats
from accuquant.model.checkpoint import AccuQuantConfig, CheckpointError, register
from accuquant.model.layers import set_arithmetic
from accuquant.recipe import Cache, FORAConfig, Recipe, RecipeError, RFCConfig, TaylorSeerConfig
from accuquant.recipe.file import load_recipe

register()

__all__ = [
    "AccuQuantConfig",
    "Cache",
    "CacheError",
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
