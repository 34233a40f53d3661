"""Integer matrix products with plain torch, exact in int32.

The inner sum of the formula in `backend` is expanded into one integer product and two integer corrections, so nothing
is rounded before the scales.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK_ROWS = 512
FLOAT_COLUMNS = 1 << 10  # products of int8 are at most 2^14: so many of them add up exactly in float32
SMALL_ROWS = 16  # cuBLAS' integer product wants more
CACHE_BYTES = 1 << 24  # results larger than this are computed and scaled by blocks of rows


def row_blocks(a: Tensor, outputs: int) -> int:
    """How many of the rows of ``a`` to compute at a time."""
    return a.shape[0] if a.is_cuda or 4 * a.shape[0] * outputs <= CACHE_BYTES else BLOCK_ROWS


def integer_product(a: Tensor, b: Tensor, bits: int = 8) -> Tensor:
    """(M, K) int8 times (O, K) int8, of so many ``bits``, -> (M, O) int32, exact.

    cuBLAS wants more than 16 rows and multiples of eight; smaller operands are padded with zeros there.
    """
    if a.device.type != "cuda":
        if a.shape[1] == 1:  # torch 2.13 leaves the result unwritten
            return a.to(torch.int32) * b.t().to(torch.int32)
        exact = bits < 8 or int_mm_is_exact()  # pairs of products with fewer bits fit into 16
        return torch._int_mm(a.contiguous(), b.t()) if exact else _float_product(a, b)
    rows, columns, outputs = a.shape[0], a.shape[1], b.shape[0]
    pad_m, pad_k, pad_o = max(0, SMALL_ROWS + 1 - rows), -columns % 8, -outputs % 8
    if pad_m or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
    if pad_k or pad_o:
        b = torch.nn.functional.pad(b, (0, pad_k, 0, pad_o))
    return torch._int_mm(a.contiguous(), b.t())[:rows, :outputs]


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for u, v in zip(a.split(FLOAT_COLUMNS, 1), b.split(FLOAT_COLUMNS, 1), strict=True):
        total += (u.float() @ v.float().t()).to(torch.int32)
    return total


def int_mm_is_exact() -> bool:
    """Whether torch's product of int8 is exact on this CPU, at the ends of the range too.

    CPUs without VNNI add products of pairs in 16 bits, which saturates; torch 2.13 uses them all the same.
    """
    return check_int_mm()


torch.compiler.assume_constant_result(int_mm_is_exact)  # a compiler asks, and does not look inside


@functools.cache
def check_int_mm() -> bool:
    """The check itself, made once."""
    with torch.device("cpu"):  # models are also built with another default device
        for rows, columns, outputs in ((1, 64, 48), (5, 37, 19), (64, 256, 64)):
            for x, w in ((-128, -128), (127, -128), (127, 127)):
                a = torch.full((rows, columns), x, dtype=torch.int8)
                b = torch.full((outputs, columns), w, dtype=torch.int8)
                if not bool((torch._int_mm(a, b.t()) == columns * x * w).all()):
                    return False
    return True


def integer_linear(
    qx: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    qw: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_sums: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """The formula above without bias.

    Args:
        qx: (M, K) int8 activations; x_scale: (M, 1), (1,) or () float; x_zero: (1,) their zero point, None for 0.
        qw: (O, K) int8 weights; w_scale: (O, G) float32; w_zero: (O, G) integers, or None for symmetric weights.
        w_sums: `weight_sums` of qw, where they are known.
        bits: of the weights' integers.

    Returns:
        (M, O) float32.
    """
    rows = row_blocks(qx, qw.shape[0])
    if x_zero is not None and w_sums is None:
        w_sums = weight_sums(qw, w_scale.shape[1])
    if rows == qx.shape[0]:
        return _block(qx, x_scale, x_zero, qw, w_scale, w_zero, w_sums, bits)
    parts = []
    for start in range(0, qx.shape[0], rows):
        scale = x_scale[start : start + rows] if x_scale.dim() == 2 else x_scale
        parts.append(_block(qx[start : start + rows], scale, x_zero, qw, w_scale, w_zero, w_sums, bits))
    return torch.cat(parts)


def _block(
    qx: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    qw: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_sums: Tensor | None,
    bits: int,
) -> Tensor:
    groups = w_scale.shape[1]
    size = -(-qw.shape[1] // groups)
    total: Tensor | None = None
    for g in range(groups):
        a, b = qx[:, g * size : (g + 1) * size], qw[:, g * size : (g + 1) * size]
        acc = integer_product(a, b, bits)
        if x_zero is not None and w_sums is not None:
            acc = acc - x_zero.to(torch.int32) * w_sums[:, g]
        if w_zero is not None:
            row_sums = a.sum(1, keepdim=True, dtype=torch.int32)
            if x_zero is not None:
                row_sums = row_sums - x_zero.to(torch.int32) * a.shape[1]
            acc = acc - row_sums * w_zero[:, g].to(torch.int32)
        part = acc * w_scale[:, g]
        total = part if total is None else total + part
    assert total is not None
    return total * x_scale


def weight_sums(qw: Tensor, groups: int) -> Tensor:
    """(O, K) int8 -> (O, G) int32, the sum of each group."""
    return torch.stack([part.sum(1, dtype=torch.int32) for part in qw.split(-(-qw.shape[1] // groups), 1)], 1)
