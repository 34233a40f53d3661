"""The recipe: one YAML file says what is quantized, how it is tuned, how it is judged and where it goes.

The schema is strict. A key that does not exist, a value of the wrong kind or two settings that contradict each other
give one `RecipeError` that names the place and the nearest valid spelling; nothing has been written by then.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from accuquant.errors import nearest
from accuquant.recipe.base import Number, Section, found
from accuquant.recipe.cache import Cache
from accuquant.recipe.export import Export, check_torchao
from accuquant.recipe.presets import PRESETS, with_preset
from accuquant.recipe.rule import Rule
from accuquant.recipe.tune import Tune

OTHER_STEPS = ("Heun", "KDPM2", "PNDM")  # schedulers that make other numbers of steps than they are asked for


def _steps_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be a whole number from 1 on, or auto (found {found(value)}){nearest(value, ['auto'])}")


StepsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_steps_or_auto)]


class Model(Section):
    """Which pipeline to quantize."""

    id: str = Field(min_length=1, description="`bundled:NAME`, a local folder in diffusers format, or a hub id")
    revision: str | None = Field(None, description="hub revision; only for hub ids")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type the pipeline is loaded in")
    device: str = Field("auto", description="`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`")


class Setting(Section):
    """How images are sampled besides: what is left out is as in `sampling`."""

    num_inference_steps: int | None = Field(None, ge=2, le=1000)
    guidance_scale: Number | None = Field(None, ge=0.0)
    arguments: dict[str, Any] = Field({}, description="in the place of, or besides, those of `sampling.arguments`")

    def of(self, sampling: Sampling) -> Sampling:
        """The whole setting."""
        given = {
            key: value for key in ("num_inference_steps", "guidance_scale") if (value := getattr(self, key)) is not None
        }
        return sampling.model_copy(update={"also": (), "arguments": sampling.arguments | self.arguments} | given)


class Sampling(Section):
    """How images are sampled, during calibration and later."""

    scheduler: str | None = Field(None, description="a diffusers scheduler class; the model's own if absent")
    num_inference_steps: int = Field(50, ge=2, le=1000)
    guidance_scale: Number | None = Field(
        1.5, ge=0.0, description="1.0 switches classifier-free guidance off; null: what the pipeline has by default"
    )

    arguments: dict[str, Any] = Field(
        {}, description="further arguments of the pipeline's call, for all samples: `{height: 512, width: 512}`"
    )

    also: tuple[Setting, ...] = Field(
        (),
        description="further settings that are calibrated for at once: calibration and validation samples are of each "
        "in turn; cache, tune and evaluation are for the one above",
    )

    @model_validator(mode="after")
    def _differ(self) -> Sampling:
        for i, one in enumerate(self.also):
            if one.of(self) in [self.only, *(other.of(self) for other in self.also[:i])]:
                raise ValueError(f"also.{i}: is a setting that is there already; change something in it or drop it")
        return self

    @property
    def only(self) -> Sampling:
        """Without the further settings."""
        return self.model_copy(update={"also": ()})

    @property
    def each(self) -> list[Sampling]:
        """All settings that are calibrated for, this one first."""
        return [self.only, *(one.of(self) for one in self.also)]

    @property
    def settings(self) -> dict[str, Any]:
        """All that is the same for every call, by the names that pipelines have for it."""
        own = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {key: value for key, value in own.items() if value is not None} | self.arguments


class Data(Section):
    """Calibration data: JSON lines, each what a person would call the pipeline with: `{"prompt": "a fox"}`."""

    path: str = Field(min_length=1, description="JSON-lines file: beside the recipe, absolute, or a shipped one")
    num_samples: int = Field(32, ge=1, description="samples calibrated on, each with its own noise")
    validation_samples: int = Field(
        8, ge=1, description="further ones, that choices are made by: M auto, tune; of unseen inputs if there are more"
    )
    held_out_fraction: Number = Field(0.3, gt=0, lt=1, description="share of distinct lines never calibrated on")
    seed: int = Field(0, ge=0, lt=2**31, description="decides the split and every sample's noise")


class Attention(Section):
    """Attention's two products, Q with K and the softmax with V: what their inputs are quantized to.

    They are computed in float on the quantized values: as integers would give them, at no gain in time.
    """

    modules: str = Field(".*", min_length=1, description="regular expression of modules that attend; by default all")
    activation: Literal["int8", "int6", "int4", "int3"] = Field("int8", description="of Q, K and V")
    softmax: Literal["int8", "int6", "int4", "int3", "float"] | None = Field(
        None, description="of the softmax, whose range is its own; as `activation` if absent"
    )
    tune: bool = Field(True, description="calibration may change their scales")


class Quantization(Section):
    preset: str | None = Field(
        None, description=f"{', '.join(PRESETS)}: rules by kind that fit any model; written out after `rules`"
    )
    rules: tuple[Rule, ...] = Field(min_length=1, description="of modules, the first that names one decides")
    timestep_groups: int = Field(10, ge=1, description="static activation scales are kept per group of steps")
    initialization: str = Field(
        "mse", min_length=1, description="how the first scales are found: `mse` or `round_to_nearest`"
    )
    share_activation_scales: bool = Field(
        False,
        description="modules that read one tensor, as Q, K, V do, have one static scale: it is quantized once",
    )

    split_inputs: bool | Literal["auto"] = Field(
        False,
        description="a module that reads a concatenation, as after a U-Net's skip connection, has scales of its own "
        "for each part of its quantized input, and of its weight; auto, as presets have it: if there is one",
    )
    attention: Attention | None = Field(None, description="attention's two products stay float if this is absent")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, given: Any) -> Any:
        return with_preset(given)


class LearningRates(Section):
    """Adam's rates. The first three are in quantization steps per update, so that they serve every bit width."""

    weight: Number = Field(1.5e-3, ge=0)
    weight_scale: Number = Field(1.5e-3, ge=0, description="steps that the end of the range moves by")
    activation_scale: Number = Field(1.5e-3, ge=0, description="likewise, of the scale or clip ratio")
    bias: Number = Field(1e-4, ge=0)
    rounding: Number = Field(1e-2, ge=0, description="of AdaRound's logits")
    forecast: Number = Field(5e-2, ge=0, description="of the shares that forecasts take, which begin at 1")


Learned = Literal["weight", "weight_scale", "activation_scale", "bias", "rounding"]
CachedLearned = Literal["weight", "weight_scale", "activation_scale", "bias", "rounding", "forecast"]


class Objective(Section):
    """AccuQuant calibration; `iterations: 0` leaves the initial scales as they are."""

    target: str = Field(
        "trajectory",
        min_length=1,
        description="what full precision is followed in: `trajectory`, the latents M steps on (AccuQuant); `blocks`, "
        "what each block gives out, block after block, with `iterations` updates each (block reconstruction); `auto` "
        "tries blocks and M = 1, 2, 5 and 10, each at its own rates and at the same cost, and keeps what is nearest on "
        "validation noise, which differs from model to model; `cached_iterations` follow the trajectory after any",
    )
    steps_per_group: StepsOrAuto = Field(
        1, description="M, the denoising steps simulated together; `auto` tries 1, 2, 5 and 10, as `target: auto` does"
    )
    gradient: Literal["identity", "variance", "exact"] = "identity"
    loss: Literal["terminal", "dense"] = Field("terminal", description="compare group ends, or every step in a group")
    inputs: Literal["full_precision", "quantized"] = Field(
        "full_precision", description="trajectory whose latents groups start from"
    )
    iterations: int = Field(
        400,
        ge=0,
        description="updates of the parameters; with `auto` network evaluations, of which an update takes 2 M - 1; the "
        "trials then take once or twice as many again",
    )
    cached_iterations: int = Field(0, ge=0, description="further updates, made with the recipe's cache on")
    cached_learn: tuple[CachedLearned, ...] | None = Field(
        None,
        min_length=1,
        description="what these learn, if not what `learn` says; forecast: how much of the last output and of its "
        "change a forecast takes, by module and gap; M is the whole trajectory then, and the gradient exact",
    )
    warmup_fraction: Number = Field(0.0, ge=0, le=1, description="first share of the updates, made with M = 1")
    batch_size: int = Field(8, ge=1)
    learn: tuple[Learned, ...] = Field(("weight", "weight_scale", "activation_scale"), min_length=1)
    learning_rates: LearningRates = LearningRates()

    @model_validator(mode="after")
    def _consistent(self) -> Objective:
        for key, kinds in (("learn", self.learn), ("cached_learn", self.cached_learn or ())):
            if "rounding" in (*self.learn, *kinds) and {"weight", "weight_scale"} & set(kinds):
                raise ValueError(f"{key}: 'rounding' (AdaRound) needs fixed weights; drop 'weight' and 'weight_scale'")
        if self.cached_learn is not None and not self.cached_iterations:
            raise ValueError("cached_learn: needs cached_iterations, for example cached_iterations: 60")
        if self.target == "blocks":
            defaults = {k: field.default for k, field in type(self).model_fields.items()}
            steps = ("steps_per_group", "gradient", "loss", "inputs", "warmup_fraction")
            wrong = [k for k in steps if getattr(self, k) != defaults[k]]
            if wrong:
                needed = ", ".join(f"{k}: {defaults[k]}" for k in wrong)
                raise ValueError(f"target: blocks knows no denoising steps; leave {' and '.join(wrong)} out ({needed})")
        if self.target == "auto":
            wrong = [k for k, v in (("steps_per_group", 1), ("inputs", "full_precision")) if getattr(self, k) != v]
            if wrong and not (wrong == ["steps_per_group"] and self.steps_per_group == "auto"):
                raise ValueError(
                    f"target: auto finds M itself, from full-precision inputs; leave {' and '.join(wrong)} out, or "
                    "write target: trajectory"
                )
        if self.inputs == "quantized" and self.cached_iterations:
            raise ValueError("inputs: quantized is a rival that knows no cache; leave cached_iterations out")
        if self.inputs == "quantized" and self.steps_per_group != 1:
            raise ValueError("inputs: quantized is the per-step rival and needs steps_per_group: 1")
        return self


class Evaluation(Section):
    num_samples: int = Field(60, ge=2, description="held-out samples, compared with full precision on the same noise")
    batch_size: int = Field(30, ge=1)
    num_images: int = Field(6, ge=1, description="rows of the image grid")
    reconstruct: bool = Field(True, description="decode to images; False compares latents only")
    neighbours: int = Field(
        8, ge=0, description="held-out samples of half and twice the steps, and of half and 1.5 times the guidance"
    )


class Recipe(Section):
    model: Model
    sampling: Sampling = Sampling()
    data: Data
    quantization: Quantization
    objective: Objective = Objective()
    cache: Cache | None = None
    tune: Tune | None = None
    evaluation: Evaluation = Evaluation()
    export: Export

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        steps, scheduler = self.sampling.num_inference_steps, self.sampling.scheduler
        other = scheduler is not None and scheduler.startswith(OTHER_STEPS)  # then the recorded pipeline knows
        self.check_steps(steps, f"sampling has only {steps} steps", None if other else "sampling.num_inference_steps")
        learns_forecasts = "forecast" in (self.objective.cached_learn or ())
        if self.cache is not None and self.cache.decides_while_running and learns_forecasts:
            raise ValueError(
                "objective.cached_learn: 'forecast' is learned of each skipped step, and those that RCS skips "
                "differ from sample to sample; use cache.interval or cache.target_nfc"
            )
        if self.quantization.share_activation_scales and not any(rule.static for rule in self.quantization.rules):
            raise ValueError("quantization.share_activation_scales: no rule has static scales of an integer activation")
        quantized = [rule for rule in self.quantization.rules if rule.weight != "float"]
        if not quantized:
            raise ValueError("quantization.rules: every weight stays float; there is nothing to do")
        tuned = [rule for rule in quantized if rule.tune]
        attention = self.quantization.attention
        if self.objective.iterations and not tuned and not (attention and attention.tune):
            raise ValueError("objective.iterations: no rule leaves anything to tune (tune: false); set it to 0")
        if "rounding" in (*self.objective.learn, *(self.objective.cached_learn or ())):
            for i, rule in enumerate(self.quantization.rules):
                if rule.weight == "fp8" and rule.tune:
                    raise ValueError(
                        "objective.learn: 'rounding' (AdaRound) needs evenly spaced integers, and "
                        f"quantization.rules.{i} has weight: fp8; write learn: [weight, weight_scale, activation_scale]"
                    )
        none = all(rule.activation == "float" for rule in tuned) and not (attention and attention.tune)
        if self.objective.iterations and none and "activation_scale" in self.objective.learn:
            raise ValueError(
                "objective.learn: 'activation_scale' (there by default) needs a tuned rule with an integer activation; "
                "write learn: [weight, weight_scale], or give a rule activation: int8"
            )
        if none and "activation_scale" in (self.objective.cached_learn or ()):
            raise ValueError("objective.cached_learn: 'activation_scale' needs a tuned rule with an integer activation")
        if (settings := len(self.sampling.each)) > 1:
            for key in ("num_samples", "validation_samples"):
                if (count := getattr(self.data, key)) < settings:
                    raise ValueError(
                        f"data.{key} is {count}, and sampling.also makes {settings} settings: each needs a sample"
                    )
        if self.tune is not None and self.sampling.also:
            raise ValueError("sampling.also: the search of a tune section is at one setting; leave one of the two out")
        if self.tune is not None and self.objective.cached_learn is not None:
            raise ValueError("objective.cached_learn: under a tune section tune.learning says it; leave this out")
        if self.export.format == "torchao":
            if self.tune is not None or self.cache is not None:
                raise ValueError(
                    f"{'cache' if self.tune is None else 'tune'}: export.format torchao holds no feature cache; leave "
                    "the section out (accuquant.enable_cache works on what is loaded) or write export.format: accuquant"
                )
            learns = self.objective.iterations > 0 and "activation_scale" in self.objective.learn
            for key in ("attention", "split_inputs"):
                if getattr(self.quantization, key) not in (None, False, "auto"):
                    raise ValueError(f"quantization.{key}: export.format torchao does not hold that; leave it out")
            check_torchao(self.quantization.rules, self.quantization.timestep_groups, learns)
        return self

    def check_steps(self, steps: int, only: str, of_cache: str | None) -> None:
        """Whether M, timestep groups and cache fit this number of denoising steps.

        Args:
            only: what is said where there are too few, after "but".
            of_cache: what the number of steps is called beside the cache's own; None leaves the cache aside.

        Raises:
            ValueError: one does not fit; the text begins with its key.
        """
        asked = {
            "objective.steps_per_group": self.objective.steps_per_group,
            "quantization.timestep_groups": self.quantization.timestep_groups,
        }
        for key, value in asked.items():
            if value != "auto" and value > steps:
                raise ValueError(f"{key} is {value} but {only}")
        if self.cache is None or of_cache is None:
            return
        if (known := self.cache.num_inference_steps) not in (None, steps):
            raise ValueError(f"cache.num_inference_steps is {known}, {of_cache} {steps}")
        try:
            self.cache.check_steps(steps)
        except ValueError as error:
            raise ValueError(f"cache.{error}") from error
