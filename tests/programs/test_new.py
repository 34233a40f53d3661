"""`accuquant new`: a recipe for a model that nobody has looked at, that can be run as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipelines import make_pipeline, make_pixart
from typer.testing import CliRunner

from accuquant.cli.main import app
from accuquant.errors import RecipeError
from accuquant.programs.describe import describe
from accuquant.programs.new import new_recipe
from accuquant.recipe.file import load_recipe
from accuquant.recipe.presets import PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline = make_pipeline()
    pipeline.register_to_config(id2label={str(i): f"class {i}" for i in range(10)})
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_the_recipe_can_be_run(folder: Path, tmp_path: Path, preset: str) -> None:
    file = tmp_path / "mine.yaml"
    caught = new_recipe(str(folder), preset, file, steps=4)
    recipe = load_recipe(file)
    assert recipe.sampling.num_inference_steps == recipe.quantization.timestep_groups == 4
    planned, _ = describe(recipe)
    assert {p.name: p.spec for p in planned if p.is_layer} == {p.name: p.spec for one in caught for p in one.modules}
    assert sum(one.products for one in caught) == pytest.approx(1) == sum(one.weights for one in caught)
    assert max(caught, key=lambda one: one.products).rule is not None
    assert (tmp_path / "mine.jsonl").read_text().splitlines() == [json.dumps({"class_labels": i}) for i in range(10)]


def test_the_comments_say_what_is_caught_and_why_the_rest_stays(folder: Path, tmp_path: Path) -> None:
    new_recipe(str(folder), "w8a8", tmp_path / "mine.yaml", steps=4)
    text = (tmp_path / "mine.yaml").read_text()
    assert "# float: first reads the latents, last writes the output, embedding embeds conditions" in text
    assert "# 12 modules, " in text and "% of the products" in text
    assert "# always float, since only Linear and Conv2d are quantized: 2 Embedding" in text
    assert "# attention: {activation: int8}  # its own products, " in text and "split_inputs" not in text


def test_a_unet_s_recipe_splits_what_reads_its_skip_connections(tmp_path: Path) -> None:
    new_recipe("bundled:emoji-unet", "w8a8", tmp_path / "mine.yaml", steps=4)
    assert (
        "split_inputs: true  # 8 modules read a concatenation: up_blocks.0.resnets.0.conv1 ..."
        in (tmp_path / "mine.yaml").read_text()
    )
    assert load_recipe(tmp_path / "mine.yaml").quantization.split_inputs is True


def test_prompts_come_from_what_is_shipped(tmp_path: Path) -> None:
    make_pixart().save_pretrained(tmp_path / "model")
    new_recipe(str(tmp_path / "model"), "w4a8", tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.data.path.endswith("prompts.jsonl") and recipe.sampling.num_inference_steps == 20


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    with pytest.raises(RecipeError, match="exists; name another"):
        new_recipe(str(folder), "w8a8", file)
    assert file.read_text() == "mine"


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["new", str(folder), "--steps", "4", "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert "first, last, embedding" in result.output and f"next: accuquant calibrate {file} --dry-run" in result.output
    wrong = CliRunner().invoke(app, ["new", str(folder), "--preset", "w8a9", "--overwrite", "-o", str(file)])
    assert wrong.exit_code == 2 and "did you mean 'w8a8'?" in wrong.stderr
