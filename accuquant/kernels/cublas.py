"""cuBLAS' integer product between Triton's quantization and rescaling: `cublas`."""

from __future__ import annotations

import torch
from torch import Tensor

from accuquant.kernels import cuda
from accuquant.kernels.backend import Facts, Operand, Weights
from accuquant.kernels.integers import SMALL_ROWS, integer_product
from accuquant.kernels.triton import Triton


class Cublas(Triton):
    """int8 times int8 with one scale a row of weights; few rows are `triton`'s, and so is all around the product."""

    name = "cublas"

    def refusal(self, facts: Facts) -> str:
        if facts.device.type != "cuda":
            return "a device without CUDA"
        if not facts.plain:
            return "weights that are not int8 with one scale a row and no zero points"
        return cuda.cublas_refusal(facts) or cuda.triton_refusal(facts)

    def linear(self, x: Operand, weights: Weights, facts: Facts, dtype: torch.dtype) -> Tensor:
        if x.q.shape[0] <= SMALL_ROWS:
            return super().linear(x, weights, facts, dtype)
        acc = integer_product(x.q, weights.q)
        y: Tensor = torch.ops.accuquant.rescale(acc, weights.scale, weights.sums, x.scale, x.zero, weights.bias, dtype)
        return y
