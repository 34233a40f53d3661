"""The bundled emoji models are what their cards say: complete folders, small, and they draw what they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from accuquant.pipeline.loading import BUNDLED, load_pipeline
from accuquant.recipe import Model
from tools.emoji.check import recognised, sample
from tools.emoji.data import SPLITS, prompt, split
from tools.emoji.judge import load_judge
from tools.train_emoji import load

LIMITS = {"emoji-sd3": 40e6, "emoji-unet": 12e6}


@pytest.fixture(scope="module", params=LIMITS)
def folder(request: pytest.FixtureRequest) -> Path:
    return BUNDLED / str(request.param)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> DiffusionPipeline:
    return load(folder)


def test_files_are_small_and_for_everyone(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMITS[folder.name]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)


def test_shapes(pipeline: DiffusionPipeline, folder: Path) -> None:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.float32}
    assert pipeline.vae.config.latent_channels == 4 and len(pipeline.vae.config.block_out_channels) == 3  # 4 times
    if folder.name == "emoji-sd3":
        config = pipeline.transformer.config
        assert 6 <= config.num_layers <= 10 and 6e6 < sizes["transformer"] < 12e6 and config.qk_norm == "rms_norm"
        assert set(parts) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipeline.scheduler.shift > 1
    else:
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        assert any(isinstance(m, torch.nn.Conv2d) for m in pipeline.unet.modules())


def test_the_record_meets_the_goal(folder: Path) -> None:
    record = json.loads((folder / "training.json").read_text())
    rows = {row["split"]: row for row in record["check"]}
    assert set(rows) == {"real images", *SPLITS}  # what was held out is reported apart
    assert rows["real images"]["among_candidates"] >= 0.95
    if folder.name == "emoji-sd3":
        assert rows["seen"]["among_candidates"] >= 0.8 and rows["seen"]["samples"] >= 200
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("Noto Emoji", "Apache-2.0", "emojibase-data", "MIT"))


def test_it_draws_what_it_is_asked_for(pipeline: DiffusionPipeline, folder: Path) -> None:
    """The record's claim again, with noise of its own and fewer steps."""
    judge, names = load_judge(BUNDLED / "emoji-sd3" / "judge")
    seen = [i for i, name in enumerate(names) if split(name) == "seen"][::113]
    call = {"max_sequence_length": 1} if folder.name == "emoji-sd3" else {}
    images = sample(pipeline, [prompt(names[i]) for i in seen], seed=500, num_inference_steps=14, **call)
    assert len(seen) >= 25
    assert recognised(judge, names, images, seen)["among_candidates"] >= (0.7 if call else 0.4)


def test_the_number_of_zero_tokens_does_not_matter(pipeline: DiffusionPipeline, folder: Path) -> None:
    if folder.name != "emoji-sd3":
        pytest.skip("the U-Net has none")
    few, many = (sample(pipeline, ["red heart"], num_inference_steps=8, max_sequence_length=n) for n in (1, 256))
    assert (few - many).square().mean() < 0.05


def test_recipes_find_it(folder: Path) -> None:
    """With the text encoder that was left out on purpose, which plain diffusers asks for."""
    assert type(load_pipeline(Model(id=f"bundled:{folder.name}"))).__name__.startswith("StableDiffusion")
