"""What modules are for is found in any model: transformers and U-Nets of diffusers, and networks of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from pipelines import flux_arguments, make_flux, make_pipeline, make_unet
from torch import Tensor, nn

from accuquant.calibration.kinds import KINDS, kinds_of
from accuquant.calibration.plan import plan_modules
from accuquant.errors import RecipeError
from accuquant.recipe import Quantization, Rule
from accuquant.recipe.presets import PRESETS

Kinds = dict[str, frozenset[str]]


def of(kinds: Kinds, kind: str) -> set[str]:
    return {name for name, found in kinds.items() if kind in found}


def dit() -> tuple[nn.Module, Callable[[], Any]]:
    model = make_pipeline().transformer
    steps, labels = torch.tensor([5, 5]), torch.tensor([1, 2])
    return model, lambda: model(torch.randn(2, 4, 8, 8), timestep=steps, class_labels=labels)


def flux() -> tuple[nn.Module, Callable[[], Any]]:
    model = make_flux()
    return model, lambda: model(torch.randn(2, 16, 4), timestep=torch.tensor([0.5, 0.5]), **flux_arguments())


def unet() -> tuple[nn.Module, Callable[[], Any]]:
    model = make_unet(cross_attention_dim=16)
    return model, lambda: model(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 16))


def test_a_diffusion_transformer() -> None:
    model, run = dit()
    kinds = kinds_of(model, run)
    assert kinds["pos_embed.proj"] == {"conv", "embedding", "first"}
    assert kinds["proj_out_2"] == {"linear", "last"}
    blocks = [f"transformer_blocks.{i}" for i in range(2)]
    assert of(kinds, "modulation") == {"proj_out_1", *(f"{b}.norm1.linear" for b in blocks)}
    attention = {f"{b}.attn1.{part}" for b in blocks for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert of(kinds, "attention") == attention
    assert of(kinds, "mlp") == {f"{b}.ff.net.{part}" for b in blocks for part in ("0.proj", "2")}
    embedders = {f"{b}.norm1.emb.timestep_embedder.linear_{k}" for b in blocks for k in (1, 2)}
    assert of(kinds, "embedding") == embedders | {"pos_embed.proj"}
    assert of(kinds, "linear") | of(kinds, "conv") == set(kinds)


def test_joint_and_fused_blocks() -> None:
    model, run = flux()
    kinds = kinds_of(model, run)
    assert of(kinds, "first") == {"x_embedder"} and of(kinds, "last") == {"proj_out"}
    single = "single_transformer_blocks.0"
    assert kinds[f"{single}.proj_mlp"] == kinds[f"{single}.proj_out"] == {"linear", "mlp"}
    assert kinds[f"{single}.attn.to_q"] == {"linear", "attention"}
    assert kinds["transformer_blocks.0.attn.add_k_proj"] == {"linear", "attention"}
    assert kinds[f"{single}.norm.linear"] == kinds["norm_out.linear"] == {"linear", "modulation"}
    assert {"context_embedder", "time_text_embed.timestep_embedder.linear_1"} <= of(kinds, "embedding")


def test_a_unet() -> None:
    model, run = unet()
    kinds = kinds_of(model, run)
    assert kinds["conv_in"] == {"conv", "embedding", "first"} and kinds["conv_out"] == {"conv", "last"}
    assert kinds["down_blocks.0.resnets.0.time_emb_proj"] == {"linear", "modulation"}
    assert kinds["down_blocks.0.resnets.0.conv1"] == kinds["up_blocks.0.resnets.0.conv_shortcut"] == {"conv"}
    assert kinds["down_blocks.0.attentions.0.proj_in"] == {"conv"}  # it leads to the blocks, and is none of them
    assert kinds["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"] == {"linear", "mlp"}
    assert of(kinds, "embedding") == {"conv_in", "time_embedding.linear_1", "time_embedding.linear_2"}


class Own(nn.Module):
    """A block that attends in its own forward, as people write them, with an MLP beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.shift = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = self.qkv(x + self.shift(c)[:, None]).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return x + self.head(x)


class OwnNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.write, self.when = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(1, 8)
        self.layers = nn.ModuleList(Own() for _ in range(2))
        self.never = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, x = self.when(t[:, None]), self.read(x)
        for layer in self.layers:
            x = layer(x, c)
        return self.write(x)


def test_a_network_of_ones_own() -> None:
    model = OwnNetwork()
    kinds = kinds_of(model, lambda: model(torch.randn(2, 5, 4), torch.rand(2)))
    assert "never" not in kinds
    assert of(kinds, "first") == {"read"} and of(kinds, "last") == {"write"}
    assert of(kinds, "embedding") == {"read", "when"}
    assert of(kinds, "attention") == {f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "out")}
    assert of(kinds, "modulation") == {f"layers.{i}.shift" for i in range(2)}
    assert of(kinds, "mlp") == {f"layers.{i}.head.{part}" for i in range(2) for part in (0, 2)}


def sana() -> tuple[nn.Module, Callable[[], Any]]:
    """Linear attention, and an MLP of convolutions, one of which is grouped."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
        mlp_ratio=2.0,
    ).eval()
    return model, lambda: model(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.tensor([5, 5]))


def test_linear_attention_and_what_cannot_be_quantized() -> None:
    model, run = sana()
    kinds = kinds_of(model, run)
    block = "transformer_blocks.0"
    assert kinds[f"{block}.attn1.to_q"] == kinds[f"{block}.attn2.to_k"] == {"linear", "attention"}
    grouped = f"{block}.ff.conv_depth"
    assert isinstance(model.get_submodule(grouped), nn.Conv2d) and grouped not in kinds
    planned = plan_modules(model, Quantization(preset="w8a8").rules, kinds=lambda: kinds)  # type: ignore[call-arg]
    spec = {p.name: p.spec for p in planned}
    assert spec[grouped] is None and spec[f"{block}.ff.conv_inverted"] is not None


# ---- rules by kind


def planned(make: Callable[[], tuple[nn.Module, Callable[[], Any]]], *rules: Rule) -> dict[str, Any]:
    model, run = make()
    return {p.name: p for p in plan_modules(model, rules, kinds=lambda: kinds_of(model, run))}


def test_a_rule_may_name_kinds_and_patterns() -> None:
    found = planned(
        unet,
        Rule(modules="attention", weight="int4", activation="int8"),
        Rule(modules=("mlp", r".*\.conv1"), weight="int8"),
    )
    types = {name: p.spec.weight if p.spec else "float" for name, p in found.items()}
    assert {types[n] for n in types if ".attn" in n} == {"int4"}
    assert {types[n] for n in types if ".ff." in n or n.endswith("conv1")} == {"int8"}
    assert {types[n] for n in types if not (".attn" in n or ".ff." in n or n.endswith("conv1"))} == {"float"}


def test_kinds_are_looked_for_only_where_they_are_asked_for() -> None:
    model, _ = dit()

    def never() -> Kinds:
        raise AssertionError

    assert plan_modules(model, (Rule(modules=".*", weight="int8"),), kinds=never)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("atention", r"quantization.rules.0.modules: 'atention' matches no .* a similar kind: attention"),
        ("conv", r"'conv' decides no module|'conv' is a kind that this model has none of"),
        (("mlp", "nothing.like.it"), "'nothing.like.it' matches no Linear or Conv2d"),
    ],
)
def test_a_kind_that_is_not_there_is_a_mistake(modules: Any, message: str) -> None:
    model = OwnNetwork()
    kinds = kinds_of(model, lambda: model(torch.randn(2, 5, 4), torch.rand(2)))
    with pytest.raises(RecipeError, match=message):
        plan_modules(model, (Rule(modules=modules, weight="int8"),), kinds=lambda: kinds)


def test_the_group_size_may_be_found() -> None:
    model = nn.Sequential(nn.Linear(96, 4), nn.Linear(24, 4), nn.Linear(10, 4), nn.Linear(64, 4), nn.Linear(256, 4))
    rule = Rule(modules=".*", weight="int4", granularity="group", group_size="auto")
    sizes = [p.spec.group_size for p in plan_modules(model, (rule,)) if p.spec]
    assert sizes == [32, 8, None, 32, 64]


@pytest.mark.parametrize("make", [dit, flux, unet, sana])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_any_model(make: Any, preset: str) -> None:
    quantization = Quantization(preset=preset)  # type: ignore[call-arg]
    found = planned(make, *quantization.rules)
    model, run = make()
    kinds = kinds_of(model, run)
    ends = of(kinds, "first") | of(kinds, "last") | of(kinds, "embedding")
    assert all(found[name].spec is None for name in ends)
    inside = of(kinds, "attention") | of(kinds, "mlp")
    assert inside and all(found[name].spec is not None for name in inside)
    weight, activation = {"fp8": ("fp8", "fp8")}.get(preset, (f"int{preset[1]}", "int8" if "a8" in preset else "float"))
    assert {(found[n].spec.weight, found[n].spec.activation) for n in inside} == {(weight, activation)}


def test_presets_are_written_out_after_the_rules_of_ones_own() -> None:
    own = Rule(modules=r".*\.to_q", weight="int3")
    found = Quantization(preset="w8a8", rules=(own,))
    assert found.preset is None and found.rules[0] == own and len(found.rules) == 1 + len(PRESETS["w8a8"])
    assert Quantization.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValueError, match=r"preset: must be one of .* \(found 'w8a9'\) \(did you mean 'w8a8'\?\)"):
        Quantization(preset="w8a9")  # type: ignore[call-arg]


def test_every_kind_is_known_to_recipes() -> None:
    assert KINDS == ("linear", "conv", "attention", "mlp", "modulation", "embedding", "first", "last")
