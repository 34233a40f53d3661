"""What a skipped step saves: the share of a denoiser's products that are inside what a cache forecasts."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from accuquant.runtime.cache.features import in_cache, is_layer
from accuquant.runtime.observe import Call, observed
from accuquant.runtime.split import SplitLayer


class Share:
    """Counts the products of the layers in one call of a denoiser; attention's own, Q·K and P·V, are not counted.

    Args:
        skipped: names of what does not run at skipped steps.
    """

    def __init__(self, denoiser: nn.Module, skipped: tuple[str, ...]) -> None:
        self.inside = self.all = 0
        modules = denoiser.named_modules()
        layers = {name: m for name, m in modules if is_layer(m) and not _holds_layers(m)}

        def count(name: str, call: Call) -> None:
            products = call.output.numel() * _per_output(layers[name])
            self.all += products
            self.inside += in_cache(name, skipped) * products

        self.watching = ExitStack()
        self.watching.enter_context(observed(denoiser, layers, count))

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


def _holds_layers(module: nn.Module) -> bool:
    """Whether what multiplies is inside it: the parts of a split layer, what an adapter is around."""
    return isinstance(module, SplitLayer) or hasattr(module, "base_layer")


def _per_output(module: Any) -> int:
    """Multiply-adds for each number that a layer gives."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(module.weight[0].numel())
