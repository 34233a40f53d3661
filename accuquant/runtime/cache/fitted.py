"""What calibration finds for a cache: tensors that an export keeps beside its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accuquant.core.correction import apply_affine
from accuquant.core.forecasts import weighted
from accuquant.recipe import Cache


class Shares(nn.ParameterList):
    """(M, 2) of each step. As forward gives it: offloading brings what a module holds when its forward is called."""

    def forward(self, step: int) -> Tensor:
        return self.get_parameter(str(step))


class Correction(nn.Module):
    """What calibration finds for a cache: a slope and an intercept of every channel of the cached modules' outputs, and
    how much a forecast takes of the last output and of its change. A step between the timesteps takes the nearest.

    Args:
        timesteps: S values, of skipped steps, whose forecasts are corrected.
        channels: of each cached module's output.
        full_timesteps: F values, of full steps, whose computed outputs are corrected.
        learned_timesteps: L values, of skipped steps, whose forecasts are weighted, before they are corrected.
        learned_modules: M names of those that are.
    """

    def __init__(
        self,
        timesteps: Sequence[float] = (),
        channels: dict[str, int] | None = None,
        full_timesteps: Sequence[float] = (),
        learned_timesteps: Sequence[float] = (),
        learned_modules: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.timesteps, self.full_timesteps = list(timesteps), list(full_timesteps)
        self.learned_timesteps, self.learned_modules = list(learned_timesteps), list(learned_modules)
        ones = torch.ones(len(learned_modules), 2)
        self.units: list[Tensor] | None = (
            None  # of the last output's weights, while they are learned: (M,) at each step
        )
        # one tensor a step, so that those of a gap can be one while they are learned
        self.learned = Shares(nn.Parameter(ones.clone(), requires_grad=False) for _ in learned_timesteps)
        rows = len(timesteps) + len(full_timesteps)
        for name, count in (channels or {}).items():
            identity = torch.stack([torch.ones(rows, count), torch.zeros(rows, count)], 1)
            self.register_parameter(name.replace(".", "/"), nn.Parameter(identity, requires_grad=False))

    def forward(self, module: str) -> Tensor:
        """(S + F, 2, C) of a module."""
        return self.get_parameter(module.replace(".", "/"))

    def correct(self, module: str, output: Tensor, timestep: float, computed: bool) -> Tensor:
        """A forecast, or with ``computed`` what a full step gave; as it is where nothing was fitted to its kind."""
        first, known = (len(self.timesteps), self.full_timesteps) if computed else (0, self.timesteps)
        if not known:
            return output
        return apply_affine(self(module)[first + _nearest(known, timestep)], output)

    def weigh(self, module: str, forecast: Tensor, last: Tensor, timestep: float) -> Tensor:
        """A forecast with the learned weights of ``last``, the output it begins from, and of its change."""
        step, index = _nearest(self.learned_timesteps, timestep), self.learned_modules.index(module)
        a, b = self.learned.forward(step)[index].unbind()
        if self.units is not None:
            a = 1 + self.units[step][index] * (a - 1)
        return weighted(forecast, last, a, b)

    @torch.no_grad()
    def settled(self) -> Correction:
        """Weights as they are stored: in no units, and those of each step for itself."""
        if self.units is not None:
            found = [weights.detach().clone() for weights in self.learned]
            for weights, unit in zip(found, self.units, strict=True):
                weights[:, 0] = 1 + unit * (weights[:, 0] - 1)
            self.learned = Shares(nn.Parameter(weights, requires_grad=False) for weights in found)
            self.units = None
        return self

    def named_in(self, config: Cache) -> Cache:
        """The config of a cache that has these learned weights."""
        names = {"learned_timesteps": tuple(self.learned_timesteps), "learned_modules": tuple(self.learned_modules)}
        return config.model_copy(update=names)

    def with_learned(self, other: Correction | None) -> Correction:
        """This one with the learned weights of another."""
        if other is not None:
            self.learned_timesteps, self.learned_modules = other.learned_timesteps, other.learned_modules
            self.learned = other.learned
        return self


def _nearest(known: list[float], timestep: float) -> int:
    return min(range(len(known)), key=lambda i: abs(known[i] - timestep))
