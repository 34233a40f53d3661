"""Compiles Triton's kernels for CUDA devices that are not there; only test_triton.py has pytest run this file.

The interpreter takes code that the compiler refuses, and says nothing about instructions or shared memory.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accuquant.kernels import triton_kernels as kernels

POINTERS = {
    "x_scale": "*fp32", "x_zero": "*i8", "w_scale": "*fp32", "w_zero": "*i8", "w_sums": "*fp32", "bias": "*fp32",
    "acc": "*i32", "scale": "*fp32", "zero": "*i8", "out_scale": "*fp32", "q": "*i8",
}  # fmt: skip
MOST_SHARED = 99 * 1024  # what every device since capability 8.0 gives a program


def compiled(kernel: Any, capability: int, types: dict[str, str], fixed: dict[str, Any], **options: int) -> Any:
    """As for real arguments: aligned, missing pointers and ones folded in."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in fixed else (POINTERS | types).get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr"}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("x", ["*i8", "*bf16"])
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"),
    [(8, None, False), (8, 128, True), (4, None, True), (4, 16, True), (4, 128, False)],
)
def test_product(capability: int, rows: int, x: str, bits: int, group: int | None, asymmetric: bool) -> None:
    sizes = kernels.tile(rows, x == "*i8")
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    step = min(sizes["BK"], group or sizes["BK"])
    sizes["BK"] = max(32, step)
    scales = (1 if asymmetric else 2) if x == "*i8" else 0
    fixed: dict[str, int | None] = {"BITS": bits, "GROUP": group or 0, "STEP": step, "BAND": 8, **sizes}
    fixed |= {"X_SCALES": scales, "W_ZERO": asymmetric, "X_ZERO": scales == 1, "BIAS": not asymmetric}
    unused = {"w_zero": not asymmetric, "x_zero": scales != 1, "x_scale": not scales, "bias": asymmetric}
    fixed |= {name: None for name, is_unused in {**unused, "w_sums": scales != 1}.items() if is_unused}
    fixed |= ({} if group else {"groups": 1}) | ({"rows": 1} if rows == 1 else {})
    types = {"x": x, "w": "*i8" if bits == 8 else "*u8", "y": "*bf16"}
    found = compiled(kernels.stored_linear_kernel, capability, types, fixed, **options)
    assert found.metadata.shared <= MOST_SHARED
    products = re.findall(r"(?:wgmma\.mma_async|\bmma)\.sync\S+", found.asm["ptx"])
    kind = {"*i8": r"s32\.s8\.s8", "*fp16": r"f32\.f16\.f16", "*bf16": r"f32\.bf16\.bf16"}[x]
    assert products and all(re.search(kind, p) for p in products)
    assert capability != 90 or rows < 64 or all(p.startswith("wgmma") for p in products)
    assert "cubin" in found.asm


@pytest.mark.parametrize("x", ["*fp32", "*bf16"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("block", [1, 4096, 1 << 16])
def test_quantization(x: str, dynamic: bool, block: int) -> None:
    fixed: dict[str, int | None] = {"QMIN": -128, "QMAX": 127, "DYNAMIC": dynamic, "BLOCK": block}
    fixed |= {"HAS_ZERO": not dynamic} | ({"zero": None} if dynamic else {}) | ({"columns": 1} if block == 1 else {})
    warps = min(16, max(1, block // 512))
    found = compiled(kernels.quantize_rows_kernel, 90, {"x": x}, fixed, num_warps=warps)
    ptx = found.asm["ptx"]
    assert "div.rn.f32" in ptx and not re.search(r"div\.(full|approx)", ptx)
    assert "0f4B400000" in ptx and "0fCB400000" in ptx  # the constant of rounding is added and taken away, not folded


@pytest.mark.parametrize("x_scales", [0, 1, 2])
def test_rescaling(x_scales: int) -> None:
    fixed: dict[str, Any] = {"X_SCALES": x_scales, "X_ZERO": x_scales == 1, "BIAS": x_scales > 0, "BM": 16, "BO": 128}
    found = compiled(kernels.rescale_kernel, 90, {"y": "*bf16"}, fixed)
    assert "cubin" in found.asm
