"""The recipes of published settings, on weights of the real sizes that hold no numbers: what becomes of each module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import pytest
import torch
from torch import nn

from accuquant.calibration.concatenated import concatenated_inputs
from accuquant.calibration.kinds import kinds_of
from accuquant.calibration.plan import PlannedModule, counted, plan_attention, plan_modules
from accuquant.calibration.products import count_products
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


def ldm4_imagenet() -> nn.Module:
    return d.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=1,  # a single head, in this class
        cross_attention_dim=512,
    )


def ldm4_bedrooms() -> nn.Module:
    return d.UNet2DModel(
        sample_size=64,
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=32,
    )


def ldm8_churches() -> nn.Module:
    return d.UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(192, 384, 384, 768, 768),
        down_block_types=(*("AttnDownBlock2D",) * 4, "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", *("AttnUpBlock2D",) * 4),
        attention_head_dim=24,  # the published one has eight heads of any width, which no weight tells
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )


DIT = Real(
    dit_xl,
    0.75,  # a timestep embedder in every block, in diffusers
    lambda: {"hidden_states": at(1, 4, 32, 32), "timestep": at(1), "class_labels": ids(1)},
)
LDM4_IMAGENET = Real(
    ldm4_imagenet,
    0.401,
    lambda: {"sample": at(1, 3, 64, 64), "timestep": at(1), "encoder_hidden_states": at(1, 1, 512)},
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
    "ldm4_imagenet_w4a8": LDM4_IMAGENET,
    "ldm4_imagenet_w3a6": LDM4_IMAGENET,
    "ldm4_bedrooms_w4a8": Real(ldm4_bedrooms, 0.274, lambda: {"sample": at(1, 3, 64, 64), "timestep": at(1)}),
    "ldm8_churches_w4a8": Real(ldm8_churches, 0.295, lambda: {"sample": at(1, 4, 32, 32), "timestep": at(1)}),
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
            run = lambda: model(**real.call())  # noqa: E731
            PLANS[id(real)] = (
                model,
                kinds_of(model, run),
                concatenated_inputs(model, run),
                count_products(model, run, 1),
            )
    model, kinds, concatenated, products = PLANS[id(real)]
    section = recipe.quantization
    parts = concatenated if section.split_inputs else {}
    found = plan_modules(model, section.rules, kinds=lambda: kinds, parts=parts)
    if section.attention is not None:
        found += plan_attention(section.attention, products.attention)
    return recipe, model, counted(found, products)


def test_every_recipe_of_a_model_on_a_hub_is_here() -> None:
    shipped = {name: load_recipe(name).model.id for name in list_shipped("recipes")}
    assert {name for name, model in shipped.items() if not model.startswith("bundled:")} == {*REAL}


@pytest.mark.parametrize("name", REAL)
def test_what_costs_is_quantized(name: str) -> None:
    recipe, model, modules = planned(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(REAL[name].billions, rel=0.02)
    is_unet = hasattr(model, "up_blocks")
    assert recipe.quantization.split_inputs in ((True, "auto") if is_unet else (False, "auto"))
    assert any(p.split for p in modules) or not is_unet
    assert (
        all(p.attention is not None for p in modules if p.kind == "attention") or recipe.quantization.attention is None
    )
    layers = [p for p in modules if p.is_layer]
    products = sum(p.macs for p in layers)
    inside = sum(p.macs for p in modules if p.spec is not None and p.spec.activation != "float")
    assert inside > 0.95 * products
    quantized = [p for p in modules if p.spec is not None]
    before = sum(p.float_bytes for p in quantized)
    after = sum(p.quantized_bytes(recipe.quantization.timestep_groups) for p in quantized)
    weight, activation = map(int, re.findall(r"w(\d)a(\d)", name + "_w8a8")[0])
    assert after / before < (0.3 if weight == 8 else 0.2)
    spec = max(quantized, key=lambda p: p.macs).spec
    assert spec is not None and (spec.weight, spec.activation) == (f"int{weight}", f"int{activation}")
    operations = sum(p.bit_operations for p in layers) / (32 * 32 * products)
    assert operations == pytest.approx(weight * activation / 32 / 32, rel=0.7) and operations < 0.1


@pytest.mark.parametrize("name", [name for name in REAL if "rfc" in name])
def test_the_cache_skips_most_of_a_step(name: str) -> None:
    recipe, model, modules = planned(name)
    assert recipe.cache is not None
    names, _, bypassed, _ = cached_features(model, recipe.cache)
    inside = sum(p.macs for p in modules if in_cache(p.name, (*names, *bypassed)))
    assert inside > 0.9 * sum(p.macs for p in modules)
