"""What a feature cache knows of one trajectory: its step, and the memories of every cached module in every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accuquant.core.forecasts import Memory
from accuquant.core.schedule import RCS
from accuquant.runtime.cache.stats import Trace

Memories = dict[tuple[str, str], tuple[Memory | None, ...]]


class State:
    """Of one trajectory; the next begins with a fresh one.

    Attributes:
        step: from 0; -1 before the first.
        timestep, batch, latent: what the denoiser was called with last.
        direction: of the timestep from step to step.
        context: name of the call of the step that is running, among `calls`.
        calls_before: how many the step before had.
        given_context: what the pipeline calls its next call of the denoiser.
        named: whether the pipeline names its calls.
        full: whether this step is computed in full; None until RCS has decided.
        forced: whether it has to be.
        driven: whether steps and memories are given from outside.
        memories: by call and module.
        tapped: inputs of features that are computed elsewhere than the feature.
        listed_done: of the listed full timesteps after the first.
        scheduler_steps: of the run, when the trajectory began and at the denoiser's last call.
    """

    def __init__(self, rcs: RCS | None, scheduler_steps: int) -> None:
        self.rcs = rcs
        self.step, self.timestep, self.batch, self.direction = -1, 0.0, 0, 0.0
        self.latent: Tensor | None = None
        self.given_context: Any = None
        self.context, self.calls, self.calls_before = "", list[str](), 0
        self.named = self.forced = self.driven = False
        self.full: bool | None = None
        self.memories: Memories = {}
        self.tapped: dict[str, Tensor] = {}
        self.nbytes = self.listed_done = 0
        self.scheduler_steps = (scheduler_steps, scheduler_steps)
        self.trace = Trace()

    @property
    def sees_scheduler(self) -> bool:
        """Whether the scheduler's steps tell those of the trajectory; replayed tapes and own loops may have none."""
        return self.scheduler_steps[1] > self.scheduler_steps[0]
