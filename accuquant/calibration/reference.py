"""What full precision gave for the calibration samples, and which of them an update draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accuquant.core.trajectory import State
from accuquant.pipeline.tape import Tape


@dataclass(frozen=True)
class Reference:
    """Full-precision runs of samples, one tape for each batch of them.

    Attributes:
        settings: number of the sampling setting that each tape is of; all of the first if it is empty.
    """

    tapes: Sequence[Tape]
    settings: Sequence[int] = ()

    @property
    def numbered(self) -> list[tuple[int, Tape]]:
        """Each tape behind the number of its setting."""
        return list(zip(self.settings or [0] * len(self.tapes), self.tapes, strict=True))

    @cached_property
    def main(self) -> Reference:
        """Those of the first setting: what caches and their updates are for."""
        return Reference([tape for setting, tape in self.numbered if setting == 0])

    def of(self, setting: int) -> Tape:
        """The first tape of a setting."""
        return next(tape for own, tape in self.numbered if own == setting)

    @property
    def num_samples(self) -> int:
        return sum(tape.num_samples for tape in self.tapes)

    @cached_property
    def variances(self) -> dict[int, list[Tensor]]:
        """What `gradient: variance` scales by, for each T: mean squares of latents (T + 1,) over tapes of T steps."""
        return {steps: self._variances(steps) for steps in {len(tape) for tape in self.tapes}}

    def _variances(self, num_steps: int) -> list[Tensor]:
        states = list(zip(*(states_of(tape) for tape in self.tapes if len(tape) == num_steps), strict=True))
        count = len(states[0][0].latents)
        return [torch.tensor([_mean_square([s.latents[k] for s in step]) for step in states]) for k in range(count)]

    def first(self, count: int) -> list[Tape]:
        """As many tapes as hold the first ``count`` samples, of each setting."""
        found, held = list[Tape](), dict[int, int]()
        for setting, tape in self.numbered:
            if held.get(setting, 0) < count:
                found.append(tape)
            held[setting] = held.get(setting, 0) + tape.num_samples
        return found


def states_of(tape: Tape) -> list[State]:
    """As recorded, T + 1 of them."""
    return [tape.state(i) for i in range(len(tape) + 1)]


def _mean_square(parts: Sequence[Tensor]) -> float:
    return float(torch.stack([part.double().square().mean() for part in parts]).mean())


@dataclass(frozen=True)
class Draws:
    """Everything random of a calibration, drawn from (seed, stream, number): a resumed run draws what it would have.

    Attributes:
        tapes: how many there are.
    """

    seed: int
    tapes: int

    def tape(self, number: int, stream: int = 2) -> int:
        """Which tape the n-th update is of: in random order, each once before any comes again."""
        return self.one_of(number, self.tapes, stream)

    def one_of(self, number: int, count: int, stream: int = 1) -> int:
        """In random order, each once before any comes again."""
        epoch, position = divmod(number, count)
        return int(torch.randperm(count, generator=self._generator(stream, epoch))[position])

    def _generator(self, stream: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 4 + stream) * 10_000_019 + number)
