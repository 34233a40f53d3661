"""Latent diffusion, and pipelines that are called with nothing, from `accuquant new` to pictures of their export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from helpers import recipe_tree
from PIL import Image
from pipelines import make_ddpm, make_ldm, make_pipeline
from zoo.others import class_conditional_latent_diffusion

import accuquant
from accuquant.cli.generate import generate
from accuquant.errors import RecipeError
from accuquant.export.load import recipe_of
from accuquant.pipeline.rows import call_of, is_unconditional
from accuquant.programs.calibrate import calibrate
from accuquant.programs.evaluate import evaluate
from accuquant.programs.new import new_recipe
from accuquant.progress import Reporter
from accuquant.recipe.file import load_recipe, parse_recipe
from accuquant.runtime.layer import quantized_layers

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module", params=[(make_ldm, 32), (make_ddpm, 16)], ids=["ldm", "ddpm"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionPipeline, Path, int]:
    """A pipeline, its folder, and how many pixels wide its pictures are."""
    make: Callable[[], DiffusionPipeline] = request.param[0]
    pipeline, folder = make(), tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return pipeline, folder, request.param[1]


def test_calibrated_exported_and_sampled(saved: tuple[DiffusionPipeline, Path, int], tmp_path: Path) -> None:
    pipeline, model, size = saved
    tree = recipe_tree(model, tmp_path / "out", data={"path": "unconditional.jsonl", "num_samples": 4})
    tree["sampling"] = {"num_inference_steps": 4, "guidance_scale": None}
    tree["quantization"] = {"preset": "w4a8", "timestep_groups": 2}
    export = calibrate(parse_recipe(tree, "test"), QUIET)
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["held_out"] == ["{}"] and metrics["num_samples"] == 3
    assert 0 < metrics["final_relative_l2"]["mean"] < 1 and 10 < metrics["psnr"] < 60  # pictures were compared
    loaded = type(pipeline).from_pretrained(export)
    assert quantized_layers(loaded.unet)
    generate(export, [], 0, tmp_path / "ten.png", False, QUIET)
    tile = size * -(-96 // size) + 4  # ten of them in five columns, enlarged by whole factors
    with Image.open(tmp_path / "ten.png") as sheet:
        assert sheet.size == (5 * tile - 4, 2 * tile - 4)
    with pytest.raises(RecipeError, match=f"--class '3': {type(pipeline).__name__} is unconditional; leave it out"):
        generate(export, ["3"], 0, tmp_path / "three.png", False, QUIET)
    assert not (tmp_path / "three.png").exists()


def test_new_finds_its_data(saved: tuple[DiffusionPipeline, Path, int], tmp_path: Path) -> None:
    new_recipe(str(saved[1]), "w4a8", tmp_path / "mine.yaml", steps=4)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.data.path.endswith("unconditional.jsonl") and recipe.sampling.guidance_scale is None
    assert not (tmp_path / "mine.jsonl").exists()


def test_a_batch_is_as_many_samples_as_rows(saved: tuple[DiffusionPipeline, Path, int], tmp_path: Path) -> None:
    pipeline = saved[0]
    call = call_of(pipeline, [{}, {"label": "for people"}, {}], [1, 2, 3], {"num_inference_steps": 2}, tmp_path)
    assert call["batch_size"] == 3 and call.keys() == {"batch_size", "generator", "num_inference_steps"}
    assert len(pipeline(**call).images) == 3


def test_only_what_is_called_with_nothing_is_unconditional() -> None:
    class Steered(DDPMPipeline):  # type: ignore[misc]
        def __call__(self, image: torch.Tensor | None = None, batch_size: int = 1, generator: object = None) -> None:
            """As a super-resolution pipeline is called."""

    class Needing(DDPMPipeline):  # type: ignore[misc]
        def __call__(self, hint: torch.Tensor, batch_size: int = 1, generator: object = None) -> None:
            """As one that needs anything else is called."""

    parts = make_ddpm().components
    assert is_unconditional(DDPMPipeline(**parts)) and is_unconditional(make_ldm())
    assert not is_unconditional(Steered(**parts)) and not is_unconditional(Needing(**parts))
    assert not is_unconditional(make_pipeline(layers=1))


@pytest.mark.filterwarnings("ignore:a skipped step saves")  # of a U-Net, whose convolutions go on
def test_a_cache_is_searched_on_samples_of_noise() -> None:
    pipeline = make_ldm()
    plan = accuquant.enable_cache(pipeline, accuquant.FORAConfig(target_nfc=4), num_inference_steps=6)
    pipeline(num_inference_steps=6)
    assert plan.full_timesteps is not None and accuquant.cache_stats(pipeline).nfc == len(plan.full_timesteps) == 4


@pytest.mark.parametrize("name", ["ldm4_bedrooms_w4a8", "ldm4_imagenet_w3a6"])
def test_recipes_of_published_settings_run_on_small_models(tmp_path: Path, name: str) -> None:
    make: Callable[[], Any] = make_ldm if "bedrooms" in name else lambda: class_conditional_latent_diffusion()[0]
    make().save_pretrained(tmp_path / "model")
    changed: dict[str, Any] = {
        "model.id": tmp_path / "model",
        "model.device": "cpu",
        "sampling.num_inference_steps": 4,
        "data.num_samples": 2,
        "data.validation_samples": 1,
        "quantization.timestep_groups": 2,
        "objective.target": "trajectory",
        "objective.iterations": 2,
        "evaluation.num_samples": 3,
        "export.output": tmp_path / "out",
    }
    recipe = load_recipe(name, [f"{key}={value}" for key, value in changed.items()])
    export = calibrate(recipe, QUIET)
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert 0 < metrics["final_relative_l2"]["mean"] < 1 and metrics["psnr"] > 5
    evaluate(export, recipe_of(export), QUIET)
    again = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert again == metrics  # with eta 1 too, of which the pipeline draws without a generator
    weights = {row["weight"] for row in metrics["modules"]}
    assert weights == {"float", "int3" if "w3a6" in name else "int4"}
