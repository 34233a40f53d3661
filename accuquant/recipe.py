"""The recipe: one YAML file says what is quantized, how it is tuned, how it is judged and where it goes.

The schema is strict. A key that does not exist, a value of the wrong kind or two settings that contradict each other
give one `RecipeError` that names the place and the nearest valid spelling; nothing has been written by then.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

IntegerType = Literal["int8", "int6", "int4", "int3"]
Shipped = Literal["recipes", "calib_data"]
PACKAGE = Path(__file__).parent


class RecipeError(ValueError):
    """What is wrong with a recipe, in words for the person who wrote it."""


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, which has no dot, as text; where a number is due, it means one."""
    scientific = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if scientific else value


def _steps_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be a whole number from 1 on, or auto (found {_found(value)}){_nearest(value, ['auto'])}")


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
    evaluation: Evaluation = Evaluation()
    export: Export

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        steps, groups = self.sampling.num_inference_steps, self.quantization.timestep_groups
        m = self.objective.steps_per_group
        if m != "auto" and m > steps:
            raise ValueError(f"objective.steps_per_group is {m} but sampling has only {steps} steps")
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


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a file, or by name from the shipped ones, and apply ``section.key=value`` overrides.

    A data path found beside the recipe or from here becomes absolute, so that the export's copy of the recipe finds it.

    Raises:
        RecipeError: the file is missing or not YAML, or its content does not fit the schema.
    """
    path = find_shipped("recipes", str(name), suffix=".yaml")
    try:
        tree = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model: ..., data: ...), found {_found(tree)}")
    for override in overrides or []:
        _apply(tree, override)
    recipe = parse_recipe(tree, " ".join([str(path), *(f"--set {o}" for o in overrides or [])]))
    for place in (path.parent / recipe.data.path, Path(os.path.expanduser(recipe.data.path))):
        if os.path.isfile(place):
            return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(place.resolve())})})
    return recipe


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a tree that was read from ``source``.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        # in JSON, pydantic's strict mode takes lists for tuples but no text for a number
        return Recipe.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = _explain(error)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: {error}") from error
    raise RecipeError(f"{source}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{source}:", *lines]))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_shipped(kind: Shipped, name: str, suffix: str = "") -> Path:
    """A file the user names: as given, or one that travels with the package.

    Raises:
        RecipeError: no such file; the message lists what is shipped and the nearest name.
    """
    given = Path(os.path.expanduser(name))
    shipped = [shipped_folder(kind) / n for n in (name, name + suffix)]
    for place in [given, *shipped]:
        if os.path.isfile(place):
            return place
    what = f"{name!r} is a folder" if os.path.isdir(given) and name else f"no file {name!r}"
    key, known = "data.path: " if kind == "calib_data" else "", list_shipped(kind)
    raise RecipeError(f"{key}{what}{_nearest(given.name, known)}; shipped {kind}: {', '.join(known) or 'none'}")


def shipped_folder(kind: Shipped) -> Path:
    """Inside the wheel, or the folder of a clone."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def list_shipped(kind: Shipped) -> list[str]:
    found = shipped_folder(kind).glob("*.yaml" if kind == "recipes" else "*.jsonl")
    return sorted(p.stem if kind == "recipes" else p.name for p in found)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for position, key in enumerate(keys):
            if key.value in [k.value for k in keys[:position]]:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = ", ".join(filter(None, parts)) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: not readable as YAML: {problem}") from error


def _apply(tree: Any, override: str) -> None:
    """Set ``a.b.0.c=value`` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set {override}: write it as section.key=value, for example objective.steps_per_group=5")
    value, node = _yaml(text, f"--set {override}"), tree
    for depth, part in enumerate(parts):
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {override}: {'.'.join(parts[:depth])} holds a value, not a section")
        place: Any = _index(node, part, override) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[place] = value
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        entries = f"entries 0 to {len(node) - 1}" if node else "no entries"
        raise RecipeError(f"--set {override}: the list has {entries}, found {part!r}")
    return int(part)


WORDS = {  # pydantic's kinds of error -> our words
    "model_type": "must be a section with the keys ",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be a size such as 500MB or 5GB",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
}


def _explain(error: ValidationError) -> list[str]:
    """One line for each thing that is wrong: path, what was found, what would do. Unknown keys come first."""
    lines = []
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    meant = [_meant(e["loc"]) for e in found if e["type"] == "extra_forbidden"]
    for e in found:
        path, value, kind = ".".join(map(str, e["loc"])), e["input"], e["type"]
        if kind == "extra_forbidden":
            hint = f" (did you mean {_meant(e['loc'])!r}?)" if _meant(e["loc"]) else ""
            lines.append(f"unknown key {path}{hint}; valid keys there: {', '.join(_keys_at(e['loc'][:-1]))}")
        elif kind == "missing":  # unless it is there, misspelt
            lines += [f"{path} is missing"] if e["loc"][-1] not in meant else []
        elif kind == "value_error":  # our own words; those about a section begin with its key
            lines.append(path + ("" if not path else "." if isinstance(value, dict) else ": ") + str(e["ctx"]["error"]))
        elif kind != "too_short" or not value:  # pydantic counts the valid entries
            message = WORDS.get(kind) or e["msg"].replace("Input should be", "must be")
            if kind == "model_type":
                message += ", ".join(_keys_at(e["loc"]))
            if kind == "string_type" and isinstance(value, bool | int | float):
                message += "; put it in quotes"
            hint = _nearest(value, re.findall(r"'([^']+)'", message)) if kind == "literal_error" else ""
            lines.append(f"{path or 'recipe'}: {message} (found {_found(value)}){hint}")
    return list(dict.fromkeys(lines))


def _found(value: Any) -> str:
    """A value from YAML, shown to the person who wrote it."""
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else "a section"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(where: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at this path."""
    section: type[BaseModel] = Recipe
    for part in where:
        annotation = section.model_fields[part].annotation if isinstance(part, str) else section
        inner = getattr(annotation, "__args__", (annotation,))[0]
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else section
    return list(section.model_fields)


def _meant(where: tuple[int | str, ...]) -> str:
    """What a wrong key stands for: the same key of another section, or the nearest one here."""
    key = str(where[-1])
    elsewhere = [f"{name}.{key}" for name in Recipe.model_fields if key in _keys_at((name,))]
    return elsewhere[0] if elsewhere else _closest(key, _keys_at(where[:-1]))


def _closest(word: str, valid: list[str]) -> str:
    """The most similar one; of equals the one with the nearest letters, so for int5 it is int4 and not int8."""

    def likeness(name: str) -> tuple[float, int]:
        apart = sum(abs(ord(a) - ord(b)) for a, b in zip(word, name, strict=False))
        return difflib.SequenceMatcher(None, word.lower(), name).ratio(), -apart

    best = max(sorted(valid), key=likeness, default="")
    return best if likeness(best)[0] >= 0.5 else ""


def _nearest(word: Any, valid: list[str]) -> str:
    close = _closest(word, valid) if isinstance(word, str) else ""
    return f" (did you mean {close!r}?)" if close else ""
