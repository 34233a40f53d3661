"""Number types, fake quantization with learned step sizes, and scale search.

A real value ``x`` is stored as an integer ``q`` with ``x ~ (q - zero_point) * scale`` and ``qmin <= q <= qmax``.
Everything that quantizes in this package (calibration, export, integer kernels) uses these functions, so that the
exported integers are the ones calibration saw.

Shape legend: O output channels, I input channels, G groups of ``group_size`` input channels, B batch, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8  # a constant-zero channel still needs a scale that divides


@dataclass(frozen=True)
class QType:
    """One number type: its name, its width in bits, and the least and greatest number that is stored.

    Integers are two's complement. ``floating`` is the torch type of small floats; they have no zero point.
    """

    name: str
    bits: int
    floating: torch.dtype | None = None

    @property
    def qmin(self) -> int:
        return -self.qmax if self.floating else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return int(torch.finfo(self.floating).max) if self.floating else (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """From one number to the next; of floats, at half the greatest."""
        if self.floating is None:
            return 1.0
        return 2.0 ** math.floor(math.log2(self.qmax / 2)) * torch.finfo(self.floating).eps

    @property
    def storage(self) -> torch.dtype:
        """Of a packed tensor."""
        return self.floating or (torch.int8 if self.bits == 8 else torch.uint8)


# A new type is a row here. fp8 is e4m3 without infinities (arXiv 2209.05433).
QTYPES: dict[str, QType] = {
    t.name: t
    for t in (
        QType("int8", 8),
        QType("int6", 6),
        QType("int4", 4),
        QType("int3", 3),
        QType("fp8", 8, torch.float8_e4m3fn),
    )
}


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, qtype: QType) -> Tensor:
    """Integers of ``x`` as a float tensor: ``clamp(round(x / scale) + zero_point, qmin, qmax)``; or small floats."""
    if qtype.floating is not None:
        return _nearest_float(x / scale, qtype)
    return (x / scale).round_().add_(zero_point).clamp_(qtype.qmin, qtype.qmax)


def _nearest_float(v: Tensor, qtype: QType) -> Tensor:
    """Of the type, in v's own; beyond its range the type has no number but NaN."""
    assert qtype.floating is not None
    return v.clamp_(qtype.qmin, qtype.qmax).to(qtype.floating).to(v.dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """``(q - zero_point) * scale``; the inverse of `quantize` up to rounding and clipping."""
    return (q - zero_point) * scale


def _fake_quantized(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    if qtype.floating is not None:
        return _nearest_float(x / scale, qtype).mul_(scale)
    # clamp(round + zero_point) - zero_point, with the integers' own exact arithmetic moved into the bounds
    return torch.round(x / scale).clamp_(qtype.qmin - zero_point, qtype.qmax - zero_point).mul_(scale)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with the straight-through gradient in ``x`` and the LSQ gradient in ``scale``.

    LSQ (arXiv 1902.08153, eq. 3): inside the range d/ds = round(v) - v with v = x / s, at a clipped end it is that
    end. Only ``x`` and the two small tensors are kept for the backward pass; the integers are computed again there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.qtype = qtype
        return _fake_quantized(x, scale, zero_point, qtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, scale, zero_point = ctx.saved_tensors
        qtype, qmin, qmax = ctx.qtype, ctx.qtype.qmin, ctx.qtype.qmax
        v = x / scale
        q = torch.round(v)
        inside = (q >= qmin - zero_point) & (q <= qmax - zero_point)
        grad_x = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            if qtype.floating is not None:
                q = _nearest_float(v.clone(), qtype)
            q.clamp_(qmin - zero_point, qmax - zero_point)
            # grad * q - grad_x * v: v counts only where it was not clipped, so this is both cases of LSQ's eq. 3
            if scale.numel() == 1:
                grad_scale = torch.dot(grad.flatten(), q.sub_(v.mul_(inside)).flatten()).view(scale.shape)
            else:
                grad_scale = q.mul_(grad).sub_(v.mul_(grad_x)).sum_to_size(scale.shape)
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Differentiable ``dequantize(quantize(x))``.

    Args:
        x: any shape.
        scale: positive, broadcastable to ``x``; receives the LSQ gradient.
        zero_point: integer-valued float tensor broadcastable to ``x``; never trained; zero for a float type.
        qtype: the number type.
    """
    if not torch.is_grad_enabled():  # autograd's bookkeeping takes longer than a small tensor
        return _fake_quantized(x, scale, zero_point, qtype)
    out: Tensor = _FakeQuantize.apply(x, scale, zero_point, qtype)
    return out


def lsq_gradient_scale(numel: int, qtype: QType) -> float:
    """LSQ's factor on a step size's gradient, ``1 / sqrt(numel * qmax)`` (arXiv 1902.08153, section 2.2)."""
    return float((numel * qtype.qmax) ** -0.5)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied with ``factor`` on its way back."""
    if not torch.is_grad_enabled():
        return x
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


def dynamic_scale(x: Tensor, qtype: QType, clip_ratio: Tensor | float = 1.0) -> Tensor:
    """Symmetric scale per token: ``clip_ratio * max|x| / qmax`` over the last dimension, (..., I) -> (..., 1)."""
    return (x.detach().abs().amax(-1, keepdim=True) * (clip_ratio / qtype.qmax)).clamp_min(SMALLEST_SCALE)


def range_to_scale(low: Tensor, high: Tensor, qtype: QType, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]`` (which is widened to contain zero).

    Symmetric: zero_point = 0 and scale = max(-low, high) / qmax. Asymmetric: scale = (high - low) / (2^bits - 1) and
    the zero point is the integer that stands for 0.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        scale = (torch.maximum(-low, high) / qtype.qmax).clamp_min(SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (qtype.qmax - qtype.qmin)).clamp_min(SMALLEST_SCALE)
    return scale, (qtype.qmin - torch.round(low / scale)).clamp_(qtype.qmin, qtype.qmax)


def search_scale(
    rows: Tensor, qtype: QType, symmetric: bool, search: bool = True, num_candidates: int = 80
) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row, by round-to-nearest over the full range or by mean-squared-error search.

    Args:
        rows: (R, K), one range is found for each row.
        symmetric: zero point fixed at 0.
        search: False takes the absolute range (round-to-nearest baseline); True shrinks the range by
            ``1, 1 - 0.8/num_candidates, ...`` down to 0.2 and keeps the candidate of least squared error per row.

    Returns:
        ``scale`` and ``zero_point``, both (R, 1), float; ``zero_point`` holds integers.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    best_scale, best_zero = range_to_scale(low, high, qtype, symmetric)
    if not search:
        return best_scale, best_zero
    best_error = torch.full_like(best_scale, torch.inf)
    for candidate in range(num_candidates):
        shrink = 1.0 - 0.8 * candidate / num_candidates
        scale, zero = range_to_scale(low * shrink, high * shrink, qtype, symmetric)
        error = (dequantize(quantize(rows, scale, zero, qtype), scale, zero) - rows).square_().sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
