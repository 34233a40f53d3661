"""The plan: which rule decides, what is wrong with the others, and its numbers against real bytes and hand counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pipelines import make_pipeline
from torch import nn

from accuquant.calibration.layers import quantize_model
from accuquant.calibration.plan import PlannedModule, count_macs, plan_modules
from accuquant.errors import RecipeError
from accuquant.recipe import Rule
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

BLOCK = "transformer_blocks.0"


def rule(modules: str, weight: str = "int8", **fields: Any) -> Rule:
    if "group_size" in fields:
        fields["granularity"] = "group"
    return Rule(modules=modules, weight=weight, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    return make_pipeline(layers=1).transformer


def plan(denoiser: nn.Module, *rules: Rule) -> dict[str, PlannedModule]:
    return {p.name: p for p in plan_modules(denoiser, rules)}


def test_every_linear_and_conv_is_planned_once(denoiser: nn.Module) -> None:
    expected = [n for n, m in denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    planned = plan_modules(denoiser, (rule(".*"),))
    assert [p.name for p in planned] == expected and len(expected) == 12
    assert planned[0] == PlannedModule("pos_embed.proj", "Conv2d", (32, 16), True, LayerSpec("int8"), True)


def test_first_match_wins(denoiser: nn.Module) -> None:
    found = plan(
        denoiser,
        rule(r".*\.to_q", "float"),
        rule(r".*\.attn1\..*", "int4", group_size=8, symmetric=False),
        rule(r"transformer_blocks\..*", "int8", activation="int8", activation_scale="dynamic", tune=False),
    )
    assert found[f"{BLOCK}.attn1.to_q"].spec is None
    assert found[f"{BLOCK}.attn1.to_k"].spec == LayerSpec("int4", group_size=8, symmetric=False)
    block = LayerSpec("int8", "int8", activation_scale="dynamic", activation_symmetric=True)
    assert found[f"{BLOCK}.ff.net.2"].spec == found[f"{BLOCK}.norm1.linear"].spec == block
    assert found["pos_embed.proj"].spec is None and found["proj_out_1"].spec is None  # no rule, so float
    tuned = {name for name, module in found.items() if module.tune}
    assert tuned == {f"{BLOCK}.attn1.{n}" for n in ("to_k", "to_v", "to_out.0")}


def test_pattern_has_to_match_the_whole_name(denoiser: nn.Module) -> None:
    """One letter more, as in to_out.0, is no match."""
    found = plan(denoiser, rule(r".*attn1\.to_.", "int4"))
    assert {n for n, p in found.items() if p.spec} == {f"{BLOCK}.attn1.{n}" for n in ("to_q", "to_k", "to_v")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule(".*"), rule(r".*\.to_q")], "rules.1.modules: '.*\\\\.to_q' decides no module: an earlier rule"),
        ([rule(r".*\.to_q"), rule(".*"), rule("proj_out_1")], "quantization.rules.2.modules: 'proj_out_1' decides no"),
        ([rule("attn1")], "matches no module in full; it is found inside 'transformer_blocks.0.attn1.to_q': add .*"),
        ([rule("proj_out_1"), rule("proj_out_3")], "rules.1.modules: 'proj_out_3' matches no Linear or Conv2d"),
        ([rule("proj_out_3")], "a similar name: proj_out_"),
        ([rule(r"transformer_block\.0\.attn1\.to_v")], "a similar name: transformer_blocks.0.attn1.to_v"),
        ([rule(r"transformer_blocks\.0\.attn1\.to_out\.1")], "a similar name: transformer_blocks.0.attn1.to_out.0"),
        ([rule(r"blocks\.(0")], r"quantization.rules.0.modules: 'blocks\\.(0' is no regular expression (missing ), "),
        ([rule("*attn1")], "is no regular expression (nothing to repeat"),
        ([rule(".*", "int4", group_size=24)], "quantization.rules.0: group_size 24 does not divide the 16"),
        ([rule(".*ff.*", "int4", group_size=24)], "does not divide the 32 inputs of transformer_blocks.0.ff"),
        ([rule(".*", "int4", group_size=24)], "would fit: [16, 8]"),
    ],
)  # fmt: skip
def test_rule_that_cannot_work_is_explained(denoiser: nn.Module, rules: list[Rule], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        plan_modules(denoiser, tuple(rules))


def test_embedding_and_norm_are_no_modules_to_quantize(denoiser: nn.Module) -> None:
    with pytest.raises(RecipeError, match="matches no Linear or Conv2d"):
        plan_modules(denoiser, (rule(r".*embedding_table"),))


def test_rule_for_a_grouped_convolution_is_explained() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 8))
    with pytest.raises(RecipeError, match=r"quantization\.rules\.0: 0: grouped .* convolutions stay float"):
        plan_modules(model, (rule(".*"),))
    assert [p.spec for p in plan_modules(model, (rule("0", "float"), rule(".*")))] == [None, LayerSpec("int8")]


class Several(nn.Module):
    """A convolution, odd widths and a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(40, 6), nn.Linear(24, 5, bias=False), nn.Conv2d(8, 3, 3)

    def forward(self, timestep: float) -> None: ...


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("weight", ["int8", "int6", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize(
    "activation",
    [
        {},
        {"activation": "int8"},
        {"activation": "int4", "activation_symmetric": True},
        {"activation": "int8", "activation_scale": "dynamic"},
    ],
    ids=["float", "static", "static-symmetric", "dynamic"],
)
def test_predicted_bytes_are_the_real_ones(
    groups: int, weight: str, symmetric: bool, group_size: int | None, activation: dict[str, Any]
) -> None:
    model = Several()
    fields = activation if group_size is None else {**activation, "group_size": group_size}
    if group_size is None:
        model.d = nn.Linear(13, 2)
    real = {n: sum(4 * p.numel() for p in m.parameters()) for n, m in model.named_children()}
    planned = plan_modules(model, (rule(".*", weight, symmetric=symmetric, **fields),))
    assert {p.name: p.float_bytes for p in planned} == real
    clock = StepClock([100.0 - k for k in range(groups - 1)])
    layers = quantize_model(model, {p.name: p.spec for p in planned if p.spec}, clock, search=False)
    for p in planned:
        exported = layers[p.name].harden()
        assert p.quantized_bytes(groups) == sum(t.numel() * t.element_size() for t in exported.parameters()), p.name


def test_bytes_by_hand() -> None:
    """int4, 128 columns in groups of 32, asymmetric, bias, static scales of 10 timestep groups."""
    spec = LayerSpec("int4", "int8", group_size=32, symmetric=False)
    module = PlannedModule("m", "Linear", (100, 128), True, spec, True)
    assert module.quantized_bytes(10) == 100 * (64 + 4 * 4 + 4 * 1 + 4) + 10 * (4 + 1)
    assert module.float_bytes == 4 * (100 * 128 + 100)
    assert PlannedModule("m", "Linear", (100, 128), False, None, False).quantized_bytes(10) == 4 * 100 * 128


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_a_dit_by_hand(denoiser: nn.Module, batch: int) -> None:
    """Width 32, 8 x 8 latents of 4 channels in patches of 2 x 2: 16 tokens a sample."""
    planned = plan_modules(denoiser, (rule(".*"),))

    def run() -> None:
        labels, timestep = torch.arange(batch), torch.full((batch,), 10)
        denoiser(torch.zeros(batch, 4, 8, 8), timestep=timestep, class_labels=labels)

    tokens, width = 16, 32
    expected = {
        "pos_embed.proj": tokens * width * (4 * 2 * 2),
        **{f"{BLOCK}.attn1.{n}": tokens * width * width for n in ("to_q", "to_k", "to_v", "to_out.0")},
        f"{BLOCK}.ff.net.0.proj": tokens * width * (4 * width),
        f"{BLOCK}.ff.net.2": tokens * (4 * width) * width,
        f"{BLOCK}.norm1.linear": width * (6 * width),  # once a sample, not once a token
        # diffusers calls the first block's embedder a second time for the output layer
        f"{BLOCK}.norm1.emb.timestep_embedder.linear_1": 2 * 256 * width,
        f"{BLOCK}.norm1.emb.timestep_embedder.linear_2": 2 * width * width,
        "proj_out_1": width * (2 * width),
        "proj_out_2": tokens * width * (4 * 2 * 2),
        f"{BLOCK}.attn1": 2 * tokens * tokens * width,  # Q with K, and the softmax with V
    }
    counted = count_macs(denoiser, planned, run, batch)
    assert {p.name: p.macs for p in counted} == expected
    assert counted[-1].kind == "attention" and not counted[-1].is_layer
    assert [(p.spec, p.shape, p.kind, p.bias, p.tune) for p in counted[:-1]] == [
        (p.spec, p.shape, p.kind, p.bias, p.tune) for p in planned
    ]


def test_counting_leaves_no_hook_even_after_an_error(denoiser: nn.Module) -> None:
    planned = plan_modules(denoiser, (rule(".*"),))

    def run() -> None:
        raise RuntimeError("out of memory")

    before = sum(len(m._forward_hooks) for m in denoiser.modules())
    with pytest.raises(RuntimeError, match="out of memory"):
        count_macs(denoiser, planned, run, 1)
    assert sum(len(m._forward_hooks) for m in denoiser.modules()) == before


def test_bit_operations() -> None:
    def operations(spec: LayerSpec | None) -> int:
        return PlannedModule("m", "Linear", (8, 8), True, spec, True, macs=100).bit_operations

    assert operations(None) == 100 * 32 * 32
    assert operations(LayerSpec("int4")) == 100 * 4 * 32
    assert operations(LayerSpec("int3", "int6")) == 100 * 3 * 6
