"""Quantized layers of all kinds and types, their inputs, and what float64 makes of their integers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer
from accuquant.core.numerics import quantize
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import LayerSpec

MODULES = {
    "linear": lambda: nn.Linear(24, 10),
    "linear-no-bias": lambda: nn.Linear(24, 10, bias=False),
    "conv": lambda: nn.Conv2d(8, 10, 3),
    "conv-strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "conv-odd": lambda: nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3), bias=False),
}
ACTIVATIONS = [("float", "static", False)] + [
    (name, scale, symmetric)
    for name in ("int8", "int6", "int4")
    for scale, symmetric in (("static", False), ("static", True), ("dynamic", True))
]
every_module = pytest.mark.parametrize("kind", MODULES)


def make_input(kind: str, seed: int = 1) -> Tensor:
    shape = (3, 8, 9, 11) if kind.startswith("conv") else (3, 7, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def make_layer(kind: str, spec: LayerSpec, clock: StepClock | None = None) -> TrainableLayer:
    """A layer with measured scales and zero points that differ between timestep groups, set to the last group."""
    torch.manual_seed(0)
    clock = clock or StepClock([500.0])
    layer = TrainableLayer(MODULES[kind](), spec, clock, kind, search=True)
    if spec.static:
        samples = make_input(kind, seed=2).flatten()
        layer.set_activation_scale([samples * (2 - k) - (1 - k) for k in range(clock.num_groups)], search=True)
    elif spec.activation != "float":
        layer.log_activation_scale.data.fill_(-0.2)  # a learned clip ratio
    clock.set(0)
    return layer


def specs(weight: str, symmetric: bool, group_size: int | None) -> Iterator[LayerSpec]:
    for activation, scale, activation_symmetric in ACTIVATIONS:
        yield LayerSpec(weight, activation, group_size, symmetric, scale, activation_symmetric)


def oracle(layer: QuantizedLayer, module: nn.Module, x: Tensor) -> Tensor:
    """The layer in float64, from its stored integers; a convolution by torch's own where its input has one scale."""
    weight = layer.integer_weight().double().view(layer.out_features, layer.groups, -1)
    if layer.weight_zero_point is not None:
        weight = weight - layer.weight_zero_point.double()[:, :, None]
    weight = (weight * layer.weight_scale.double()[:, :, None]).flatten(1)
    bias = None if layer.bias is None else layer.bias.double()
    conv = isinstance(module, nn.Conv2d)

    def quantized(values: Tensor) -> Tensor:
        qtype = layer.spec.activation_type
        if qtype is None:
            return values.double()
        if layer.spec.static:
            scale, zero = layer.activation_scale[layer.clock.group], 0.0
            if layer.activation_zero_point is not None:
                zero = float(layer.activation_zero_point[layer.clock.group])
        else:
            scale, zero = values.abs().amax(-1, keepdim=True) * (layer.activation_scale / qtype.qmax), 0.0
        q = torch.clamp(torch.round(values / scale) + zero, qtype.qmin, qtype.qmax)
        if qtype.floating is not None:  # which test_fp8 compares with all of its numbers
            q = quantize(values, scale, 0, qtype)
        return (q.double() - zero) * scale.double()

    if not conv:
        return F.linear(quantized(x), weight, bias)
    geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    if layer.spec.activation_type is None or layer.spec.static:
        return F.conv2d(quantized(x), weight.view(module.weight.shape), bias, **geometry)
    patches = quantized(F.unfold(x, module.kernel_size, **geometry).transpose(1, 2)).transpose(1, 2)
    shape = module(x).shape
    y = weight @ patches + (0 if bias is None else bias[:, None])
    return y.view(shape)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
