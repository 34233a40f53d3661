"""Which call of a pipeline is running: what is remembered from step to step belongs to the call, not to a module.

Two threads may share a denoiser, a call may be aborted, and the next begins anew. A pipeline's class and those of its
schedulers are followed once for all: what they do is unchanged, and this module hears of it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline

from accuquant.pipeline.seams import is_scheduler

MARK = "_accuquant_follows"


class Owner(Protocol):
    """Something that keeps state for each run."""

    def ended(self, state: Any) -> None:
        """The run that had this state is over."""


class Run:
    """A call of a pipeline; or, in a thread, all that happens outside of one.

    Attributes:
        pipeline: None outside of a call.
        scheduler_steps: how many have been made in it.
        states: of whoever keeps some for each run.
    """

    def __init__(self, pipeline: DiffusionPipeline | None = None) -> None:
        self.pipeline, self.scheduler_steps = pipeline, 0
        self.states: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @property
    def is_call(self) -> bool:
        return self.pipeline is not None

    def end(self) -> None:
        for owner, state in self.states.items():
            owner.ended(state)


_call: ContextVar[Run | None] = ContextVar("accuquant_call", default=None)
_outside = threading.local()


def current_run() -> Run:
    """The innermost call of a pipeline that is followed; else what this thread does outside of any."""
    if (call := _call.get()) is not None:
        return call
    if not hasattr(_outside, "run"):
        _outside.run = Run()
    run: Run = _outside.run
    return run


def follow(pipeline: DiffusionPipeline) -> None:
    """Hear of each call of this pipeline's class from now on, and of its schedulers' steps."""
    _wrap(type(pipeline), "__call__", _in_a_run)
    for part in pipeline.components.values():
        if is_scheduler(part):
            _wrap(type(part), "step", _counted)


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline whose call this is in, by the frames: of a denoiser that was loaded before its pipeline was made."""
    frame = calling_frame()
    return None if frame is None else frame.f_locals["self"]


def calling_frame() -> FrameType | None:
    """That of the innermost call of a pipeline which this is in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def _wrap(kind: type[Any], name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Once, where the class or one that it inherits from has the method."""
    owner = next(each for each in kind.__mro__ if name in vars(each))
    method = vars(owner)[name]
    if not getattr(method, MARK, False):
        wrapped = functools.wraps(method)(around(method))
        setattr(wrapped, MARK, True)
        setattr(owner, name, wrapped)


def _in_a_run(call: Callable[..., Any]) -> Callable[..., Any]:
    def followed(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        outer = _call.get()
        if outer is not None and outer.pipeline is self:  # a class that calls what it inherits
            return call(self, *args, **kwargs)
        run = Run(self)
        token = _call.set(run)
        try:
            return call(self, *args, **kwargs)
        finally:
            _call.reset(token)
            run.end()

    return followed


def _counted(step: Callable[..., Any]) -> Callable[..., Any]:
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = step(self, *args, **kwargs)
        current_run().scheduler_steps += 1
        return made

    return followed
