"""The recipes of published settings, on weights of the real sizes that hold no numbers: what becomes of each module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import pytest
import torch
from torch import nn

from accuquant.calibration.kinds import kinds_of
from accuquant.calibration.plan import PlannedModule, count_macs, plan_modules
from accuquant.recipe import Recipe
from accuquant.recipe.file import list_shipped, load_recipe
from accuquant.runtime.cache.features import cached_features, in_cache


@dataclass(frozen=True)
class Real:
    """A denoiser as it was published.

    Attributes:
        billions: of parameters.
        call: shapes of its floating-point arguments, and whatever else it is given, of one sample.
    """

    make: Callable[[], nn.Module]
    billions: float
    call: Callable[[], dict[str, Any]]


def at(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="meta")


def dit_xl() -> nn.Module:
    sizes = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32, "patch_size": 2}
    return d.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **sizes)


def sdxl() -> nn.Module:
    return d.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


DIT = Real(
    dit_xl,
    0.75,  # a timestep embedder in every block, in diffusers
    lambda: {"hidden_states": at(1, 4, 32, 32), "timestep": at(1), "class_labels": ids(1)},
)
FLUX = Real(
    lambda: d.FluxTransformer2DModel(guidance_embeds=True),
    11.9,
    lambda: {
        "hidden_states": at(1, 4096, 64),
        "encoder_hidden_states": at(1, 512, 4096),
        "pooled_projections": at(1, 768),
        "timestep": at(1),
        "guidance": at(1),
        "img_ids": at(4096, 3),
        "txt_ids": at(512, 3),
    },
)
REAL = {
    "dit_xl_256_w8a8": DIT,
    "dit_xl_256_w4a8": DIT,
    "dit_xl_256_rfc": DIT,
    "sd14_w4a8": Real(
        lambda: d.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        0.86,
        lambda: {"sample": at(1, 4, 64, 64), "timestep": at(1), "encoder_hidden_states": at(1, 77, 768)},
    ),
    "sdxl_w8a8": Real(
        sdxl,
        2.57,
        lambda: {
            "sample": at(1, 4, 128, 128),
            "timestep": at(1),
            "encoder_hidden_states": at(1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": at(1, 1280), "time_ids": at(1, 6)},
        },
    ),
    "flux_dev_w8a8_rfc": FLUX,
    "flux_dev_w4a8": FLUX,
    "hunyuan_video_w8a8_rfc": Real(
        lambda: d.HunyuanVideoTransformer3DModel(),
        12.8,
        lambda: {
            "hidden_states": at(1, 16, 5, 30, 40),
            "timestep": ids(1),
            "encoder_hidden_states": at(1, 32, 4096),
            "encoder_attention_mask": torch.ones(1, 32, device="meta"),
            "pooled_projections": at(1, 768),
            "guidance": at(1),
        },
    ),
    "wan_w8a8": Real(
        lambda: d.WanTransformer3DModel(),
        14.3,
        lambda: {"hidden_states": at(1, 16, 3, 60, 104), "timestep": at(1), "encoder_hidden_states": at(1, 512, 4096)},
    ),
    "qwen_image_w8a8": Real(
        lambda: d.QwenImageTransformer2DModel(),
        20.4,
        lambda: {
            "hidden_states": at(1, 1024, 64),
            "timestep": at(1),
            "encoder_hidden_states": at(1, 64, 3584),
            "encoder_hidden_states_mask": torch.ones(1, 64, dtype=torch.int64, device="meta"),
            "img_shapes": [[(1, 32, 32)]],
        },
    ),
}
PLANS: dict[int, Any] = {}


def planned(name: str) -> tuple[Recipe, nn.Module, list[PlannedModule]]:
    real, recipe = REAL[name], load_recipe(name)
    if id(real) not in PLANS:  # a model of billions of parameters is made once
        with torch.device("meta"):
            model = real.make()
        model = model.to("meta").eval()
        with torch.no_grad():
            PLANS[id(real)] = model, kinds_of(model, lambda: model(**real.call()))
    model, kinds = PLANS[id(real)]
    found = plan_modules(model, recipe.quantization.rules, kinds=lambda: kinds)
    return recipe, model, count_macs(model, found, lambda: model(**real.call()), 1)


def test_every_recipe_of_a_model_on_a_hub_is_here() -> None:
    shipped = {name: load_recipe(name).model.id for name in list_shipped("recipes")}
    assert {name for name, model in shipped.items() if not model.startswith("bundled:")} == {*REAL}


@pytest.mark.parametrize("name", REAL)
def test_what_costs_is_quantized(name: str) -> None:
    recipe, model, modules = planned(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(REAL[name].billions, rel=0.02)
    products = sum(p.macs for p in modules)
    inside = sum(p.macs for p in modules if p.spec is not None and p.spec.activation != "float")
    assert inside > 0.95 * products
    quantized = [p for p in modules if p.spec is not None]
    before = sum(p.float_bytes for p in quantized)
    after = sum(p.quantized_bytes(recipe.quantization.timestep_groups) for p in quantized)
    assert after / before < (0.2 if "w4" in name else 0.3)
    spec = max(quantized, key=lambda p: p.macs).spec
    bits = {"int4": 4, "int8": 8}[spec.weight if spec else ""]
    assert bits == (4 if "w4" in name else 8)
    operations = sum(p.bit_operations for p in modules) / (32 * 32 * products)
    assert operations == pytest.approx(bits * 8 / 32 / 32, rel=0.7) and operations < 0.1


@pytest.mark.parametrize("name", [name for name in REAL if "rfc" in name])
def test_the_cache_skips_most_of_a_step(name: str) -> None:
    recipe, model, modules = planned(name)
    assert recipe.cache is not None
    names, _, bypassed, _ = cached_features(model, recipe.cache)
    inside = sum(p.macs for p in modules if in_cache(p.name, (*names, *bypassed)))
    assert inside > 0.9 * sum(p.macs for p in modules)
