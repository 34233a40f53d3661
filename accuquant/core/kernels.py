"""Integer matrix products, exact in int32, and the float products they stand for.

With q the stored integers, z zero points and s scales, a linear layer is

    y[b, o] = s_x[b] * sum_g s_w[o, g] * sum_{i in g} (q_x[b, i] - z_x) * (q_w[o, i] - z_w[o, g])  + bias[o].

The inner sum is expanded into one integer product and two integer corrections, so nothing is rounded before the scales.

`integer_linear` serves every case with plain torch, whose integer product saturates on CPUs without VNNI; there floats
hold the same integers. `packed_linear` is oneDNN's product on weights laid out for it: symmetric int8 weights with one
scale a row, on CPUs where it gives the exact integers (`packed_works`).
`weight_only_linear` multiplies few rows of floats with such weights, which are never all floats at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK_ROWS = 512
TOKEN_BLOCK = 256  # rows at least of which the float result stays in the cache until it is scaled,
TOKEN_BYTES = 1 << 19  # and more of narrow ones
EXACT_COLUMNS = 1024  # whose sum of int8 products float32 holds, in any order: 1024 * 128 * 128 is 2^24
SMALL_ROWS = 16  # cuBLAS' integer product wants more
FEW_ROWS = 64  # of floats: more make up for weights that are written out as floats
FEW_ROWS_HALF = 8
WEIGHT_BLOCK = 512  # rows of weights that stay in the cache as floats
CACHE_BYTES = 1 << 24  # results larger than this are computed and scaled by blocks of rows

_LIBRARY = torch.library.Library("accuquant", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor u, Tensor scale, Tensor zero, Tensor packed, Tensor w_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.define("weight_only_linear(Tensor x, Tensor qw, Tensor w_scale, Tensor? bias) -> Tensor")


def row_blocks(a: Tensor, outputs: int) -> int:
    """How many of the rows of ``a`` to compute at a time."""
    return a.shape[0] if a.is_cuda or 4 * a.shape[0] * outputs <= CACHE_BYTES else BLOCK_ROWS


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 times (O, K) int8 -> (M, O) int32, exact.

    cuBLAS wants more than 16 rows and multiples of eight; smaller operands are padded with zeros there.
    """
    if a.device.type != "cuda":
        if a.shape[1] == 1:  # torch 2.13 leaves the result unwritten
            return a.to(torch.int32) * b.t().to(torch.int32)
        return torch._int_mm(a.contiguous(), b.t()) if product_is_exact() else _product_of_floats(a, b)
    rows, columns, outputs = a.shape[0], a.shape[1], b.shape[0]
    pad_m, pad_k, pad_o = max(0, SMALL_ROWS + 1 - rows), -columns % 8, -outputs % 8
    if pad_m or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
    if pad_k or pad_o:
        b = torch.nn.functional.pad(b, (0, pad_k, 0, pad_o))
    return torch._int_mm(a.contiguous(), b.t())[:rows, :outputs]


def _product_of_floats(a: Tensor, b: Tensor) -> Tensor:
    """`integer_product` where the CPU's own saturates."""
    parts = zip(a.split(EXACT_COLUMNS, 1), b.split(EXACT_COLUMNS, 1), strict=True)
    products = [(x.float() @ y.float().t()).to(torch.int32) for x, y in parts]
    return functools.reduce(torch.add, products)


_exact: bool | None = None


def product_is_exact() -> bool:
    """Whether torch's integer product is, on this CPU: oneDNN's without VNNI adds pairs in 16 bits, which saturates.

    A compiler reads what an earlier call has found, so one is made wherever a layer is.
    """
    global _exact
    if _exact is None:
        _exact = _product_is_exact()
    return _exact


def _product_is_exact() -> bool:
    for rows, columns, outputs in ((1, 64, 48), (5, 37, 19), (64, 256, 64)):
        a, b = (torch.full((n, columns), 127, dtype=torch.int8, device="cpu") for n in (rows, outputs))
        b[::2] = -128
        found = torch._int_mm(a, b.t())
        if not torch.equal(found.long(), 127 * columns * b[:, 0].long().expand(rows, outputs)):
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
) -> Tensor:
    """The formula above without bias.

    Args:
        qx: (M, K) int8 activations; x_scale: (M, 1), (1,) or () float; x_zero: (1,) their zero point, None for 0.
        qw: (O, K) int8 weights; w_scale: (O, G) float32; w_zero: (O, G) integers, or None for symmetric weights.
        w_sums: `weight_sums` of qw, where they are known.

    Returns:
        (M, O) float32.
    """
    rows = row_blocks(qx, qw.shape[0])
    if x_zero is not None and w_sums is None:
        w_sums = weight_sums(qw, w_scale.shape[1])
    if rows == qx.shape[0]:
        return _block(qx, x_scale, x_zero, qw, w_scale, w_zero, w_sums)
    parts = []
    for start in range(0, qx.shape[0], rows):
        scale = x_scale[start : start + rows] if x_scale.dim() == 2 else x_scale
        parts.append(_block(qx[start : start + rows], scale, x_zero, qw, w_scale, w_zero, w_sums))
    return torch.cat(parts)


def _block(
    qx: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    qw: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_sums: Tensor | None,
) -> Tensor:
    groups = w_scale.shape[1]
    size = -(-qw.shape[1] // groups)
    total: Tensor | None = None
    for g in range(groups):
        a, b = qx[:, g * size : (g + 1) * size], qw[:, g * size : (g + 1) * size]
        acc = integer_product(a, b)
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


def scaled_product(q: Tensor, scale: Tensor, qw: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) fp8 times (O, K) fp8 -> (M, O): scale * w_scale * (q @ qw.T) + bias.

    In bfloat16 on a CUDA device, whose product by rows has nothing else, in float32 elsewhere.

    Args:
        scale: (1,) or (M, 1) float32; w_scale: (O, 1) float32. K and O are multiples of 16.
    """
    if not q.shape[0]:
        return w_scale.new_empty(0, qw.shape[0])
    out = torch.bfloat16 if q.is_cuda else torch.float32
    rows = scale.float().reshape(-1, 1).expand(q.shape[0], 1).contiguous()
    y: Tensor = torch._scaled_mm(
        q.contiguous(), qw.t(), rows, w_scale.view(1, -1), None if bias is None else bias.to(out), out_dtype=out
    )
    return y


@functools.cache
def scaled_works(device: torch.device) -> bool:
    """Whether the device multiplies fp8 with a scale for each row, and right."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        q, qw = (torch.randn(n, 64, generator=generator).to(torch.float8_e4m3fn).to(device) for n in (20, 48))
        scale, w_scale, bias = (
            torch.rand(*shape, generator=generator).to(device) for shape in ((20, 1), (48, 1), (48,))
        )
    expected = scale.double() * w_scale.view(-1).double() * (q.double() @ qw.double().t()) + bias.double()
    try:
        found = scaled_product(q, scale, qw, w_scale, bias).double()
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return bool((found - expected).norm() < 1e-2 * expected.norm())


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
