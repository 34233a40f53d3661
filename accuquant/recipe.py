"""The recipe: one YAML file says what is quantized, how it is tuned, how it is judged and where it goes.

The schema is strict. A key that does not exist, a value of the wrong kind or two settings that contradict each other give
one `RecipeError` that names the place and the nearest valid spelling; nothing has been written by then.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

IntegerType = Literal["int8", "int6", "int4", "int3"]
PACKAGE = Path(__file__).parent


class RecipeError(ValueError):
    """What is wrong with a recipe, in words for the person who wrote it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """Which pipeline to quantize."""

    id: str = Field(description="`bundled:NAME`, a local folder in diffusers format, or a hub id")
    revision: str | None = Field(None, description="hub revision; only for hub ids")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type the pipeline is loaded in")
    device: str = Field("auto", description="`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`")


class Sampling(Section):
    """How images are sampled, during calibration and later."""

    scheduler: str | None = Field(None, description="a diffusers scheduler class; the model's own if absent")
    num_inference_steps: int = Field(50, ge=2, le=1000)
    guidance_scale: float = Field(1.5, ge=1.0, description="1.0 switches classifier-free guidance off")


class Data(Section):
    """Calibration data: JSON lines with a `class_id` (or a `prompt`) each."""

    path: str = Field(description="a JSON-lines file: beside the recipe, absolute, or one that is shipped")
    num_samples: int = Field(32, ge=1, description="samples calibrated on, each with its own noise")
    held_out_fraction: float = Field(0.3, gt=0, lt=1, description="share of classes or prompts never calibrated on")
    seed: int = Field(0, ge=0, description="decides the split and every sample's noise")


class Rule(Section):
    """What becomes of the Linear and Conv2d modules whose name the pattern matches in full; the first match wins."""

    modules: str = Field(description="regular expression, matched against the whole module name")
    weight: IntegerType | Literal["float"]
    activation: IntegerType | Literal["float"] = "float"
    granularity: Literal["channel", "group"] = Field("channel", description="one weight scale per row, or per group of it")
    group_size: int | None = Field(None, ge=8, description="weights per scale, with `granularity: group`")
    symmetric: bool = Field(True, description="weight zero point fixed at 0")
    activation_scale: Literal["static", "dynamic"] = Field(
        "static", description="static: one per timestep group, measured; dynamic: one per token, at run time"
    )
    activation_symmetric: bool = Field(False, description="activation zero point fixed at 0 (dynamic scales always are)")
    tune: bool = Field(True, description="calibration may change these modules; false keeps their initial scales")

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity: group needs a group_size (for example group_size: 32)")
        if self.granularity == "channel" and self.group_size is not None:
            raise ValueError("group_size has no meaning with granularity: channel; set granularity: group or leave it out")
        if self.weight == "float" and self.activation != "float":
            raise ValueError("activation cannot be an integer where the weight stays float")
        return self


class Quantization(Section):
    rules: tuple[Rule, ...] = Field(min_length=1)
    timestep_groups: int = Field(10, ge=1, description="static activation scales are kept per group of steps")
    initialization: Literal["mse", "round_to_nearest"] = Field("mse", description="how the first scales are found")


class LearningRates(Section):
    weight: float = Field(1e-4, ge=0)
    weight_scale: float = Field(3e-4, ge=0, description="of the logarithm of the scale")
    activation_scale: float = Field(3e-4, ge=0, description="of the logarithm of the scale or clip ratio")
    bias: float = Field(1e-4, ge=0)
    rounding: float = Field(1e-2, ge=0, description="of AdaRound's logits")


Learned = Literal["weight", "weight_scale", "activation_scale", "bias", "rounding"]


class Objective(Section):
    """AccuQuant calibration; `iterations: 0` leaves the initial scales as they are."""

    steps_per_group: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="M, the denoising steps simulated together; `auto` tries 1, 2, 5 and keeps the best"
    )
    gradient: Literal["identity", "variance", "exact"] = "identity"
    loss: Literal["terminal", "dense"] = Field("terminal", description="compare group ends, or every step in a group")
    inputs: Literal["full_precision", "quantized"] = Field(
        "full_precision", description="trajectory whose latents groups start from"
    )
    iterations: int = Field(400, ge=0, description="updates of the parameters")
    warmup_fraction: float = Field(0.0, ge=0, le=1, description="first share of the updates, made with M = 1")
    batch_size: int = Field(8, ge=1)
    learn: tuple[Learned, ...] = ("weight", "weight_scale", "activation_scale")
    learning_rates: LearningRates = LearningRates()

    @model_validator(mode="after")
    def _consistent(self) -> Objective:
        if "rounding" in self.learn and {"weight", "weight_scale"} & set(self.learn):
            raise ValueError("learn: 'rounding' (AdaRound) works on fixed weights and scales; drop 'weight' and 'weight_scale'")
        if self.inputs == "quantized" and self.steps_per_group != 1:
            raise ValueError("inputs: quantized is the per-step rival and needs steps_per_group: 1")
        return self


class Evaluation(Section):
    num_samples: int = Field(60, ge=2, description="held-out samples, compared with full precision on the same noise")
    batch_size: int = Field(30, ge=1)
    num_images: int = Field(6, ge=1, description="rows of the image grid")
    reconstruct: bool = Field(True, description="decode to images; False compares latents only")


class Export(Section):
    output: str = Field(description="folder to write; it appears when it is whole")
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?\s*[KMGT]?B$")


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
        return self


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a file, or by name from the shipped ones, and apply ``section.key=value`` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, or its content does not fit the schema.
    """
    path = find_shipped("recipes", str(name), suffix=".yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(tree).__name__}")
    for override in overrides or []:
        _apply(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a tree that was read from ``source``.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        return Recipe.model_validate_json(_json(tree))
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(dict.fromkeys(map(_explain, error.errors())))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_shipped(kind: Literal["recipes", "calib_data"], name: str, suffix: str = "", beside: Path | None = None) -> Path:
    """A file the user names: as given, beside another file, or one that travels with the package.

    Raises:
        RecipeError: no such file; the message lists what is shipped and the nearest name.
    """
    places = [Path(name), *([beside / name] if beside else []), *(shipped_folder(kind) / n for n in (name, name + suffix))]
    for place in places:
        if place.is_file():
            return place
    shipped = list_shipped(kind)
    raise RecipeError(f"no file {name!r}{_nearest(name, shipped)}; shipped {kind}: {', '.join(shipped) or 'none'}")


def shipped_folder(kind: str) -> Path:
    """Inside the wheel, or the folder of a clone."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def list_shipped(kind: str) -> list[str]:
    endings = {".yaml", ".jsonl"}
    return sorted(p.stem if p.suffix == ".yaml" else p.name for p in shipped_folder(kind).glob("*") if p.suffix in endings)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b.0.c=value`` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override!r}: write it as section.key=value, for example objective.steps_per_group=5")
    node: Any = tree
    *parents, last = key.strip().split(".")
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"--set {override!r}: {'.'.join(parents[:depth])} holds a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {override!r}: {'.'.join(parents)} holds a value, not a section")


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"--set {override!r}: the list has entries 0 to {len(node) - 1}, found {part!r}")
    return int(part)


def _json(tree: dict[str, Any]) -> str:
    """YAML's tree as JSON text: pydantic's strict mode then takes lists for tuples but no string for a number."""
    import json

    return json.dumps(_floats(tree), default=str)


def _floats(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as text; whoever writes it means a number."""
    if isinstance(value, dict):
        return {str(k): _floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: Any) -> str:
    """One line for one pydantic error: path, what was found, what would do."""
    where = [str(part) for part in error["loc"]]
    path = ".".join(where)
    if error["type"] == "extra_forbidden":
        keys = _keys_at(where[:-1])
        return f"unknown key {path}{_nearest(where[-1], keys)}; valid keys there: {', '.join(keys)}"
    if error["type"] == "missing":
        return f"{path} is missing"
    found = f" (found {error['input']!r})" if not isinstance(error["input"], dict) else ""
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = _nearest(error["input"], [v.strip("'") for v in error["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message}{found}{hint}" if path else message


def _keys_at(where: list[str]) -> list[str]:
    """Valid keys of the section at this path."""
    section: type[BaseModel] = Recipe
    for part in where:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        inner = getattr(annotation, "__args__", (annotation,))[0]
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else section
    return list(section.model_fields)


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
