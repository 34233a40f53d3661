"""Attention's products on quantized inputs: what integers give, for every way of calling, and nothing left unsaid."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import recipe_tree
from pipelines import flux_arguments, make_flux, make_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accuquant.calibration.inputs import TrainableInput
from accuquant.calibration.opened import planned_model
from accuquant.calibration.plan import PlannedModule, count_macs, plan_attention
from accuquant.calibration.session import open_session
from accuquant.core.numerics import QTYPES
from accuquant.errors import AccuQuantError, CheckpointError, RecipeError
from accuquant.export.native import harden_model
from accuquant.pipeline.loading import load_pipeline
from accuquant.progress import Reporter
from accuquant.recipe import Attention, Model
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.attention import (
    INPUTS,
    AttentionProducts,
    AttentionSpec,
    QuantizedInput,
    quantize_attention,
    quantized_attention,
)
from accuquant.runtime.clock import StepClock

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.arange(5)[None, :] < torch.tensor([[5], [4], [3], [2], [1], [5], [1]])},
    "bias": {"attn_mask": torch.linspace(-2, 0, 35).view(7, 5)},
    "groups of heads": {"enable_gqa": True},
    "a row that sees nothing": {"attn_mask": torch.arange(7)[:, None] > torch.zeros(5)},
}


def given(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(2, 4, 7, 8), (2, 4 or 2, 5, 8), and values of another width."""
    generator = torch.Generator().manual_seed(seed)
    heads = 2 if name == "groups of heads" else 4
    shapes = (2, 4, 7, 8), (2, heads, 5, 8), (2, heads, 5, 6)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v + 0.5


def products(spec: AttentionSpec, *args: Tensor, **kwargs: Any) -> AttentionProducts:
    """Exported ones, with scales of two timestep groups that cover what they are called with; group 1 is on."""
    clock = StepClock([500.0])
    made = AttentionProducts(spec, lambda own: TrainableInput(own, clock))
    seen: dict[str, Tensor] = {}
    for name in spec.inputs():
        part: Any = made.get_submodule(name)
        part.observer, part.quantized = (lambda _, x, name=name: seen.__setitem__(name, x)), False
    made(*args, **kwargs)
    for name in spec.inputs():
        part = made.get_submodule(name)
        part.set_activation_scale([torch.tensor([1e3]), seen[name].flatten()], search=False)
        made.set_submodule(name, part.harden())
    clock.set(100.0)
    return made


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "spec", [AttentionSpec(), AttentionSpec("int6", "int4"), AttentionSpec("int8", "float")], ids=str
)
def test_as_integers_would_give_it(name: str, spec: AttentionSpec) -> None:
    """In int64 with zero points taken off, scales after: Q with K, and the softmax with V."""
    (q, k, v), call = given(name), dict(CALLS[name])
    made = products(spec, q, k, v, **call)

    def integers(part: str, x: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = made.get_submodule(part)
        scale, zero, qtype = layer.activation_scale[1].double(), layer.activation_zero_point[1].long(), QTYPES
        kind = qtype[spec.softmax if part == "softmax" else spec.activation]
        stored = (torch.round(x.float() / scale.float()).long() + zero).clamp(kind.qmin, kind.qmax)
        return stored - zero, scale

    (qi, qs), (ki, ks), (vi, vs) = (integers(part, x) for part, x in zip(INPUTS[:3], (q, k, v), strict=True))
    if name == "groups of heads":
        ki, vi = ki.repeat_interleave(2, 1), vi.repeat_interleave(2, 1)
    scores = (qi @ ki.transpose(-1, -2)).double() * qs * ks * call.get("scale", 8**-0.5)
    mask = call.get("attn_mask")
    if name == "causal":
        mask = torch.ones(7, 5, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p, ps = scores.softmax(-1).nan_to_num(0.0), torch.tensor(1.0)
    if spec.softmax == "float":
        vi = vi.double()
    else:
        p, ps = integers("softmax", p.float())
    expected = (p @ vi).double() * ps * vs
    step = float(ps * vs) * float(vi.abs().max())  # where a softmax lies between two integers, either is right
    assert float((made(q, k, v, **call).double() - expected).abs().max()) <= 1.01 * step
    assert float((made(q, k, v, **call).double() - expected).abs().median()) < 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_in_full_precision_it_is_torch_s_own(name: str) -> None:
    q, k, v = given(name)
    made = AttentionProducts(AttentionSpec(), lambda own: TrainableInput(own, StepClock([])))
    for part in made.children():
        part.quantized = False  # type: ignore[assignment]
    torch.testing.assert_close(made(q, k, v, **CALLS[name]), F.scaled_dot_product_attention(q, k, v, **CALLS[name]))


def test_the_softmax_has_a_range_of_its_own() -> None:
    """From zero on, up to what it reaches: its scale is a hundredth of a half of the queries'."""
    q, k, v = given("plain")
    made = products(AttentionSpec(), q / 4, k, v)
    scale, zero = (getattr(made.get_submodule("softmax"), f"activation_{n}")[1] for n in ("scale", "zero_point"))
    highest = (q / 4 @ k.transpose(-1, -2) * 8**-0.5).softmax(-1).max()
    assert int(zero) == -128 and float(scale) == pytest.approx(float(highest) / 255, rel=1e-2)


def test_half_types_and_gradients() -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in given("plain"))
    made = products(AttentionSpec(), q, k, v)
    out = made(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
    before = made.get_submodule("query").state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    after = made.to(torch.bfloat16).get_submodule("query").state_dict()
    assert all(after[n].dtype == kept[n].dtype and torch.equal(after[n], kept[n]) for n in kept)
    assert kept["activation_scale"].dtype == torch.float32 and kept["activation_zero_point"].dtype == torch.int8
    with pytest.raises(AccuQuantError, match=r"has no dropout \(found 0\.1\)"):
        made(q, k, v, dropout_p=0.1)


class Attends(nn.Module):
    """Projects and attends by itself, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.by_hand = nn.Linear(8, 8), False

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        """(B, L, 8) -> the same."""
        q = self.to_q(x)[:, None]
        if self.by_hand:
            return ((q @ q.transpose(-1, -2) * scale).softmax(-1) @ q)[:, 0]
        return F.scaled_dot_product_attention(q, q, q, scale=scale)[:, 0]


def test_a_module_keeps_its_code_its_name_and_its_copies() -> None:
    torch.manual_seed(0)
    module, x = Attends(), torch.randn(2, 5, 8)
    plain = module(x)
    q = module.to_q(x)[:, None]
    quantize_attention(module, products(AttentionSpec("int4"), q, q, q, scale=0.5))
    found = module(x)
    assert isinstance(module, Attends) and type(module).__name__ == "Attends"
    assert not torch.equal(found, plain) and torch.equal(found, module.products(q, q, q, scale=0.5)[:, 0])
    assert isinstance(found, Tensor) and "<locals>" not in module.__reduce_ex__(4)[0].__qualname__
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    twin.products.get_submodule("query").activation_scale.data.mul_(3)  # type: ignore[operator]
    assert torch.equal(module(x), found) and not torch.equal(twin(x), found)
    assert torch.equal(module(x), found)
    module.by_hand = True
    with pytest.raises(AccuQuantError, match=r"Attends has not called scaled_dot_product_attention.*native"):
        module(x)


def test_a_compiled_model_computes_the_same() -> None:
    """diffusers' own attention, in one graph."""
    model = make_pipeline().transformer
    call = {"timestep": torch.tensor([10, 10]), "class_labels": torch.tensor([1, 2])}
    x, clock = torch.randn(2, 4, 8, 8), StepClock([])
    plain = model(x, **call).sample
    for block in model.transformer_blocks:
        q = torch.randn(2, 2, 16, 16)
        made = products(AttentionSpec("int6"), q, q, q)
        for name in INPUTS:
            made.get_submodule(name).clock = clock  # type: ignore[assignment]
        quantize_attention(block.attn1, made)
    found = model(x, **call).sample
    assert not torch.equal(found, plain)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, **call).sample, found)


def test_products_are_counted_and_cost_what_their_types_do() -> None:
    """FLUX: joint attention of 16 + 7 tokens in two kinds of blocks; quantized ones at 8 x 8 and 4 x 8 bits."""
    model = make_flux()
    run = lambda: model(torch.randn(2, 16, 4), timestep=torch.tensor([0.5, 0.5]), **flux_arguments())  # noqa: E731
    counted = {p.name: p for p in count_macs(model, [], run, 2)}
    attention = [p for p in counted.values() if p.kind == "attention"]
    tokens = 16 + flux_arguments()["encoder_hidden_states"].shape[1]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert {p.name for p in attention} == {
        "transformer_blocks.0.attn",
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    }
    assert all(p.macs == 2 * tokens * tokens * width and p.bit_operations == p.macs * 1024 for p in attention)
    planned = plan_attention(Attention(softmax="int4"), [p.name for p in attention])
    quantized = [p for p in count_macs(model, planned, run, 2) if p.attention]
    assert [p.macs for p in quantized] == [p.macs for p in attention]
    assert all(p.bit_operations == p.macs // 2 * (8 * 8 + 4 * 8) for p in quantized)
    assert not any(p.kind == "attention" and p.attention is None for p in count_macs(model, planned, run, 2))


def test_what_else_multiplies_is_counted_as_float() -> None:
    """A convolution in three dimensions, and a product of two activations outside of attention."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.linear = nn.Conv3d(2, 3, 2, stride=2), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Any:
            tokens = self.linear(self.patch(x).flatten(2).transpose(1, 2))
            return tokens @ tokens.transpose(1, 2)

    model, linear = Odd(), PlannedModule("linear", "Linear", (5, 3), True, None, False)
    found = {p.name: p.macs for p in count_macs(model, [linear], lambda: model(torch.randn(2, 2, 4, 4, 4)), 2)}
    assert found == {"linear": 8 * 3 * 5, "patch": 8 * 3 * 2 * 8, "": 8 * 8 * 5}


def test_calibrated_exported_and_loaded(model_folder: Path, tmp_path: Path) -> None:
    """By plain diffusers, to the last bit, from a config and scales that can be read."""
    section = {"attention": {"activation": "int8", "softmax": "int6"}, "preset": "w8a8", "timestep_groups": 3}
    recipe = parse_recipe(recipe_tree(model_folder, tmp_path / "out", quantization=section), "test")
    session = open_session(recipe, Reporter(quiet=True))
    own = {n: layer for n, layer in session.layers.items() if isinstance(layer, TrainableInput)}
    assert len(own) == 2 * 4 and all(bool((layer.log_activation_scale != 0).all()) for layer in own.values())
    before = {n: layer.log_activation_scale.detach().clone() for n, layer in own.items()}
    session.loop(recipe.objective, 2).run()
    assert all(not torch.equal(layer.log_activation_scale, before[n]) for n, layer in own.items())
    (clock,) = session.clocks
    harden_model(session.network, clock)
    pipeline: Any = session.model.recorder.pipeline
    pipeline.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "recipe.yaml").write_text("unused")
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    fields = asdict(AttentionSpec("int8", "int6"))
    assert config["attention"] == {f"transformer_blocks.{i}.attn1": fields for i in range(2)}
    loaded = load_pipeline(Model(id=str(tmp_path / "out")))
    call = (torch.randn(2, 4, 8, 8),), {"timestep": torch.tensor([10, 10]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        expected, found = (p.transformer(*call[0], **call[1]).sample for p in (pipeline, loaded))
    assert torch.equal(found, expected) and len(quantized_attention(loaded.transformer)) == 2
    assert all(
        isinstance(p, QuantizedInput) for a in quantized_attention(loaded.transformer).values() for p in a.children()
    )
    check_broken(tmp_path / "out" / "transformer")


def check_broken(folder: Path) -> None:
    """What is wrong with the file is said with its key."""
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    tensors, text = load_file(weights), config.read_text()
    key = "transformer_blocks.0.attn1.products.softmax.activation_scale"
    for change, message in (
        ({key: torch.zeros(3)}, f"{key} must be finite and positive"),
        ({key: torch.ones(2)}, f"{key} has shape"),
        ({key.replace("scale", "zero_point"): torch.full((3,), 99, dtype=torch.int8)}, "range of int6"),
    ):
        save_file(tensors | change, weights)
        with pytest.raises(CheckpointError, match=message):
            make_pipeline().transformer.from_pretrained(folder)
    save_file(tensors, weights)
    for change, message in (
        ({"transformer_blocks.0.attn1": {"activation": "int8"}}, "attn1 must be an object with activation and softmax"),
        ({"transformer_blocks.0.attn1": {"activation": "int9", "softmax": "int8"}}, "attn1.activation: must be one of"),
        (
            {"transformer_blocks.9": {"activation": "int8", "softmax": "int8"}},
            r"9 is no module that attends \(found noth",
        ),
        ([], "must be an object"),
    ):
        tree = json.loads(text)
        tree["quantization_config"]["attention"] = change
        config.write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=f"quantization_config.attention.*{message}"):
            make_pipeline().transformer.from_pretrained(folder)


def test_mistakes_of_a_recipe_are_named(model_folder: Path, tmp_path: Path) -> None:
    def tried(section: dict[str, Any], **export: Any) -> None:
        tree = recipe_tree(
            model_folder, tmp_path / "o", quantization={"preset": "w8a8", "timestep_groups": 1} | section
        )
        tree["export"] |= export
        planned_model(parse_recipe(tree, "test"))

    with pytest.raises(RecipeError, match=r"attention\.modules: .*5.* matches none of the 2 modules"):
        tried({"attention": {"modules": r"transformer_blocks\.5.*"}})
    with pytest.raises(RecipeError, match=r"attention\.modules: '\(' is no regular expression"):
        tried({"attention": {"modules": "("}})
    with pytest.raises(RecipeError, match=r"attention\.activation"):
        tried({"attention": {"activation": "fp8"}})
    with pytest.raises(RecipeError, match=r"quantization\.attention: export\.format torchao does not hold that"):
        tried({"attention": {}}, format="torchao")
