"""What a CUDA device can be trusted with.

Each product is tried on the device once, against float64, before a layer may use it: one that does not compile there or
computes something else is not used.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from accuquant.core.numerics import QTYPES, dynamic_scale, quantize
from accuquant.core.packing import pack
from accuquant.kernels.backend import Facts
from accuquant.kernels.integers import integer_product

CAPABILITY = (8, 0)  # int8 and bfloat16 tensor cores, and the shared memory that the kernels' tiles take
MAX_COLUMNS = 1 << 16  # Triton quantizes a row as one block, and its int32 sums cannot overflow
GROUP_STEP = 16  # Triton's groups are multiples of it: tensor cores multiply 16 or 32 columns at a time


def triton_refusal(facts: Facts) -> str:
    """Why Triton's product does not take such weights; the numbers of rows and outputs do not matter to it."""
    if facts.weight.floating or facts.weight.bits not in (4, 8):
        return f"weights of {facts.weight.name}, and these kernels multiply int4 and int8"
    if facts.groups > 1 and (facts.inputs // facts.groups) % GROUP_STEP:
        return f"groups that are no multiples of {GROUP_STEP}"
    if facts.inputs > MAX_COLUMNS:
        return f"more than {MAX_COLUMNS} inputs"
    return "" if triton_works(facts.device) else f"a device ({facts.device}) on which Triton's kernels do not run"


def cublas_refusal(facts: Facts) -> str:
    """Why the library does not multiply such integers; padded copies of the weights are no path."""
    if not facts.integers:
        return "no integers to multiply"
    if facts.groups > 1:
        return "several scales a row of weights"
    if facts.inputs % 8 or facts.outputs % 8:
        return f"{facts.outputs} x {facts.inputs} weights, which are no multiples of 8"
    return "" if cublas_works(facts.device) else f"a device ({facts.device}) without an integer product"


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton is there, its kernels compile for this device, and they compute what they should.

    Defines the operators ``torch.ops.accuquant.stored_linear`` and its companions.
    """
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < CAPABILITY):
        return False
    try:
        from accuquant.kernels import triton_kernels  # noqa: F401
    except ImportError:  # an extra
        return False
    try:
        with device:
            return all(_product_is_right(*case) for case in ((8, 1, 200, True), (4, 2, 5, True), (4, 2, 200, False)))
    except Exception as error:  # Triton has no common class for what a compiler, a driver or a launch may raise
        warnings.warn(f"Triton's kernels do not run on {device} and are not used: {error}", stacklevel=2)
        return False


@functools.cache
def cublas_works(device: torch.device) -> bool:
    """Whether the device has an integer product: some newer ones have none."""
    a, b = (torch.arange(n * 64, device=device).sub(n).to(torch.int8).view(n, 64) for n in (32, 40))
    try:
        return torch.equal(integer_product(a, b).double(), a.double() @ b.double().t())
    except RuntimeError as error:
        warnings.warn(f"{device} has no integer product: {error}", stacklevel=2)
        return False


def _product_is_right(bits: int, groups: int, rows: int, integers: bool) -> bool:
    """Quantization and product, at sizes that fill no tile."""
    columns, outputs, qtype = 96, 136, QTYPES[f"int{bits}"]
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu").to(w_scale.device)

    w_scale = torch.full((outputs, groups), 1 / 64)
    qw, x = draw(qtype.qmin, qtype.qmax + 1, outputs, columns), draw(-99, 100, rows, columns).half() / 16
    zero = None if groups == 1 else draw(qtype.qmin, qtype.qmax + 1, outputs, groups).to(torch.int8)
    shift = 0 if zero is None else zero.double().repeat_interleave(columns // groups, 1)
    weight, bias = (qw.double() - shift) / 64, torch.arange(outputs, dtype=torch.float32)
    operators, scale, expected = torch.ops.accuquant, None, x.double()
    if integers:
        clip_ratio = torch.full((1,), 0.9)
        scale = dynamic_scale(x, QTYPES["int8"], clip_ratio)
        expected = quantize(x, scale, 0, QTYPES["int8"]).double() * scale
        x, scale = operators.quantize_dynamic(x, clip_ratio, -128, 127)
        if not torch.allclose(x * scale, expected.float(), rtol=1e-2, atol=1e-2):
            return False
        expected = x.double() * scale
    packed = pack(qw, qtype)
    y = operators.stored_linear(x, packed, bits, w_scale, zero, None, scale, None, bias, torch.float32).double()
    expected = expected @ weight.t() + bias
    return bool((y - expected).norm() < 1e-6 * expected.norm())
