"""The recipe schema: what it takes, and what it says to someone who got it wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import recipe_tree

from accuquant.errors import RecipeError
from accuquant.recipe import Recipe
from accuquant.recipe.file import dump_recipe, find_shipped, list_shipped, load_recipe, parse_recipe

OBJECTIVE_KEYS = (
    "target, steps_per_group, gradient, loss, inputs, iterations, cached_iterations, cached_learn, "
    "warmup_fraction, batch_size, learn, learning_rates"
)
RULE_KEYS = (
    "modules, weight, activation, granularity, group_size, symmetric, activation_scale, activation_symmetric, tune, "
    "optional"
)
SECTIONS = "model, sampling, data, quantization, objective, cache, tune, evaluation, export"
TYPES = "'int8', 'int6', 'int4', 'int3', 'fp8' or 'float'"
WRITE_IT_AS = "write it as section.key=value, for example objective.steps_per_group=5"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree("model", "out")), encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # keys, at every level
        ("modle.id=3", f"unknown key modle (did you mean 'model'?); valid keys there: {SECTIONS}"),
        ("Objective.loss=dense", f"unknown key Objective (did you mean 'objective'?); valid keys there: {SECTIONS}"),
        (
            "objective.iteratons=5",
            f"unknown key objective.iteratons (did you mean 'iterations'?); valid keys there: {OBJECTIVE_KEYS}",
        ),
        (
            "quantization.rules.0.weigth=int4",
            f"unknown key quantization.rules.0.weigth (did you mean 'weight'?); valid keys there: {RULE_KEYS}",
        ),
        (
            "objective.learning_rates.wieght=1e-4",
            "unknown key objective.learning_rates.wieght (did you mean 'weight'?); "
            "valid keys there: weight, weight_scale, activation_scale, bias, rounding, forecast",
        ),
        (
            "objective.scheduler=DDIMScheduler",
            f"unknown key objective.scheduler (did you mean 'sampling.scheduler'?); valid keys there: {OBJECTIVE_KEYS}",
        ),
        ("zzz=1", f"unknown key zzz; valid keys there: {SECTIONS}"),
        # values
        (
            "quantization.rules.0.weight=int5",
            f"quantization.rules.0.weight: must be {TYPES} (found 'int5') (did you mean 'int4'?)",
        ),
        (
            "quantization.rules.0.weight=INT8",
            f"quantization.rules.0.weight: must be {TYPES} (found 'INT8') (did you mean 'int8'?)",
        ),
        ("quantization.rules.0.weight=8", f"quantization.rules.0.weight: must be {TYPES} (found 8)"),
        (
            "model.dtype=fp16",
            "model.dtype: must be 'float32', 'bfloat16' or 'float16' (found 'fp16') (did you mean 'float16'?)",
        ),
        (
            "objective.steps_per_group=atuo",
            "objective.steps_per_group: must be a whole number from 1 on, or auto (found 'atuo') "
            "(did you mean 'auto'?)",
        ),
        (
            "objective.steps_per_group=0",
            "objective.steps_per_group: must be a whole number from 1 on, or auto (found 0)",
        ),
        (
            "objective.steps_per_group=true",
            "objective.steps_per_group: must be a whole number from 1 on, or auto (found true)",
        ),
        ("sampling.num_inference_steps='50'", "sampling.num_inference_steps: must be a whole number (found '50')"),
        ("sampling.num_inference_steps=50.0", "sampling.num_inference_steps: must be a whole number (found 50.0)"),
        (
            "sampling.num_inference_steps=-5",
            "sampling.num_inference_steps: must be greater than or equal to 2 (found -5)",
        ),
        ("sampling.guidance_scale=.inf", "sampling.guidance_scale: must be a finite number (found inf)"),
        ("objective.learning_rates.bias=.nan", "objective.learning_rates.bias: must be a finite number (found nan)"),
        (
            "objective.learning_rates.bias=-1e-4",
            "objective.learning_rates.bias: must be greater than or equal to 0 (found -0.0001)",
        ),
        ("objective.learning_rates.bias=fast", "objective.learning_rates.bias: must be a number (found 'fast')"),
        ("objective.iterations=", "objective.iterations: must be a whole number (found nothing)"),
        ("objective.iterations={a: 1}", "objective.iterations: must be a whole number (found a section)"),
        ("objective.learn=weight", "objective.learn: must be a list (found 'weight')"),
        ("objective.learn=[]", "objective.learn: must have at least one entry (found [])"),
        (
            "objective.learn=[wieght]",
            "objective.learn.0: must be 'weight', 'weight_scale', 'activation_scale', 'bias' or 'rounding' "
            "(found 'wieght') (did you mean 'weight'?)",
        ),
        ("quantization.rules={modules: a}", "quantization.rules: must be a list (found a section)"),
        (
            "quantization.rules.0=int8",
            f"quantization.rules.0: must be a section with the keys {RULE_KEYS} (found 'int8')",
        ),
        ("quantization.rules.0.symmetric='no'", "quantization.rules.0.symmetric: must be true or false (found 'no')"),
        ("model=[a]", "model: must be a section with the keys id, revision, dtype, device (found ['a'])"),
        ("model.revision=20240101", "model.revision: must be text; put it in quotes (found 20240101)"),
        ("model.id=''", "model.id: must not be empty (found '')"),
        ("data.seed=4294967296", "data.seed: must be less than 2147483648 (found 4294967296)"),
        ("export.max_shard_size=4B", "export.max_shard_size: must be a size such as 500MB or 5GB (found '4B')"),
        ("export.output=/", "export.output: must name a folder that can be created (found '/')"),
        ("export.output=.", "export.output: must name a folder that can be created (found '.')"),
        ("export.output=a/..", "export.output: must name a folder that can be created (found 'a/..')"),
        ("export.output=' '", "export.output: must name a folder that can be created (found ' ')"),
        # combinations
        ("objective.steps_per_group=7", "objective.steps_per_group is 7 but sampling has only 6 steps"),
        ("quantization.timestep_groups=7", "quantization.timestep_groups is 7 but sampling has only 6 steps"),
        (
            "quantization.rules.0.group_size=null",
            "quantization.rules.0.granularity: group needs a group_size (for example group_size: 32)",
        ),
        (
            "quantization.rules.0.granularity=channel",
            "quantization.rules.0.group_size needs granularity: group; set that too, or leave group_size out",
        ),
        (
            "quantization.rules.1={modules: a, weight: float, activation: int8}",
            "quantization.rules.1.activation cannot be int8 where the weight stays float",
        ),
        (
            "quantization.rules.1.activation_scale=dynamic",
            "quantization.rules.1.activation_scale: dynamic needs an integer activation, for example activation: int8",
        ),
        (
            "quantization.rules.1={modules: a, weight: int8, activation: int8, activation_scale: dynamic, "
            "activation_symmetric: false}",
            "quantization.rules.1.activation_symmetric: false needs activation_scale: static; "
            "dynamic has no zero point",
        ),
        (
            "objective.learn=[rounding, weight]",
            "objective.learn: 'rounding' (AdaRound) needs fixed weights; drop 'weight' and 'weight_scale'",
        ),
        (
            "objective.inputs=quantized",
            "objective.inputs: quantized is the per-step rival and needs steps_per_group: 1",
        ),
        (
            "objective={inputs: quantized, cached_iterations: 5}",
            "objective.inputs: quantized is a rival that knows no cache; leave cached_iterations out",
        ),
        (
            "quantization.rules=[{modules: a, weight: float}]",
            "quantization.rules: every weight stays float; there is nothing to do",
        ),
        (
            "quantization.rules=[{modules: a, weight: int8, tune: false}]",
            "objective.iterations: no rule leaves anything to tune (tune: false); set it to 0",
        ),
        (
            "quantization.rules=[{modules: a, weight: int8}]",
            "objective.learn: 'activation_scale' (there by default) needs a tuned rule with an integer activation; "
            "write learn: [weight, weight_scale], or give a rule activation: int8",
        ),
    ],
)
def test_one_mistake_is_one_line_that_names_it(file: Path, override: str, message: str) -> None:
    assert refusal(file, override) == f"{file} --set {override}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.iterations", WRITE_IT_AS),
        ("=5", WRITE_IT_AS),
        ("objective..iterations=5", WRITE_IT_AS),
        ("objective.iterations.=5", WRITE_IT_AS),
        ("objective.iterations.x=5", "objective.iterations holds a value, not a section"),
        ("objective.iterations.x.y=5", "objective.iterations holds a value, not a section"),
        ("quantization.rules.2.weight=int4", "the list has entries 0 to 1, found '2'"),
        ("quantization.rules.-1.weight=int4", "the list has entries 0 to 1, found '-1'"),
        ("quantization.rules.weight=int4", "the list has entries 0 to 1, found 'weight'"),
    ],
)
def test_override_that_leads_nowhere(file: Path, override: str, message: str) -> None:
    assert refusal(file, override) == f"--set {override}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping of sections (model: ..., data: ...), found nothing"),
        ("# only a comment", ": a recipe is a mapping of sections (model: ..., data: ...), found nothing"),
        ("- a", ": a recipe is a mapping of sections (model: ..., data: ...), found ['a']"),
        (
            "model: {id: x\nfoo: 1",
            ", line 2, column 4: not readable as YAML: while parsing a flow mapping, expected ','",
        ),
        ("model:\n\tid: x", r", line 2, column 1: not readable as YAML: while scanning for the next token, found "),
        (
            "model: 1\n---\ndata: 2",
            ", line 2, column 1: not readable as YAML: expected a single document in the stream",
        ),
        ("model: {id: a}\nmodel: {id: b}", ", line 2, column 1: not readable as YAML: the key 'model' is given twice"),
        ("model: {id: a, id: b}", ", line 1, column 16: not readable as YAML: the key 'id' is given twice"),
        ("model: 2024-13-45", ": not readable as YAML: month must be in 1..12"),
        ("model: &a {id: *a}", ": Circular reference detected"),
        ("data: {seed: " + "9" * 5000 + "}", ": not readable as YAML: Exceeds the limit"),
        ("[" * 1100, ": not readable as YAML: maximum recursion depth exceeded"),
        ("2024-01-01: x", ": keys must be str"),
        ("model: \0", ": not readable as YAML: unacceptable character"),
        (b"\xff\xfe", " cannot be read as text: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(path).startswith(f"{path}{message}")
    assert len(refusal(path).splitlines()) == 1


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [pwned]", "!!python/name:os.system", "!!python/object:os.X {}"]
)
def test_yaml_tags_run_nothing(file: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(file.parent)
    assert "could not determine a constructor for the tag" in refusal(file, f"objective.batch_size={tag}")
    file.write_text(f"model: {tag}")
    assert "could not determine a constructor for the tag" in refusal(file)
    assert os.listdir() == ["recipe.yaml"]


def test_misspelt_section_is_not_called_missing_too(tmp_path: Path) -> None:
    tree = recipe_tree("model", "out")
    tree["modle"] = tree.pop("model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert "missing" not in refusal(tmp_path / "recipe.yaml")
    del tree["modle"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert refusal(tmp_path / "recipe.yaml").endswith("recipe.yaml: model is missing")


def test_several_mistakes_are_listed_one_per_line(file: Path) -> None:
    lines = refusal(file, "model.idd=x", "data.seed=a", "quantization.rules.1.tune=1").splitlines()
    assert [line.split(":")[0].split(" (")[0].strip() for line in lines[1:]] == [
        "unknown key model.idd",
        "data.seed",
        "quantization.rules.1.tune",
    ]


def test_numbers_where_numbers_are_due_and_text_where_text_is(file: Path) -> None:
    """YAML 1.1 takes 1e-4 for text. A commit hash of digits and one e must not become infinity for that."""
    numbers = ["objective.learning_rates.weight=1e-4", "objective.learning_rates.bias=3", "sampling.guidance_scale=2e0"]
    texts = ["model.revision=7e12345", "model.id=1e5", "quantization.rules.0.modules=1e5"]
    recipe = load_recipe(file, numbers + texts)
    assert recipe.objective.learning_rates.weight == 1e-4
    assert type(recipe.objective.learning_rates.bias) is float
    assert recipe.sampling.guidance_scale == 2
    assert (recipe.model.revision, recipe.model.id, recipe.quantization.rules[0].modules) == ("7e12345", "1e5", "1e5")


def test_overrides_apply_in_order_and_reach_lists_and_sections(file: Path) -> None:
    overrides = ["quantization.rules.1.weight=int4", "evaluation={num_samples: 9}", "objective.iterations=1"]
    recipe = load_recipe(file, [*overrides, "objective.iterations=2", "sampling.scheduler=DDIMScheduler"])
    assert [rule.weight for rule in recipe.quantization.rules] == ["int4", "int4"]
    assert (recipe.evaluation.num_samples, recipe.evaluation.batch_size) == (9, 30)
    assert recipe.objective.iterations == 2 and recipe.sampling.scheduler == "DDIMScheduler"
    assert load_recipe(file).quantization.rules[1].weight == "int8"


def test_absent_activation_symmetric_fits_both_kinds_of_scale() -> None:
    def rule(**keys: Any) -> Recipe:
        keys = {"modules": ".*", "weight": "int8", "activation": "int8", **keys}
        return parse_recipe(recipe_tree("m", "out", quantization={"rules": [keys], "timestep_groups": 1}), "test")

    for recipe in (
        rule(),
        rule(activation_scale="dynamic"),
        rule(activation_scale="dynamic", activation_symmetric=True),
    ):
        assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe


def test_output_in_the_home_folder_is_there(file: Path) -> None:
    assert load_recipe(file, ["export.output=~/out"]).export.output == str(Path.home() / "out")


def test_data_beside_the_recipe_is_found_from_anywhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(file).data.path == "digits.jsonl"  # a shipped name stays one
    (file.parent / "digits.jsonl").write_text("")
    monkeypatch.chdir("/")
    assert load_recipe(file).data.path == str(file.parent / "digits.jsonl")


@pytest.mark.parametrize("name", list_shipped("recipes"))
def test_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe
    assert find_shipped("calib_data", recipe.data.path).is_file()
    assert find_shipped("recipes", name, ".yaml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["dit_w8a9", "./dit_w8a9.yaml", "recipes/dit_w8a9.yaml"])
def test_recipe_that_does_not_exist(name: str) -> None:
    shipped = ", ".join(list_shipped("recipes"))
    assert refusal(name) == f"no file {name!r} (did you mean 'dit_w8a8'?); shipped recipes: {shipped}"


@pytest.mark.parametrize(
    ("name", "start"), [("", "no file ''"), ("a" * 5000, "no file 'aaa"), ("/", "'/' is a folder")]
)
def test_recipe_name_that_cannot_be_one(name: str, start: str) -> None:
    assert refusal(name).startswith(start)
