"""Stable Diffusion's U-Net, from its tape to an export with CacheQuant's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import finals, recipe_tree, recorded_finals
from pipelines import make_stable_diffusion

from accuquant.pipeline.data import Samples
from accuquant.pipeline.recorder import Recorder
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Sampling
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import controller_of
from accuquant.runtime.layer import quantized_layers


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_tape_is_the_pipeline(guidance_scale: float) -> None:
    pipeline = make_stable_diffusion()
    recorder = Recorder(pipeline, Sampling(num_inference_steps=4, guidance_scale=guidance_scale))
    tapes = [recorder.tape(Samples([{"prompt": "a cat"}, {"prompt": "dog"}], [1, 2]))]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipeline(
        ["a cat", "dog"],
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        generator=generators,
        output_type="latent",
    ).images
    assert torch.equal(recorded_finals(tapes), expected.flatten(1))
    assert torch.equal(finals(tapes), expected.flatten(1))


@pytest.mark.filterwarnings("ignore:a skipped step saves")  # of a U-Net this small its ends are half of all
def test_convolutions_and_cachequants_feature_are_exported(tmp_path: Path) -> None:
    make_stable_diffusion().save_pretrained(tmp_path / "model")
    tree = recipe_tree(tmp_path / "model", tmp_path / "out")
    tree["sampling"] |= {"guidance_scale": 3.0}
    tree["data"] = {"path": "prompts.jsonl", "num_samples": 2}
    tree["quantization"]["rules"] = [
        {"modules": r".*\.(conv1|conv2|to_q|to_out\.0)", "weight": "int8", "activation": "int8"}
    ]
    tree["cache"] = {
        "feature": "blocks",
        "estimation": "reuse",
        "schedule": "dps",
        "interval": 2,
        "corrected": True,
        "corrected_quantization": True,
    }
    folder = calibrate(parse_recipe(tree, "test"), Reporter(quiet=True))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    controller = controller_of(pipeline.unet)
    assert controller is not None
    assert controller.modules == ("up_blocks.1",)
    assert any(layer.conv is not None for layer in quantized_layers(pipeline.unet).values())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["cache"]["nfc"]["mean"] == 3
    # of the bit-operations, all before the last up-block but the first down-block are saved at half of the steps
    assert metrics["cache"]["bit_operations_ratio"] < 0.9 * metrics["bit_operations"]["ratio"]
    assert metrics["E_qc"] < 1
    # of channels, and so for other resolutions too
    channels = pipeline.unet.up_blocks[0].resnets[-1].out_channels
    assert controller.fitted is not None and controller.fitted.channels == {"up_blocks.1": channels}
    with pytest.warns(UserWarning, match="latents of 4 x"):  # it was calibrated for others
        pipeline("a cat", height=48, width=64, num_inference_steps=6, output_type="latent")
