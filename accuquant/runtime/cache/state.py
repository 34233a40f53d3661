"""What a feature cache knows of one trajectory: its step, and the memories of every cached module in every call."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from accuquant.core.forecasts import Memory
from accuquant.core.schedule import RCS
from accuquant.runtime.cache.stats import Trace


class Key(NamedTuple):
    """Where an output of a module belongs.

    Attributes:
        context: of the denoiser's call in a step.
        number: of the module's call in that one.
        form: of the denoiser's call.
    """

    context: str
    module: str
    number: int = 0
    form: str = ""


Memories = dict[Key, tuple[Memory | None, ...]]


class State:
    """Of one trajectory; the next begins with a fresh one.

    Attributes:
        step: from 0; -1 before the first.
        timestep, batch, latent: what the denoiser was called with last.
        first_timestep: of the first step.
        direction: of the timestep from step to step.
        form: of the denoiser's call that is running: the shape of its latents, its flags.
        made: how often each module has worked in it.
        context: name of the call of the step that is running, among `calls`.
        calls_before: how many the step before had.
        given_context: what the pipeline calls its next call of the denoiser.
        named: whether the pipeline names its calls.
        full: whether this step is computed in full; None until RCS has decided.
        forced: whether it has to be.
        driven: whether steps and memories are given from outside.
        memories: of every output that is forecast.
        tapped: inputs of features that are computed elsewhere than the feature.
        listed_done: of the listed full timesteps after the first.
        scheduler_steps: of the run, when the trajectory began and at the denoiser's last call.
    """

    def __init__(self, rcs: RCS | None, scheduler_steps: int) -> None:
        self.rcs = rcs
        self.step, self.timestep, self.batch, self.direction = -1, 0.0, 0, 0.0
        self.first_timestep = 0.0
        self.form, self.made = "", Counter[str]()
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

    def begin_call(self, context: str, form: str) -> None:
        """The denoiser is called, once more in this step."""
        self.context, self.form = context, form
        self.calls.append(context)
        self.made.clear()

    def key(self, module: str) -> Key:
        """Of a module's next output."""
        return Key(self.context, module, self.made[module], self.form)

    def count(self, module: str) -> None:
        """A module has worked, or was forecast."""
        self.made[module] += 1

    def move_to(self, timestep: float) -> None:
        """The next step."""
        if self.step < 0:
            self.first_timestep = timestep
        elif self.direction == 0:
            self.direction = timestep - self.timestep
        self.step, self.timestep = self.step + 1, timestep

    def turns(self, timestep: float) -> bool:
        """Whether this is against the trajectory's direction."""
        return (timestep - self.timestep) * self.direction < 0

    def is_back(self, timestep: float) -> bool:
        """Whether it is so as far as where the trajectory began; restarts in its midst (RePaint) are part of it."""
        return self.turns(timestep) and (timestep - self.first_timestep) * self.direction <= 0

    @property
    def sees_scheduler(self) -> bool:
        """Whether the scheduler's steps tell those of the trajectory; replayed tapes and own loops may have none."""
        return self.scheduler_steps[1] > self.scheduler_steps[0]
