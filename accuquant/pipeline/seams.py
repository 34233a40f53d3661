"""Where a pipeline can be held while it runs: the calls of its networks and the steps of its schedulers."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils._pytree import tree_map

CALLED = ("forward", "encode", "decode")  # the methods of a component that are opaque


class Seams:
    """Where a pipeline is held while it runs: the calls of its networks, and the steps of its schedulers.

    Args:
        on_call: given the component's name ("vae.decode" for another method than forward), the method and its
            arguments; what it returns is what the pipeline gets.
        on_step: the same for a scheduler's step.
    """

    def __init__(self, pipeline: DiffusionPipeline, on_call: Callable[..., Any], on_step: Callable[..., Any]) -> None:
        self.pipeline, self.on_call, self.on_step = pipeline, on_call, on_step
        self.inside = 0  # a network called by a network is part of it
        self.thread = threading.get_ident()  # others may use the same schedulers' classes meanwhile
        self.contexts: dict[str, str] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        with ExitStack() as undo:
            components: dict[str, Any] = self.pipeline.components
            for name, component in components.items():
                if isinstance(component, nn.Module):
                    opaque = {"forward"} | (set(CALLED) if hasattr(component, "decode") else set())
                    for method in opaque & set(dir(component)):
                        label = name if method == "forward" else f"{name}.{method}"
                        undo.callback(_replaced(component, method, self._call(label, getattr(component, method))))
                    entered: Any = getattr(component, "cache_context", None)
                    if entered is not None:
                        undo.callback(_replaced(component, "cache_context", self._context(name, entered)))
            # on the class: a pipeline may copy its scheduler, and a copy of an instance's would step the original
            classes = {type(part): name for name, part in self.pipeline.components.items() if is_scheduler(part)}
            for kind, name in classes.items():
                undo.callback(_replaced(kind, "step", self._step(name, kind.step)))
            yield

    def _call(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside or threading.get_ident() != self.thread:
                return method(*args, **kwargs)
            self.inside += 1
            try:
                return self.on_call(name, method, args, kwargs)
            finally:
                self.inside -= 1

        return call

    def _step(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def call(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside or threading.get_ident() != self.thread:
                return step(scheduler, *args, **kwargs)
            self.inside += 1
            try:
                return self.on_step(name, functools.partial(step, scheduler), args, kwargs)
            finally:
                self.inside -= 1

        return call

    def _context(self, component: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def entered(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer = self.contexts.get(component)
            self.contexts[component] = name
            try:
                with method(name, *args, **kwargs):
                    yield
            finally:
                self.contexts.pop(component)
                if outer is not None:
                    self.contexts[component] = outer

        return entered


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same make with ``function`` of each leaf; empty fields of diffusers' outputs are kept."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, BaseOutput):
            return function(leaf)
        made = copy.copy(leaf)
        for key, value in list(made.items()):
            made[key] = mapped(function, value)
        return made

    return tree_map(one, tree, is_leaf=lambda leaf: isinstance(leaf, BaseOutput))


def is_scheduler(component: Any) -> bool:
    return callable(getattr(component, "step", None)) and not isinstance(component, nn.Module)


def _replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute; calling the result restores what was there, or nothing."""
    own = vars(owner).get(name, _replaced)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if own is _replaced else setattr(owner, name, own)


def previous_sample(result: Any) -> Any:
    """The next latents in what a scheduler's step returns."""
    return result.prev_sample if hasattr(result, "prev_sample") else result[0]


def step_sample(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The latents that a scheduler's step was given."""
    bound = inspect.signature(step).bind(*args, **kwargs).arguments
    return bound.get("sample", args[2] if len(args) > 2 else None)


def unwrapped(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The pipeline's call without the decorators that switch gradients off."""
    return functools.partial(inspect.unwrap(type(pipeline).__call__), pipeline)


def default_of(pipeline: DiffusionPipeline, argument: str) -> Any:
    """The number that the pipeline's call has for an argument by default; None where it has none."""
    parameter = inspect.signature(unwrapped(pipeline)).parameters.get(argument)
    value = None if parameter is None else parameter.default
    return value if isinstance(value, int | float) else None


def required(pipeline: DiffusionPipeline) -> list[str]:
    """The arguments that the pipeline's call cannot do without."""
    parameters = inspect.signature(unwrapped(pipeline)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def takes(pipeline: DiffusionPipeline, argument: str) -> bool:
    """Whether the pipeline's call has an argument of this name."""
    return argument in inspect.signature(unwrapped(pipeline)).parameters
