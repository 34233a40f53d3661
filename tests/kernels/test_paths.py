"""Every path of a quantized layer computes what float64 makes of its integers, and none changes what is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layers import MODULES, every_module, make_input, make_layer, oracle, relative, specs
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer, quantize_model
from accuquant.export.native import harden_model
from accuquant.kernels import floating, integers, onednn, select
from accuquant.runtime import layer as quantized
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import LayerSpec

W8A8 = [
    LayerSpec("int8", "int8"),
    LayerSpec("int8", "int8", activation_symmetric=True),
    LayerSpec("int8", "int8", activation_scale="dynamic"),
    LayerSpec("int8", "int4"),
]
needs_onednn = pytest.mark.skipif(not onednn.packed_works(), reason="this CPU's oneDNN product is not exact")


def on_each_path(layer: QuantizedLayer) -> Iterator[QuantizedLayer]:
    for path in layer.paths():
        layer.take(select.named(path))
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
        monkeypatch.setattr(integers, "CACHE_BYTES", 0)
        monkeypatch.setattr(integers, "BLOCK_ROWS", 64)
        monkeypatch.setattr(onednn, "TOKEN_BLOCK", 64)
        monkeypatch.setattr(onednn, "TOKEN_BYTES", 0)
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
    whole = floating.dequantized
    if rows <= floating.FEW_ROWS:
        monkeypatch.setattr(floating, "dequantized", lambda *_: pytest.fail("all weights are floats at once"))
    y = layer(x)
    assert y.dtype == dtype and y.shape == (rows, outputs)
    if rows:
        assert relative(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert compiled.dtype == dtype and relative(compiled, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    monkeypatch.setattr(floating, "dequantized", whole)
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
    packed, shift = onednn.prepack(w), torch.tensor([128 + zero], dtype=torch.int32)
    found = onednn.packed_linear(onednn.unsigned(q), torch.ones(1), shift, packed, torch.ones(5), None)
    assert torch.equal(found.double(), (q.double() - zero) @ w.double().t())
    assert torch.equal(onednn.unpack(packed), w)


@needs_onednn
@every_module
@pytest.mark.parametrize("spec", W8A8, ids=lambda spec: f"{spec.activation}-{spec.activation_scale}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_on_onednn(kind: str, spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = make_layer(kind, spec).harden()
    layer.take(select.named("onednn"))
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
    layer.take(select.named("onednn"))
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
    other.take(select.named("onednn"))
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
    layer.take(select.named("onednn"))
    expected = layer(x)
    monkeypatch.setattr(onednn, "packed_works", lambda: False)
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
            layer.take(select.named(path))
        model.save_pretrained(tmp_path / path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "onednn" / name).read_bytes() == (tmp_path / "int_mm" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "onednn")
    found = load_file(tmp_path / "int_mm" / name)
    assert all(torch.equal(found[k], v) for k, v in loaded.state_dict().items())
    assert {layer.why for layer in quantized.quantized_layers(loaded).values()} == {"rule"}


# ---- trust


@needs_onednn
def test_product_that_is_not_exact_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    check, right = onednn.packed_works.__wrapped__, onednn.packed_linear

    def saturated(*arguments: Tensor) -> Tensor:
        return right(*arguments).clamp_max(2.0**14)

    def refused(weight: Tensor) -> Tensor:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(onednn, "packed_linear", saturated)
    assert not check()
    monkeypatch.setattr(onednn, "packed_linear", right)
    monkeypatch.setattr(onednn, "prepack", refused)
    assert not check()
    monkeypatch.setattr(onednn, "packed_works", lambda: False)
    layer = make_layer("linear", LayerSpec("int8", "int8")).harden()
    layer.prepare()
    assert layer.path != "onednn" and layer.paths() == ["int_mm", "float"]


def test_check_does_not_hang_on_the_default_device() -> None:
    with torch.device("meta"):
        assert onednn.packed_works.__wrapped__() == onednn.packed_works()
        assert integers.int_mm_is_exact() in (True, False)


@pytest.mark.parametrize("columns", [1, 64, 1024, 1025, 5000])
def test_integer_product_is_exact_without_the_instructions_for_it(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CPUs on which torch's own saturates: at the ends of the range, and with blocks of columns."""
    monkeypatch.setattr(integers, "int_mm_is_exact", lambda: False)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, columns), dtype=torch.int8, generator=generator) for n in (5, 7))
    a[0], b[0], a[1], b[1] = -128, -128, 127, 127
    found = integers.integer_product(a, b)
    assert found.dtype == torch.int32 and torch.equal(found.double(), a.double() @ b.double().t())


def test_saturating_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._int_mm
    monkeypatch.setattr(integers, "check_int_mm", integers.check_int_mm.__wrapped__)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b).clamp_max(2**15 - 1))
    assert not integers.int_mm_is_exact()
