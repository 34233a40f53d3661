"""A video pipeline of two experts: rules for one of them, its films, and caches, which are of one denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from helpers import recipe_tree
from PIL import Image
from zoo.videos import WAN, wan_two_experts

import accuquant
from accuquant import FORAConfig, RFCConfig
from accuquant.calibration.opened import open_model, planned_model
from accuquant.cli.generate import MIN_TILE, generate
from accuquant.errors import CacheError, RecipeError
from accuquant.evaluation.measure import held_out_reference, sample
from accuquant.export.load import exported_networks, load_export, recipe_of
from accuquant.programs.calibrate import calibrate
from accuquant.programs.evaluate import evaluate
from accuquant.progress import Reporter
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.layer import quantized_layers
from accuquant.tuning.budget import type_combinations

QUIET = Reporter(quiet=True)
SEVERAL = (
    r"has several denoisers, and a cache is of one: enable it on each apart "
    r"\(pipeline\.transformer, pipeline\.transformer_2\)"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    wan_two_experts()[0].save_pretrained(folder)
    return folder


def tree_of(model: Path, output: Path) -> dict[str, Any]:
    """Rules of the second expert alone."""
    tree = recipe_tree(model, output, data={"path": "prompts.jsonl", "num_samples": 2, "validation_samples": 1})
    arguments = {key: value for key, value in WAN.items() if key != "guidance_scale"}
    tree["sampling"] = {"num_inference_steps": 4, "guidance_scale": 3.0, "arguments": arguments}
    rule = {"modules": r"transformer_2\.blocks\..*\.(to_[qkv]|net\..*)", "weight": "int4", "activation": "int8"}
    tree["quantization"] = {"timestep_groups": 2, "rules": [rule]}
    return tree


@pytest.fixture(scope="module")
def export(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(parse_recipe(tree_of(model, tmp_path_factory.mktemp("exports") / "out"), "test"), QUIET)


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def test_one_expert_is_quantized_and_the_other_left_as_it_was(export: Path, model: Path) -> None:
    loaded, full = (WanPipeline.from_pretrained(folder) for folder in (export, model))
    assert quantized_layers(loaded.transformer_2) and exported_networks(loaded).keys() == {"transformer_2"}
    one, other = (pipeline.transformer.state_dict() for pipeline in (loaded, full))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rows = {m["name"]: m for m in metrics_of(export)["modules"]}
    quantized = {name for name, row in rows.items() if row["weight"] != "float"}
    assert len(quantized) == 2 * 8 and all(name.startswith("transformer_2.") for name in quantized)
    assert all(rows[name]["relative_error"] > 0 for name in quantized)
    assert len(metrics_of(export)["calibration"]["history"]) == 4


def test_the_error_begins_with_the_expert_that_is_quantized(export: Path) -> None:
    recipe = recipe_of(export)
    full = open_model(recipe)
    second = min(full.denoisers[1].levels)
    curve = metrics_of(export)["relative_l2_per_step"]
    assert [one.name for one in full.denoisers] == ["transformer", "transformer_2"] and 0 < second < 4
    assert max(curve[: second + 1]) < 1e-6 < min(curve[second + 1 :])


def test_films_are_judged_by_all_their_frames(export: Path) -> None:
    """Against films sampled with plain diffusers, by hand."""
    recipe, metrics = recipe_of(export), metrics_of(export)
    full = open_model(recipe)
    held_out = held_out_reference(full, recipe, QUIET)
    frames = held_out.frames(held_out.finals)
    assert frames is not None and frames.shape == (3, 5, 3, 16, 16)
    quantized = load_export(export, recipe)
    networks = {name: getattr(quantized, name) for name in full.networks}
    films = held_out.frames(sample(held_out.tapes, QUIET, "", networks).finals)
    assert films is not None
    found = []
    for pipeline in (full.recorder.pipeline, quantized):
        call = recipe.sampling.settings | {"prompt": [row["prompt"] for row in held_out.samples.rows]}
        generators = [torch.Generator().manual_seed(seed) for seed in held_out.samples.seeds]
        made = pipeline(**call, generator=generators, output_type="pt").frames
        found.append(made.double())
    torch.testing.assert_close(frames.double(), found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(films.double(), found[1], rtol=1e-3, atol=1e-3)
    error = (found[0] - found[1]).square().mean()
    assert metrics["psnr"] == pytest.approx(float(-10 * torch.log10(error)), abs=0.05)
    before = metrics
    evaluate(export, recipe, QUIET)
    assert metrics_of(export) == before


def test_generate_writes_the_frame_in_the_middle(export: Path, tmp_path: Path) -> None:
    generate(export, ["a cat", "a red dog"], 7, tmp_path / "films.png", False, QUIET)
    pipeline = load_export(export, recipe_of(export))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    call = recipe_of(export).sampling.settings | {"prompt": ["a cat", "a red dog"], "output_type": "np"}
    films = pipeline(**call, generator=generators).frames
    assert films.shape == (2, 5, 16, 16, 3)
    factor = MIN_TILE // 16
    with Image.open(tmp_path / "films.png") as sheet:
        assert sheet.size == (2 * MIN_TILE + 4, MIN_TILE)
        pixels = np.asarray(sheet) / 255
    for film, left in zip(films, (0, MIN_TILE + 4), strict=True):
        tile = pixels[::factor, left : left + MIN_TILE : factor]
        assert np.abs(tile - film[2]).max() < 0.01 < np.abs(tile - film[0]).max()


@pytest.mark.parametrize("section", ["cache", "tune"])
def test_the_section_that_wants_one_denoiser_is_named(model: Path, tmp_path: Path, section: str) -> None:
    tree = tree_of(model, tmp_path / "out")
    tree[section] = {"nfc": 3} if section == "tune" else {"interval": 2}
    recipe = parse_recipe(tree, "test")
    with pytest.raises(RecipeError, match=f"^{section}: WanPipeline {SEVERAL}; leave the section out$"):
        type_combinations(recipe) if section == "tune" else planned_model(recipe)


def test_a_cache_of_several_is_refused_in_the_same_words(export: Path) -> None:
    whole = WanPipeline.from_pretrained(export)
    for config in (FORAConfig(interval=2), RFCConfig(target_nfc=3)):
        with pytest.raises(CacheError, match=f"^WanPipeline {SEVERAL}$"):
            accuquant.enable_cache(whole, config, num_inference_steps=4)
    with pytest.raises(RecipeError, match=f"^WanPipeline {SEVERAL}$"):
        load_export(export, recipe_of(export, ["cache.interval=2"]))  # though one expert alone is quantized
