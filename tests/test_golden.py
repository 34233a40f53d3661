"""Exports and recipes that commit 870077b wrote: they load, compute and are used as they were. See golden/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiTPipeline
from helpers import sampled
from safetensors.torch import load_file
from typer.testing import CliRunner

from accuquant import cache_stats, set_arithmetic
from accuquant.cli.main import app
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe.cache import WRITTEN
from accuquant.recipe.file import dump_recipe, load_recipe, parse_recipe

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FULL_STEPS = {"w4a8-cached": (0, 1, 4, 7), "w8a8-dynamic": (0, 1, 2, 6, 9)}
# Sums in another order move an activation across the edge between two integers now and then, in either arithmetic: seen
# 2.5e-4 without vector instructions, 2e-7 with AVX2 in the reference. Integer paths round differently besides.
BOUNDS = {"reference": 1e-3, "integer": 5e-3}
NAMES = pytest.mark.parametrize("name", FULL_STEPS)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to write in, and to be in: the recipes' paths begin there."""
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(folder)
    return folder


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"accuquant {' '.join(arguments)} on an export of 870077b: {result.output}"
    return str(result.output)


def quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = config["quantization_config"]
    return found


@NAMES
def test_export_gives_the_latents_it_gave(name: str) -> None:
    """By plain diffusers, in both arithmetics, with the cache on and full at the steps it was."""
    pipeline, expected = DiTPipeline.from_pretrained(GOLDEN / name), load_file(GOLDEN / name / "latents.safetensors")
    for arithmetic, bound in BOUNDS.items():
        set_arithmetic(pipeline.transformer, arithmetic)  # type: ignore[arg-type]
        found, wanted = sampled(pipeline), expected[arithmetic]
        error = float((found - wanted).norm() / wanted.norm())
        assert error <= bound, (
            f"{name}, {arithmetic}: latents are {error:.2g} from those of 870077b: the format changed"
        )
        full = cache_stats(pipeline).full_steps
        assert full == FULL_STEPS[name], f"{name}: its cache is full at {full}, by 870077b at {FULL_STEPS[name]}"
    assert torch.isfinite(found).all()


@NAMES
def test_recipe_of_then_is_a_recipe(name: str) -> None:
    for path in (GOLDEN / f"{name}.yaml", GOLDEN / name / "recipe.yaml"):
        recipe = load_recipe(path)
        again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dumped")
        assert again == recipe, f"{path.name}: another recipe after it was written and read"
        assert recipe.sampling.num_inference_steps == 10 and recipe.cache is not None
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        kept = recipe.model_dump(mode="json")
        for section, fields in written.items():
            for key, value in (fields or {}).items():
                if key not in ("rules", "path", "learning_rates", *WRITTEN):
                    assert kept[section][key] == value, f"{path.name}: {section}.{key} is not what was written"


@NAMES
def test_programs_work_on_it(name: str, copy: Path) -> None:
    shown = command("inspect", name)
    assert "timestep groups" in shown and "cache: estimation" in shown
    before = (copy / name / WEIGHTS).read_bytes()
    command("evaluate", name, "--quiet")
    metrics = json.loads((copy / name / "metrics.json").read_text(encoding="utf-8"))
    assert 0 < metrics["final_relative_l2"]["mean"] < 1 and metrics["psnr"] > 0
    assert metrics["cache"]["nfc"]["mean"] == len(FULL_STEPS[name])
    assert (copy / name / "report.html").is_file() and (copy / name / WEIGHTS).read_bytes() == before


@NAMES
def test_the_recipe_makes_such_an_export_today(name: str, copy: Path) -> None:
    folder = calibrate(load_recipe(f"{name}.yaml", ["export.output=again"]), Reporter(quiet=True))
    expected, found = (load_file(f / WEIGHTS) for f in (copy / name, folder))
    shapes = [{key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} for tensors in (expected, found)]
    assert shapes[0] == shapes[1], f"{name}: calibration writes other tensors than 870077b did; is it a new version?"
    then, now = quantization(copy / name), quantization(folder)
    assert (now["version"], now["layers"]) == (then["version"], then["layers"])
    assert now["timestep_edges"] == pytest.approx(then["timestep_edges"])
    gone = then["cache"].keys() - now["cache"].keys()  # how a search was asked for, which no loaded export needs
    assert now["cache"].keys() <= then["cache"].keys() and gone <= {"trials", "target_nfc", "warmup"}
