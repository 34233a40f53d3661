"""The quantized layer that is exported and loaded: packed integers and scales."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.core import kernels
from accuquant.core.numerics import dequantize, dynamic_scale, quantize
from accuquant.core.packing import packed_columns, unpack
from accuquant.model.clock import StepClock
from accuquant.model.spec import Conv, Layer, LayerSpec

Arithmetic = Literal["integer", "reference"]


class QuantizedLayer(Layer):
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


def _fixed(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


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
