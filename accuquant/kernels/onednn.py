"""oneDNN's integer product on weights that are laid out for it: `onednn`.

Symmetric int8 weights with one scale a row, on CPUs where it gives the exact integers (`packed_works`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.kernels import thresholds
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, quantized
from accuquant.kernels.integers import row_blocks

TOKEN_BLOCK = 256  # rows at least of which the float result stays in the cache until it is scaled,
TOKEN_BYTES = 1 << 19  # and more of narrow ones

_LIBRARY = torch.library.Library("accuquant", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor u, Tensor scale, Tensor zero, Tensor packed, Tensor w_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor"
)


class Packed(nn.Parameter):
    """A weight in oneDNN's layout, which no other device knows: offloading takes the file's away and brings it back."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        return super().__new__(cls if data.is_mkldnn else nn.Parameter, data, requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return unpack(self).to(*args, **kwargs)


class OneDNN(Backend):
    """int8 times int8 on a CPU; the weight is in a layout of its own, (I, O)."""

    name = "onednn"

    def refusal(self, facts: Facts) -> str:
        if not facts.integers:
            return "no integers to multiply"
        if not facts.plain:
            return "weights that are not int8 with one scale a row and no zero points"
        if facts.device.type == "cuda":
            return "a CUDA device"
        return "" if packed_works() else "a CPU on which this product is not there or not exact"

    def pays(self, facts: Facts) -> bool:
        return thresholds.pays(self.name, facts)

    def copies(self, facts: Facts) -> bool:
        return True

    def holds(self, q: Tensor, x: Tensor) -> bool:
        return isinstance(q, Packed) and x.device.type == "cpu"

    def lay_out(self, weights: Weights, facts: Facts) -> Weights:
        return weights._replace(q=Packed(prepack(weights.q)))

    def stored(self, q: Tensor) -> Tensor:
        return unpack(q) if q.is_mkldnn else q

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        q, scale, zero = quantized(x.reshape(-1, facts.inputs), grid, facts)
        shift = torch.full((1,), 128, dtype=torch.int32, device=x.device)
        return Operand(unsigned(q), scale.float(), shift if zero is None else shift + zero)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None and x.zero is not None
        out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return packed_linear(x.q, x.scale, x.zero, weights.q, weights.scale.view(-1), weights.bias, out)


def unsigned(q: Tensor) -> Tensor:
    """Integers in [-128, 127], of any type -> uint8, 128 higher: the only activations oneDNN is fast with."""
    if torch.compiler.is_compiling():
        return (q + 128).to(torch.uint8)
    return q.to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # by far the fastest without a compiler


def prepack(qw: Tensor) -> Tensor:
    """(O, K) int8 -> (K, O) in oneDNN's own layout, in as many bytes."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(qw, None)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `prepack`."""
    return packed.to_dense().t().contiguous()


def packed_linear(
    u: Tensor,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(M, O) in ``dtype``: scale * w_scale * ((u - zero) @ packed) + bias.

    Args:
        u: (M, K) uint8; scale: (1,) or (M, 1) float32; zero: (1,) int32; packed: of `prepack`; w_scale: (O,) float32.
    """
    out: Tensor = torch.ops.accuquant.packed_linear(u, scale, zero, packed, w_scale, bias, dtype)
    return out


def _packed_linear(
    u: Tensor, scale: Tensor, zero: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    w_zero, one = torch.zeros_like(w_scale, dtype=torch.int32), w_scale.new_ones(1)  # whatever the default device is
    per_token = scale.dim() == 2

    def compute(block: Tensor, scale: Tensor) -> Tensor:
        fused = (one, None, torch.float32) if per_token else (scale, bias, dtype)  # oneDNN takes one scale
        y: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
            block, fused[0], zero, packed, w_scale, w_zero, fused[1], 1.0, 0, fused[2], "none", [], ""
        )
        if per_token:
            y = y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale)
        return y

    if not u.shape[0]:
        return w_scale.new_empty(0, w_scale.shape[0], dtype=dtype)
    outputs = w_scale.shape[0]
    rows = max(TOKEN_BLOCK, TOKEN_BYTES // (4 * outputs)) if per_token else row_blocks(u, outputs)
    if rows >= u.shape[0]:
        return compute(u, scale).to(dtype)
    out = w_scale.new_empty(u.shape[0], w_scale.shape[0], dtype=dtype)
    for k, block in enumerate(u.split(rows)):
        out[k * rows : (k + 1) * rows] = compute(block, scale[k * rows : (k + 1) * rows] if per_token else scale)
    return out


def _packed_linear_shape(
    u: Tensor, scale: Tensor, zero: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return w_scale.new_empty(u.shape[0], w_scale.shape[0], dtype=dtype)


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
_LIBRARY.impl("packed_linear", _packed_linear, "MkldnnCPU")
torch.library.register_fake("accuquant::packed_linear", _packed_linear_shape, lib=_LIBRARY)


@functools.cache
def packed_works() -> bool:
    """Whether oneDNN's product exists here and its integers are exact, at the ends of their range too.

    CPUs without VNNI add products of pairs in 16 bits, which saturates.
    """
    if not (hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return False
    try:
        with torch.device("cpu"):  # models are also built with another default device
            return _packed_is_exact()
    except (RuntimeError, NotImplementedError):
        return False


def _packed_is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, outputs in ((1, 1, 1), (1, 64, 48), (5, 37, 19), (64, 256, 64)):
        qw = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8, generator=generator)
        u = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
        qw[0], u[0] = -128, 255
        w_scale = torch.full((outputs,), 1 / 64)  # powers of two: the expected floats are exact
        bias = torch.arange(outputs, dtype=torch.float32)
        for zero in (0, 128, 255):
            exact = (u.double() - zero) @ qw.double().t() / 128 + bias.double()
            packed = prepack(qw)
            arguments = (u, torch.tensor([0.5]), torch.tensor([zero], dtype=torch.int32), packed, w_scale, bias)
            same = torch.equal(packed_linear(*arguments).double(), exact)
            half = packed_linear(*arguments, torch.bfloat16)
            if not (same and torch.equal(half, exact.to(torch.bfloat16)) and torch.equal(unpack(packed), qw)):
                return False
    return True
