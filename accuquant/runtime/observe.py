"""What modules are given and what they give while a model runs: every loop that looks inside one goes through here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any

    @property
    def input(self) -> Tensor:
        """The first tensor it was given; ``hidden_states``, where all are named."""
        given = (*self.args, self.kwargs.get("hidden_states"), *self.kwargs.values())
        return next(value for value in given if isinstance(value, Tensor))

    @property
    def output(self) -> Tensor:
        """The first of what it returned."""
        first: Tensor = self.returned[0] if isinstance(self.returned, tuple) else self.returned
        return first


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is given, in the order of its forward's ``names``, however the caller ordered it."""
    given = dict(zip(names[: len(args)], args, strict=True)) | kwargs
    return {name: given[name] for name in names if name in given}


@contextmanager
def entered(
    network: nn.Module,
    enter: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None],
    leave: Callable[[nn.Module, Any], None],
) -> Iterator[None]:
    """Every module says in the block when it begins, with its name and what it is given, and when it has ended."""
    with ExitStack() as handles:
        for name, module in network.named_modules():
            before = lambda m, args, kwargs, name=name: enter(name, m, args, kwargs)  # noqa: E731
            handles.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            after = lambda m, args, returned: leave(m, returned)  # noqa: E731
            handles.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


@contextmanager
def observed(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Call], None] | None = None
) -> Iterator[dict[str, Call]]:
    """The last call of each named module of ``model`` in the block, by name; one that was not called is not there.

    Args:
        see: is shown every call as it ends, in place of what is kept.

    Raises:
        AttributeError: the model has no module of such a name.
    """
    seen: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
            (see or seen.__setitem__)(name, Call(args, kwargs, returned))

        return note

    with ExitStack() as handles:
        for name in names:
            module = model.get_submodule(name)
            handles.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield seen


def run_until(module: nn.Module, run: Callable[[], object], times: int = 0) -> Call:
    """The module's call in ``run`` after so many others; what comes after it is not computed.

    Raises:
        LookupError: ``run`` ended before it.
    """
    made = 0

    def stop(name: str, call: Call) -> None:
        nonlocal made
        made += 1
        if made > times:
            raise _Reached(call)

    try:
        with observed(module, [""], stop):
            run()
    except _Reached as reached:
        return reached.call
    what = f"no {type(module).__name__} was called" if not made else f"{type(module).__name__} was called {made} times"
    raise LookupError(f"{what} before the model had run to its end")


class _Reached(Exception):
    """Carries a call out of a forward pass whose rest is not wanted."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
