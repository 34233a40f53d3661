"""Rows of calibration data become the arguments of a pipeline's call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from pipelines import make_pipeline, make_stable_diffusion

from accuquant.errors import RecipeError
from accuquant.pipeline.record import record
from accuquant.pipeline.rows import call_of

SAMPLING = {"num_inference_steps": 3, "guidance_scale": 2.0}


def image_to_image() -> Any:
    parts = make_stable_diffusion().components | {"image_encoder": None}
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_classes_by_either_name(tmp_path: Path) -> None:
    former, now = (
        call_of(make_pipeline(), [{key: 3}, {key: 1}], [5, 6], SAMPLING, tmp_path)
        for key in ("class_id", "class_labels")
    )
    assert former["class_labels"] == now["class_labels"] == [3, 1] and "class_id" not in former
    assert now["num_inference_steps"] == 3 and [g.initial_seed() for g in now["generator"]] == [5, 6]


def test_noise_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    rows, seeds = [{"class_labels": 3}, {"class_labels": 1}], [5, 6]
    both = record(pipeline, **call_of(pipeline, rows, seeds, SAMPLING, tmp_path)).state(0).latents[0]
    alone = record(pipeline, **call_of(pipeline, rows[1:], seeds[1:], SAMPLING, tmp_path)).state(0).latents[0]
    assert len(both) == 4  # DiT's pipeline keeps both halves of guidance in its latents
    assert torch.equal(both[1], alone[0])


def test_pictures_are_opened_and_what_is_one_for_all_is_one(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    rows = [{"prompt": "a", "image": "in.png", "strength": 0.9}, {"prompt": "b", "image": "in.png", "strength": 0.9}]
    pipeline = image_to_image()
    call = call_of(pipeline, rows, [1, 2], SAMPLING | {"num_inference_steps": 4}, tmp_path)
    assert call["prompt"] == ["a", "b"] and call["strength"] == 0.9
    assert [picture.size for picture in call["image"]] == [(32, 32)] * 2
    assert len(record(pipeline, **call)) == 3  # 0.9 of 4 steps
    with pytest.raises(RecipeError, match="'strength' is one for a whole call"):
        call_of(pipeline, [rows[0], rows[1] | {"strength": 0.5}], [1, 2], SAMPLING, tmp_path)
    with pytest.raises(RecipeError, match=r"picture .*other\.png cannot be read"):
        call_of(pipeline, [{"prompt": "a", "image": "other.png"}], [1], SAMPLING, tmp_path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"takes no 'promt' \(did you mean 'prompt'\?\)"):
        call_of(make_stable_diffusion(), [{"promt": "a"}], [1], SAMPLING, tmp_path)
    with pytest.raises(RecipeError, match="row 1 of a batch has no 'negative_prompt'"):
        call_of(
            make_stable_diffusion(), [{"prompt": "a", "negative_prompt": "b"}, {"prompt": "a"}], [1, 2], {}, tmp_path
        )
