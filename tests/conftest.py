"""Small random pipelines, of the same classes as the real ones, and recipes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

torch.set_num_threads(2)


def make_pipeline(
    seed: int = 0, learned_variance: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32
) -> DiTPipeline:
    """DiT of random weights, 8x8 latents, with adaLN that is not zero: every module matters."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    for parameter in transformer.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    pipeline = DiTPipeline(
        transformer.eval().to(dtype), vae.eval(), scheduler, id2label={i: f"class {i}" for i in range(10)}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random-dit"
    make_pipeline().save_pretrained(folder)
    return folder


def recipe_tree(model: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe for a small random model; keyword arguments replace sections."""
    tree: dict[str, Any] = {
        "model": {"id": str(model), "device": "cpu"},
        "sampling": {"num_inference_steps": 6, "guidance_scale": 1.5},
        "data": {"path": "digits.jsonl", "num_samples": 4},
        "quantization": {
            "timestep_groups": 3,
            "rules": [
                {
                    "modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*",
                    "weight": "int4",
                    "activation": "int8",
                    "granularity": "group",
                    "group_size": 16,
                },
                {"modules": r"transformer_blocks\.\d+\.norm1\.linear", "weight": "int8", "tune": False},
            ],
        },
        "objective": {"iterations": 4, "batch_size": 2, "steps_per_group": 2},
        "evaluation": {"num_samples": 3, "batch_size": 3, "num_images": 2},
        "export": {"output": str(output)},
    }
    return tree | changes
