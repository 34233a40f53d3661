"""What a pipeline was saved without is left out again when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from zoo.images import stable_diffusion_3

from accuquant.pipeline.loading import BUNDLED, left_out, load_pipeline
from accuquant.recipe import Model


def test_parts_saved_as_none_are_none_again(tmp_path: Path) -> None:
    pipeline, _, _ = stable_diffusion_3()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="expected"):  # diffusers alone does not load what it saved
        DiffusionPipeline.from_pretrained(tmp_path / "sd3")
    without = left_out(str(tmp_path / "sd3"))
    assert without == {"text_encoder_3": None, "tokenizer_3": None}  # and nothing that is optional
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "sd3", **without)
    assert loaded.text_encoder_3 is None and loaded.text_encoder is not None
    assert load_pipeline(Model(id=str(tmp_path / "sd3"))).tokenizer_3 is None


def test_a_whole_pipeline_leaves_nothing_out() -> None:
    assert left_out(str(BUNDLED / "digits-dit")) == {}
