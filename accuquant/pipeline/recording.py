"""A pipeline run once and written down: what its networks were given, and all that was computed between them.

Networks are opaque: what happens inside is not written, only the call. Of the other operations those are kept whose
result depends on some network's output; whatever else they read is a constant, stored once however often it is read.
No tensor is held for being hot: an operation names its operands by where they lie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from accuquant.pipeline.processors import Processors, changed_processors, processors_of
from accuquant.pipeline.seams import Seams, mapped, previous_sample, step_sample, unwrapped

RANDOM = re.compile(r"aten::(rand|normal|uniform|bernoulli|exponential|multinomial)")


@dataclass(frozen=True)
class Place:
    """Where a tensor that depends on a network lies: a storage of the recording, and how it is read."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    flags: tuple[bool, bool]  # conjugated, negated: lazy in torch


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no network: the index of its value."""

    index: int


@dataclass(frozen=True)
class Autocast:
    """The mixed precision that a network was called under."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Around:
    """What a network was called under.

    Attributes:
        context: diffusers' cache context.
        processors: of its attention, by name, where the pipeline had set others for its run.
    """

    context: str | None
    autocast: tuple[Autocast, ...]
    processors: Processors | None


@dataclass(frozen=True)
class Operation:
    """``outputs = function(*args, **kwargs)``; trees with `Place` and `Constant` where tensors were."""

    function: Any
    args: Any
    kwargs: Any
    outputs: Any
    writes: tuple[Place, ...] = ()  # operands that it writes into


@dataclass(frozen=True)
class Call:
    """A network's forward, or its encode or decode."""

    component: str
    args: Any
    kwargs: Any
    outputs: Any
    held: list[Tensor]  # what it returned, for as long as the recording is being worked on
    around: Around
    writes: bool  # whether it wrote into what it was given


@dataclass(frozen=True)
class Mark:
    """A scheduler's step has ended: its sample, and the next one."""

    scheduler: str
    sample: Any
    previous: Any
    value: Tensor


@dataclass
class Recording:
    """What a run left."""

    events: list[Operation | Call | Mark] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    initial: dict[int, Tensor] = field(default_factory=dict)  # flat contents of storages before something hot came in
    numel: dict[int, int] = field(default_factory=dict)  # elements of each storage, in the type of its first reader
    returned: Any = None


class _Writer(TorchDispatchMode):
    """Writes down the operations that depend on networks."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.hot: dict[int, tuple[int, StorageWeakRef]] = {}
        self.known: dict[tuple[Any, ...], int] = {}  # constants by content
        self.seen: dict[tuple[Any, ...], tuple[int, StorageWeakRef]] = {}  # and by place and version

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [t for t in _written(func, args, kwargs) if isinstance(t, Tensor)]
        if RANDOM.match(func._schema.name):
            out = func(*args, **kwargs)
            for tensor in written:
                if self.is_hot(tensor):
                    self._write_constant(tensor)
            return out
        if not any(self.is_hot(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **kwargs)  # a number is no tensor; the self-check sees if it matters
        if torch.Tag.inplace_view in func.tags:
            return self._reshaped(func, args, kwargs)
        for tensor in written:
            self._heat_written(tensor)
        given, named = self.encode((args, kwargs))
        out = func(*args, **kwargs)
        places = self.heat(out)
        writes = tuple(self.place(t) for t in written)
        self.recording.events.append(Operation(func, given, named, places, writes))
        return out

    def _reshaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """squeeze_ and the like change how a tensor is read and none of its elements: a view that takes its name."""
        before = self.place(args[0])
        out = func(*args, **kwargs)
        after = self.place(args[0])
        view = torch.ops.aten.as_strided.default
        shape = (list(after.size), list(after.stride), after.offset)
        self.recording.events.append(Operation(view, (before, *shape), {}, after))
        return out

    def is_hot(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self.hot

    def place(self, tensor: Tensor) -> Place:
        number, _ = self.hot[_storage(tensor)]
        flags = (tensor.is_conj(), tensor.is_neg())
        return Place(
            number, tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()), flags
        )

    def heat(self, tree: Any) -> Any:
        """Counts the tensors of a result among those that depend on networks; the tree with their places."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            self._heat(leaf)
            return self.place(leaf)

        return mapped(one, tree)

    def _heat(self, tensor: Tensor) -> int:
        key = _storage(tensor)
        if key not in self.hot:
            # the weak reference keeps the storage's number from being given to another one
            self.hot[key] = (len(self.hot), StorageWeakRef(tensor.untyped_storage()))
            self.recording.numel[self.hot[key][0]] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return self.hot[key][0]

    def _heat_written(self, tensor: Tensor) -> None:
        if not self.is_hot(tensor):
            with _disable_current_modes():
                self.recording.initial[self._heat(tensor)] = _flat(tensor).clone()

    def _write_constant(self, tensor: Tensor) -> None:
        with _disable_current_modes():
            value = self.constant(tensor)
        place = self.place(tensor)
        self.recording.events.append(Operation(torch.ops.aten.copy_.default, (place, value), {}, place, (place,)))

    def encode(self, tree: Any) -> Any:
        """The tree with places for what is hot, and constants for all other tensors."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return self.place(leaf) if self.is_hot(leaf) else self.constant(leaf)

        return mapped(one, tree)

    def constant(self, tensor: Tensor) -> Constant:
        """The stored value of a tensor: equal contents are stored once."""
        with _disable_current_modes():
            storage = tensor.untyped_storage()
            now = version(tensor)
            where = (_storage(tensor), tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset(), now)
            if now is not None and where in self.seen:
                return Constant(self.seen[where][0])
            kept = compact_copy(tensor)
            content = (_digest(kept), kept.dtype, kept.size(), kept.stride(), kept.device)
            if content not in self.known:
                self.known[content] = len(self.recording.constants)
                self.recording.constants.append(kept)
            if now is not None:
                self.seen[where] = (self.known[content], StorageWeakRef(storage))
            return Constant(self.known[content])


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors and the like have none
        return -id(tensor)


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written into; inference tensors do not count it."""
    return None if tensor.is_inference() else tensor._version


def _flat(tensor: Tensor) -> Tensor:
    """All elements of a tensor's storage."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an operation writes into, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tree_leaves(given)


def compact_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides that repeats nothing: an expanded dimension stays expanded."""
    tensor = tensor.detach()
    once = [
        slice(0, 1) if stride == 0 and size > 1 else slice(None)
        for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
    ]
    return tensor[tuple(once)].clone().expand(tensor.size()) if once else tensor.clone()


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    data = plain.flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()


Outputs = Mapping[int, Sequence[Tensor]]
"""What networks gave, by the number of their call in a run."""


class OtherOutputs(Exception):
    """Known outputs are not of the shapes that the networks give: they are of another run."""


def write_down(
    pipeline: DiffusionPipeline,
    call: dict[str, Any],
    known: Outputs | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Recording:
    """Runs ``pipeline(**call)`` without gradient and writes it down.

    Args:
        known: outputs to give instead of evaluating networks; a call that is not among them is evaluated. Of an empty
            mapping each network is evaluated once for arguments of the same shapes, and then gives the same again: the
            steps are those of the run, and their values are not. None evaluates all.
        progress: called when a scheduler's step has ended.

    Raises:
        OtherOutputs: known outputs are of something else.
    """
    writer = _Writer()
    recording, given_before = writer.recording, dict[Any, Any]()
    calls, before_run = 0, processors_of(pipeline)

    def evaluated(name: str, method: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        if known is None or (known and calls not in known):
            return method(*args, **kwargs)
        shapes = (name, *((t.shape, t.dtype) for t in tensors))
        is_first = shapes not in given_before
        if is_first:
            given_before[shapes] = method(*args, **kwargs)
        usual = [leaf for leaf in tree_leaves(given_before[shapes]) if isinstance(leaf, Tensor)]
        if not usual:  # the output hides its tensors from torch
            return given_before[shapes] if is_first else method(*args, **kwargs)
        given = list(known.get(calls, usual))
        if [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in usual]:
            raise OtherOutputs(f"the outputs of call {calls} are not what {name} gives")
        handed = iter(given)
        return mapped(lambda leaf: next(handed).clone() if isinstance(leaf, Tensor) else leaf, given_before[shapes])

    def on_call(name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal calls
        given, named = writer.encode((args, kwargs))
        around = Around(seams.contexts.get(name), autocast_state(), changed_processors(pipeline, name, before_run))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        with _disable_current_modes():
            before = [version(t) for t in tensors]
            out = evaluated(name, method, args, kwargs, tensors)
            writes = before != [version(t) for t in tensors]
            held = [t.clone() for t in tree_leaves(out) if isinstance(t, Tensor)]
        calls += 1
        recording.events.append(Call(name, given, named, writer.heat(out), held, around, writes))
        return out

    def on_step(name: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        sample = writer.encode(step_sample(step, args, kwargs))
        result = step(*args, **kwargs)
        previous = previous_sample(result)
        with _disable_current_modes():
            value = previous.clone()
        recording.events.append(Mark(name, sample, writer.encode(previous), value))
        progress()
        return result

    seams = Seams(pipeline, on_call, on_step)
    with torch.no_grad(), seams.held(), writer:
        recording.returned = writer.encode(unwrapped(pipeline)(**call))
    return recording


def autocast_state() -> tuple[Autocast, ...]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple(Autocast(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
