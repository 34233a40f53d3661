"""The `tune:` section: what `accuquant tune` may choose, and the budget it keeps to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from accuquant.recipe.base import Number, Section
from accuquant.recipe.cache import check_estimation
from accuquant.recipe.rule import NAMED, Modules, Rule

Estimation = Annotated[str, BeforeValidator(check_estimation)]
Schedule = Literal["interval", "dps", "rcs", "best"]
Correction = Literal["none", "cache", "quantization", "both"]
Learning = Literal["forecast", "weights", "both"]


class ModuleClass(Section):
    """Modules that share their types, and the rules to choose from, each without its own `modules`."""

    modules: Modules = Field(description=NAMED)
    choose: tuple[Rule, ...] = Field(min_length=1, description="types, as in quantization.rules")

    @model_validator(mode="before")
    @classmethod
    def _same_modules(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("choose"), list):
            same = {"modules": given.get("modules")}
            # tuples: after this, strict mode no longer knows that it reads JSON
            return given | {"choose": tuple(r | same if isinstance(r, dict) else r for r in given["choose"])}
        return given


class Tune(Section):
    """A search for the least error of quantization and cache together, under at least one budget.

    Naive stacking and CacheQuant are tried beside what is asked for here, and may be chosen. Of the recipe's `cache:`
    the search keeps what is cached and how it is computed; full steps, forecast and corrections are its own choice.
    """

    nfc: int | None = Field(None, ge=3, description="budget: full computations of a trajectory")
    bit_operations: Number | None = Field(
        None, gt=0, le=1, description="budget: of a trajectory, as a fraction of float32 without a cache"
    )
    seconds: Number | None = Field(
        None, gt=0, description="budget: of one trajectory of eight samples, measured on this machine"
    )
    types: tuple[ModuleClass, ...] = Field((), description="classes of modules whose bit widths are chosen")
    combinations: int = Field(4, ge=1, description="combinations of types that are calibrated; tables say which")
    estimations: tuple[Estimation, ...] = Field(("reuse", "taylor", "rfe"), min_length=1)
    orders: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="of taylor and rfe")
    noise_aware: tuple[bool, ...] = Field((False, True), min_length=1)
    schedules: tuple[Schedule, ...] = Field(("interval", "best"), min_length=1)
    corrections: tuple[Correction, ...] = Field(("none", "cache", "quantization", "both"), min_length=1)
    levels: tuple[float, ...] = Field(
        (1.0, 0.7, 0.5), min_length=1, description="shares of the NFC that the budget pays for, for the Pareto front"
    )
    finalists: int = Field(3, ge=1, description="forecasts whose full steps are refined")
    trials: int = Field(24, ge=0, description="sampled trajectories that refine a list of full steps")
    more_samples: int = Field(
        4,
        ge=1,
        description="times data.validation_samples: what leaders get at most, until they are told apart",
    )
    learning: tuple[Learning, ...] = Field(
        ("forecast", "both"),
        description="what objective.cached_iterations updates with the best cache on learn, each from the model "
        "calibrated alone; weights: what objective.learn says",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Tune:
        if self.nfc is None and self.bit_operations is None and self.seconds is None:
            raise ValueError("give at least one budget: nfc, bit_operations or seconds")
        if any(order < 1 or order > 4 for order in self.orders):
            raise ValueError("orders: must be from 1 to 4; estimation reuse is order 0")
        if max(self.levels) != 1.0 or min(self.levels) <= 0:
            raise ValueError("levels: must be shares of the budget, above 0, with 1.0 among them")
        if len({each.modules for each in self.types}) < len(self.types):
            raise ValueError("types: two classes have the same modules")
        return self
