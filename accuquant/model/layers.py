"""Quantized Linear and Conv2d.

`TrainableLayer` is what calibration works on: float weights, learned scales, everything differentiable.
`QuantizedLayer` is what is exported and loaded: packed integers and scales. `TrainableLayer.harden` turns the one into
the other, and both compute the same function (`torch.equal` with the reference arithmetic).

A Conv2d is a Linear over its unfolded patches: weights are kept as (O, I) with I = in_channels * kh * kw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.core import kernels, rounding
from accuquant.core.numerics import (
    QTYPES,
    QType,
    dequantize,
    dynamic_scale,
    fake_quantize,
    lsq_gradient_scale,
    quantize,
    search_scale,
)
from accuquant.core.packing import pack, packed_columns, unpack
from accuquant.model.clock import StepClock

Arithmetic = Literal["integer", "reference"]


@dataclass(frozen=True)
class LayerSpec:
    """What one module is quantized to; stored per module in the export's config.json."""

    weight: str
    activation: str = "float"
    group_size: int | None = None
    symmetric: bool = True
    activation_scale: str = "static"
    activation_symmetric: bool = False

    def __post_init__(self) -> None:
        for name in (self.weight, *([] if self.activation == "float" else [self.activation])):
            if name not in QTYPES:
                raise ValueError(f"unknown type {name!r}; known types: {', '.join(QTYPES)}")
        if self.activation_scale not in ("static", "dynamic"):
            raise ValueError(f"activation_scale must be 'static' or 'dynamic', found {self.activation_scale!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, found {self.group_size}")

    @property
    def weight_type(self) -> QType:
        return QTYPES[self.weight]

    @property
    def activation_type(self) -> QType | None:
        return QTYPES.get(self.activation)

    @property
    def static(self) -> bool:
        return self.activation != "float" and self.activation_scale == "static"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def num_groups(self, columns: int, name: str = "module") -> int:
        """Weight scales per row.

        Raises:
            ValueError: the group size does not divide the row.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            fits = [s for s in (128, 64, 32, 16, 8) if columns % s == 0]
            raise ValueError(
                f"group_size {self.group_size} does not divide the {columns} inputs of {name}; would fit: {fits}"
            )
        return columns // self.group_size


@dataclass(frozen=True)
class Conv:
    """Geometry of a Conv2d."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Conv | None:
        if not isinstance(module, nn.Conv2d):
            return None
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError(f"{name}: grouped or specially padded convolutions stay float; give them weight: float")
        pairs = (module.kernel_size, module.stride, module.padding, module.dilation)
        return cls(*((int(a), int(b)) for a, b in pairs))

    def unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, C * kh * kw), L output positions."""
        return F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride).transpose(1, 2)

    def fold(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, L, O) -> (B, O, H', W')."""
        height = (x.shape[2] + 2 * self.padding[0] - self.dilation[0] * (self.kernel_size[0] - 1) - 1) // self.stride[
            0
        ] + 1
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], height, -1)


class _Layer(nn.Module):
    """What both kinds share: the spec, the geometry, the clock, and the way from input to rows and back."""

    def __init__(
        self, spec: LayerSpec, columns: int, rows: int, conv: Conv | None, clock: StepClock, name: str
    ) -> None:
        super().__init__()
        self.spec, self.conv, self.clock, self.name = spec, conv, clock, name
        self.in_features, self.out_features = columns, rows
        self.groups = spec.num_groups(columns, name)

    def forward(self, x: Tensor) -> Tensor:
        tokens = _at_least_float32(self.conv.unfold(x) if self.conv else x)
        y = self.linear(tokens).to(x.dtype)
        return self.conv.fold(y, x) if self.conv else y

    def linear(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.spec.weight}, activation={self.spec.activation}"


class TrainableLayer(_Layer):
    """Fake-quantized layer with learnable weights, weight scales, activation scales, rounding and bias.

    Scales are parametrised by their logarithm. ``log_activation_scale`` is (timestep groups,) for static scales and
    (1,), the logarithm of the clip ratio on max|x|, for dynamic ones. ``observer``, when set, receives each call's
    tokens.
    """

    def __init__(
        self, module: nn.Linear | nn.Conv2d, spec: LayerSpec, clock: StepClock, name: str, search: bool
    ) -> None:
        weight = _at_least_float32(module.weight.detach()).flatten(1)
        super().__init__(spec, weight.shape[1], weight.shape[0], Conv.of(module, name), clock, name)
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("float_weight", weight, persistent=False)  # calibration changes `weight` and `bias`
        float_bias = None if module.bias is None else _at_least_float32(module.bias.detach())
        self.register_buffer("float_bias", float_bias, persistent=False)
        self.bias = None if module.bias is None else nn.Parameter(_at_least_float32(module.bias.detach()).clone())
        scale, zero = search_scale(self._grouped(weight), spec.weight_type, spec.symmetric, search)
        self.log_weight_scale = nn.Parameter(scale.view(-1, self.groups).log())
        self.register_buffer("weight_zero_point", zero.view(-1, self.groups))
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
            return float(self.log_weight_scale.detach().exp().mean())
        if kind == "weight_scale":
            return 1 / self.spec.weight_type.qmax
        if kind == "activation_scale" and self.spec.activation_type:
            return 1 / self.spec.activation_type.qmax
        return 1.0

    def linear(self, tokens: Tensor) -> Tensor:
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
            factor = lsq_gradient_scale(tokens.numel(), qtype)
            log_scale = _scale_gradient(self.log_activation_scale, factor)[self.clock.group]
            return fake_quantize(tokens, log_scale.exp(), self.activation_zero_point[self.clock.group], qtype)
        scale = dynamic_scale(tokens, qtype, self.log_activation_scale.exp())
        return fake_quantize(tokens, scale, self.activation_zero_point[0], qtype)

    def _weight_scale(self) -> Tensor:
        factor = lsq_gradient_scale(self.weight.numel() // self.log_weight_scale.numel(), self.spec.weight_type)
        return _scale_gradient(self.log_weight_scale, factor).exp().view(-1, 1)

    @torch.no_grad()
    def set_activation_scale(self, samples: list[Tensor], search: bool) -> None:
        """Static scales from observed values, one 1-d tensor per timestep group."""
        qtype = self.spec.activation_type
        assert qtype is not None and self.spec.static
        for group, values in enumerate(samples):
            scale, zero = search_scale(values.view(1, -1), qtype, self.spec.activation_symmetric, search)
            self.log_activation_scale[group] = scale[0, 0].log()
            self.activation_zero_point[group] = zero[0, 0]

    @torch.no_grad()
    def harden(self) -> QuantizedLayer:
        """The exported form: integers fixed, scales out of their logarithms."""
        layer = QuantizedLayer(
            self.spec, self.in_features, self.out_features, self.conv, self.clock, self.name, self.bias is not None
        ).to(self.weight.device)
        grouped, scale, zero = self._grouped(self.weight), self._weight_scale(), self.weight_zero_point.view(-1, 1)
        if self.rounding_logits is not None:
            up = rounding.rectified_sigmoid(self.rounding_logits) >= 0.5
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


class QuantizedLayer(_Layer):
    """Packed integers with their scales; computes in integers, or in float on the dequantized values.

    Tensors, as they stand in the safetensors file: ``weight`` (O, packed columns), ``weight_scale`` (O, G) float32,
    ``weight_zero_point`` (O, G) int8 where asymmetric, ``activation_scale`` (timestep groups,) or (1,) float32,
    ``activation_zero_point`` (timestep groups,) int8 where static and asymmetric, ``bias`` (O,).
    """

    def __init__(
        self, spec: LayerSpec, columns: int, rows: int, conv: Conv | None, clock: StepClock, name: str, bias: bool
    ) -> None:
        super().__init__(spec, columns, rows, conv, clock, name)
        storage = torch.int8 if spec.weight_type.bits == 8 else torch.uint8
        num_scales = clock.num_groups if spec.static else 1
        asymmetric = spec.static and not spec.activation_symmetric
        self.weight = _fixed(rows, packed_columns(columns, spec.weight_type), dtype=storage)
        self.weight_scale = _fixed(rows, self.groups)
        self.weight_zero_point = None if spec.symmetric else _fixed(rows, self.groups, dtype=torch.int8)
        self.activation_scale = _fixed(num_scales) if spec.activation != "float" else None
        self.activation_zero_point = _fixed(num_scales, dtype=torch.int8) if asymmetric else None
        self.bias = _fixed(rows) if bias else None
        self.arithmetic: Arithmetic = "integer"

    def linear(self, tokens: Tensor) -> Tensor:
        if self.arithmetic == "integer" and self.activation_scale is not None:
            y = self._integer(tokens)
            return y if self.bias is None else y + self.bias
        return F.linear(self._reference_input(tokens), self.dequantized_weight(), self._float_bias())

    def integer_weight(self) -> Tensor:
        """(O, I) int8."""
        return unpack(self.weight, self.in_features, self.spec.weight_type)

    def dequantized_weight(self) -> Tensor:
        """(O, I) float32."""
        q = self.integer_weight().reshape(self.out_features * self.groups, -1).float()
        zero: Tensor | int = 0 if self.weight_zero_point is None else self.weight_zero_point.view(-1, 1).float()
        return dequantize(q, self.weight_scale.view(-1, 1), zero).view(self.out_features, -1)

    def _float_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def _input_grid(self, tokens: Tensor) -> tuple[Tensor, int]:
        assert self.activation_scale is not None and self.spec.activation_type is not None
        if not self.spec.static:
            return dynamic_scale(tokens, self.spec.activation_type, self.activation_scale), 0
        group = self.clock.group
        zero = 0 if self.activation_zero_point is None else int(self.activation_zero_point[group])
        return self.activation_scale[group], zero

    def _reference_input(self, tokens: Tensor) -> Tensor:
        if self.spec.activation_type is None:
            return tokens
        scale, zero = self._input_grid(tokens)
        return dequantize(quantize(tokens, scale, zero, self.spec.activation_type), scale, zero)

    def _integer(self, tokens: Tensor) -> Tensor:
        assert self.spec.activation_type is not None
        scale, zero = self._input_grid(tokens)
        q = quantize(tokens, scale, zero, self.spec.activation_type).to(torch.int8).reshape(-1, self.in_features)
        flat_scale = scale if self.spec.static else scale.reshape(-1, 1)
        y = kernels.integer_linear(
            q, flat_scale, zero, self.integer_weight(), self.weight_scale, self.weight_zero_point
        )
        return y.view(*tokens.shape[:-1], self.out_features)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _fixed(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


def trainable_layers(model: nn.Module) -> dict[str, TrainableLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TrainableLayer)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantize_model(
    model: nn.Module, specs: dict[str, LayerSpec], clock: StepClock, search: bool
) -> dict[str, TrainableLayer]:
    """Replace the named modules in place by trainable ones with initial weight scales; the clock follows the model."""
    for name, spec in specs.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        model.set_submodule(name, TrainableLayer(module, spec, clock, name, search))
    keep_float32(model, specs)
    clock.attach(model)
    return trainable_layers(model)


def keep_float32(model: Any, names: Iterable[str]) -> None:
    """Tell diffusers that these modules' float tensors do not speak for the model's dtype: scales stay float32."""
    model._keep_in_fp32_modules = [*(getattr(model, "_keep_in_fp32_modules", None) or []), *names]


def set_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Choose how a quantized model computes: ``integer`` (default) or ``reference`` (float on dequantized values).

    Raises:
        ValueError: unknown name, or the model has no quantized layer.
    """
    if arithmetic not in ("integer", "reference"):
        raise ValueError(f"arithmetic must be 'integer' or 'reference', found {arithmetic!r}")
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer quantized by accuquant")
    for layer in layers.values():
        layer.arithmetic = arithmetic
