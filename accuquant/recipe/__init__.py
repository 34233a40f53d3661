"""The recipe: its schema (`schema`, `cache`), and its reading and writing (`file`). Imports nothing else of ours."""

from accuquant.recipe.base import RecipeError
from accuquant.recipe.cache import Cache, FORAConfig, RFCConfig, TaylorSeerConfig
from accuquant.recipe.schema import (
    Data,
    Evaluation,
    Export,
    LearningRates,
    Model,
    Objective,
    Quantization,
    Recipe,
    Rule,
    Sampling,
)

__all__ = [
    "Cache",
    "Data",
    "Evaluation",
    "Export",
    "FORAConfig",
    "LearningRates",
    "Model",
    "Objective",
    "Quantization",
    "RFCConfig",
    "Recipe",
    "RecipeError",
    "Rule",
    "Sampling",
    "TaylorSeerConfig",
]
