"""Attention whose two products take quantized inputs: Q, K and V, and the softmax P, whose range is its own.

The papers' tables count on it (Q-Diffusion, Li et al. 2023, arXiv 2302.04304; PTQ4DM, Shang et al. 2023, arXiv
2211.15736): with everything else at eight bits these products decide what a step costs. Here they are computed in float
on the quantized values, which gives what integers would give, and takes longer than float attention does: it is for
knowing what such a model would draw.

A module that attends keeps its code: while it runs, its calls of ``scaled_dot_product_attention`` come here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from accuquant.core.numerics import QTYPES, QType, at_least_float32, fake_quantize
from accuquant.errors import AccuQuantError, nearest
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import fixed, types_kept

PRODUCTS = "products"  # what the submodule of an attention is called
INPUTS = ("query", "key", "value", "softmax")
INTEGERS = tuple(name for name, qtype in QTYPES.items() if qtype.floating is None)


@dataclass(frozen=True)
class InputSpec:
    """What one input of a product is quantized to: static scales, and zero points."""

    activation: str
    activation_scale: str = "static"
    activation_symmetric: bool = False
    static: bool = True

    @property
    def activation_type(self) -> QType:
        return QTYPES[self.activation]


@dataclass(frozen=True)
class AttentionSpec:
    """What the inputs of a module's two products are quantized to; stored in the export's config.json."""

    activation: str = "int8"
    softmax: str = "int8"

    def __post_init__(self) -> None:
        for key in ("activation", "softmax"):
            value: Any = getattr(self, key)
            known = INTEGERS if key == "activation" else (*INTEGERS, "float")
            if value not in known:
                hint = nearest(str(value), known)
                raise AccuQuantError(f"{key}: must be one of {', '.join(known)} (found {value!r}){hint}")

    def inputs(self) -> dict[str, InputSpec]:
        """Those that are quantized, by name."""
        types = dict.fromkeys(INPUTS, self.activation) | {"softmax": self.softmax}
        return {name: InputSpec(kind) for name, kind in types.items() if kind != "float"}

    def bit_operations(self, macs: int) -> int:
        """Of both products, which take as many multiply-adds each."""
        bits = QTYPES[self.activation].bits
        softmax = 32 if self.softmax == "float" else QTYPES[self.softmax].bits
        return macs * bits * (bits + softmax) // 2


class QuantizedInput(nn.Module):
    """Scales and zero points of one input, as they are exported and loaded.

    Tensors: ``activation_scale`` (timestep groups,) float32, ``activation_zero_point`` (timestep groups,) int8.
    """

    def __init__(self, spec: InputSpec, clock: StepClock) -> None:
        super().__init__()
        self.spec, self.clock = spec, clock
        self.activation_scale = fixed(clock.num_groups)
        self.activation_zero_point = fixed(clock.num_groups, dtype=torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        zero = self.clock.own(self.activation_zero_point).to(x.dtype)
        return fake_quantize(x, self.clock.own(self.activation_scale), zero, self.spec.activation_type)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedInput:
        with types_kept(self):
            super()._apply(fn, recurse)
        return self


class AttentionProducts(nn.Module):
    """``scaled_dot_product_attention`` on quantized inputs.

    Args:
        inputs: makes each of `INPUTS` of its spec.
    """

    def __init__(self, spec: AttentionSpec, inputs: Callable[[InputSpec], nn.Module]) -> None:
        super().__init__()
        self.spec = spec
        for name, own in spec.inputs().items():
            self.add_module(name, inputs(own))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(..., L, E), (..., S, E), (..., S, Ev) -> (..., L, Ev), with all of P in memory, (..., L, S) in float32.

        Raises:
            AccuQuantError: there is dropout, which is of training.
        """
        if dropout_p:
            raise AccuQuantError(f"attention with quantized products has no dropout (found {dropout_p})")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        given = {"query": query, "key": key, "value": value}.items()
        q, k, v = (self.get_submodule(name)(at_least_float32(x)) for name, x in given)
        scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        p = scores.softmax(-1)
        if attn_mask is not None:  # a row that sees nothing
            p = p.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
        if self.spec.softmax != "float":
            p = self.get_submodule("softmax")(p)
        made: Tensor = p @ v
        return made.to(query.dtype)


class _Diverted(TorchFunctionMode):
    """Has calls of ``scaled_dot_product_attention`` come to ``products``, and notes each in ``made``."""

    def __init__(self, products: nn.Module, made: list[bool]) -> None:
        super().__init__()
        self.products, self.made = products, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.made.append(True)
        return self.products(*args, **(kwargs or {}))


def quantize_attention(module: nn.Module, products: AttentionProducts) -> None:
    """Have a module attend by ``products``, which becomes its submodule of that name; in place.

    Its class becomes one of the same name that is derived from it, so that copies and compilers find its forward.
    """
    module.add_module(PRODUCTS, products)
    of: Any = type(module)
    module.__class__ = _diverting(of)


@functools.cache
def _diverting(of: Any) -> Any:
    inner = of.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls: list[bool] = []
        with _Diverted(self.products, calls):
            made = inner(self, *args, **kwargs)
        if not calls:
            raise AccuQuantError(
                f"{of.__name__} has not called scaled_dot_product_attention, and its products are to be quantized: "
                'set_attention_backend("native") has it do so'
            )
        return made

    def reduced(self: Any, protocol: Any) -> Any:
        return _empty, (of,), vars(self)

    return type(of.__name__, (of,), {"forward": forward, "__reduce_ex__": reduced, "__module__": of.__module__})


def _empty(of: Any) -> Any:
    """For copies: a name finds the class that was derived from, and not the derived one."""
    derived = _diverting(of)
    return derived.__new__(derived)


def quantized_attention(model: nn.Module) -> dict[str, AttentionProducts]:
    """The products by name of the module that attends."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, AttentionProducts)}
    return {name.removesuffix(PRODUCTS).removesuffix("."): products for name, products in found.items()}
