"""What a skipped step saves: the share of a denoiser's products that are inside what a cache forecasts."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.overrides import TorchFunctionMode

from accuquant.runtime.attention import AttentionProducts, attention_macs
from accuquant.runtime.cache.features import in_cache, is_layer
from accuquant.runtime.observe import Call, observed


class Share(TorchFunctionMode):
    """Counts the products of the layers in a call of a denoiser that begins now, and those of Q with K and P with V.

    Args:
        skipped: names of what does not run at skipped steps.
    """

    def __init__(self, denoiser: nn.Module, skipped: tuple[str, ...]) -> None:
        super().__init__()
        self.inside = self.all = 0
        self.depth = 0  # of what is skipped, while it runs
        modules = dict(denoiser.named_modules())
        quantized = {name for name, m in modules.items() if isinstance(m, AttentionProducts)}
        layers = {name: m for name, m in modules.items() if is_layer(m) and not hasattr(m, "base_layer")}

        def count(name: str, call: Call) -> None:
            if name in quantized:
                products = attention_macs(*call.args, **call.kwargs)
            else:
                products = call.output.numel() * _per_output(layers[name])
            self.count(products, in_cache(name, skipped))

        self.watching, self.counting = ExitStack(), ExitStack()
        self.watching.enter_context(observed(denoiser, [*layers, *quantized], count))
        for module in (m for name, m in modules.items() if in_cache(name, skipped)):
            self.watching.callback(module.register_forward_pre_hook(self._enter).remove)
            self.watching.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self.counting.enter_context(self)
        self.watching.callback(denoiser.register_forward_hook(self._stop, always_call=True).remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.count(attention_macs(*args, **(kwargs or {})), self.depth > 0)
        return func(*args, **(kwargs or {}))

    def count(self, products: int, inside: bool) -> None:
        self.all += products
        self.inside += inside * products

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.depth -= 1

    def _stop(self, *_: Any) -> None:
        self.counting.close()

    def end(self) -> float | None:
        """The share, and the hooks are off; None if nothing was counted."""
        self.watching.close()
        return self.inside / self.all if self.all else None


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether torch compiles this call, or part of the denoiser: hooks that go again are not seen by its graphs."""
    if any(module._compiled_call_impl is not None for module in denoiser.modules()):
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), OptimizedModule):
            return True
        frame = frame.f_back
    return torch.compiler.is_compiling()


def _per_output(module: Any) -> int:
    """Multiply-adds for each number that a layer gives."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(module.weight[0].numel())
