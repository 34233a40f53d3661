"""What full precision gave for the calibration samples, and which of them an update draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accuquant.model.rollout import Conditions


@dataclass
class Reference:
    """Full-precision trajectories of the calibration samples.

    Attributes:
        latents: (T + 1, B, C, H, W); predictions: (T, B, C, H, W).
        conditions: their noise and conditioning.
    """

    latents: Tensor
    predictions: Tensor
    conditions: Conditions

    @cached_property
    def variances(self) -> Tensor:
        """(T + 1,) mean square of the latents, the marginal variance that `gradient: variance` scales by."""
        return self.latents.double().square().flatten(1).mean(1)

    def take(self, index: Tensor) -> Reference:
        return Reference(self.latents[:, index], self.predictions[:, index], self.conditions.take(index))

    def first(self, count: int) -> Reference:
        """At most ``count`` samples."""
        return self.take(torch.arange(min(count, len(self.conditions)), device=self.latents.device))

    def join(self, other: Reference) -> Reference:
        latents, predictions = (
            torch.cat(pair, 1) for pair in ((self.latents, other.latents), (self.predictions, other.predictions))
        )
        return Reference(latents, predictions, Conditions.join([self.conditions, other.conditions]))


@dataclass(frozen=True)
class Draws:
    """Everything random of a calibration, drawn from (seed, stream, number): a resumed run draws what it would have.

    Attributes:
        total: samples there are; batch_size: of a draw.
    """

    seed: int
    total: int
    batch_size: int
    device: torch.device

    def batch(self, number: int, stream: int = 2) -> Tensor:
        """Samples of the n-th batch, as an index on the device."""
        chosen = torch.randperm(self.total, generator=self._generator(stream, number))[: self.batch_size]
        return chosen.to(self.device)

    def one_of(self, number: int, count: int) -> int:
        """In random order, each once before any comes again."""
        epoch, position = divmod(number, count)
        return int(torch.randperm(count, generator=self._generator(1, epoch))[position])

    def _generator(self, stream: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 4 + stream) * 10_000_019 + number)
