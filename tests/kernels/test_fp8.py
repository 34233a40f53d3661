"""fp8 (e4m3): the nearest of its numbers, products against float64, files that keep them whatever the model's type."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import as_allocated, recipe_tree
from layers import make_input, make_layer, relative
from pipelines import make_pipeline
from safetensors import safe_open
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer, quantize_model
from accuquant.core.numerics import QTYPES, dequantize, fake_quantize, quantize, search_scale
from accuquant.errors import RecipeError
from accuquant.export.native import harden_model
from accuquant.kernels import select
from accuquant.kernels.scaled_mm import scaled_works
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer, quantized_layers
from accuquant.runtime.spec import LayerSpec

FP8 = QTYPES["fp8"]
STATIC = LayerSpec("fp8", "fp8", activation_symmetric=True)
DYNAMIC = LayerSpec("fp8", "fp8", activation_scale="dynamic", activation_symmetric=True)
WEIGHTS = LayerSpec("fp8")
GROUPS = LayerSpec("fp8", "fp8", group_size=8, activation_symmetric=True)
SPECS = [STATIC, DYNAMIC, WEIGHTS, GROUPS]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=["static", "dynamic", "weights", "groups"])
needs_product = pytest.mark.skipif(
    not scaled_works(torch.device("cpu")), reason="this torch does not multiply fp8 on CPUs"
)


def numbers() -> list[float]:
    """All of e4m3, by its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; the last is NaN."""
    found = {(m / 8) * 2.0**-6 for m in range(8)} | {
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
    }
    found.discard((1 + 7 / 8) * 2.0**8)
    return sorted(found | {-v for v in found})


def nearest(value: float) -> float:
    """By looking at all of them; between two the one whose mantissa is even."""
    ordered = numbers()
    distance = min(abs(value - n) for n in ordered)
    best = [n for n in ordered if abs(value - n) == distance]
    return (
        best[0]
        if len(best) == 1
        else next(n for n in best if [abs(m) for m in ordered if m >= 0].index(abs(n)) % 2 == 0)
    )


def test_numbers_of_the_type() -> None:
    assert (FP8.qmin, FP8.qmax, FP8.step, FP8.storage) == (-448, 448, 16, torch.float8_e4m3fn)
    ordered = numbers()
    assert len(ordered) == 253 and ordered[-1] == FP8.qmax  # two zeros and two NaN of 256
    assert ordered[ordered.index(224.0) + 1] - 224.0 == FP8.step


def test_each_value_becomes_the_nearest_number() -> None:
    positive = [v for v in numbers() if v >= 0]
    between = [(a + b) / 2 for a, b in itertools.pairwise(positive)]
    values = positive + between + [b * 1.001 for b in between] + [b * 0.999 for b in between] + [460.0, 1e4, 1e6]
    v = torch.tensor(values + [-x for x in values], dtype=torch.float32)
    scale, zero = torch.tensor(0.25), torch.tensor(0.0)
    q = quantize(v * scale, scale, 0, FP8)
    assert q.tolist() == [nearest(x) for x in v.tolist()]
    assert torch.equal(fake_quantize(v * scale, scale, zero, FP8), dequantize(q, scale, 0))
    assert torch.equal(q.to(FP8.storage).float(), q)


def test_gradient_is_straight_through_and_lsq() -> None:
    x = (300 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    scale = torch.full((6, 1), 0.8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((fake_quantize(x, scale, torch.zeros(()), FP8) * weights).sum(), (x, scale))
    v = x / scale
    clamped = v.clamp(FP8.qmin, FP8.qmax)
    rounded = torch.tensor([nearest(u) for u in clamped.flatten().tolist()], dtype=torch.float64).view(6, 50)
    y = (rounded + clamped - clamped.detach()) * scale
    expected = torch.autograd.grad((y * weights).sum(), (x, scale))
    assert (v.abs() > FP8.qmax).any() and all(
        torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True)
    )


def test_search_is_never_worse_than_the_whole_range() -> None:
    rows = torch.randn(8, 200, generator=torch.Generator().manual_seed(0)) ** 3
    errors = []
    for search in (False, True):
        scale, zero = search_scale(rows, FP8, symmetric=True, search=search)
        assert not zero.any()
        errors.append((dequantize(quantize(rows, scale, 0, FP8), scale, 0) - rows).square().sum(1))
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()


def make(spec: LayerSpec, columns: int = 64, outputs: int = 48) -> TrainableLayer:
    torch.manual_seed(0)
    clock = StepClock([500.0])
    layer = TrainableLayer(nn.Linear(columns, outputs), spec, clock, "x", search=True)
    if spec.static:
        layer.set_activation_scale([torch.randn(999), 3 * torch.randn(999)], search=False)
    elif spec.activation != "float":
        layer.log_activation_scale.data.fill_(-0.2)
    clock.set(0)
    return layer


def oracle(layer: QuantizedLayer, x: Tensor) -> Tensor:
    scales = layer.weight_scale.double().repeat_interleave(layer.in_features // layer.groups, 1)
    if layer.activation_scale is not None:
        scale = layer.activation_scale[layer.clock.group] if layer.spec.static else layer.activation_scale
        if not layer.spec.static:
            scale = x.abs().amax(-1, keepdim=True) * (scale / 448)
        x = torch.tensor([nearest(v) for v in (x / scale).flatten().tolist()]).view(x.shape).double() * scale.double()
    return x.double() @ (layer.weight.double() * scales).t() + layer.bias.double()  # type: ignore[union-attr]


@each_spec
@torch.no_grad()
def test_layer_is_what_float64_makes_of_its_numbers(spec: LayerSpec) -> None:
    layer, x = make(spec), torch.randn(5, 7, 64)
    hard = layer.harden()
    assert hard.weight.dtype == torch.float8_e4m3fn
    hard.arithmetic = "reference"
    assert torch.equal(hard(x), layer(x))
    hard.arithmetic = "integer"
    expected, bare = oracle(hard, x), spec in (STATIC, DYNAMIC) and scaled_works(torch.device("cpu"))
    assert hard.paths() == (["scaled_mm", "float"] if bare else ["float"])
    for path in hard.paths():
        hard.take(select.named(path))
        assert relative(hard(x), expected) < 1e-6 and hard(x[:0]).shape == (0, 7, 48)
        assert relative(hard(x.bfloat16()), oracle(hard, x.bfloat16().float())) < 1e-2
    hard.prepare()
    assert hard.path in hard.paths() and relative(hard(x), expected) < 1e-6


@torch.no_grad()
def test_odd_shapes_and_convolutions_are_computed_in_float() -> None:
    for kind in ("linear", "conv", "conv-odd"):
        for spec in (STATIC, DYNAMIC, WEIGHTS):
            layer, x = make_layer(kind, spec), make_input(kind)
            hard = layer.harden()
            assert hard.paths() == ["float"] and torch.equal(hard(x), layer(x))


def make_model(spec: LayerSpec) -> Any:
    model, clock = make_pipeline().transformer, StepClock([500.0])
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".attn1" in n or ".ff" in n)]
    for layer in quantize_model(model, dict.fromkeys(names, spec), clock, search=False).values():
        if spec.static:
            layer.set_activation_scale([3 * torch.randn(100), torch.randn(100)], search=False)
    harden_model(model, clock)
    return model


def call(model: Any) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found: Tensor = model(
        x.to(model.dtype), timestep=torch.tensor([900, 900]), class_labels=torch.tensor([1, 2])
    ).sample
    return found


@each_spec
@torch.no_grad()
def test_files_keep_it_whatever_the_model_s_type(spec: LayerSpec, tmp_path: Path) -> None:
    if spec.group_size:
        spec = LayerSpec("fp8", "fp8", group_size=16, activation_symmetric=True)
    model = make_model(spec)
    expected, name = call(model), "transformer_blocks.0.ff.net.2"
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.get_tensor(f"{name}.weight").dtype == torch.float8_e4m3fn
    kind, stored = type(model), quantized_layers(model)[name].weight.view(torch.int8)
    twin = as_allocated(kind.from_pretrained(tmp_path))
    assert torch.equal(call(twin), expected) and torch.equal(call(copy.deepcopy(twin)), expected)
    half = kind.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and relative(call(half), expected.double()) < 0.05
    assert torch.equal(quantized_layers(half)[name].weight.view(torch.int8), stored)
    layer = quantized_layers(twin)[name].to(torch.bfloat16)
    assert layer.weight.dtype == FP8.storage and torch.equal(layer.weight.view(torch.int8), stored)
    model.load_state_dict(kind.from_pretrained(tmp_path).state_dict())
    assert torch.equal(call(model), expected)


@needs_product
@torch.no_grad()
def test_compiled_as_one_graph() -> None:
    model = make_model(STATIC)
    for layer in quantized_layers(model).values():
        layer.take(select.named("scaled_mm"))
    expected = call(model)
    torch.compiler.reset()
    try:
        assert relative(call(torch.compile(model, fullgraph=True, backend="aot_eager")), expected.double()) < 1e-2
    finally:
        torch.compiler.reset()


def make_tree(model: Path, output: Path, **rule: Any) -> dict[str, Any]:
    rules = [{"modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*", "weight": "fp8", **rule}]
    tree = recipe_tree(model, output, quantization={"timestep_groups": 2, "rules": rules})
    tree["objective"] |= {"iterations": 30, "steps_per_group": 1}
    return tree


@pytest.mark.parametrize("scale", ["static", "dynamic"])
def test_it_is_calibrated_and_exported(model_folder: Path, tmp_path: Path, scale: str) -> None:
    tree = make_tree(model_folder, tmp_path / "fp8", activation="fp8", activation_scale=scale)
    folder = calibrate(parse_recipe(tree, "test"), Reporter(quiet=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["final_relative_l2"]["mean"] < 0.1
    layers = quantized_layers(DiTPipeline.from_pretrained(folder).transformer)
    assert len(layers) == 12 and all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers.values())


def test_what_fp8_cannot_do_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for rule, message in (
        ({"activation": "int8"}, "fp8 is multiplied with fp8 or float; write activation: fp8"),
        ({"weight": "int8", "activation": "fp8"}, "fp8 is multiplied with fp8 or float; write activation: int8"),
        ({"symmetric": False}, "fp8 has no zero point"),
        ({"activation": "fp8", "activation_symmetric": False}, "fp8 has no zero point"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(make_tree(model_folder, tmp_path, **rule), "test")
    tree = make_tree(model_folder, tmp_path, activation="fp8")
    tree["objective"]["learn"] = ["rounding"]
    with pytest.raises(RecipeError, match=r"needs evenly spaced integers, and quantization\.rules\.0 has weight: fp8"):
        parse_recipe(tree, "test")
    for fields in ({"activation": "int8"}, {"symmetric": False}, {"activation": "fp8"}):
        with pytest.raises(ValueError, match="fp8"):
            LayerSpec("fp8", **fields)
    with pytest.raises(ValueError, match="fp8 is multiplied"):
        LayerSpec("int8", "fp8", activation_symmetric=True)
