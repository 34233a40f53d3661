"""Section `export`: where the result goes, in which format, and what the format cannot hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from accuquant.recipe.base import Section
from accuquant.recipe.rule import Rule

OURS = "or export.format: accuquant, which holds it"


def _output_folder(value: str) -> str:
    if "\0" in value or not value.strip() or Path(value).name in ("", ".."):
        raise ValueError(f"must name a folder that can be created (found {value!r})")
    return os.path.expanduser(value)


OutputFolder = Annotated[str, AfterValidator(_output_folder)]


class Export(Section):
    output: OutputFolder = Field(description="folder to write; it appears when it is whole")
    format: Literal["accuquant", "torchao"] = Field(
        "accuquant",
        description="accuquant: everything; torchao: int8 Linear modules, loaded by diffusers and torchao alone",
    )
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(\.\d+)?\s*[KMGT]B$")


def check_torchao(rules: tuple[Rule, ...], timestep_groups: int, learns_activation_scale: bool) -> None:
    """See to it that torchao's `Int8Tensor` can hold what the rules ask for.

    Raises:
        ValueError: it cannot; the text begins with the key.
    """
    for i, rule in enumerate(rules):
        if rule.weight == "float":
            continue
        where = f"quantization.rules.{i}"
        if rule.weight != "int8":
            why = ", and torchao's int4 tensors have no product on CPUs" if rule.weight == "int4" else ""
            raise ValueError(
                f"{where}.weight: export.format torchao holds int8 (found {rule.weight!r}{why}); "
                f"write weight: int8, {OURS}"
            )
        if rule.activation not in ("int8", "float"):
            raise ValueError(
                f"{where}.activation: export.format torchao holds int8 or float (found {rule.activation!r}); "
                f"write activation: int8, {OURS}"
            )
        if rule.granularity != "channel":
            raise ValueError(
                f"{where}.granularity: the integer product of export.format torchao has one weight scale a row "
                f"(found {rule.granularity!r}); write granularity: channel without a group_size, {OURS}"
            )
        if not rule.symmetric:
            raise ValueError(
                f"{where}.symmetric: the integer product of export.format torchao passes over weight zero points "
                f"(found false); write symmetric: true, {OURS}"
            )
        if rule.static and timestep_groups > 1:
            raise ValueError(
                f"quantization.timestep_groups: export.format torchao has one static activation scale a module "
                f"(found {timestep_groups}, and {where} has static scales); write timestep_groups: 1, "
                f"or activation_scale: dynamic in that rule, {OURS}"
            )
        if rule.activation != "float" and not rule.static and rule.tune and learns_activation_scale:
            raise ValueError(
                f"objective.learn: 'activation_scale' (there by default) learns a clip ratio for dynamic scales, "
                f"those of {where}, and export.format torchao has none; write learn: [weight, weight_scale], {OURS}"
            )
