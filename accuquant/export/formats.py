"""What the export's format asks of model and machine, and the turning of a calibrated model into it."""

from __future__ import annotations

import torch
from torch import nn

from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.session import Session
from accuquant.errors import AccuQuantError, RecipeError
from accuquant.export.native import harden_model
from accuquant.export.torchao import INSTALL_TORCHAO, convert_model, input_dimensions, torchao_installed
from accuquant.model.rollout import Rollout
from accuquant.pipeline.data import Split, calibration_samples
from accuquant.recipe import Recipe


def check_format(recipe: Recipe, rollout: Rollout, planned: list[PlannedModule], split: Split) -> dict[str, int]:
    """See to it before a long run that its result can be written.

    Returns:
        for torchao, how many dimensions the inputs of modules with static scales have.

    Raises:
        RecipeError: torchao is missing, or a module is nothing that it can hold.
    """
    if recipe.export.format != "torchao":
        return {}
    if not torchao_installed():
        raise RecipeError(
            f"export.format: torchao needs the package torchao, which is not installed: {INSTALL_TORCHAO}"
        )
    for p in planned:
        if p.spec is not None and not isinstance(rollout.denoiser.get_submodule(p.name), nn.Linear):
            raise RecipeError(
                f"export.format: torchao holds Linear modules, and the rules quantize {p.name}, a {p.kind}; "
                "give it weight: float in a rule before that one, or write export.format: accuquant, which holds it"
            )
    static = [p.name for p in planned if p.spec is not None and p.spec.static]
    samples = calibration_samples(split, recipe.data.model_copy(update={"num_samples": 1}))
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    try:
        return input_dimensions(rollout.denoiser, static, lambda: rollout.predict(0, conditions.noise, conditions))
    except AccuQuantError as error:
        raise RecipeError(
            f"export.format: torchao: {error}; give it activation_scale: dynamic, or write export.format: accuquant"
        ) from error


def write_format(session: Session, dimensions: dict[str, int]) -> None:
    """Turn the calibrated layers in place into those that the pipeline's ``save_pretrained`` writes."""
    if session.recipe.export.format == "torchao":
        convert_model(session.rollout.denoiser, dimensions, getattr(torch, session.recipe.model.dtype))
    else:
        harden_model(session.rollout.denoiser, session.clock)
