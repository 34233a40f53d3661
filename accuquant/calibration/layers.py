"""Quantized Linear and Conv2d while they are calibrated, and the replacing of a model's modules by them.

`TrainableLayer` is what calibration works on: float weights, learned scales, everything differentiable.
`QuantizedLayer` is what is exported and loaded: packed integers and scales. `TrainableLayer.harden` turns the one into
the other, and both compute the same function (`torch.equal` with the reference arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.calibration.inputs import LearnedScales, TrainableInput
from accuquant.core import rounding
from accuquant.core.numerics import (
    at_least_float32,
    dequantize,
    dynamic_scale,
    fake_quantize,
    lsq_gradient_scale,
    quantize,
    scale_gradient,
    search_scale,
)
from accuquant.core.packing import pack
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import Conv, Layer, LayerSpec, keep_float32


class TrainableLayer(Layer, LearnedScales):
    """Fake-quantized layer with learnable weights, weight scales, activation scales, rounding and bias.

    Scales are parametrised by their logarithm. ``log_activation_scale`` is (timestep groups,) for static scales and
    (1,), the logarithm of the clip ratio on max|x|, for dynamic ones. ``observer``, when set, receives each call's
    tokens.
    """

    def __init__(
        self, module: nn.Linear | nn.Conv2d, spec: LayerSpec, clock: StepClock, name: str, search: bool
    ) -> None:
        weight = at_least_float32(module.weight.detach()).flatten(1)
        super().__init__(spec, weight.shape[1], weight.shape[0], Conv.of(module, name), clock, name)
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("float_weight", weight, persistent=False)  # calibration changes `weight` and `bias`
        float_bias = None if module.bias is None else at_least_float32(module.bias.detach())
        self.register_buffer("float_bias", float_bias, persistent=False)
        self.bias = None if module.bias is None else nn.Parameter(at_least_float32(module.bias.detach()).clone())
        self.log_weight_scale = nn.Parameter(weight.new_empty(len(weight), self.groups))
        self.register_buffer("weight_zero_point", weight.new_empty(len(weight), self.groups))
        num_scales = clock.num_groups if spec.static else 1
        self.log_activation_scale = nn.Parameter(weight.new_zeros(num_scales))
        self.register_buffer("activation_zero_point", weight.new_zeros(num_scales))
        self.rounding_logits: nn.Parameter | None = None
        self.float_weight: Tensor
        self.float_bias: Tensor | None
        self.weight_zero_point: Tensor
        self.activation_zero_point: Tensor
        self.observer: Any = None
        self.quantized = True  # False computes as the module did that this one replaces
        self.set_weight_scale(search)

    def _grouped(self, weight: Tensor) -> Tensor:
        """(O, I) -> (O * G, group_size)."""
        return weight.reshape(weight.shape[0] * self.groups, -1)

    def enable_adaround(self) -> None:
        weight, scale = self._grouped(self.weight.detach()), self.log_weight_scale.detach().exp().view(-1, 1)
        self.rounding_logits = nn.Parameter(rounding.initial_logits(weight, scale))

    def learnable(self, kind: str) -> nn.Parameter | None:
        """The parameter that ``objective.learn`` calls ``kind``, or None where this layer has none."""
        if kind == "rounding":
            if self.rounding_logits is None:
                self.enable_adaround()
            return self.rounding_logits
        if kind == "activation_scale":
            return self.log_activation_scale if self.spec.activation_type else None
        if kind == "weight_scale":
            return self.log_weight_scale
        return self.bias if kind == "bias" else self.weight

    def step_unit(self, kind: str) -> float:
        """What a learning rate is multiplied with: how far a parameter moves when integers move by one step.

        Adam moves every parameter by about the rate. In these units one rate serves all widths: a weight is measured in
        its mean step size, the logarithm of a scale in the steps that the end of its range moves by.
        """
        if kind == "weight":
            return float(self.log_weight_scale.detach().exp().mean()) * self.spec.weight_type.step
        if kind == "weight_scale":
            return self.spec.weight_type.step / self.spec.weight_type.qmax
        if kind == "activation_scale" and self.spec.activation_type:
            return self.activation_step_unit()
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self._linear(at_least_float32(self.conv.unfold(x) if self.conv else x)).to(x.dtype)
        return self.conv.fold(y, x) if self.conv else y

    def _linear(self, tokens: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, tokens)
        if not self.quantized:
            return F.linear(tokens, self.float_weight, self.float_bias)
        return F.linear(self.quantized_input(tokens), self.quantized_weight(), self.bias)

    def quantized_weight(self) -> Tensor:
        """(O, I), differentiable in the weight, its scales and the rounding logits."""
        grouped, scale, zero = self._grouped(self.weight), self._weight_scale(), self.weight_zero_point.view(-1, 1)
        if self.rounding_logits is None:
            return fake_quantize(grouped, scale, zero, self.spec.weight_type).view(self.weight.shape)
        qtype = self.spec.weight_type
        soft = torch.floor(grouped / scale) + rounding.rectified_sigmoid(self.rounding_logits) + zero
        return dequantize(soft.clamp(qtype.qmin, qtype.qmax), scale, zero).view(self.weight.shape)

    def quantized_input(self, tokens: Tensor) -> Tensor:
        qtype = self.spec.activation_type
        if qtype is None:
            return tokens
        if self.spec.static:
            return self.statically(tokens)
        scale = dynamic_scale(tokens, qtype, self.log_activation_scale.exp())
        return fake_quantize(tokens, scale, self.activation_zero_point[0], qtype)

    def _weight_scale(self) -> Tensor:
        factor = lsq_gradient_scale(self.weight.numel() // self.log_weight_scale.numel(), self.spec.weight_type)
        return scale_gradient(self.log_weight_scale, factor).exp().view(-1, 1)

    @torch.no_grad()
    def set_weight_scale(self, search: bool) -> None:
        """Scales of the weights as they were in full precision, see `core.numerics.search_scale`."""
        rows = self._grouped(self.float_weight)
        scale, zero = search_scale(rows, self.spec.weight_type, self.spec.symmetric, search)
        self.log_weight_scale.copy_(scale.view(-1, self.groups).log())
        self.weight_zero_point.copy_(zero.view(-1, self.groups))

    @torch.no_grad()
    def harden(self) -> QuantizedLayer:
        """The exported form: integers fixed, scales out of their logarithms."""
        layer = QuantizedLayer(
            self.spec, self.in_features, self.out_features, self.conv, self.clock, self.name, self.bias is not None
        ).to(self.weight.device)
        grouped, scale, zero = self._grouped(self.weight), self._weight_scale(), self.weight_zero_point.view(-1, 1)
        if self.rounding_logits is not None:
            up = rounding.rounds_up(self.rounding_logits)
            q = (torch.floor(grouped / scale) + up + zero).clamp(self.spec.weight_type.qmin, self.spec.weight_type.qmax)
        else:
            q = quantize(grouped, scale, zero, self.spec.weight_type)
        layer.weight.copy_(pack(q.view(self.weight.shape), self.spec.weight_type))
        layer.weight_scale.copy_(scale.view(-1, self.groups))
        if layer.weight_zero_point is not None:
            layer.weight_zero_point.copy_(self.weight_zero_point.to(torch.int8))
        if layer.activation_scale is not None:
            layer.activation_scale.copy_(self.log_activation_scale.exp())
        if layer.activation_zero_point is not None:
            layer.activation_zero_point.copy_(self.activation_zero_point.to(torch.int8))
        if self.bias is not None and layer.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


Trainable = TrainableLayer | TrainableInput


def trainable_layers(model: nn.Module) -> dict[str, Trainable]:
    """What is calibrated: layers, and inputs of attention's products."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Trainable)}


@contextmanager
def full_precision(layers: Collection[Trainable]) -> Iterator[None]:
    """These layers compute in full precision for as long as the block runs."""
    for layer in layers:
        layer.quantized = False
    try:
        yield
    finally:
        for layer in layers:
            layer.quantized = True


def quantize_model(
    model: nn.Module, specs: dict[str, LayerSpec], clock: StepClock, search: bool
) -> dict[str, Trainable]:
    """Replace the named modules in place by trainable ones with initial weight scales; the clock follows the model."""
    for name, spec in specs.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        model.set_submodule(name, TrainableLayer(module, spec, clock, name, search))
    keep_float32(model, specs)
    clock.attach(model)
    return trainable_layers(model)


# torchao's dynamic scale is max|x| / 127.5, half of the whole range; ours is clip ratio * max|x| / 127. A token's
# extreme so lies between two integers, and which of them -127.5 becomes depends on the last bit of the scale.
DYNAMIC_CLIP = 127 / 127.5


def adopt_dynamic_scales(layers: Iterable[Trainable]) -> None:
    """Have dynamic layers compute with torchao's scale, so that calibration sees the arithmetic of the export."""
    with torch.no_grad():
        for layer in layers:
            if layer.spec.activation != "float" and not layer.spec.static:
                layer.log_activation_scale.fill_(math.log(DYNAMIC_CLIP))
