"""From what was written down to straight-line code: every value once, nothing written in place, constants folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from accuquant.errors import AccuQuantError
from accuquant.pipeline.recording import Around, Call, Constant, Mark, Operation, Place, Recording
from accuquant.pipeline.seams import mapped


class TapeError(AccuQuantError):
    """A pipeline that cannot be recorded, or not replayed as it ran; says where and why."""


@dataclass(frozen=True)
class Slot:
    """A value of the code, by its number."""

    number: int


class Template:
    """Arguments with slots in them."""

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = tree_flatten(tree)
        self.leaves: list[Any] = leaves
        self.numbers = {leaf.number for leaf in leaves if isinstance(leaf, Slot)}
        self.filled: Callable[[dict[int, Tensor]], Any] = _filler(tree)
        """With the values of its slots."""

    def substituted(self, known: dict[int, Any]) -> Template:
        """With some slots replaced, by tensors or by other slots."""
        leaves = [known.get(leaf.number, leaf) if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        return Template(tree_unflatten(leaves, self.spec))

    @property
    def constants(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def _filler(tree: Any) -> Callable[[dict[int, Tensor]], Any]:
    """What fills a tree again and again, several times as fast as taking it apart each time; containers are new."""
    if isinstance(tree, Slot):
        return itemgetter(tree.number)
    if type(tree) in (tuple, list):
        kind, parts = type(tree), [_filler(part) for part in tree]
        return lambda values: kind([part(values) for part in parts])
    if type(tree) is dict:
        named = [(key, _filler(part)) for key, part in tree.items()]
        return lambda values: {key: part(values) for key, part in named}
    leaves, spec = tree_flatten(tree)
    if spec.is_leaf():
        return lambda values: tree
    inner = [_filler(leaf) for leaf in leaves]
    return lambda values: tree_unflatten([part(values) for part in inner], spec)


@dataclass(frozen=True)
class Apply:
    """One aten operation; ``outputs`` are the slots of the tensors in its result, in their order (-1: not wanted)."""

    function: Callable[..., Any]
    given: Template
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Invoke:
    """One call of a network, the ``index``-th of the run."""

    index: int
    component: str
    given: Template
    outputs: tuple[int, ...]
    held: tuple[Tensor, ...]
    around: Around
    writes: bool


@dataclass(frozen=True)
class Advance:
    """A scheduler's step: the slots, or constants, of its sample and of the next one."""

    scheduler: str
    sample: Any
    previous: Any
    value: Tensor


Instruction = Apply | Invoke | Advance


def scatter(base: Tensor, value: Tensor, size: list[int], stride: list[int], offset: int) -> Tensor:
    """``base`` (flat) with ``value`` where a strided view of it lies.

    aten's own as_strided_scatter has a zero gradient for its base in torch 2.13.
    """
    index = torch.arange(base.numel(), device=base.device).as_strided(size, stride, offset)
    return base.scatter(0, index.reshape(-1), value.reshape(-1))


def written_into(function: Callable[..., Any], target: int) -> Callable[..., Any]:
    """An operation that writes into one of its arguments, a position among the leaves, as one that returns it."""

    def functional(*args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = tree_flatten((args, kwargs))
        copy: Tensor = leaves[target].clone()
        leaves[target] = copy
        given, named = tree_unflatten(leaves, spec)
        function(*given, **named)
        return copy

    return functional


class Lowering:
    """The instructions of a recording, in single assignment.

    Storages that something hot is written into are values of their own: flat, read by strides, and each write makes a
    new one. In all others a tensor is known by its place.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.written = {place.storage for e in recording.events if isinstance(e, Operation) for place in e.writes}
        self.values: dict[Place, Slot] = {}
        self.bases: dict[int, Any] = {}
        self.code: list[Instruction] = []
        self.count = calls = 0
        for event in recording.events:
            match event:
                case Operation():
                    self._operation(event)
                case Call():
                    given = self._template((event.args, event.kwargs))
                    outputs = self._define(event.outputs)
                    self.code.append(
                        Invoke(
                            calls,
                            event.component,
                            given,
                            outputs,
                            tuple(event.held),
                            event.around,
                            event.writes,
                        )
                    )
                    calls += 1
                    self._define_bases(event.outputs)
                case Mark():
                    sample, previous = self.read(event.sample), self.read(event.previous)
                    self.code.append(Advance(event.scheduler, sample, previous, event.value))
        self.returned = mapped(self.read, recording.returned)

    def _fresh(self) -> Slot:
        self.count += 1
        return Slot(self.count - 1)

    def _apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Slot:
        slot = self._fresh()
        self.code.append(Apply(function, Template((args, kwargs)), (slot.number,)))
        return slot

    def read(self, leaf: Any) -> Any:
        """What stands for a leaf of the recording: a slot, a constant tensor, or the leaf itself."""
        if isinstance(leaf, Constant):
            return self.recording.constants[leaf.index]
        if not isinstance(leaf, Place):
            return leaf
        if leaf.storage in self.written:
            base = self._base(leaf)
            return self._apply(torch.ops.aten.as_strided.default, base, list(leaf.size), list(leaf.stride), leaf.offset)
        if leaf not in self.values:
            raise TapeError(f"a tensor {leaf.size} of {leaf.dtype} depends on a network in a way torch does not show")
        return self.values[leaf]

    def _template(self, tree: Any) -> Template:
        return Template(tree_map(self.read, tree))

    def _base(self, place: Place) -> Any:
        """The flat value of a written storage."""
        base = self.bases.setdefault(place.storage, self.recording.initial.get(place.storage))
        if base is None:
            raise TapeError(f"a buffer of {place.dtype} is read before anything was written into it")
        if isinstance(base, Tensor) and base.dtype != place.dtype:
            raise TapeError(f"a buffer of {base.dtype} is written as {place.dtype}")
        return base

    def _put(self, place: Place, value: Slot) -> None:
        """``value`` becomes what is read at ``place`` of a written storage."""
        whole = torch.Size(place.size).numel() == self.recording.numel[place.storage]
        if whole and _contiguous(place):
            self.bases[place.storage] = self._apply(torch.ops.aten.reshape.default, value, [-1])
            return
        shape, known = (list(place.size), list(place.stride), place.offset), self.recording.initial
        if place.storage not in self.bases and place.storage not in known:  # its first contents have gaps
            flat = [self.recording.numel[place.storage]]
            self.bases[place.storage] = self._apply(torch.ops.aten.new_zeros.default, value, flat)
        self.bases[place.storage] = self._apply(scatter, self._base(place), value, *shape)

    def _operation(self, event: Operation) -> None:
        if event.writes:
            (place, *more) = event.writes
            if more:
                raise TapeError(f"{event.function} writes into {1 + len(more)} tensors at once")
            leaves = tree_leaves((event.args, event.kwargs))
            given = self._template((event.args, event.kwargs))
            slot = self._fresh()
            function = written_into(event.function, leaves.index(place))
            self.code.append(Apply(function, given, (slot.number,)))
            self._put(place, slot)
            return
        inputs = {leaf.storage for leaf in tree_leaves((event.args, event.kwargs)) if isinstance(leaf, Place)}
        results = [leaf for leaf in tree_leaves(event.outputs) if isinstance(leaf, Place)]
        if results and all(place.storage in self.written and place.storage in inputs for place in results):
            return  # a view of a written storage: read where it is used
        given = self._template((event.args, event.kwargs))
        outputs = self._define(event.outputs)
        self.code.append(Apply(event.function, given, outputs))
        self._define_bases(event.outputs)

    def _define(self, outputs: Any) -> tuple[int, ...]:
        places = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Place)]
        numbers = []
        for place in places:
            self.values[place] = self._fresh()
            numbers.append(self.values[place].number)
        return tuple(numbers)

    def _define_bases(self, outputs: Any) -> None:
        for place in (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Place)):
            if place.storage in self.written:
                self._put(place, self.values[place])


def _contiguous(place: Place) -> bool:
    expected = 1
    for size, stride in zip(reversed(place.size), reversed(place.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return place.offset == 0
