"""The integer product of plain torch: `int_mm`."""

from __future__ import annotations

import torch
from torch import Tensor

from accuquant.kernels import cuda, thresholds
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, blocks, integer_weight, quantized
from accuquant.kernels.integers import SMALL_ROWS, integer_linear, weight_sums


class IntMM(Backend):
    """Every layer of integers, on a CPU; on CUDA devices those that no kernel of ours takes better."""

    name = "int_mm"

    def refusal(self, facts: Facts) -> str:
        if not facts.integers:
            return "no integers to multiply"
        if facts.device.type != "cuda":
            return ""
        if facts.groups > 1:
            return "several scales a row of weights, which a CUDA device multiplies with `triton`"
        refused = cuda.cublas_refusal(facts)
        if not refused and facts.plain and not cuda.triton_refusal(facts):
            return "what `cublas` computes with the same product"
        return refused

    def pays(self, facts: Facts) -> bool:
        return facts.device.type == "cuda" or thresholds.pays(self.name, facts)

    def takes_input(self, x: Tensor, facts: Facts) -> bool:
        """Few rows would be padded to many there."""
        return not (x.is_cuda and x.numel() <= SMALL_ROWS * facts.inputs)

    def lay_out(self, weights: Weights, facts: Facts) -> Weights:
        if not facts.shifted:
            return weights
        sums = [weight_sums(integer_weight(weights, facts, rows), facts.groups) for rows in blocks(facts)]
        return weights._replace(sums=torch.cat(sums))

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        q, scale, zero = quantized(x.reshape(-1, facts.inputs), grid, facts)
        return Operand(q.to(torch.int8), scale, zero)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        qw = integer_weight(weights, facts)
        sums, bits = weights.sums, facts.weight.bits
        y = integer_linear(x.q, x.scale, x.zero, qw, weights.scale, weights.zero, sums, bits)
        return y if weights.bias is None else y + weights.bias
