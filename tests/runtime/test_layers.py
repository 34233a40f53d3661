"""Quantized layers: what calibration sees is what is exported, and integers compute what their floats say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layers import MODULES, every_module, make_input, make_layer, oracle, relative, specs
from pipelines import make_pipeline
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer, quantize_model
from accuquant.core.numerics import QTYPES
from accuquant.runtime.arithmetic import set_arithmetic
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import LayerSpec


@every_module
@pytest.mark.parametrize("weight", ["int8", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_hardened_layer_equals_the_calibrated_one(
    kind: str, weight: str, symmetric: bool, group_size: int | None
) -> None:
    """Bit by bit with the reference arithmetic; and that is what float64 makes of the stored integers."""
    x = make_input(kind)
    for spec in specs(weight, symmetric, group_size):
        layer = make_layer(kind, spec)
        hardened = layer.harden()
        hardened.arithmetic = "reference"
        with torch.no_grad():
            found = hardened(x)
            assert torch.equal(layer(x), found), spec
            assert relative(found, oracle(hardened, MODULES[kind](), x)) < 1e-6, spec


@every_module
@pytest.mark.parametrize("weight", ["int8", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_integer_arithmetic_is_exact_up_to_its_scales(
    kind: str, weight: str, symmetric: bool, group_size: int | None
) -> None:
    x = make_input(kind)
    for spec in specs(weight, symmetric, group_size):
        layer = make_layer(kind, spec).harden()
        assert layer.arithmetic == "integer"
        with torch.no_grad():
            assert relative(layer(x), oracle(layer, MODULES[kind](), x)) < 1e-6, spec


@pytest.mark.parametrize("kind", ["linear", "conv-odd"])
@pytest.mark.parametrize("weight", ["int8", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_adaround_decided_equals_its_export(kind: str, weight: str, symmetric: bool, group_size: int | None) -> None:
    x = make_input(kind)
    for spec in specs(weight, symmetric, group_size):
        layer = make_layer(kind, spec)
        nearest = layer.harden().integer_weight()
        layer.enable_adaround()
        assert layer.rounding_logits is not None
        with torch.no_grad():
            layer.rounding_logits.copy_(torch.where(torch.randn(layer.rounding_logits.shape) > 0, 9.0, -9.0))
            hardened = layer.harden()
            hardened.arithmetic = "reference"
            assert torch.equal(layer(x), hardened(x)), spec
        moved = (hardened.integer_weight().int() - nearest).abs()
        assert int(moved.max()) == 1 and 0.2 < float(moved.float().mean()) < 0.8, spec


@pytest.mark.parametrize("weight", ["int8", "int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_adaround_starts_at_the_float_weight_and_hardens_to_nearest(weight: str, symmetric: bool) -> None:
    layer = make_layer("linear", LayerSpec(weight, symmetric=symmetric))
    nearest, scale = layer.harden().integer_weight(), layer.log_weight_scale.detach().exp()
    layer.enable_adaround()
    assert torch.equal(layer.harden().integer_weight(), nearest)
    qtype = QTYPES[weight]
    low, high = (qtype.qmin - layer.weight_zero_point) * scale, (qtype.qmax - layer.weight_zero_point) * scale
    clipped = layer.weight.clamp(min=low, max=high)
    torch.testing.assert_close(layer.quantized_weight(), clipped, rtol=0, atol=1e-6)


def test_adaround_gradient_reaches_the_logits_and_stops_where_clipped() -> None:
    layer = make_layer("linear", LayerSpec("int3"))
    layer.enable_adaround()
    assert layer.rounding_logits is not None
    layer(make_input("linear")).square().sum().backward()
    gradient = layer.rounding_logits.grad
    assert gradient is not None
    v = layer.weight.detach() / layer.log_weight_scale.detach().exp()
    clipped = (v < -4) | (v > 3.01)
    assert int(clipped.sum()) > 0 and not bool(gradient[clipped].any())
    assert bool((gradient[(v > -4) & (v < 2.99)] != 0).all())


@pytest.mark.parametrize("kind", [k for k in MODULES if k.startswith("conv")])
def test_unquantized_convolution_is_torch_s(kind: str) -> None:
    module = MODULES[kind]().double()
    layer = TrainableLayer(module, LayerSpec("int8"), StepClock([]), kind, search=False)
    layer.quantized = False
    x = make_input(kind).double()
    torch.testing.assert_close(layer(x), module(x), rtol=1e-12, atol=1e-12)


@every_module
def test_eight_bits_stay_near_the_float_layer(kind: str) -> None:
    """Against the module that was replaced, not against ourselves; fewer bits are worse."""
    x = make_input(kind)
    errors = []
    for name in ("int8", "int6", "int4"):
        layer = make_layer(kind, LayerSpec(name, name)).harden()
        torch.manual_seed(0)
        module = MODULES[kind]()
        with torch.no_grad():
            errors.append(relative(layer(x), module(x).double()))
    assert errors[0] < 0.02 < errors[1] < 0.08 < errors[2] < 0.4


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arithmetic", ["integer", "reference"])
def test_input_type_comes_back_and_arithmetic_stays_float32(kind: str, dtype: torch.dtype, arithmetic: str) -> None:
    layer = make_layer(kind, LayerSpec("int8", "int8")).harden()
    layer.arithmetic = arithmetic  # type: ignore[assignment]
    x = make_input(kind).to(dtype)
    with torch.no_grad():
        found, expected = layer(x), layer(x.float())
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_layer_of_a_half_type_module_keeps_its_weights_in_float32() -> None:
    module = nn.Linear(24, 10).bfloat16()
    layer = TrainableLayer(module, LayerSpec("int4", "int8"), StepClock([]), "x", search=True)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(make_input("linear").bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scale", ["static", "dynamic"])
@pytest.mark.parametrize("arithmetic", ["integer", "reference"])
def test_memory_layout_of_the_input_does_not_matter(kind: str, scale: str, arithmetic: str) -> None:
    layer = make_layer(kind, LayerSpec("int8", "int8", activation_scale=scale)).harden()
    layer.arithmetic = arithmetic  # type: ignore[assignment]
    x = make_input(kind)
    other = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert other.stride() != x.stride()
    with torch.no_grad():
        torch.testing.assert_close(layer(other), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["static", "dynamic"])
def test_any_number_of_leading_dimensions(scale: str) -> None:
    layer = make_layer("linear", LayerSpec("int4", "int8", activation_scale=scale)).harden()
    x = make_input("linear")
    expected = layer(x)
    for shape in [(21, 24), (3, 1, 7, 24)]:
        torch.testing.assert_close(layer(x.view(shape)), expected.view(*shape[:-1], 10), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], rtol=1e-6, atol=1e-6)
    assert layer(x[:0]).shape == (0, 7, 10)


@pytest.mark.parametrize("kind", [k for k in MODULES if k.startswith("conv")])
@torch.no_grad()
def test_empty_batches_of_images(kind: str) -> None:
    x = make_input(kind)
    for spec in specs("int8", True, None):
        layer = make_layer(kind, spec).harden()
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:]), spec


def test_one_input_column() -> None:
    """torch's integer product of one column is its own case."""
    torch.manual_seed(0)
    module = nn.Linear(1, 5)
    spec = LayerSpec("int8", "int8", activation_scale="dynamic")
    layer = TrainableLayer(module, spec, StepClock([]), "x", search=True)
    x = torch.randn(4, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer.harden()(x), module(x), rtol=1e-5, atol=1e-5)


def test_dynamic_scale_looks_at_one_token() -> None:
    layer = make_layer("linear", LayerSpec("int8", "int4", activation_scale="dynamic")).harden()
    x = make_input("linear")
    louder = x.clone()
    louder[0, 0] *= 100
    assert torch.equal(layer(louder).flatten(0, 1)[1:], layer(x).flatten(0, 1)[1:])


def test_zero_weights_and_zero_inputs_give_the_bias() -> None:
    module = nn.Linear(24, 10)
    nn.init.zeros_(module.weight)
    for symmetric in (True, False):
        spec = LayerSpec("int4", "int8", 8, symmetric, "dynamic", True)
        layer = TrainableLayer(module, spec, StepClock([]), "x", search=True)
        for x in (make_input("linear"), torch.zeros(3, 24)):
            assert torch.equal(layer.harden()(x), module(x)) and torch.equal(layer(x), module(x))


# ---- what is refused


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ],
    ids=["grouped", "padding-name", "circular"],
)
def test_special_convolutions_are_refused(module: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match=r"down\.conv: grouped or specially padded convolutions stay float"):
        TrainableLayer(module, LayerSpec("int8"), StepClock([]), "down.conv", search=False)


def test_group_size_that_does_not_divide_names_sizes_that_do() -> None:
    with pytest.raises(ValueError, match=r"32 does not divide the 48 inputs of ff\.up; would fit: \[16, 8\]"):
        TrainableLayer(nn.Linear(48, 4), LayerSpec("int4", group_size=32), StepClock([]), "ff.up", search=False)
    with pytest.raises(ValueError, match=r"16 does not divide the 36 inputs of c"):  # 4 channels of 3 x 3
        TrainableLayer(nn.Conv2d(4, 4, 3), LayerSpec("int4", group_size=16), StepClock([]), "c", search=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": "int5"},
        {"weight": "int8", "activation": "fp8"},
        {"weight": "float"},
        {"weight": "int8", "activation": "int8", "activation_scale": "dynamical"},
        {"weight": "int4", "group_size": 0},
        {"weight": "int4", "group_size": -8},
    ],
    ids=lambda fields: "-".join(str(v) for v in fields.values()),
)
def test_impossible_specs_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(list(fields.values())[-1])):
        LayerSpec(**fields)  # type: ignore[arg-type]


def test_set_arithmetic_reaches_every_layer_and_refuses_what_it_does_not_know() -> None:
    model = nn.Sequential(make_layer("linear", LayerSpec("int8", "int8")).harden(), nn.ReLU())
    assert isinstance(model[0], QuantizedLayer)
    set_arithmetic(model, "reference")
    assert model[0].arithmetic == "reference"
    with pytest.raises(ValueError, match="'fast'"):
        set_arithmetic(model, "fast")
    with pytest.raises(ValueError, match="did you mean 'int_mm'"):
        set_arithmetic(model, "intmm")
    with pytest.raises(ValueError, match="ReLU has no layer quantized"):
        set_arithmetic(nn.ReLU(), "integer")


# ---- the clock


class Denoiser(nn.Module):
    """Three timestep groups' worth of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 10)

    def forward(self, sample: Tensor, encoder: Tensor | None = None, timestep: Tensor | float | None = None) -> Tensor:
        return self.layer(sample)


def test_static_scales_follow_the_timestep() -> None:
    """Each call, however the timestep is passed, gives what a layer with that one scale alone would give.

    Nearly: the logarithm of three scales may have other last bits than that of one.
    """
    torch.manual_seed(0)
    model, clock = Denoiser(), StepClock([700.0, 300.0])
    source = nn.Linear(24, 10)
    source.load_state_dict(model.layer.state_dict(), strict=True)
    spec = LayerSpec("int8", "int4")
    layer = quantize_model(model, {"layer": spec}, clock, search=True)["layer"]
    x = make_input("linear")
    samples = [x.flatten() * k + k for k in (0.3, 1.0, 3.0)]
    layer.set_activation_scale(samples, search=True)
    expected = []
    for values in samples:
        alone = TrainableLayer(source, spec, StepClock([]), "alone", search=True)
        alone.set_activation_scale([values], search=True)
        expected.append(alone(x).detach())
    assert min(relative(expected[k], expected[k + 1].double()) for k in (0, 1)) > 0.1
    for harden in (False, True):
        if harden:
            model.layer = layer.harden()
            model.layer.arithmetic = "reference"
        for timestep, group in [(999, 0), (701.0, 0), (700, 0), (699, 1), (300, 1), (299.5, 2), (0, 2), (800, 0)]:
            found = model(x, timestep=timestep).detach()
            assert relative(found, expected[group].double()) < 0.03
            assert torch.equal(model(x, None, torch.tensor([timestep] * 3)), found)


def test_only_the_current_group_s_scale_is_trained() -> None:
    model, clock = Denoiser(), StepClock([500.0])
    layer = quantize_model(model, {"layer": LayerSpec("int8", "int8")}, clock, search=True)["layer"]
    layer.set_activation_scale([torch.randn(500)] * 2, search=True)
    model(make_input("linear"), timestep=10).square().sum().backward()
    gradient = layer.log_activation_scale.grad
    assert gradient is not None and float(gradient[0]) == 0 and float(gradient[1]) != 0


def test_scales_are_trained_by_their_logarithm_with_lsq_s_factor() -> None:
    """d/d log s = s d/ds by autograd's own pieces, times 1 / sqrt(values per scale * qmax)."""
    layer = make_layer("linear", LayerSpec("int4", "int6", group_size=8, activation_symmetric=True), StepClock([]))
    x, up = make_input("linear"), torch.randn(3, 7, 10)
    layer(x).backward(up)

    def rounded(v: Tensor) -> Tensor:
        return v.round().detach() + (v - v.detach())

    w_scale = layer.log_weight_scale.detach().exp().requires_grad_()
    x_scale = layer.log_activation_scale.detach().exp().requires_grad_()
    grouped = rounded(layer.weight.detach().view(10, 3, 8) / w_scale[..., None]).clamp(-8, 7)
    weight = (grouped * w_scale[..., None]).flatten(1)
    F.linear(rounded(x / x_scale).clamp(-32, 31) * x_scale, weight).backward(up)
    for found, scale, values, qmax in (
        (layer.log_weight_scale.grad, w_scale, 8, 7),
        (layer.log_activation_scale.grad, x_scale, x.numel(), 31),
    ):
        assert scale.grad is not None
        expected = scale.grad * scale.detach() / (values * qmax) ** 0.5
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("edges", [[3.0, 5.0], [5.0, 5.0], [9.0, 4.0, 6.0]])
def test_edges_have_to_descend(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="descend strictly"):
        StepClock(edges)


@pytest.mark.parametrize(("steps", "groups"), [(50, 10), (50, 7), (20, 7), (6, 3), (10, 10), (9, 1)])
def test_groups_partition_the_schedule(steps: int, groups: int) -> None:
    """Consecutive runs whose lengths differ by at most one."""
    timesteps = torch.linspace(999, 0, steps).round()
    clock = StepClock.from_timesteps(timesteps, groups)
    found = []
    for t in timesteps:
        clock.set(float(t))
        found.append(clock.group)
    assert clock.num_groups == groups
    assert found == sorted(found) and set(found) == set(range(groups))
    lengths = [found.count(g) for g in range(groups)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["timesteps", "sigmas"])
def test_groups_are_keyed_by_value(scale: float) -> None:
    """Another number of steps finds, at each timestep, the group of the nearest calibrated one."""
    calibrated = torch.linspace(999, 0, 50).round() * scale
    clock = StepClock.from_timesteps(calibrated, 8)

    def group(t: float) -> int:
        clock.set(t)
        return clock.group

    known = {float(t): group(float(t)) for t in calibrated}
    for steps in (4, 20, 73, 1000):
        for t in (torch.linspace(998.7, 0.3, steps) * scale).tolist():
            assert group(t) == known[min(known, key=lambda k: abs(k - t))]
    assert group(5000 * scale) == 0 and group(-1) == 7


def test_model_without_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear\.forward has no argument 'timestep'"):
        StepClock([]).attach(nn.Linear(2, 2))


def test_patch_convolution_of_a_dit() -> None:
    """A Conv2d inside a real model: eight bits change its prediction a little, three bits change it much."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    inputs = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 2])}
    reference = make_pipeline().transformer(x, **inputs).sample
    errors = {}
    for name in ("int8", "int3"):
        model = make_pipeline().transformer
        spec = LayerSpec(name, name, activation_scale="dynamic")
        layers = quantize_model(model, {"pos_embed.proj": spec}, StepClock([]), search=True)
        model.set_submodule("pos_embed.proj", layers["pos_embed.proj"].harden())
        with torch.no_grad():
            errors[name] = relative(model(x, **inputs).sample, reference.double())
    assert 0 < errors["int8"] < 0.02 < errors["int3"]
