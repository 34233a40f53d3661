"""The recipe: one YAML file says what is quantized, how it is tuned, how it is judged and where it goes.

The schema is strict. A key that does not exist, a value of the wrong kind or two settings that contradict each other
give one `RecipeError` that names the place and the nearest valid spelling; nothing has been written by then.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

IntegerType = Literal["int8", "int6", "int4", "int3"]


class RecipeError(ValueError):
    """What is wrong with a recipe, in words for the person who wrote it."""


def found(value: Any) -> str:
    """A value from YAML, shown to the person who wrote it."""
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else "a section"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def closest(word: str, valid: list[str]) -> str:
    """The most similar one; of equals the one with the nearest letters, so for int5 it is int4 and not int8."""

    def likeness(name: str) -> tuple[float, int]:
        apart = sum(abs(ord(a) - ord(b)) for a, b in zip(word, name, strict=False))
        return difflib.SequenceMatcher(None, word.lower(), name).ratio(), -apart

    best = max(sorted(valid), key=likeness, default="")
    return best if likeness(best)[0] >= 0.5 else ""


def nearest(word: Any, valid: list[str]) -> str:
    close = closest(word, valid) if isinstance(word, str) else ""
    return f" (did you mean {close!r}?)" if close else ""


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, which has no dot, as text; where a number is due, it means one."""
    scientific = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if scientific else value


def _steps_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be a whole number from 1 on, or auto (found {found(value)}){nearest(value, ['auto'])}")


def _output_folder(value: str) -> str:
    if "\0" in value or not value.strip() or Path(value).name in ("", ".."):
        raise ValueError(f"must name a folder that can be created (found {value!r})")
    return os.path.expanduser(value)


Number = Annotated[float, BeforeValidator(_scientific)]
StepsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_steps_or_auto)]
OutputFolder = Annotated[str, AfterValidator(_output_folder)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """Which pipeline to quantize."""

    id: str = Field(min_length=1, description="`bundled:NAME`, a local folder in diffusers format, or a hub id")
    revision: str | None = Field(None, description="hub revision; only for hub ids")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type the pipeline is loaded in")
    device: str = Field("auto", description="`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`")


class Sampling(Section):
    """How images are sampled, during calibration and later."""

    scheduler: str | None = Field(None, description="a diffusers scheduler class; the model's own if absent")
    num_inference_steps: int = Field(50, ge=2, le=1000)
    guidance_scale: Number = Field(1.5, ge=1.0, description="1.0 switches classifier-free guidance off")


class Data(Section):
    """Calibration data: JSON lines with a `class_id` (or a `prompt`) each."""

    path: str = Field(min_length=1, description="JSON-lines file: beside the recipe, absolute, or a shipped one")
    num_samples: int = Field(32, ge=1, description="samples calibrated on, each with its own noise")
    held_out_fraction: Number = Field(0.3, gt=0, lt=1, description="share of classes or prompts never calibrated on")
    seed: int = Field(0, ge=0, lt=2**31, description="decides the split and every sample's noise")


class Rule(Section):
    """What becomes of the Linear and Conv2d modules whose name the pattern matches in full; the first match wins."""

    modules: str = Field(description="regular expression, matched against the whole module name")
    weight: Literal[IntegerType, "float"]
    activation: Literal[IntegerType, "float"] = "float"
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
            raise ValueError("activation cannot be an integer where the weight stays float")
        if self.activation_scale == "dynamic" and self.activation == "float":
            raise ValueError("activation_scale: dynamic needs an integer activation, for example activation: int8")
        if self.activation_scale == "dynamic" and self.activation_symmetric is False:
            raise ValueError("activation_symmetric: false needs activation_scale: static; dynamic has no zero point")
        return self


class Quantization(Section):
    rules: tuple[Rule, ...] = Field(min_length=1)
    timestep_groups: int = Field(10, ge=1, description="static activation scales are kept per group of steps")
    initialization: Literal["mse", "round_to_nearest"] = Field("mse", description="how the first scales are found")


class LearningRates(Section):
    """Adam's rates. The first three are in quantization steps per update, so that they serve every bit width."""

    weight: Number = Field(1.5e-3, ge=0)
    weight_scale: Number = Field(1.5e-3, ge=0, description="steps that the end of the range moves by")
    activation_scale: Number = Field(1.5e-3, ge=0, description="likewise, of the scale or clip ratio")
    bias: Number = Field(1e-4, ge=0)
    rounding: Number = Field(1e-2, ge=0, description="of AdaRound's logits")


Learned = Literal["weight", "weight_scale", "activation_scale", "bias", "rounding"]


class Objective(Section):
    """AccuQuant calibration; `iterations: 0` leaves the initial scales as they are."""

    steps_per_group: StepsOrAuto = Field(
        1, description="M, the denoising steps simulated together; `auto` tries 1, 2, 5 and keeps the best"
    )
    gradient: Literal["identity", "variance", "exact"] = "identity"
    loss: Literal["terminal", "dense"] = Field("terminal", description="compare group ends, or every step in a group")
    inputs: Literal["full_precision", "quantized"] = Field(
        "full_precision", description="trajectory whose latents groups start from"
    )
    iterations: int = Field(400, ge=0, description="updates of the parameters")
    cached_iterations: int = Field(0, ge=0, description="further updates, made with the recipe's cache on")
    warmup_fraction: Number = Field(0.0, ge=0, le=1, description="first share of the updates, made with M = 1")
    batch_size: int = Field(8, ge=1)
    learn: tuple[Learned, ...] = Field(("weight", "weight_scale", "activation_scale"), min_length=1)
    learning_rates: LearningRates = LearningRates()

    @model_validator(mode="after")
    def _consistent(self) -> Objective:
        if "rounding" in self.learn and {"weight", "weight_scale"} & set(self.learn):
            raise ValueError("learn: 'rounding' (AdaRound) needs fixed weights; drop 'weight' and 'weight_scale'")
        if self.inputs == "quantized" and self.steps_per_group != 1:
            raise ValueError("inputs: quantized is the per-step rival and needs steps_per_group: 1")
        return self


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


class Cache(Section):
    """Feature caching: attention and MLP of every block are computed at a few full steps and forecast at the others.

    One of `interval`, `tau`, `target_nfc`, `target_seconds`, or a list of steps as `schedule`, says at which.
    """

    estimation: Literal["rfe", "taylor", "reuse"] = Field("rfe", description="forecast of RFC, TaylorSeer or FORA")
    order: int | None = Field(None, ge=0, le=4, description="of the forecast; 2 if absent, 0 for reuse")
    schedule: Schedule = Field(
        None,
        description="interval; rcs: by tau; dps: CacheQuant's, of mean gap interval; best: searched; or full steps",
    )
    interval: int | None = Field(None, ge=1, description="a full step every so many")
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
    modules: str | None = Field(None, description="regular expression, matched against the whole module name")
    factors_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="as the output if absent")
    factors_device: str | None = Field(None, description="where factors wait, such as cpu; by the model if absent")
    num_inference_steps: int | None = Field(None, ge=1, description="if known, factors are freed after their last use")
    full_timesteps: Numbers | None = Field(None, description="written by a search: timestep values of the full steps")
    noise: dict[str, Numbers] | None = Field(None, description="written by calibration: of each module, see noise.py")
    correction_timesteps: Numbers | None = Field(None, description="written by calibration")
    correction_channels: dict[str, int] | None = Field(None, description="written by calibration")
    measured_nfc: Numbers | None = Field(None, description="written by a search: NFC, mean and std over samples")

    @property
    def forecast_order(self) -> int:
        return (0 if self.estimation == "reuse" else 2) if self.order is None else self.order

    @property
    def full_steps(self) -> tuple[int, ...] | None:
        return self.schedule if isinstance(self.schedule, tuple) else None

    @property
    def searches(self) -> bool:
        """Whether a search has to be made before this can run."""
        wanted = self.schedule == "dps" or self.target_nfc is not None or self.target_seconds is not None
        return wanted and self.full_timesteps is None and self.tau is None

    @model_validator(mode="after")
    def _consistent(self) -> Cache:
        keys, targets = ("interval", "tau", "target_nfc", "target_seconds"), (self.target_nfc, self.target_seconds)
        given = [key for key in keys if getattr(self, key) is not None] + ["schedule"] * (self.full_steps is not None)
        given += ["full_timesteps"] * (bool(self.full_timesteps) and not given)
        if len(given) != 1:
            alternatives = f"{', '.join(keys)} or a list of steps as schedule"
            raise ValueError(f"give exactly one of {alternatives} (found {' and '.join(given) or 'none'})")
        if self.schedule in ("interval", "dps") and self.interval is None:
            raise ValueError(f"schedule {self.schedule} needs interval, for example interval: 4")
        rcs = self.schedule == "rcs" or self.tau is not None
        if self.corrected and rcs:
            raise ValueError("corrected: steps that RCS skips differ from sample to sample; use interval or target_nfc")
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
        if self.estimation == "reuse" and order != 0:
            raise ValueError(f"order: estimation reuse has order 0 (found {order}); use estimation: taylor")
        if self.noise_aware and order < 1:
            raise ValueError("noise_aware: order 0 has no change that noise could spoil; leave it out")
        if self.estimation == "rfe" and order < 1:
            raise ValueError("order: estimation rfe needs order 1 or more; use estimation: reuse")
        if full is not None and (full[0] != 0 or any(a >= b for a, b in itertools.pairwise(full))):
            raise ValueError(f"schedule must rise from 0, which is always full (found {found(list(full))})")
        self.check_steps(self.num_inference_steps)
        return self

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
            most = self.warmup + max(0, steps - self.warmup) // self.interval
        if most <= order and most != steps:
            raise ValueError(f"order {order} needs {order + 1} full steps, and there are {most:g}; lower the order")


class _Config(Cache):
    """A cache as Python code asks for it: mistakes are `RecipeError`s in one line."""

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            lines = []
            for e in error.errors():
                key, message = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
                if e["type"] == "extra_forbidden":
                    message = f"no such setting{nearest(key, list(type(self).model_fields))}"
                lines.append(f"{key}: {message}" if key else message)
            raise RecipeError(f"{type(self).__name__}: {'; '.join(lines)}") from None


class FORAConfig(_Config):
    """FORA (arXiv 2407.01425): the last output again, at a fixed interval."""

    estimation: Literal["reuse"] = "reuse"


class TaylorSeerConfig(_Config):
    """TaylorSeer (arXiv 2503.06923): a Taylor forecast, at a fixed interval."""

    estimation: Literal["taylor"] = "taylor"


class RFCConfig(_Config):
    """RFC (arXiv 2602.19506): Taylor's direction with the input's magnitude, at the steps that the input's error asks.

    With ``target_nfc`` the full steps are searched; ``schedule="rcs"`` searches tau instead.
    """


class Evaluation(Section):
    num_samples: int = Field(60, ge=2, description="held-out samples, compared with full precision on the same noise")
    batch_size: int = Field(30, ge=1)
    num_images: int = Field(6, ge=1, description="rows of the image grid")
    reconstruct: bool = Field(True, description="decode to images; False compares latents only")


class Export(Section):
    output: OutputFolder = Field(description="folder to write; it appears when it is whole")
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(\.\d+)?\s*[KMGT]B$")


class Recipe(Section):
    model: Model
    sampling: Sampling = Sampling()
    data: Data
    quantization: Quantization
    objective: Objective = Objective()
    cache: Cache | None = None
    evaluation: Evaluation = Evaluation()
    export: Export

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        steps, groups = self.sampling.num_inference_steps, self.quantization.timestep_groups
        m = self.objective.steps_per_group
        if m != "auto" and m > steps:
            raise ValueError(f"objective.steps_per_group is {m} but sampling has only {steps} steps")
        if self.cache is not None:
            known = self.cache.num_inference_steps
            if known is not None and known != steps:
                raise ValueError(f"cache.num_inference_steps is {known}, sampling.num_inference_steps {steps}")
            try:
                self.cache.check_steps(steps)
            except ValueError as error:
                raise ValueError(f"cache.{error}") from error
        if groups > steps:
            raise ValueError(f"quantization.timestep_groups is {groups} but sampling has only {steps} steps")
        quantized = [rule for rule in self.quantization.rules if rule.weight != "float"]
        if not quantized:
            raise ValueError("quantization.rules: every weight stays float; there is nothing to do")
        tuned = [rule for rule in quantized if rule.tune]
        if self.objective.iterations and not tuned:
            raise ValueError("objective.iterations: no rule leaves anything to tune (tune: false); set it to 0")
        idle = "activation_scale" in self.objective.learn and all(rule.activation == "float" for rule in tuned)
        if self.objective.iterations and idle:
            raise ValueError(
                "objective.learn: 'activation_scale' (there by default) needs a tuned rule with an integer activation; "
                "write learn: [weight, weight_scale], or give a rule activation: int8"
            )
        return self
