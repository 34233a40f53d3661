"""The `cache:` section, and the same as Python code asks for it."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from accuquant.errors import RecipeError, nearest
from accuquant.recipe.base import Number, Section, found

# the forecasts of `core.forecasts`, dearest first, with their least and highest order
ESTIMATIONS = {"rfe": (1, 4), "taylor": (0, 4), "reuse": (0, 0)}
# once written into recipes by searches and calibration, which now find them anew
WRITTEN = (
    *("correction_timesteps", "correction_full_timesteps", "correction_channels"),
    *("learned_timesteps", "learned_modules", "measured_nfc"),
)


def check_estimation(value: Any, more: tuple[str, ...] = ()) -> str:
    """One of the forecasts there are, or of ``more`` words.

    Raises:
        ValueError: it is none.
    """
    words = [*ESTIMATIONS, *more]
    if value in words:
        return str(value)
    shown = ", ".join(map(repr, words[:-1]))
    raise ValueError(f"must be {shown} or {words[-1]!r} (found {found(value)}){nearest(value, words)}")


def _schedule(value: Any) -> Any:
    words = ["interval", "rcs", "dps", "best"]
    steps = tuple(value) if isinstance(value, list | tuple | range) else ()
    if value is None or value in words or (steps and all(type(i) is int for i in steps)):
        return steps or value
    raise ValueError(
        f"must be {', '.join(words)} or a list of full steps (found {found(value)}){nearest(value, words)}"
    )


Schedule = Annotated[Literal["interval", "rcs", "dps", "best"] | tuple[int, ...] | None, BeforeValidator(_schedule)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Pair = Annotated[tuple[int, int], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Cache(Section):
    """Feature caching: attention and MLP of every block are computed at a few full steps and forecast at the others.

    One of `interval`, `tau`, `target_nfc`, `target_seconds`, or a list of steps as `schedule`, says at which.
    """

    estimation: Annotated[str, BeforeValidator(lambda value: check_estimation(value, ("auto",)))] = Field(
        "rfe", description="forecast of RFC, TaylorSeer or FORA; auto: tries them all up to `order`, and noise-aware"
    )
    order: int | None = Field(None, ge=0, le=4, description="of the forecast; 2 if absent, 0 for reuse")
    schedule: Schedule = Field(
        None,
        description="interval; rcs: by tau; dps: CacheQuant's, of mean gap interval or target_nfc; best: searched",
    )
    interval: int | None = Field(None, ge=1, description="a full step every so many")
    offset: int | None = Field(
        None,
        ge=0,
        description="interval: steps skipped between warmup and the next full one; interval - 1 if absent, as "
        "published (0, 1, 5, 9 ...); 1 as in diffusers (0, 1, 3, 7 ...)",
    )
    tau: Number | None = Field(None, gt=0, description="RCS: full when the input's forecast error adds up to this")
    target_nfc: Number | None = Field(None, ge=1, description="search for this mean number of full computations")
    target_seconds: Number | None = Field(None, gt=0, description="search for this time of one trajectory of 8 samples")
    trials: int = Field(60, ge=0, description="sampled trajectories that refine a `best` schedule")
    warmup: int = Field(2, ge=1, description="leading full steps: 2 for DiT, 3 for FLUX, 1 for HunyuanVideo")
    max_gap: int | None = Field(None, ge=1, description="rcs: the longest distance of two full steps")
    norm: Literal["sample", "token", "channel", "batch"] = Field("sample", description="scope of the norms of rfe")
    differences: Literal["taylor", "newton"] = Field("taylor", description="newton: exact under uneven gaps")
    noise_aware: bool = Field(False, description="forecasts know the quantization noise that calibration measures")
    corrected: bool = Field(False, description="calibration fits a slope and an intercept to each forecast channel")
    corrected_quantization: bool = Field(False, description="likewise to what full steps compute")
    measured_on: Literal["quantized", "full_precision"] = Field(
        "quantized", description="what dps and corrections are found on; full_precision: without cache, as published"
    )
    correction_ridge: Number | None = Field(
        None,
        ge=0,
        description="weight of the slope 1 against the fitted one; 1 if absent, 0: least squares, as published",
    )
    dps_feature: str | None = Field(None, description="regular expression: modules that dps looks at, if not all")
    dps_samples: int | None = Field(
        None, ge=1, description="calibration samples that dps looks at, as far as there are; 2 if absent"
    )
    feature: Literal["modules", "blocks"] = Field(
        "modules",
        description="blocks: one feature, as CacheQuant; what `blocks` add up to, of a U-Net its last up-block's input",
    )
    blocks: Pair | None = Field(None, description="first and last of feature: blocks; all but the outer two if absent")
    modules: str | None = Field(None, description="regular expression, matched against the whole module name")
    factors_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="as the output if absent")
    factors_device: str | None = Field(None, description="where factors wait, such as cpu; by the model if absent")
    num_inference_steps: int | None = Field(None, ge=1, description="if known, factors are freed after their last use")
    full_timesteps: Numbers | None = Field(None, description="written by a search: timestep values of the full steps")
    noise: dict[str, Numbers] | None = Field(None, description="written by a search: of each module, see noise.py")

    @model_validator(mode="before")
    @classmethod
    def _found_anew(cls, given: Any) -> Any:
        if isinstance(given, dict) and cls is Cache:
            return {key: value for key, value in given.items() if key not in WRITTEN}
        return given

    def changed(self, **changes: Any) -> Cache:
        """The same with other settings, checked like any.

        Raises:
            ValidationError: they do not go together.
        """
        return Cache(**(self.model_dump() | changes))

    @property
    def orders(self) -> tuple[int, int]:
        """The least and the highest order that the forecast can have."""
        return ESTIMATIONS.get(self.estimation, (1, 4))  # auto has the orders of those it tries

    @property
    def forecast_order(self) -> int:
        return min(2, self.orders[1]) if self.order is None else self.order

    @property
    def full_steps(self) -> tuple[int, ...] | None:
        return self.schedule if isinstance(self.schedule, tuple) else None

    @property
    def fits(self) -> bool:
        """Whether calibration fits a correction."""
        return self.corrected or self.corrected_quantization

    @property
    def searches(self) -> bool:
        """Whether a search has to be made before this can run."""
        wanted = self.schedule == "dps" or self.target_nfc is not None or self.target_seconds is not None
        return (wanted and self.full_timesteps is None and self.tau is None) or self.estimation == "auto"

    @property
    def decides_while_running(self) -> bool:
        """Whether what is computed in full depends on the samples (RCS)."""
        return self.schedule == "rcs" or self.tau is not None

    @model_validator(mode="after")
    def _consistent(self) -> Cache:
        keys, targets = ("interval", "tau", "target_nfc", "target_seconds"), (self.target_nfc, self.target_seconds)
        given = [key for key in keys if getattr(self, key) is not None] + ["schedule"] * (self.full_steps is not None)
        given += ["full_timesteps"] * (bool(self.full_timesteps) and not given)
        if len(given) != 1:
            alternatives = f"{', '.join(keys)} or a list of steps as schedule"
            raise ValueError(f"give exactly one of {alternatives} (found {' and '.join(given) or 'none'})")
        if self.schedule == "interval" and self.interval is None:
            raise ValueError("schedule interval needs interval, for example interval: 4")
        if self.schedule == "dps" and self.interval is None and self.target_nfc is None:
            raise ValueError("schedule dps needs interval or target_nfc, for example interval: 4")
        rcs = self.decides_while_running
        if self.fits and rcs:
            key = "corrected" if self.corrected else "corrected_quantization"
            raise ValueError(f"{key}: steps that RCS skips differ from sample to sample; use interval or target_nfc")
        for name in ("dps_feature", "dps_samples"):
            if self.schedule != "dps" and getattr(self, name) is not None:
                raise ValueError(f"{name}: only schedule: dps looks at it")
        if self.correction_ridge is not None and not self.fits:
            raise ValueError("correction_ridge: nothing is corrected; add corrected or corrected_quantization")
        if self.offset is not None and (self.interval is None or self.schedule == "dps"):
            raise ValueError("offset: belongs to a fixed interval, for example interval: 4 with offset: 1")
        if self.offset is not None and self.interval is not None and self.offset >= self.interval:
            raise ValueError(f"offset: must be below the interval of {self.interval} (found {self.offset})")
        self._check_blocks()
        if self.max_gap is not None and not rcs and not any(targets):
            raise ValueError("max_gap is for tau and targets; with interval or a list of steps the gaps are given")
        if self.full_steps is not None and self.warmup != 2:
            raise ValueError("warmup: the list of steps in schedule says which are full; leave warmup out")
        if self.schedule in ("interval", "dps", "best") and self.tau is not None:
            raise ValueError(f"schedule {self.schedule} knows no tau; use schedule: rcs, or leave schedule out")
        if self.schedule == "rcs" and self.interval is not None:
            raise ValueError("schedule rcs needs tau or target_nfc, not interval")
        if self.schedule == "best" and not any(targets):
            raise ValueError("schedule best needs target_nfc or target_seconds")
        if self.schedule != "rcs" and self.target_nfc and self.target_nfc % 1:
            raise ValueError(f"target_nfc must be whole (found {self.target_nfc:g}); schedule: rcs can meet a mean")
        order, full = self.forecast_order, self.full_steps
        if self.factors_device and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", self.factors_device):
            raise ValueError(f"factors_device: {self.factors_device!r} is no device; cpu, cuda or cuda:1 are")
        least, highest = self.orders
        if order > highest:
            most = f"{'at most ' if highest else ''}order {highest}"
            raise ValueError(f"order: estimation {self.estimation} has {most} (found {order}); use estimation: taylor")
        if self.noise_aware and order < 1:
            raise ValueError("noise_aware: order 0 has no change that noise could spoil; leave it out")
        if order < least:
            raise ValueError(f"order: estimation {self.estimation} needs order {least} or more; use estimation: reuse")
        if self.estimation == "auto" and rcs:
            raise ValueError("estimation: auto compares forecasts at the same full steps; use interval or target_nfc")
        if full is not None and (full[0] != 0 or any(a >= b for a, b in itertools.pairwise(full))):
            raise ValueError(f"schedule must rise from 0, which is always full (found {found(list(full))})")
        self.check_steps(self.num_inference_steps)
        return self

    def _check_blocks(self) -> None:
        if self.feature == "modules":
            if self.blocks is not None:
                raise ValueError("blocks: needs feature: blocks")
            return
        if self.modules is not None:
            raise ValueError("modules: feature: blocks forecasts blocks, which blocks: [first, last] names")
        if self.noise_aware:
            raise ValueError("noise_aware: is measured of modules; use feature: modules")
        if self.blocks is not None and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise ValueError(f"blocks: must be first and last, counted from 0 (found {list(self.blocks)})")

    def check_steps(self, steps: int | None) -> None:
        """Whether trajectories of this many steps (None: unknown) have the full steps that the config asks for.

        Raises:
            ValueError: they have not.
        """
        order, most = self.forecast_order, float("inf")
        if self.full_steps is not None and steps is not None and self.full_steps[-1] >= steps:
            raise ValueError(f"schedule: {self.full_steps[-1]} is no step of {steps}, they count from 0")
        if self.full_steps is not None:
            most = len(self.full_steps)
        elif self.target_nfc is not None:
            most = self.target_nfc
            if steps is not None and most > steps:
                raise ValueError(f"target_nfc: {most:g} is more than the {steps} steps there are")
            if most < self.warmup:
                raise ValueError(f"target_nfc: {most:g} is less than the {self.warmup} full steps of warmup")
        elif self.schedule == "dps" and self.interval is not None and steps is not None:
            most = -(-steps // self.interval)
        elif self.interval is not None and steps is not None:
            skipped = self.interval - 1 if self.offset is None else self.offset
            most = self.warmup + max(0, -(-(steps - self.warmup - skipped) // self.interval))
        if most <= order and most != steps:
            raise ValueError(f"order {order} needs {order + 1} full steps, and there are {most:g}; lower the order")


def cache_mistakes(error: ValidationError) -> str:
    """What pydantic found wrong with the fields of a cache, in one line: each key and what would do."""
    lines = []
    for e in error.errors():
        key, message = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            message = f"no such setting{nearest(key, Cache.model_fields)}"
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)


class _Config(Cache):
    """A cache as Python code asks for it: mistakes are `RecipeError`s in one line."""

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise RecipeError(f"{type(self).__name__}: {cache_mistakes(error)}") from None


class FORAConfig(_Config):
    """FORA (arXiv 2407.01425): the last output again, at a fixed interval."""

    estimation: Literal["reuse"] = "reuse"


class TaylorSeerConfig(_Config):
    """TaylorSeer (arXiv 2503.06923): a Taylor forecast, at a fixed interval; ``offset=1`` has it as diffusers does."""

    estimation: Literal["taylor"] = "taylor"


class RFCConfig(_Config):
    """RFC (arXiv 2602.19506): Taylor's direction with the input's magnitude, at the steps that the input's error asks.

    With ``target_nfc`` the full steps are searched; ``schedule="rcs"`` searches tau instead.
    """
