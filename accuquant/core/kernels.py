"""Integer matrix products, exact in int32, and the float products they stand for.

With q the stored integers, z zero points and s scales, a linear layer is

    y[b, o] = s_x[b] * sum_g s_w[o, g] * sum_{i in g} (q_x[b, i] - z_x) * (q_w[o, i] - z_w[o, g])  + bias[o].

The inner sum is expanded into one integer product and two integer corrections, so nothing is rounded before the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 times (O, K) int8 -> (M, O) int32, exact.

    CUDA's kernel wants more than 16 rows and multiples of eight; smaller operands are padded with zeros there.
    """
    if a.device.type != "cuda":
        if a.shape[1] == 1:  # torch 2.13 leaves the result unwritten
            return a.to(torch.int32) * b.t().to(torch.int32)
        return torch._int_mm(a.contiguous(), b.t())
    rows, columns, outputs = a.shape[0], a.shape[1], b.shape[0]
    pad_m, pad_k, pad_o = max(0, 17 - rows), -columns % 8, -outputs % 8
    if pad_m or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
    if pad_k or pad_o:
        b = torch.nn.functional.pad(b, (0, pad_k, 0, pad_o))
    return torch._int_mm(a.contiguous(), b.t())[:rows, :outputs]


def integer_linear(
    qx: Tensor,
    x_scale: Tensor,
    x_zero: int,
    qw: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
) -> Tensor:
    """The formula above without bias.

    Args:
        qx: (M, K) int8 activations; x_scale: (M, 1) or () float32; x_zero: their zero point.
        qw: (O, K) int8 weights; w_scale: (O, G) float32; w_zero: (O, G) integers, or None for symmetric weights.

    Returns:
        (M, O) float32.
    """
    groups = w_scale.shape[1]
    size = -(-qw.shape[1] // groups)
    total: Tensor | None = None
    for g in range(groups):
        a, b = qx[:, g * size : (g + 1) * size], qw[:, g * size : (g + 1) * size]
        acc = integer_product(a, b)
        if x_zero:
            acc = acc - x_zero * b.sum(1, dtype=torch.int32)
        if w_zero is not None:
            rows = a.sum(1, keepdim=True, dtype=torch.int32) - x_zero * a.shape[1]
            acc = acc - rows * w_zero[:, g].to(torch.int32)
        part = acc.to(torch.float32) * w_scale[:, g]
        total = part if total is None else total + part
    assert total is not None
    return total * x_scale
