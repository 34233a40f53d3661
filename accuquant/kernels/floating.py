"""Products of floats with dequantized weights: `float`, and the reference that the others are compared with.

`weight_only_linear` multiplies few rows of floats with int8 weights, which are never all floats at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accuquant.core.numerics import at_least_float32, dequantize
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, dequantized, quantized

FEW_ROWS = 64  # of floats: more make up for weights that are written out as floats
FEW_ROWS_HALF = 8
WEIGHT_BLOCK = 512  # rows of weights that stay in the cache as floats

_LIBRARY = torch.library.Library("accuquant", "FRAGMENT")
_LIBRARY.define("weight_only_linear(Tensor x, Tensor qw, Tensor w_scale, Tensor? bias) -> Tensor")


class Reference(Backend):
    """Every layer, at least in float32: what calibration computes."""

    name = "reference"
    shares = False  # floats are four times as large

    def refusal(self, facts: Facts) -> str:
        return ""

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        x = at_least_float32(x)
        if facts.activation is None:
            return Operand(x)
        q, scale, zero = quantized(x, grid, facts)
        return Operand(dequantize(q, scale, 0 if zero is None else zero))

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        return float_linear(x.q, weights, facts, x.q.dtype)


class Float(Backend):
    """Every layer: on a CUDA device in the input's type, as the layer did that was replaced; on a CPU in float32."""

    name = "float"
    shares = False

    def refusal(self, facts: Facts) -> str:
        return ""

    def copies(self, facts: Facts) -> bool:
        return rows_weigh(facts)

    def lay_out(self, weights: Weights, facts: Facts) -> Weights:
        """The product of few rows wants whole cache lines; mapped files begin anywhere."""
        unaligned = rows_weigh(facts) and weights.q.data_ptr() % 64
        return weights._replace(q=weights.q.clone()) if unaligned else weights

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        return Operand(x) if facts.activation is None else REFERENCE.operand(x, grid, facts)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        if _weight_only(x.q, facts):
            rows = x.q.reshape(-1, facts.inputs)
            return weight_only_linear(rows, weights.q, weights.scale.view(-1), weights.bias)
        q = at_least_float32(x.q)
        return float_linear(q, weights, facts, dtype if q.is_cuda else q.dtype)


REFERENCE = Reference()


def float_linear(x: Tensor, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
    """(..., I) -> (..., O), computed in ``dtype``."""
    weight, bias = dequantized(weights, facts), weights.bias
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def rows_weigh(facts: Facts) -> bool:
    """Whether weights alone are integers, of a CPU, with a scale a row."""
    plain = facts.activation is None and facts.symmetric and facts.groups == 1
    return plain and facts.weight.storage == torch.int8 and facts.device.type == "cpu"


def _weight_only(x: Tensor, facts: Facts) -> bool:
    """Whether a few rows of floats meet int8 weights with a scale a row: adaLN, which sees one row a sample."""
    few = x.numel() <= FEW_ROWS * facts.inputs and x.dtype in (torch.float32, torch.bfloat16)
    return few and rows_weigh(facts) and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def weight_only_linear(x: Tensor, qw: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) float times (O, K) int8 -> (M, O) in x's type: w_scale * (x @ qw.T) + bias, on a CPU, without a gradient.

    Args:
        x: few rows of float32, or of bfloat16, whose product is rounded before it is scaled; w_scale: (O,) float32.
    """
    y: Tensor = torch.ops.accuquant.weight_only_linear(x, qw, w_scale, bias)
    return y


def _weight_only_linear(x: Tensor, qw: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    # torch's own product is for bfloat16; with odd shapes or addresses it reads where nothing is
    aligned = qw.shape[0] % 32 == qw.shape[1] % 32 == qw.data_ptr() % 64 == x.data_ptr() % 64 == 0
    if x.dtype == torch.bfloat16 and aligned and 0 < x.shape[0] <= FEW_ROWS_HALF:
        y = torch._weight_int8pack_mm(x, qw, w_scale.new_ones(w_scale.shape, dtype=x.dtype)).float()
    else:
        columns = x.float().t().contiguous()
        y = w_scale.new_empty(qw.shape[0], x.shape[0])
        for start in range(0, qw.shape[0], WEIGHT_BLOCK):
            block = slice(start, start + WEIGHT_BLOCK)
            torch.mm(qw[block].float(), columns, out=y[block])
        y = y.t()
    y = y * w_scale
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def _weight_only_linear_shape(x: Tensor, qw: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], qw.shape[0])


_LIBRARY.impl("weight_only_linear", _weight_only_linear, "CPU")
torch.library.register_fake("accuquant::weight_only_linear", _weight_only_linear_shape, lib=_LIBRARY)
