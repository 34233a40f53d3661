"""Small random pipelines, of the same classes as the real ones, and recipes for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from accuquant.calibration.loop import UpdateLoop
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe

# Tensors this small gain nothing from a second thread, and lose much where its core is taken: two processes test.
THREADS = os.environ.get("ACCUQUANT_TEST_THREADS", "1")  # tools/test_matrix.py tests with more, which add otherwise
torch.set_num_threads(int(THREADS))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = THREADS  # for programs that tests start
os.environ["ACCUQUANT_CACHE"] = "/nonexistent"  # what somebody had measured on this machine
os.environ.pop("ACCUQUANT_PATH", None)


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


def make_pixart() -> Any:
    """PixArt-alpha with a T5 of its own, all random and tiny; skips where the `text` extra is not installed."""
    transformers = pytest.importorskip("transformers", reason="text pipelines need accuquant[text]")
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    words = ["a", "red", "cat", "dog", "the", "photo", "of"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{w}", -1.0) for w in words), ("▁", -5.0)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=32,
        patch_size=8,
        caption_channels=16,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    encoder = transformers.T5EncoderModel(config).eval()
    pipeline = PixArtAlphaPipeline(tokenizer, encoder, vae, transformer.eval(), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """Three down-blocks and three up-blocks, random."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def make_stable_diffusion() -> Any:
    """Stable Diffusion with a CLIP of its own, all random and tiny; skips where the `text` extra is not installed."""
    transformers = pytest.importorskip("transformers", reason="text pipelines need accuquant[text]")
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    unet = make_unet(cross_attention_dim=16)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    encoder = transformers.CLIPTextModel(config).eval()
    pipeline = StableDiffusionPipeline(vae.eval(), encoder, tokenizer, unet.eval(), scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def finite_differences(steps: list[int], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """D_0, D_1, ... at the last full step. TaylorSeer: D_{j+1} = (D_j - D_j at the one before) / the last gap."""
    last = len(steps) - 1
    if last == 0:
        return [values[0]]
    before = finite_differences(steps[:-1], values[:-1])
    found = [values[-1]]
    for old in before:
        found.append((found[-1] - old) / (steps[last] - steps[last - 1]))
    return found


def randomize(model: torch.nn.Module, seed: int = 0) -> Any:
    """Weights that keep the size of what they multiply, none of them zero: every module matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def make_flux(layers: int = 1, single_layers: int = 2) -> FluxTransformer2DModel:
    """FLUX of random weights: joint blocks, and blocks with attention and MLP side by side."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    return randomize(model)


def flux_arguments(batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """What FLUX is called with beside the latent (B, 16, 4) and the timestep."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }


def sampled(
    pipeline: Any, labels: tuple[int, ...] = (1, 2), seed: int = 5, steps: int = 10, guidance: float = 1.5
) -> torch.Tensor:
    """Final latents of a class-conditional pipeline, over a `Rollout`."""
    from accuquant.model.rollout import Rollout
    from accuquant.recipe import Sampling

    rollout = Rollout(pipeline, Sampling(num_inference_steps=steps, guidance_scale=guidance))
    conditions = rollout.conditions(list(labels), [seed + i for i in range(len(labels))])
    return rollout.trajectory(conditions)[0][-1]


def images(pipeline: DiTPipeline, **changes: Any) -> Any:
    """Of ten steps of a class-conditional pipeline's own; keyword arguments change the call."""
    arguments = dict(class_labels=[1, 2], num_inference_steps=10, guidance_scale=1.5, output_type="np") | changes
    return pipeline(generator=[torch.Generator().manual_seed(s) for s in (5, 6)], **arguments).images


def interrupt_cached_update(patch: pytest.MonkeyPatch, iteration: int) -> None:
    """Ctrl-C at the start of this update with the cache on."""
    update = UpdateLoop.update

    def interrupted(self: UpdateLoop, number: int) -> dict[str, Any]:
        if self.cache is not None and number == iteration:
            raise KeyboardInterrupt
        return update(self, number)

    patch.setattr(UpdateLoop, "update", interrupted)


INT8 = {"weight": "int8", "activation": "int8"}
INT4 = {"weight": "int4", "activation": "int8", "granularity": "group", "group_size": 16}
TYPES = [
    {"modules": r"transformer_blocks\.\d+\.attn1\..*", "choose": [INT8, INT4]},
    {"modules": r"transformer_blocks\.\d+\.ff\..*", "choose": [INT8, INT4]},
]
SMALL = {"orders": [1], "trials": 2, "finalists": 1, "levels": [1.0], "schedules": ["interval", "best"]}


def tune_recipe(model: Path | str, output: Path, **section: Any) -> Recipe:
    """A search of seconds, over the types of attention and MLP."""
    given = {"bit_operations": 0.13, "types": TYPES, "combinations": 2} | SMALL | section
    objective = {"iterations": 4, "cached_iterations": 2, "batch_size": 2}
    sampling = {"num_inference_steps": 8, "guidance_scale": 1.5}
    return parse_recipe(recipe_tree(model, output, tune=given, objective=objective, sampling=sampling), "test")


def as_allocated(model: torch.nn.Module) -> Any:
    """The model with its values where torch puts tensors: files are mapped at any address, where sums may differ."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is torch.Tensor and not tensor.is_mkldnn:
            tensor.data = tensor.data.clone()
    return model


def assert_same_weights(one: Path, other: Path) -> None:
    """Two exports' denoisers, to the last bit."""
    expected, found = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
