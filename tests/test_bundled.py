"""The bundled model is what its README says, and the shipped recipes fit their models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from helpers import decoder_input, dit_tapes, finals, recorded_finals
from pipelines import make_pipeline

from accuquant.calibration.opened import planned_model
from accuquant.evaluation.costs import cost_metrics
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.pipeline.loading import BUNDLED
from accuquant.programs.describe import describe
from accuquant.recipe import Sampling
from accuquant.recipe.file import list_shipped, load_recipe

FOLDER = BUNDLED / "digits-dit"


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    loaded = DiTPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_shape_and_size(pipeline: DiTPipeline) -> None:
    config = pipeline.transformer.config
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    assert config.num_layers >= 6 and config.in_channels == 4 and 2e6 < parameters < 6e6
    assert sum(p.stat().st_size for p in FOLDER.rglob("*.safetensors")) <= 16e6
    assert {k: str(v) for k, v in pipeline.labels.items()} == {str(i): str(i) for i in range(10)}
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"


def test_training_record_meets_the_goals() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["classifier_held_out_accuracy"] >= 0.97
    assert record["generated_agreement"] >= 0.95
    assert {"seed", "split", "vae", "transformer", "classifier"} <= set(record)


def test_digits_are_recognised(pipeline: DiTPipeline) -> None:
    """The record's claim again, on noise of its own."""
    labels = [i % 10 for i in range(30)]
    images = pipeline(
        labels, guidance_scale=1.5, num_inference_steps=25, generator=torch.manual_seed(77), output_type="pt"
    ).images
    with torch.no_grad():
        found = DigitClassifier.from_folder(FOLDER / "classifier")(images * 2 - 1).argmax(1)
    assert (found == torch.tensor(labels)).float().mean() >= 0.85


def test_tape_is_equal_to_its_pipeline(pipeline: DiTPipeline) -> None:
    sampling = Sampling(num_inference_steps=10, guidance_scale=1.5)
    tapes = dit_tapes(pipeline, 10, labels=(3, 8))
    handed = decoder_input(pipeline, [3, 8], [0, 1], sampling).flatten(1)
    for found in (recorded_finals(tapes), finals(tapes)):
        assert torch.equal(1 / pipeline.vae.config.scaling_factor * found, handed)


@pytest.mark.parametrize(("name", "limit"), [("dit_w8a8", 0.27), ("dit_w4a8", 0.16)])
def test_recipes_keep_the_promised_size(name: str, limit: float) -> None:
    """The plan's bytes, which test_calibrate holds against the file, of all quantized layers."""
    recipe = load_recipe(name)
    model, planned = planned_model(recipe)
    assert sum(p.spec is not None for p in planned) == 6 * (4 + 2 + 1)
    sizes = {p.name: p.quantized_bytes(recipe.quantization.timestep_groups) for p in planned}
    size = cost_metrics(planned, model.network, sizes)["size"]
    assert size["layers_ratio"] <= limit


def test_every_shipped_recipe_is_valid() -> None:
    assert {"dit_w8a8", "dit_w4a8", "dit_xl_256_w8a8"} <= set(list_shipped("recipes"))
    for name in list_shipped("recipes"):
        load_recipe(name)


def test_dit_xl_recipe_runs_dry_on_a_local_model_of_its_class(tmp_path: Path) -> None:
    """Learned variance and a thousand classes, as DiT-XL has; only small and random."""
    make_pipeline(learned_variance=True).save_pretrained(tmp_path / "xl")
    recipe = load_recipe("dit_xl_256_w8a8", [f"model.id={tmp_path / 'xl'}", "model.device=cpu"])
    planned, costs = describe(recipe)
    assert sum(p.spec is not None for p in planned) == 2 * (4 + 2 + 1)
    assert costs["network_evaluations"]["tuning"] == 1200 + 1857  # the calibration's, and those of the trials of `auto`
    assert costs["seconds"] > 0
