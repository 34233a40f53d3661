"""A quantization rule: modules by pattern, and the types they get."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from accuquant.errors import nearest
from accuquant.recipe.base import Section, found

NumberType = Literal["int8", "int6", "int4", "int3", "fp8"]
Kind = Literal["linear", "conv", "attention", "mlp", "modulation", "embedding", "first", "last"]


def _patterns(value: Any) -> Any:
    """One or several, each a text that says something."""
    several = isinstance(value, list | tuple)
    if several and value and all(isinstance(one, str) and one for one in value):
        return tuple(value)
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"must be a regular expression or a kind of modules, or a list of them (found {found(value)})")


Modules = Annotated[str | tuple[str, ...], BeforeValidator(_patterns)]
NAMED = (
    "regular expression, matched against the whole module name; or a kind, found in any model: "
    f"{', '.join(get_args(Kind))}; or a list of these"
)


def patterns_of(modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Each of what `modules` names: regular expressions and kinds."""
    return (modules,) if isinstance(modules, str) else modules


def _size_or_auto(value: Any) -> Any:
    if value is None or value == "auto" or (type(value) is int and value >= 8):
        return value
    raise ValueError(f"must be a whole number from 8 on, or auto (found {found(value)}){nearest(value, ['auto'])}")


class Rule(Section):
    """What becomes of the Linear and Conv2d modules that it names; the first rule that names a module decides."""

    modules: Modules = Field(description=NAMED)
    weight: Literal[NumberType, "float"] = Field(description="fp8 is e4m3, for GPUs that multiply it")
    activation: Literal[NumberType, "float"] = "float"
    granularity: Literal["channel", "group"] = Field("channel", description="a weight scale per row, or group of it")
    group_size: Annotated[int | Literal["auto"] | None, BeforeValidator(_size_or_auto)] = Field(
        None,
        description="weights per scale, with `granularity: group`; auto: the most of 64, 32, 16 and 8 that divides a "
        "row, and where none does the row",
    )
    symmetric: bool = Field(True, description="weight zero point fixed at 0")
    activation_scale: Literal["static", "dynamic"] = Field(
        "static", description="static: one per timestep group, measured; dynamic: one per token, at run time"
    )
    activation_symmetric: bool | None = Field(
        None,
        description="activation zero point fixed at 0; dynamic scales have none, static ones do unless this is set",
    )
    tune: bool = Field(True, description="calibration may change these modules; false keeps their initial scales")
    optional: bool = Field(False, description="that no module is left for this rule is no mistake")

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity: group needs a group_size (for example group_size: 32)")
        if self.granularity == "channel" and self.group_size is not None:
            raise ValueError("group_size needs granularity: group; set that too, or leave group_size out")
        if self.weight == "float" and self.activation != "float":
            raise ValueError(f"activation cannot be {self.activation} where the weight stays float")
        if "fp8" in (self.weight, self.activation):
            if self.activation not in (self.weight, "float"):
                raise ValueError(
                    f"fp8 is multiplied with fp8 or float; write activation: {self.weight} "
                    f"(found weight: {self.weight}, activation: {self.activation})"
                )
            if not self.symmetric or self.activation_symmetric is False:
                raise ValueError(
                    "fp8 has no zero point; leave symmetric and activation_symmetric out, or set them true"
                )
        if self.activation_scale == "dynamic" and self.activation == "float":
            raise ValueError("activation_scale: dynamic needs an integer activation, for example activation: int8")
        if self.activation_scale == "dynamic" and self.activation_symmetric is False:
            raise ValueError("activation_symmetric: false needs activation_scale: static; dynamic has no zero point")
        return self

    @property
    def static(self) -> bool:
        """Whether its activations have scales that are measured."""
        return self.activation != "float" and self.activation_scale == "static"
