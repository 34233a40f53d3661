"""A source of gradients: what the layers of a model learn from. One class a file; the loop makes the updates.

To add one, write a file with a final subclass of `GradientSource` and a line in `OBJECTIVES` of this package:
`objective.target` is then its name there, the dry run sums its cost, and `target: auto` tries it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.reference import Draws, Reference
from accuquant.pipeline.denoisers import Denoiser, denoisers_of, joined, step_levels
from accuquant.pipeline.tape import Tape
from accuquant.recipe import Cache, Objective
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

Parameters = dict[str, dict[str, nn.Parameter]]
"""Kind, as `objective.learn` calls it -> name of the layer -> what it learns."""


@dataclass(frozen=True)
class Material:
    """What a source of gradients works on.

    Attributes:
        denoisers: whose layers learn; timestep_groups: the group of each step.
        parameters: of the tuned layers; everything else is frozen.
        objective: the recipe's section.
        steps_per_group: M, decided.
        cache: on during the updates; fitted: what its forecasts know.
    """

    denoisers: Sequence[Denoiser]
    timestep_groups: list[int]
    reference: Reference
    parameters: Parameters
    objective: Objective
    steps_per_group: int
    draws: Draws
    cache: CachePlan | None = None
    fitted: Fitted | None = None

    @cached_property
    def network(self) -> nn.Module:
        """The denoiser; of several, one module that holds them."""
        return joined({one.name: one.network for one in self.denoisers})

    @cached_property
    def levels(self) -> list[float]:
        """The noise level of each step."""
        return step_levels(self.denoisers)

    @property
    def num_steps(self) -> int:
        return len(self.timestep_groups)

    def step_of(self, tape: Tape, step: int, denoiser: Denoiser) -> tuple[int, float]:
        """The step of a tape at the noise level of a step, or next to it, where a denoiser works, and its level.

        A tape may be of another setting, with other steps.
        """
        if not self.reference.settings:
            return step, self.levels[step]
        levels = next(one.levels for one in denoisers_of(tape) if one.name == denoiser.name)
        nearest = min(levels, key=lambda i: abs(levels[i] - self.levels[step]))
        return nearest, levels[nearest]

    def tape(self, update: int) -> Tape:
        """The batch that an update is of."""
        return self.reference.tapes[self.draws.tape(update)]


@dataclass(frozen=True)
class Job:
    """What a cost depends on: all of it is known before anything is computed.

    Attributes:
        timestep_groups: of each denoising step, ascending.
        planned: the denoiser's modules, with their multiply-adds if these have been counted.
        num_samples: calibration samples.
    """

    objective: Objective
    steps_per_group: int
    timestep_groups: list[int]
    planned: list[PlannedModule]
    num_samples: int
    cache: Cache | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timestep_groups)

    @property
    def batch(self) -> int:
        """Samples of an update."""
        return min(self.objective.batch_size, self.num_samples)


@dataclass(frozen=True)
class Cost:
    """Denoising steps that the network is evaluated for; bytes kept between updates, but for parameters and moments."""

    evaluations: int
    kept_bytes: int = 0


class GradientSource(ABC):
    """What the parameters of a material learn from, update after update.

    Attributes:
        parameters: the material's, and what the source itself has to learn.
        network_evaluations: denoising steps that it was evaluated for so far; guidance may call it twice in one.
    """

    trials: ClassVar[tuple[tuple[int, float], ...]] = ((1, 1.0),)
    """What `target: auto` tries of it: (M, factor of the recipe's learning rates)."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.parameters = material.parameters
        self.network_evaluations = 0

    @cached_property
    def scale(self) -> float:
        """What gradients are multiplied by on their way back: the share of one element is too small for float16."""
        return 2.0**16 if self.material.tape(0).state(0).latents[0].dtype == torch.float16 else 1.0

    @classmethod
    @abstractmethod
    def cost(cls, job: Job) -> Cost:
        """Of all updates of a job."""

    @property
    def updates(self) -> int:
        """How many there are."""
        return self.material.objective.iterations

    @abstractmethod
    def gradient(self, update: int) -> tuple[float, dict[str, Any]]:
        """Add the update's gradient to ``.grad`` of the parameters.

        Returns:
            the loss, and what the history has to say of this update beside it.
        """

    def scaled_back(self, scale: float) -> None:
        """Divide ``.grad`` of the parameters by what the loss was multiplied by."""
        for parameter in (p for of in self.parameters.values() for p in of.values()) if scale != 1 else ():
            if parameter.grad is not None:
                parameter.grad /= scale

    def where(self, update: int) -> str:
        """What the update learns from, in words for an error."""
        return f"update {update}"

    def done(self, update: int) -> float:
        """Share of the way to the end of its schedule, in [0, 1): rates fall and AdaRound decides along it."""
        return update / self.updates

    def running(self) -> AbstractContextManager[Any]:
        """What has to be on while updates are made."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, beside parameters and moments, to go on with the same numbers."""
        return {}

    def resume(self, update: int, network_evaluations: int, state: dict[str, Tensor]) -> None:
        """Go on at ``update`` with what `state` gave."""
        self.network_evaluations = network_evaluations
