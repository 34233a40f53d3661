"""What a denoiser multiplies in a step, counted in one: layers with their weights, attention without any, and the rest.

Attention's two products, of Q with K and of its softmax P with V, take two activations each and grow with the square of
the tokens. They run in ``scaled_dot_product_attention``, inside the module that attends; one that multiplies by itself,
as linear attention does, and layers that are neither Linear nor Conv2d are counted as the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from accuquant.runtime.observe import entered
from accuquant.runtime.spec import Layer
from accuquant.runtime.split import SplitLayer

LAYERS = (nn.Linear, nn.Conv2d, Layer, SplitLayer)  # counted by their rows: planned, or quantized as planned


@dataclass(frozen=True)
class Products:
    """Of ``samples`` samples at one step of each denoiser, by names of modules.

    Attributes:
        rows: vectors that each Linear and Conv2d multiplies with its weight.
        attention: multiply-adds of Q with K and of P with V in each module that attends.
        rest: multiply-adds of other modules.
    """

    rows: dict[str, int]
    attention: dict[str, int]
    rest: dict[str, int]
    samples: int


@dataclass
class _Running:
    """A module that runs: the operations before it, and those of the modules in it and of its attention."""

    name: str
    before: int
    known: int = 0


@dataclass
class _Counting(TorchFunctionMode):
    """Counts while a network runs; ``flops`` sees what torch computes below."""

    flops: FlopCounterMode
    rows: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    rest: Counter[str] = field(default_factory=Counter)
    running: list[_Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops.get_total_flops()
        made = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.running:
            inner = self.running[-1]
            self.attention[inner.name] += attention_macs(*args, **(kwargs or {}))
            inner.known += self.flops.get_total_flops() - before
        return made

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(_Running(name, self.flops.get_total_flops()))

    def leave(self, module: nn.Module, made: Any) -> None:
        inner = self.running.pop()
        total = self.flops.get_total_flops() - inner.before
        if self.running:
            self.running[-1].known += total
        if isinstance(module, LAYERS) and made is not None:  # it has not failed
            self.rows[inner.name] += made.numel() // _outputs(module)
        elif total > inner.known:
            self.rest[inner.name] += (total - inner.known) // 2


def _outputs(module: Any) -> int:
    return int(module.out_channels if isinstance(module, nn.Conv2d) else module.out_features)


def attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Multiply-adds of one call of ``scaled_dot_product_attention``: (..., L, E), (..., S, E), (..., S, Ev)."""
    width = query.shape[-1] + value.shape[-1]
    return query.numel() // query.shape[-1] * key.shape[-2] * width


def count_products(network: nn.Module, run: Callable[[], object], samples: int) -> Products:
    """Count in the calls that ``run`` makes for ``samples`` samples."""
    flops = FlopCounterMode(display=False)
    counting = _Counting(flops)
    with torch.no_grad(), entered(network, counting.enter, counting.leave), flops, counting:
        run()
    return Products(dict(counting.rows), dict(counting.attention), dict(counting.rest), samples)
