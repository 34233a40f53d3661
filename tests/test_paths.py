"""Every path of a quantized layer computes what float64 makes of its integers, and none changes what is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline
from safetensors.torch import load_file
from test_layers import MODULES, every_module, make_input, make_layer, oracle, relative, specs
from torch import Tensor, nn

from accuquant.core import kernels
from accuquant.model import quantized
from accuquant.model.checkpoint import harden_model
from accuquant.model.clock import StepClock
from accuquant.model.layers import LayerSpec, QuantizedLayer, TrainableLayer, quantize_model

W8A8 = [
    LayerSpec("int8", "int8"),
    LayerSpec("int8", "int8", activation_symmetric=True),
    LayerSpec("int8", "int8", activation_scale="dynamic"),
    LayerSpec("int8", "int4"),
]
needs_onednn = pytest.mark.skipif(not kernels.packed_works(), reason="this CPU's oneDNN product is not exact")


def on_each_path(layer: QuantizedLayer) -> Iterator[QuantizedLayer]:
    for path in layer.paths():
        layer._lay_out(path)
        assert layer.weight.is_mkldnn == (path == "onednn")
        yield layer


@every_module
@pytest.mark.parametrize("weight", ["int8", "int6", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 8])
@torch.no_grad()
def test_every_path_is_exact_up_to_its_scales(kind: str, weight: str, symmetric: bool, group_size: int | None) -> None:
    x = make_input(kind)
    for spec in specs(weight, symmetric, group_size):
        layer = make_layer(kind, spec).harden()
        expected = oracle(layer, MODULES[kind](), x)
        for each in on_each_path(layer):
            assert relative(each(x), expected) < 1e-6, (spec, each.path)


@pytest.mark.parametrize("spec", W8A8, ids=lambda spec: f"{spec.activation}-{spec.activation_scale}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 19), (3, 1, 8), (130, 96, 3), (700, 33, 65)])
@pytest.mark.parametrize("small_cache", [False, True])
@torch.no_grad()
def test_odd_shapes(
    spec: LayerSpec, shape: tuple[int, int, int], small_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, one column, more rows than a block; with blocks and without."""
    if small_cache:
        monkeypatch.setattr(kernels, "CACHE_BYTES", 0)
        monkeypatch.setattr(kernels, "BLOCK_ROWS", 64)
        monkeypatch.setattr(kernels, "TOKEN_BLOCK", 64)
        monkeypatch.setattr(kernels, "TOKEN_BYTES", 0)
    rows, columns, outputs = shape
    torch.manual_seed(0)
    module = nn.Linear(columns, outputs)
    trainable = TrainableLayer(module, spec, StepClock([]), "x", search=False)
    x = torch.randn(rows, columns) + 0.5
    if spec.static:
        trainable.set_activation_scale([x.flatten()], search=False)
    layer = trainable.harden()
    expected = oracle(layer, module, x)
    for each in on_each_path(layer):
        assert relative(each(x), expected) < 1e-6, each.path
        assert each(x[:0]).shape == (0, outputs)


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 64, 65])
@pytest.mark.parametrize("shape", [(64, 96), (1152, 544), (37, 19), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_few_rows_of_floats_meet_weights_that_stay_integers(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adaLN: against float64, and with no more weights written out as floats than a block."""
    columns, outputs = shape
    torch.manual_seed(0)
    module = nn.Linear(columns, outputs)
    layer = TrainableLayer(module, LayerSpec("int8", "float"), StepClock([]), "x", search=False).harden()
    x = torch.randn(rows, columns).to(dtype)
    expected = oracle(layer, module, x.double())
    whole = layer.dequantized_weight
    if rows <= kernels.FEW_ROWS:
        monkeypatch.setattr(layer, "dequantized_weight", lambda *_: pytest.fail("all weights are floats at once"))
    y = layer(x)
    assert y.dtype == dtype and y.shape == (rows, outputs)
    if rows:
        assert relative(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert compiled.dtype == dtype and relative(compiled, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    monkeypatch.setattr(layer, "dequantized_weight", whole)
    layer.arithmetic = "reference"
    assert torch.allclose(layer(x).float(), y.float(), rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("offset", [1, 8, 16, 64])
@pytest.mark.parametrize("rows", range(1, 9))
@torch.no_grad()
def test_weights_at_any_address(offset: int, rows: int) -> None:
    """As files are mapped: torch's product ends the process where they are not at the start of a cache line."""
    torch.manual_seed(0)
    layer = TrainableLayer(nn.Linear(64, 96), LayerSpec("int8", "float"), StepClock([]), "x", search=False).harden()
    x = torch.randn(rows, 64).bfloat16()
    expected, buffer = layer(x), torch.zeros(64 * 96 + 128, dtype=torch.int8)
    start = -buffer.data_ptr() % 64 + offset
    moved = buffer[start : start + 64 * 96].view(96, 64).copy_(layer.weight)
    assert moved.data_ptr() % 64 == offset % 64
    layer.weight = nn.Parameter(moved, requires_grad=False)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=1e-2)
    layer.prepare()
    assert layer.weight.data_ptr() % 64 == 0
    assert torch.equal(layer(x), expected)


def test_few_rows_pass_a_gradient_to_their_input() -> None:
    torch.manual_seed(0)
    layer = TrainableLayer(nn.Linear(64, 96), LayerSpec("int8", "float"), StepClock([]), "x", search=False).harden()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.float()[0], layer.dequantized_weight().sum(0), rtol=2e-2, atol=2e-2)


@needs_onednn
@pytest.mark.parametrize("zero", [-128, -3, 127])
def test_onednn_at_the_ends_of_the_range(zero: int) -> None:
    """Rows of the greatest products, where pairs summed in 16 bits would saturate; any zero point."""
    w = torch.full((5, 512), -128, dtype=torch.int8)
    w[1], w[2, ::2], w[3] = 127, 127, 0
    q = torch.tensor([-128.0, 127.0, 0.0]).repeat_interleave(512).view(3, 512)
    packed, shift = kernels.prepack(w), torch.tensor([128 + zero], dtype=torch.int32)
    found = kernels.packed_linear(kernels.unsigned(q), torch.ones(1), shift, packed, torch.ones(5), None)
    assert torch.equal(found.double(), (q.double() - zero) @ w.double().t())
    assert torch.equal(kernels.unpack(packed), w)


@needs_onednn
@every_module
@pytest.mark.parametrize("spec", W8A8, ids=lambda spec: f"{spec.activation}-{spec.activation_scale}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_on_onednn(kind: str, spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = make_layer(kind, spec).harden()
    layer._lay_out("onednn")
    x = make_input(kind).to(dtype)
    found = layer(x)
    assert found.dtype == dtype and torch.equal(found, layer(x.float()).to(dtype))


@every_module
@pytest.mark.parametrize("spec", [*W8A8, LayerSpec("int8")], ids=lambda s: f"{s.activation}-{s.activation_scale}")
@torch.no_grad()
def test_the_default_device_is_not_the_layer_s(kind: str, spec: LayerSpec) -> None:
    layer, x = make_layer(kind, spec).harden(), make_input(kind)
    for each in on_each_path(layer):
        for timestep in (600.0, torch.tensor([400.0])):
            each.clock.set(timestep)
            expected = each(x)
            with torch.device("meta"):
                each.clock.set(timestep)
                assert torch.equal(each(x.clone()), expected)


@torch.no_grad()
def test_groups_of_timesteps_have_their_own_scales_on_every_path() -> None:
    clock = StepClock([700.0, 300.0])
    layer = make_layer("linear", LayerSpec("int8", "int8"), clock).harden()
    x = make_input("linear")
    for timestep in (900, 500.0, torch.tensor([100, 100]), torch.tensor(700.0)):
        clock.set(timestep)
        expected = oracle(layer, MODULES["linear"](), x)
        for each in on_each_path(layer):
            assert relative(each(x), expected) < 1e-6


# ---- what is stored


def stored_bytes(layer: QuantizedLayer) -> int:
    found = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if isinstance(v, Tensor))]
    return sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize("weight", ["int8", "int4", "int3"])
@torch.no_grad()
def test_one_copy_of_the_weights_is_in_memory(weight: str) -> None:
    """After preparing and after a call; the sums of the weights are the only tensor that the file has not."""
    torch.manual_seed(0)
    layer = TrainableLayer(nn.Linear(256, 128), LayerSpec(weight, "int8"), StepClock([]), "x", search=False).harden()
    layer.activation_scale.fill_(0.1)  # type: ignore[union-attr]
    before = stored_bytes(layer)
    layer.prepare()
    layer(torch.randn(4, 256))
    assert stored_bytes(layer) <= before + 4 * 128


@needs_onednn
@torch.no_grad()
def test_layout_is_nobody_else_s_business() -> None:
    """state_dict, deep copies, moves and load_state_dict see the documented weight; the path stays."""
    plain = make_layer("linear", LayerSpec("int8", "int8")).harden()
    layer, x = copy.deepcopy(plain), make_input("linear")
    layer.prepare()
    layer._lay_out("onednn")
    expected = layer(x)

    def same(other: nn.Module) -> bool:
        found = other.state_dict()
        return all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in plain.state_dict().items())

    assert list(layer.state_dict().keys() ^ plain.state_dict().keys()) == [] and same(layer)
    for other in (copy.deepcopy(layer), layer.to("cpu")):
        assert other.path == "onednn" and other.weight.is_mkldnn and same(other)
        assert torch.equal(other(x), expected)
    other = make_layer("linear", LayerSpec("int8", "int8")).harden()
    other.weight.zero_()
    other._lay_out("onednn")
    other.load_state_dict(layer.state_dict(), strict=True)
    assert other.weight.is_mkldnn and torch.equal(other(x), expected)
    layer.arithmetic = "reference"
    assert relative(layer(x), expected.double()) < 1e-6
    assert layer.to("meta").weight.shape == plain.weight.shape


@needs_onednn
@torch.no_grad()
def test_a_copy_takes_no_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it was made on another machine."""
    layer, x = make_layer("linear", LayerSpec("int8", "int8")).harden(), make_input("linear")
    layer._lay_out("onednn")
    expected = layer(x)
    monkeypatch.setattr(kernels, "packed_works", lambda: False)
    other = copy.deepcopy(layer)
    assert other.path == "int_mm" and relative(other(x), expected.double()) < 1e-6


@needs_onednn
@torch.no_grad()
def test_prepared_model_is_saved_as_it_was(tmp_path: Path) -> None:
    """Byte by byte the file of the same model without any other layout; loading chooses the same paths again."""
    model = make_pipeline(layers=1).transformer
    specs = {n: LayerSpec("int8", "int8") for n, m in model.named_modules() if isinstance(m, nn.Linear) and "ff" in n}
    clock = StepClock([500.0])
    for layer in quantize_model(model, specs, clock, search=False).values():
        layer.set_activation_scale([torch.randn(100), torch.randn(100)], search=False)
    harden_model(model, clock)
    layers = quantized.quantized_layers(model)
    for path in ("int_mm", "onednn"):
        for layer in layers.values():
            layer._lay_out(path)
        model.save_pretrained(tmp_path / path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "onednn" / name).read_bytes() == (tmp_path / "int_mm" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "onednn")
    found = load_file(tmp_path / "int_mm" / name)
    assert all(torch.equal(found[k], v) for k, v in loaded.state_dict().items())
    assert {layer.path for layer in quantized.quantized_layers(loaded).values()} == {"onednn"}


# ---- the choice


@torch.no_grad()
def test_choice_is_measured_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_fastest", {})
    measured = []
    monkeypatch.setattr(quantized, "_seconds", lambda layer, tokens: measured.append(layer.path) or 1.0)
    spec = LayerSpec("int4", "int8", activation_scale="dynamic")

    def prepared(columns: int) -> QuantizedLayer:
        layer = TrainableLayer(nn.Linear(columns, 256), spec, StepClock([]), "x", search=False).harden()
        layer.prepare()
        return layer

    assert prepared(128).path == "int_mm"  # no faster than the one before it is not fast enough
    count = len(measured)
    assert set(measured) == {"int_mm", "float"}
    prepared(128)
    assert len(measured) == count
    prepared(256)
    assert len(measured) == 2 * count
    prepared(8)  # too small to be worth it
    assert len(measured) == 2 * count


@torch.no_grad()
def test_fastest_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_fastest", {})
    monkeypatch.setattr(quantized, "_seconds", lambda layer, tokens: {"float": 0.5}.get(layer.path, 1.0))
    layer = TrainableLayer(nn.Linear(256, 128), LayerSpec("int8", "int8"), StepClock([]), "x", False).harden()
    layer.prepare()
    assert layer.path == "float"


@needs_onednn
@pytest.mark.parametrize("begin", range(6))
@torch.no_grad()
def test_load_that_passes_does_not_choose(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as a path's first round takes, the machine is ten times slower."""
    monkeypatch.setattr(quantized, "_fastest", {})
    calls = list[str]()

    def seconds(layer: QuantizedLayer, tokens: Tensor) -> float:
        calls.append(layer.path)
        taken = {"onednn": 1.0, "int_mm": 1.5, "float": 4.0}[layer.path]
        return 10 * taken if begin <= len(calls) - 1 < begin + 1 + quantized.PROBE_RUNS else taken

    monkeypatch.setattr(quantized, "_seconds", seconds)
    layer = TrainableLayer(nn.Linear(256, 128), LayerSpec("int8", "int8"), StepClock([]), "x", False).harden()
    layer.prepare()
    assert layer.path == "onednn"
    assert calls.count("float") < quantized.PROBE_ROUNDS * (1 + quantized.PROBE_RUNS)  # it is far behind


def test_layers_with_float_activations_have_one_path() -> None:
    layer = TrainableLayer(nn.Linear(256, 128), LayerSpec("int8"), StepClock([]), "x", search=False).harden()
    layer.prepare()
    assert layer.path == "float" and layer.paths() == ["float"]


def test_product_that_is_not_exact_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    check, right = kernels.packed_works.__wrapped__, kernels.packed_linear

    def saturated(*arguments: Tensor) -> Tensor:
        return right(*arguments).clamp_max(2.0**14)

    def refused(weight: Tensor) -> Tensor:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(kernels, "packed_linear", saturated)
    assert not check()
    monkeypatch.setattr(kernels, "packed_linear", right)
    monkeypatch.setattr(kernels, "prepack", refused)
    assert not check()
    monkeypatch.setattr(kernels, "packed_works", lambda: False)
    monkeypatch.setattr(quantized, "_fastest", {})
    layer = make_layer("linear", LayerSpec("int8", "int8")).harden()
    layer.prepare()
    assert layer.path == "int_mm" and layer.paths() == ["int_mm", "float"]


def test_check_does_not_hang_on_the_default_device() -> None:
    with torch.device("meta"):
        assert kernels.packed_works.__wrapped__() == kernels.packed_works()
