"""A quantization rule: modules by pattern, and the types they get."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from accuquant.recipe.base import Section

NumberType = Literal["int8", "int6", "int4", "int3", "fp8"]


class Rule(Section):
    """What becomes of the Linear and Conv2d modules whose name the pattern matches in full; the first match wins."""

    modules: str = Field(description="regular expression, matched against the whole module name")
    weight: Literal[NumberType, "float"] = Field(description="fp8 is e4m3, for GPUs that multiply it")
    activation: Literal[NumberType, "float"] = "float"
    granularity: Literal["channel", "group"] = Field("channel", description="a weight scale per row, or group of it")
    group_size: int | None = Field(None, ge=8, description="weights per scale, with `granularity: group`")
    symmetric: bool = Field(True, description="weight zero point fixed at 0")
    activation_scale: Literal["static", "dynamic"] = Field(
        "static", description="static: one per timestep group, measured; dynamic: one per token, at run time"
    )
    activation_symmetric: bool | None = Field(
        None,
        description="activation zero point fixed at 0; dynamic scales have none, static ones do unless this is set",
    )
    tune: bool = Field(True, description="calibration may change these modules; false keeps their initial scales")

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
