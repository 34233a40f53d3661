"""Triton's kernels against float64 and against `numerics`; pytest finds this file only where another test runs it.

With TRITON_INTERPRET=1, which has to be set before Triton is imported, on CPU tensors (test_triton.py), else on a
CUDA device (test_gpu.py). The interpreter cannot multiply bfloat16; on a device it is checked too.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from layers import MODULES, every_module, make_input, make_layer, oracle, relative, specs
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer
from accuquant.core.numerics import QTYPES, SMALLEST_SCALE, dynamic_scale, quantize
from accuquant.core.packing import pack
from accuquant.kernels import cuda, measured, select, triton_kernels
from accuquant.kernels.backend import Facts
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import LayerSpec

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda:0")
HALVES = [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OPERATORS: Any = torch.ops.accuquant


def draw(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


# ---- integers: bit by bit those of numerics


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 64), (3, 1000), (2, 5000)])
@pytest.mark.parametrize("zero", [None, -128, 5])
def test_static_integers(dtype: torch.dtype, bits: int, shape: tuple[int, int], zero: int | None) -> None:
    torch.manual_seed(0)
    qtype = QTYPES[f"int{bits}"]
    zero = None if zero is None else max(zero, qtype.qmin)
    x, scale = (torch.randn(shape) * 3).to(dtype), torch.tensor([0.0371])
    point = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    found = OPERATORS.quantize_static(*on_device(x, scale, point), qtype.qmin, qtype.qmax)
    assert torch.equal(found.cpu(), quantize(x, scale, zero or 0, qtype).to(torch.int8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 64), (3, 1000), (2, 5000)])
@pytest.mark.parametrize("clip", [1.0, 0.83])
def test_dynamic_integers_and_scales(dtype: torch.dtype, bits: int, shape: tuple[int, int], clip: float) -> None:
    torch.manual_seed(1)
    qtype, x, ratio = QTYPES[f"int{bits}"], torch.randn(shape).to(dtype), torch.tensor([clip])
    x[0] *= 300
    q, scale = OPERATORS.quantize_dynamic(*on_device(x, ratio), qtype.qmin, qtype.qmax)
    expected = dynamic_scale(x, qtype, ratio)
    assert torch.equal(scale.cpu(), expected)
    assert torch.equal(q.cpu(), quantize(x, expected, 0, qtype).to(torch.int8))


def test_ties_go_to_even_and_far_values_to_the_ends() -> None:
    """Every half within the range and beyond it; the neighbours of every half; values no integer is near."""
    scale, halves = torch.tensor([0.25]), torch.arange(-140, 140) + 0.5
    near = [halves, torch.nextafter(halves, torch.tensor(-1e9)), torch.nextafter(halves, torch.tensor(1e9))]
    far = torch.tensor([3e38, -3e38, 1e10, -1e10, 2.0**20, 2.0**23 + 1, 0.0, -0.0, 1e-42, torch.inf, -torch.inf])
    x = torch.cat([*near, far]).view(1, -1) * 0.25
    for zero in (-128, 0, 127):
        point = torch.tensor([zero], dtype=torch.int8)
        found = OPERATORS.quantize_static(*on_device(x, scale, point), -128, 127)
        assert torch.equal(found.cpu().float(), quantize(x, scale, zero, QTYPES["int8"]))


def test_many_quotients_are_rounded_as_torch_rounds_them() -> None:
    """An approximate division would miss some of these."""
    torch.manual_seed(2)
    x = torch.randn(1, 1 << 16)
    for value in (0.0123, 1 / 127, 0.7):
        scale = torch.tensor([value])
        found = OPERATORS.quantize_static(*on_device(x, scale, None), -128, 127)
        assert torch.equal(found.cpu().float(), quantize(x, scale, 0, QTYPES["int8"]))


def test_rows_of_zeros_and_of_no_numbers() -> None:
    x = torch.ones(4, 20)
    x[0], x[1, 3], x[2, 7] = 0, torch.nan, torch.inf
    q, scale = OPERATORS.quantize_dynamic(*on_device(x, torch.ones(1)), -128, 127)
    assert not q[0].any() and scale[0] == SMALLEST_SCALE
    assert scale[1:3].isinf().all()  # whatever they are multiplied with is no number that looks right
    assert (q[3] == 127).all()


# ---- the product


def stored(bits: int, outputs: int, columns: int, groups: int, asymmetric: bool) -> tuple[list[Any], Tensor]:
    """Arguments that stand for a weight, and the weight in float64."""
    qtype = QTYPES[f"int{bits}"]
    q, scale = draw(qtype.qmin, qtype.qmax + 1, outputs, columns), torch.rand(outputs, groups) / 100 + 1e-3
    q[0] = qtype.qmin
    zero = draw(qtype.qmin, qtype.qmax + 1, outputs, groups).to(torch.int8) if asymmetric else None
    grouped = q.double().view(outputs, groups, -1)
    weight = ((grouped if zero is None else grouped - zero.double()[..., None]) * scale.double()[..., None]).flatten(1)
    packed, *rest = on_device(pack(q, qtype), scale, zero, weight.sum(1).float())
    return [packed, bits, *rest], weight


SHAPES = [(1, 96, 3), (16, 96, 40), (17, 96, 65), (70, 192, 33), (130, 96, 136)]  # every tile, none of them full
GROUPINGS = [(shape, group) for shape in SHAPES for group in (None, 16, 32, 48)]
GROUPINGS += [((33, 384, 40), 128), ((2, 256, 5), 64), ((1, 1, 1), None), ((3, 37, 5), None), ((20, 129, 7), None)]


@pytest.mark.parametrize(("shape", "group"), GROUPINGS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_product_is_exact_up_to_its_scales(
    shape: tuple[int, int, int], group: int | None, bits: int, asymmetric: bool
) -> None:
    torch.manual_seed(3)
    rows, columns, outputs = shape
    groups = 1 if group is None else columns // group
    weights = QTYPES[f"int{bits}"]
    facts = Facts(weights, QTYPES["int8"], columns, outputs, groups, not asymmetric, False, True, DEVICE)
    assert cuda.triton_refusal(facts) == ""
    arguments, weight = stored(bits, outputs, columns, groups, asymmetric)
    bias, q = torch.randn(outputs), draw(-128, 128, rows, columns).to(torch.int8)
    q[0] = -128
    point = torch.tensor([-77], dtype=torch.int8)
    for scale, zero in ((torch.rand(rows, 1), None), (torch.tensor([0.02]), None), (torch.tensor([0.02]), point)):
        real = (q.double() - (0 if zero is None else -77)) * scale.double()
        for offset in (bias, None):
            found = OPERATORS.stored_linear(
                *on_device(q), *arguments, *on_device(scale, zero, offset), torch.float32
            ).cpu()
            assert relative(found, real @ weight.t() + (0 if offset is None else offset)) < 1e-6
    for dtype in HALVES:
        x = torch.randn(rows, columns).to(dtype)
        found = OPERATORS.stored_linear(*on_device(x), *arguments, *on_device(None, None, bias), torch.float32).cpu()
        assert relative(found, x.double() @ weight.t() + bias) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_result_is_rounded_once_to_its_type(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    arguments, _ = stored(4, 40, 64, 2, True)
    q, scale = on_device(draw(-128, 128, 20, 64).to(torch.int8), torch.rand(20, 1))
    full = OPERATORS.stored_linear(q, *arguments, scale, None, None, torch.float32)
    found = OPERATORS.stored_linear(q, *arguments, scale, None, None, dtype)
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off
        full = full.view(torch.int32).bitwise_and(-1 << 16).view(torch.float32)
    assert found.dtype == dtype and torch.equal(found, full.to(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (17, 8), (40, 200)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rescaling(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    acc, w_scale, bias = draw(-(2**20), 2**20, *shape).int(), torch.rand(shape[1], 1), torch.randn(shape[1])
    sums, point = torch.randn(shape[1]) * 100, torch.tensor([9], dtype=torch.int8)
    for scale, zero in ((torch.rand(shape[0], 1), None), (torch.rand(1), None), (torch.rand(1), point)):
        found = OPERATORS.rescale(*on_device(acc, w_scale, sums, scale, zero, bias), dtype).cpu()
        total = acc.double() * w_scale.double().t() - (0 if zero is None else 9 * sums.double())
        expected = total * scale.double() + bias.double()
        limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        big = expected.abs() < 60000  # float16 ends there
        assert found.dtype == dtype and relative(found[big], expected[big]) < limit


def test_no_rows_and_refused_types() -> None:
    arguments, _ = stored(8, 4, 16, 1, False)
    empty = torch.empty(0, 16, device=DEVICE)
    q, scale = OPERATORS.quantize_dynamic(empty, torch.ones(1, device=DEVICE), -128, 127)
    assert q.shape == (0, 16) and scale.shape == (0, 1)
    assert OPERATORS.stored_linear(q, *arguments, scale, None, None, torch.float16).shape == (0, 4)
    assert OPERATORS.rescale(q[:, :4].int(), arguments[2], None, scale, None, None, torch.float16).shape == (0, 4)
    with pytest.raises(TypeError, match="float32"):
        OPERATORS.stored_linear(torch.randn(2, 16, device=DEVICE), *arguments, None, None, None, torch.float32)


def test_operators_are_what_torch_compile_believes() -> None:
    """Shapes, types and aliasing of the fake versions."""
    (x, scale, point), (arguments, _) = on_device(torch.randn(5, 32), torch.ones(1), None), stored(4, 8, 32, 2, True)
    q = draw(-8, 8, 5, 32).to(torch.int8).to(DEVICE)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, values in (
        (OPERATORS.quantize_static, (x, scale, point, -128, 127)),
        (OPERATORS.quantize_dynamic, (x, scale, -128, 127)),
        (OPERATORS.stored_linear, (q, *arguments, scale, None, None, torch.float16)),
        (OPERATORS.rescale, (q.int()[:, :8].contiguous(), arguments[2][:, :1], None, scale, None, None, torch.float16)),
    ):
        torch.library.opcheck(operator.default, values, test_utils=tests)


# ---- layers


def on_triton(layer: QuantizedLayer, path: str = "triton") -> QuantizedLayer:
    layer = layer.to(DEVICE)
    layer.take(select.named(path))
    return layer


@every_module
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@torch.no_grad()
def test_layers(kind: str, weight: str, symmetric: bool) -> None:
    """Every kind of activation scale, of a group of timesteps that is not the first."""
    x = make_input(kind)
    for spec in specs(weight, symmetric, None):
        layer = make_layer(kind, spec).harden()
        values = x.half() if spec.activation == "float" else x
        expected = oracle(layer, MODULES[kind](), values.float())
        found = on_triton(layer)(values.to(DEVICE)).cpu()
        assert found.dtype == values.dtype
        assert relative(found, expected) < (1e-3 if values.dtype == torch.float16 else 1e-6), spec


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("activation", ["float", "int8"])
@torch.no_grad()
def test_packed_groups(group: int, rows: int, activation: str) -> None:
    torch.manual_seed(6)
    module, x = nn.Linear(256, 24), torch.randn(rows, 256).half()
    for symmetric in (True, False):
        spec = LayerSpec("int4", activation, group, symmetric)
        trainable = TrainableLayer(module, spec, StepClock([]), "x", search=False)
        if spec.static:
            trainable.set_activation_scale([x.float().flatten() + 0.2], search=False)
        layer = trainable.harden()
        expected = oracle(layer, module, x.float())
        assert relative(on_triton(layer)(x.to(DEVICE)).cpu(), expected) < 1e-3


@pytest.mark.parametrize("rows", [5, 40])
@torch.no_grad()
def test_path_over_cublas(rows: int) -> None:
    torch.manual_seed(7)
    module, x = nn.Linear(32, 24), torch.randn(rows, 32)
    for symmetric, scale in ((True, "static"), (False, "static"), (True, "dynamic")):
        spec = LayerSpec("int8", "int8", activation_symmetric=symmetric, activation_scale=scale)
        trainable = TrainableLayer(module, spec, StepClock([]), "x", search=False)
        if spec.static:
            trainable.set_activation_scale([x.flatten() + 0.2], search=False)
        layer = trainable.harden()
        expected = oracle(layer, module, x)
        assert relative(on_triton(layer, "cublas")(x.to(DEVICE)).cpu(), expected) < 1e-6


@torch.no_grad()
def test_inputs_the_kernels_have_no_product_for() -> None:
    """float64, and float32 with weights alone: computed in float where they are."""
    for spec, dtype in ((LayerSpec("int8", "int8"), torch.float64), (LayerSpec("int4"), torch.float32)):
        layer, x = make_layer("linear", spec).harden(), make_input("linear").to(dtype)
        expected = oracle(layer, MODULES["linear"](), x.float())
        assert relative(on_triton(layer)(x.to(DEVICE)).cpu(), expected) < 1e-6


def test_compiled_layers_are_one_graph() -> None:
    clock = StepClock([500.0])
    specs = [LayerSpec("int8", "int8"), LayerSpec("int4", "int8", activation_scale="dynamic"), LayerSpec("int4")]
    layers = [on_triton(make_layer("linear", spec, clock).harden()) for spec in specs]
    x = make_input("linear").half().to(DEVICE)

    def run(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for timestep in (900, 100):
            clock.set(timestep)
            assert all(torch.equal(a, b) for a, b in zip(compiled(x), run(x), strict=True))


# ---- trust


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        (LayerSpec("int8", "int8"), ["triton", "cublas", "float"]),
        (LayerSpec("int8", "int8", activation_scale="dynamic"), ["triton", "cublas", "float"]),
        (LayerSpec("int8", "int8", symmetric=False), ["triton", "int_mm", "float"]),
        (LayerSpec("int8", "int8", 16), ["triton", "float"]),
        (LayerSpec("int4", "int8"), ["triton", "int_mm", "float"]),
        (LayerSpec("int4", "int8", 32), ["triton", "float"]),
        (LayerSpec("int4", group_size=16), ["triton", "float"]),
        (LayerSpec("int4", group_size=8), ["float"]),  # too small a step
        (LayerSpec("int6", "int8"), ["int_mm", "float"]),
        (LayerSpec("int6"), ["float"]),
    ],
    ids=str,
)
def test_paths_of_a_device(spec: LayerSpec, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a device whose kernels work; the interpreter's do."""
    for name in ("triton_works", "cublas_works"):
        assert getattr(cuda, name)(DEVICE)
        monkeypatch.setattr(cuda, name, lambda device: True)
    monkeypatch.setattr(measured, "kept", lambda facts: None)  # would ask for the device's name
    for columns, outputs in ((64, 24), (64, 9)):
        facts = QuantizedLayer(spec, columns, outputs, None, StepClock([]), "x", bias=True).facts
        padded = [p for p in paths if outputs % 8 == 0 or p not in ("cublas", "int_mm")]
        found = select.paths(dataclasses.replace(facts, device=torch.device("cuda")))
        assert [backend.name for backend in found] == padded
        assert select.choose(dataclasses.replace(facts, device=torch.device("cuda"))).backend is found[0]


def test_kernels_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check, right = cuda.triton_works.__wrapped__, triton_kernels.tile
    assert check(DEVICE)
    monkeypatch.setattr(triton_kernels, "tile", lambda *a: right(*a) | {"BK": 96})  # not a power of two: refused
    with pytest.warns(UserWarning, match="do not run on"):
        assert not check(DEVICE)
    monkeypatch.setattr(triton_kernels, "tile", right)
    monkeypatch.setattr(triton_kernels, "scale_kind", lambda scale: 0)  # forgets to scale
    assert not check(DEVICE)
