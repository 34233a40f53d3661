"""The recipe: its schema, and its reading and writing (`file`). Imports nothing else of ours."""

from accuquant.errors import RecipeError
from accuquant.recipe.cache import ESTIMATIONS, Cache, FORAConfig, RFCConfig, TaylorSeerConfig
from accuquant.recipe.export import Export
from accuquant.recipe.rule import Rule
from accuquant.recipe.schema import (
    Attention,
    Data,
    Evaluation,
    LearningRates,
    Model,
    Objective,
    Quantization,
    Recipe,
    Sampling,
)
from accuquant.recipe.tune import Tune

__all__ = [
    "ESTIMATIONS",
    "Attention",
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
    "Tune",
]
