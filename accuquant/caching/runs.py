"""The full runs that a search of a cache compares with, and how near another run comes to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from accuquant.core.metrics import relative_l2
from accuquant.core.trajectory import State
from accuquant.pipeline.tape import Tape


@dataclass(frozen=True)
class Runs:
    """What a search compares with: full runs without a cache.

    Attributes:
        denoiser: that the cache is for.
        levels: the noise level of each step.
        samples: that most of the search is made on.
        few: (samples, samples of a tape) -> tapes of the first calibration samples.
        choice: tapes that a forecast is chosen by.
    """

    denoiser: nn.Module
    levels: Sequence[float]
    samples: int
    few: Callable[[int, int], list[Tape]]
    choice: Callable[[], list[Tape]]

    @property
    def num_steps(self) -> int:
        return len(self.levels)

    def usual(self) -> list[Tape]:
        """Those that most of a search is made on."""
        return self.few(self.samples, self.samples)

    def listed(self, steps: Sequence[int]) -> dict[str, Any]:
        """How a plan says which steps are full: by noise level, that other numbers of steps find them as well.

        By number where two steps are at one level, as Heun's are.
        """
        if len(set(self.levels)) < len(self.levels):
            return {"full_steps": tuple(steps)}
        return {"full_timesteps": tuple(self.levels[i] for i in steps)}


def errors_from(tape: Tape, state: State, images: Tensor | None) -> list[Tensor]:
    """Relative L2 (B,) of each sample's final latents, and of its images where there are some."""
    errors = [relative_l2(tape.per_sample(state), tape.per_sample(tape.state(len(tape))))]
    if images is not None and (made := tape.images(state)) is not None and len(made) == tape.num_samples:
        errors.append(relative_l2(made, images))
    return errors
