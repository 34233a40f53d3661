"""Triton's kernels on a CUDA device: `triton`, products of integers or floats with weights that stay packed."""

from __future__ import annotations

import torch
from torch import Tensor

from accuquant.kernels import cuda, thresholds
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, blocks, dequantized


class Triton(Backend):
    """Weights of four or eight bits, in groups or not. Few rows are one tile, which reads the weights once."""

    name = "triton"

    def refusal(self, facts: Facts) -> str:
        return "a device without CUDA" if facts.device.type != "cuda" else cuda.triton_refusal(facts)

    def pays(self, facts: Facts) -> bool:
        return thresholds.triton_pays(facts)

    def takes_input(self, x: Tensor, facts: Facts) -> bool:
        """Whether the kernels have a product for the input: no float64, and no float32 with weights alone."""
        wide = torch.float64 if facts.activation is not None else torch.float32
        return x.dtype.itemsize < wide.itemsize

    def lay_out(self, weights: Weights, facts: Facts) -> Weights:
        """With the sums of the dequantized rows, where the input has a zero point."""
        if not facts.shifted:
            return weights
        sums = [dequantized(weights, facts, rows).double().sum(1).float() for rows in blocks(facts)]
        return weights._replace(sums=torch.cat(sums))

    def operand(self, x: Tensor, grid: Grid | None, facts: Facts) -> Operand:
        """(..., I) -> (M, I) integers, made in one pass; floats stay as they are."""
        x, qtype = x.reshape(-1, facts.inputs), facts.activation
        if grid is None or qtype is None:
            return Operand(x)
        if facts.dynamic:
            return Operand(*torch.ops.accuquant.quantize_dynamic(x, grid.scale, qtype.qmin, qtype.qmax))
        q = torch.ops.accuquant.quantize_static(x, grid.scale, grid.zero, qtype.qmin, qtype.qmax)
        return Operand(q, grid.scale, grid.zero)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        """(M, O) in ``dtype``, by the fused kernel."""
        weight = (weights.q, facts.weight.bits, weights.scale, weights.zero, weights.sums)
        y: Tensor = torch.ops.accuquant.stored_linear(x.q, *weight, x.scale, x.zero, weights.bias, dtype)
        return y
