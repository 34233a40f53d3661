"""accuquant: post-training quantization of diffusion models, calibrated over several denoising steps.

Importing the package makes diffusers' `from_pretrained` understand the checkpoints it exports.
"""

__version__ = "0.1.0"

from accuquant.model.checkpoint import AccuQuantConfig, CheckpointError, register
from accuquant.model.layers import set_arithmetic
from accuquant.recipe import Recipe, RecipeError
from accuquant.recipe_file import load_recipe

register()

__all__ = [
    "AccuQuantConfig",
    "CheckpointError",
    "Recipe",
    "RecipeError",
    "__version__",
    "load_recipe",
    "set_arithmetic",
]
