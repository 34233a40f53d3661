"""torch's product of fp8 with a scale for each row: `scaled_mm`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from accuquant.kernels import thresholds
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, quantized

STEP = 16  # inputs and outputs are multiples of it


class ScaledMM(Backend):
    """fp8 times fp8, where the device has such a product."""

    name = "scaled_mm"

    def refusal(self, facts: Facts) -> str:
        if facts.weight.floating is None or facts.activation is None:
            return "no small floats on both sides"
        if not facts.plain:
            return "several scales a row of weights"
        if facts.inputs % STEP or facts.outputs % STEP:
            return f"{facts.outputs} x {facts.inputs} weights, which are no multiples of {STEP}"
        return "" if scaled_works(facts.device) else f"a device ({facts.device}) without a product of fp8"

    def pays(self, facts: Facts) -> bool:
        return facts.device.type == "cuda" or thresholds.pays(self.name, facts)

    def takes_input(self, x: Tensor, facts: Facts) -> bool:
        """A CUDA device gives bfloat16, which is too little for wider inputs."""
        return not (x.is_cuda and x.dtype.itemsize > 2)

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        q, scale, _ = quantized(x.reshape(-1, facts.inputs), grid, facts)
        return Operand(q.to(facts.weight.storage), scale)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        return scaled_product(x.q, x.scale, weights.q, weights.scale, weights.bias)


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
