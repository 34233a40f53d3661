"""Triton's kernels for a CUDA device: quantize a row in one pass, multiply with weights that stay packed, rescale.

The formula is that of `backend`, with d[o] = sum_i w[o, i] over the dequantized weights:

    y[m, o] = s_x[m] * (sum_g s_w[o, g] * sum_{i in g} q_x[m, i] * (q_w[o, i] - z_w[o, g])  -  z_x * d[o]) + bias[o].

The inner sum is exact: int8 times int8 in int32. Half types multiply the integers q_w - z_w, which they hold
exactly, and are summed in float32; so nothing is rounded before the scales here either.

Triton is an extra: only `cuda.triton_works`, which asks for it, imports this file. With TRITON_INTERPRET=1 the
same kernels run on CPU tensors, which is how they are tested where there is no GPU.

Shape legend: M rows, K inputs, O outputs, G groups.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accuquant.core.numerics import SMALLEST_SCALE
from accuquant.kernels.integers import SMALL_ROWS

ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)  # adding it leaves float32 no fraction: nearest, ties to even
FAR: tl.constexpr = tl.constexpr(2.0**20)  # beyond every integer, and small enough for the line above
TINY: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def quantize_rows_kernel(
    x, q, scale, zero, out_scale, columns,
    QMIN: tl.constexpr, QMAX: tl.constexpr, DYNAMIC: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its scale if dynamic, then clamp(round(x / scale) + zero). ``scale`` is then the clip ratio."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
    s = tl.load(scale)
    if DYNAMIC:
        # NaN as infinity: the maximum would leave it out, and the row would look healthy
        largest = tl.max(tl.where(value == value, tl.abs(value), float("inf")), 0)
        s = tl.maximum(largest * tl.div_rn(s, QMAX * 1.0), TINY)
        tl.store(out_scale + row, s)
    v = tl.minimum(tl.maximum(tl.div_rn(value, s), -FAR), FAR)
    v = (v + ROUND) - ROUND
    if HAS_ZERO:
        v += tl.load(zero).to(tl.float32)
    v = tl.minimum(tl.maximum(v, QMIN * 1.0), QMAX * 1.0)
    tl.store(q + row * columns + k, v.to(tl.int8), mask=k < columns)


@triton.jit
def stored_linear_kernel(
    x, w, w_scale, w_zero, w_sums, x_scale, x_zero, bias, y,
    rows, outputs, columns, groups, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, W_ZERO: tl.constexpr,
    X_SCALES: tl.constexpr, X_ZERO: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One (BM, BO) tile. STEP columns at a time, of a block of BK; GROUP 0 is one scale a row."""
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    # tiles in bands of BAND tiles, so that neighbours in time share weights in the L2 cache
    tiles_o = tl.cdiv(outputs, BO)
    first = tl.program_id(0) // (BAND * tiles_o) * BAND
    height = min(tl.cdiv(rows, BM) - first, BAND)
    inside_band = tl.program_id(0) % (BAND * tiles_o)
    start = (first + inside_band % height).to(tl.int64) * BM
    m, o = tl.arange(0, BM), inside_band // height * BO + tl.arange(0, BO)
    is_row, is_output = start + m < rows, o < outputs
    x += start * columns
    y += start * outputs

    lane, byte = tl.arange(0, BK), tl.arange(0, BK // 2)
    w_rows = w + o.to(tl.int64)[:, None] * row_bytes
    total = tl.zeros((BM, BO), tl.float32)
    acc = tl.zeros((BM, BO), SUM)
    for k0 in range(0, columns, STEP):
        k = k0 + lane
        is_column = (lane < STEP) & (k < columns)
        a = tl.load(x + m[:, None] * columns + k[None, :], mask=is_row[:, None] & is_column[None, :], other=0)
        if BITS == 8:
            b = tl.load(w_rows + k[None, :], mask=is_output[:, None] & is_column[None, :], other=0)
        else:  # two to a byte, low nibble first, eight higher
            column = k0 // 2 + byte
            pair = tl.load(w_rows + column[None, :], mask=is_output[:, None] & (column < row_bytes)[None, :], other=0)
            b = tl.interleave(pair & 15, pair >> 4).to(tl.int8) - 8
        g = k0 // GROUP if GROUP else 0
        if W_ZERO:
            z = tl.load(w_zero + o * groups + g, mask=is_output, other=0)
            if BITS == 4:
                b = b - z[:, None]
            elif not INTEGER:
                b = b.to(tl.int16) - z.to(tl.int16)[:, None]
        part = tl.dot(a, tl.trans(b.to(a.dtype)), out_dtype=SUM)
        if W_ZERO and INTEGER and BITS == 8:  # the difference does not fit eight bits
            part -= tl.sum(a.to(tl.int32), 1)[:, None] * z.to(tl.int32)[None, :]
        if GROUP:
            s = tl.load(w_scale + o * groups + g, mask=is_output, other=0.0)
            total += part.to(tl.float32) * s[None, :]
        else:
            acc += part
    if not GROUP:
        total = acc.to(tl.float32) * tl.load(w_scale + o, mask=is_output, other=0.0)[None, :]
    _finish(total, w_sums, x_scale, x_zero, bias, y, start, rows, m, o, outputs, X_SCALES, X_ZERO, BIAS)


@triton.jit
def _finish(
    total, w_sums, x_scale, x_zero, bias, y, start, rows, m, o, outputs,
    X_SCALES: tl.constexpr, X_ZERO: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The formula outside its sum over groups, and the store; ``y`` begins at row ``start``."""
    is_row, is_output = start + m < rows, o < outputs
    if X_ZERO:
        total -= tl.load(x_zero).to(tl.float32) * tl.load(w_sums + o, mask=is_output, other=0.0)[None, :]
    if X_SCALES == 1:
        total *= tl.load(x_scale)
    elif X_SCALES == 2:
        total *= tl.load(x_scale + start + m, mask=is_row, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + o, mask=is_output, other=0.0).to(tl.float32)[None, :]
    where = m[:, None] * outputs + o[None, :]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def rescale_kernel(
    acc, w_scale, w_sums, x_scale, x_zero, bias, y, rows, outputs,
    X_SCALES: tl.constexpr, X_ZERO: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """What `stored_linear_kernel` does after its loop, on the int32 sums of another product."""
    start = tl.program_id(0).to(tl.int64) * BM
    m, o = tl.arange(0, BM), tl.program_id(1) * BO + tl.arange(0, BO)
    mask = (start + m < rows)[:, None] & (o < outputs)[None, :]
    sums = tl.load(acc + start * outputs + m[:, None] * outputs + o[None, :], mask=mask, other=0)
    total = sums.to(tl.float32) * tl.load(w_scale + o, mask=o < outputs, other=0.0)[None, :]
    _finish(
        total, w_sums, x_scale, x_zero, bias, y + start * outputs, start, rows, m, o, outputs, X_SCALES, X_ZERO, BIAS
    )


def tile(rows: int, integer: bool) -> dict[str, int]:
    """Sizes of a tile. Up to 96 kB of shared memory, which every device of `cuda.CAPABILITY` has."""
    if rows <= SMALL_ROWS:  # the weights are read once, and that is all there is to it: many short programs
        return {"BM": SMALL_ROWS, "BO": 32, "BK": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"BM": 64, "BO": 64, "BK": 128 if integer else 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BO": 128, "BK": 128 if integer else 64, "num_warps": 8, "num_stages": 3}


# ---- operators: one opaque call each, so that torch.compile keeps one graph

_LIBRARY = torch.library.Library("accuquant", "FRAGMENT")
_REST = "Tensor? x_scale, Tensor? x_zero, Tensor? bias, ScalarType dtype) -> Tensor"
_LIBRARY.define("quantize_static(Tensor x, Tensor scale, Tensor? zero, int qmin, int qmax) -> Tensor")
_LIBRARY.define("quantize_dynamic(Tensor x, Tensor clip_ratio, int qmin, int qmax) -> (Tensor, Tensor)")
_LIBRARY.define(
    "stored_linear(Tensor x, Tensor weight, int bits, Tensor w_scale, Tensor? w_zero, Tensor? w_sums, " + _REST
)
_LIBRARY.define("rescale(Tensor acc, Tensor w_scale, Tensor? w_sums, " + _REST)


def _quantized(
    x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int, dynamic: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    x, q = x.contiguous(), torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    out_scale = scale.new_empty(rows if dynamic else 0, 1)
    if rows:
        block = triton.next_power_of_2(columns)
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(rows,)](
                x, q, scale, zero, out_scale, columns,
                QMIN=qmin, QMAX=qmax, DYNAMIC=dynamic, HAS_ZERO=zero is not None, BLOCK=block,
                num_warps=min(16, max(1, block // 512)),
            )  # fmt: skip
    return q, out_scale


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """(M, K) -> (M, K) int8 with one scale (1,) float32 and zero point (1,), as `numerics.quantize` does."""
    return _quantized(x, scale, zero, qmin, qmax, dynamic=False)[0]


def quantize_dynamic(x: Tensor, clip_ratio: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """(M, K) -> (M, K) int8 and (M, 1) float32, as `numerics.quantize` with `numerics.dynamic_scale` does."""
    return _quantized(x, clip_ratio, None, qmin, qmax, dynamic=True)


def stored_linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_sums: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula above: (M, K) -> (M, O) in ``dtype``.

    Args:
        x: (M, K) int8, or float16 or bfloat16 that is not quantized.
        x_scale: (M, 1), (1,) or None for 1; x_zero: (1,) int8 or None.
        weight: (O, packed columns) of `packing`, 4 or 8 ``bits``; w_scale: (O, G) float32; w_zero: (O, G) int8 or None.
        w_sums: (O,) float32, d of the formula; needed where there is an x_zero.
    """
    if x.dtype not in (torch.int8, torch.float16, torch.bfloat16):
        raise TypeError(f"no tensor core multiplies {x.dtype}")
    (rows, columns), (outputs, groups) = x.shape, w_scale.shape
    y = x.new_empty(rows, outputs, dtype=dtype)
    if not rows:
        return y
    sizes = tile(rows, x.dtype == torch.int8)
    size, step = columns // groups, sizes["BK"]
    if groups > 1:
        step = min(step, size & -size)  # the greatest power of two in it: a step never leaves its group
        sizes["BK"] = max(32, step)
    count = triton.cdiv(rows, sizes["BM"]) * triton.cdiv(outputs, sizes["BO"])
    with torch.cuda.device_of(x):
        stored_linear_kernel[(count,)](
            x.contiguous(), weight, w_scale, w_zero, w_sums, x_scale, x_zero, bias, y,
            rows, outputs, columns, groups, weight.shape[1],
            BITS=bits, GROUP=size if groups > 1 else 0, STEP=step, W_ZERO=w_zero is not None,
            X_SCALES=scale_kind(x_scale), X_ZERO=x_zero is not None, BIAS=bias is not None, BAND=8, **sizes,
        )  # fmt: skip
    return y


def rescale(
    acc: Tensor,
    w_scale: Tensor,
    w_sums: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(M, O) int32 sums of q_x * q_w -> (M, O) in ``dtype``, for weights with one scale a row; the rest as above."""
    rows, outputs = acc.shape
    y = torch.empty_like(acc, dtype=dtype, memory_format=torch.contiguous_format)
    if not rows:
        return y
    with torch.cuda.device_of(acc):
        rescale_kernel[(triton.cdiv(rows, 16), triton.cdiv(outputs, 128))](
            acc.contiguous(), w_scale, w_sums, x_scale, x_zero, bias, y, rows, outputs,
            X_SCALES=scale_kind(x_scale), X_ZERO=x_zero is not None, BIAS=bias is not None, BM=16, BO=128,
        )  # fmt: skip
    return y


def scale_kind(x_scale: Tensor | None) -> int:
    return 0 if x_scale is None else x_scale.dim()


for _device in ("CUDA", "CPU"):  # CPU: the interpreter
    for _operator in (quantize_static, quantize_dynamic, stored_linear, rescale):
        _LIBRARY.impl(_operator.__name__, _operator, _device)


@functools.partial(torch.library.register_fake, "accuquant::quantize_static", lib=_LIBRARY)
def _(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@functools.partial(torch.library.register_fake, "accuquant::quantize_dynamic", lib=_LIBRARY)
def _(x: Tensor, clip_ratio: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), clip_ratio.new_empty(x.shape[0], 1)


@functools.partial(torch.library.register_fake, "accuquant::stored_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=rest[-1])


@functools.partial(torch.library.register_fake, "accuquant::rescale", lib=_LIBRARY)
def _(acc: Tensor, *rest: Any) -> Tensor:
    return acc.new_empty(acc.shape, dtype=rest[-1])
