"""What a module is for, found from where it stands in the denoiser and from one call: no list of models' names.

A Linear or Conv2d can be of several kinds at once: `linear` or `conv` says what it is, `attention`, `mlp`, `modulation`
and `embedding` what it serves, `first` and `last` that it reads the latents, or writes what the denoiser gives. What
cannot be quantized, as grouped convolutions, is of no kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from accuquant.recipe.rule import Kind
from accuquant.runtime.cache.features import attends
from accuquant.runtime.observe import entered
from accuquant.runtime.spec import Conv

KINDS: tuple[str, ...] = get_args(Kind)
ATTENDS = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax, Tensor.softmax, torch.softmax)
EMBEDS, MODULATES = re.compile("Embed"), re.compile("Ada(LayerNorm|GroupNorm|LN|Norm)|Modulat|RMSNormZero")


@dataclass(frozen=True)
class _Called:
    """A Linear or Conv2d at its first call; ``order`` counts the calls of all modules, ``rows`` its input's vectors."""

    order: int
    rows: int
    values: int


@dataclass
class _Seen(TorchFunctionMode):
    """One call of a network: which modules run, in which order, and which of them attend."""

    samples: int = 0
    latent_values: int = 0
    layers: dict[str, _Called] = field(default_factory=dict)
    attends: dict[str, int] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    order: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENDS and self.running and args and isinstance(args[0], Tensor) and args[0].ndim > 2:
            self.attends.setdefault(self.running[-1], self.order)
        return func(*args, **(kwargs or {}))

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.order += 1
        self.running.append(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not name and not self.samples:
            latents = next(t for t in given if t.is_floating_point() and t.ndim > 1)
            self.samples, self.latent_values = len(latents), latents.numel()
        if name not in self.began:
            self.began[name] = self.order
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and Conv.holds(module)):
                columns = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                self.layers[name] = _Called(self.order, given[0].numel() // columns, given[0].numel())

    def leave(self, *_: Any) -> None:
        self.running.pop()


def kinds_of(network: nn.Module, run: Callable[[], object]) -> dict[str, frozenset[str]]:
    """The kinds of each Linear and Conv2d of a denoiser that ``run`` calls, by name.

    What does not run, or cannot be quantized, has none.
    """
    seen = _Seen()
    with torch.no_grad(), entered(network, seen.enter, seen.leave), seen:
        run()
    return _Kinds(network, seen).found()


class _Kinds:
    """What the one call says of each module."""

    def __init__(self, network: nn.Module, seen: _Seen) -> None:
        self.network, self.seen = network, seen
        named = {name for name, module in network.named_modules() if attends(module)}  # linear attention has no softmax
        self.attention = {*seen.attends, *named} - {""}
        self.bodies = self._bodies()
        began = [seen.began[name] for name in self.bodies if name in seen.began]
        self.last_begins = max(began, default=0)

    def _bodies(self) -> list[str]:
        """The blocks: items of module lists that attend somewhere, their siblings, and a block that stands alone."""
        found = list[str]()
        for name, child in self.network.named_children():
            inside = any(inner == name or inner.startswith(f"{name}.") for inner in self.attention)
            if isinstance(child, nn.ModuleList):
                several = inside or (len(child) > 1 and all(_holds(item) for item in child))
                found += [f"{name}.{i}" for i in range(len(child))] if several else []
            elif inside and _holds(child):
                found.append(name)
        return found

    def found(self) -> dict[str, frozenset[str]]:
        layers, served = self.seen.layers, dict[str, set[str]]()
        for name in layers:
            kind = "linear" if isinstance(self.network.get_submodule(name), nn.Linear) else "conv"
            served[name] = {kind, *([use] if (use := self._use(name)) else [])}
        outside = [name for name in layers if not self._body(name)]
        reads = [n for n in outside if layers[n].values == self.seen.latent_values and self._is_before(n)]
        tokens = [name for name in layers if layers[name].rows > self.seen.samples]
        for name in (reads or [n for n in tokens if n in outside and self._is_before(n)])[:1]:
            served[name].add("first")
        for name in sorted(tokens, key=lambda n: layers[n].order)[-1:]:
            served[name].add("last")
        return {name: frozenset(kinds) for name, kinds in served.items()}

    def _use(self, name: str) -> str | None:
        """What a module serves, by the nearest around it that tells, and else by what it reads and when."""
        called = self.seen.layers[name]
        for outer in _around(name):
            if outer in self.attention and not self._follows_attention(name, outer):
                return "modulation" if called.rows <= self.seen.samples and self._is_block(outer) else "attention"
            kind = type(self.network.get_submodule(outer)).__name__
            if MODULATES.search(kind) and called.rows <= self.seen.samples:
                return "modulation"
            if EMBEDS.search(kind) and (called.rows <= self.seen.samples or not self._body(name)):
                return "embedding"
        if not self._body(name):
            if self._is_before(name):
                return "embedding"
            return "modulation" if called.rows <= self.seen.samples else None
        if called.rows <= self.seen.samples:
            return "modulation"
        return "mlp" if self._is_beside_attention(name) else None

    def _follows_attention(self, name: str, outer: str) -> bool:
        """Whether it is in a part of its own of two layers or more that runs when ``outer`` has attended: an MLP."""
        first, _, rest = name.removeprefix(f"{outer}.").partition(".")
        if not rest or outer not in self.seen.attends:
            return False
        own = [called for n, called in self.seen.layers.items() if n.startswith(f"{outer}.{first}.")]
        return len(own) > 1 and min(called.order for called in own) > self.seen.attends[outer]

    def _is_block(self, outer: str) -> bool:
        """Whether what attends is a whole block, with an MLP."""
        inside = [name for name in self.seen.layers if name.startswith(f"{outer}.")]
        return any(self._follows_attention(name, outer) for name in inside)

    def _is_beside_attention(self, name: str) -> bool:
        """Whether the block that it is in has its attention at hand, and not somewhere deeper inside."""
        for outer in _around(name):
            inside = [a for a in self.attention if a == outer or a.startswith(f"{outer}.")]
            if inside:
                return any("." not in a.removeprefix(outer).removeprefix(".") for a in inside)
        return False

    def _body(self, name: str) -> bool:
        return any(name.startswith(f"{body}.") for body in self.bodies)

    def _is_before(self, name: str) -> bool:
        """Whether it runs before the last of the blocks: refiners of text and latents may come before the others."""
        return self.seen.layers[name].order < self.last_begins


def _around(name: str) -> Iterator[str]:
    """The names of the modules around one, the nearest first; not the network."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _holds(module: nn.Module) -> bool:
    """Whether a module holds several layers."""
    return sum(isinstance(inner, nn.Linear | nn.Conv2d) for inner in module.modules()) > 1
