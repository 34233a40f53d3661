"""What the export's format asks of model and machine, and the turning of a calibrated model into it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from accuquant.calibration.layers import trainable_layers
from accuquant.calibration.opened import OpenedModel
from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.sampled import calibrated_for
from accuquant.calibration.session import Session
from accuquant.errors import AccuQuantError, RecipeError
from accuquant.export.native import harden_model
from accuquant.export.torchao import INSTALL_TORCHAO, convert_model, input_dimensions, torchao_installed

Format = Literal["accuquant", "torchao"]


def check_format(format: Format, model: OpenedModel, planned: list[PlannedModule]) -> dict[str, int]:
    """See to it before a long run that its result can be written.

    Returns:
        for torchao, how many dimensions the inputs of modules with static scales have.

    Raises:
        RecipeError: torchao is missing, or a module is nothing that it can hold.
    """
    if format != "torchao":
        return {}
    if not torchao_installed():
        raise RecipeError(
            f"export.format: torchao needs the package torchao, which is not installed: {INSTALL_TORCHAO}"
        )
    for p in planned:
        if p.spec is not None and not isinstance(model.network.get_submodule(p.module), nn.Linear):
            raise RecipeError(
                f"export.format: torchao holds Linear modules, and the rules quantize {p.name}, a {p.kind}; "
                "give it weight: float in a rule before that one, or write export.format: accuquant, which holds it"
            )
    static = [p.name for p in planned if p.spec is not None and p.spec.static]
    try:
        return input_dimensions(model.network, static, model.step_once)
    except AccuQuantError as error:
        raise RecipeError(
            f"export.format: torchao: {error}; give it activation_scale: dynamic, or write export.format: accuquant"
        ) from error


def write_format(session: Session, format: Format, dimensions: dict[str, int], dtype: torch.dtype) -> None:
    """Turn the calibrated layers in place into those that the pipeline's ``save_pretrained`` writes.

    Args:
        dimensions: what `check_format` has found.
        dtype: of the model.
    """
    for one, clock in zip(session.model.denoisers, session.clocks, strict=True):
        if not trainable_layers(one.network):  # the rules leave it as it is
            continue
        if format == "torchao":
            own = {n.removeprefix(one.prefix): d for n, d in dimensions.items() if n.startswith(one.prefix)}
            convert_model(one.network, own, dtype)
        else:
            harden_model(one.network, clock, calibrated_for(session.model, session.reference, one))
