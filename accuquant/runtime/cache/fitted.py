"""What calibration finds for a cache: tensors that an export keeps beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.correction import apply_affine
from accuquant.core.forecasts import weighted
from accuquant.runtime.cache.plan import CachePlan

Noise = dict[str, tuple[float, float]]  # module -> sigma^2 over ||O||^2 and over ||I||^2, see `caching.noise`
NUMBERS, NAMES = (list, int | float, "a list of numbers"), (list, str, "a list of names")
KEYS: dict[str, tuple[Any, Any, str]] = {  # of what is stored, and its types
    "noise": (dict, list | tuple, "two numbers for each module"),
    "correction_timesteps": NUMBERS,
    "correction_full_timesteps": NUMBERS,
    "correction_channels": (dict, int, "a whole number for each module"),
    "learned_timesteps": NUMBERS,
    "learned_modules": NAMES,
}


class Shares(nn.ParameterList):
    """(M, 2) of each step. As forward gives it: offloading brings what a module holds when its forward is called."""

    def forward(self, step: int) -> Tensor:
        return self.get_parameter(str(step))


class Fitted(nn.Module):
    """What calibration finds for a cache: a slope and an intercept of every channel of the cached modules' outputs, and
    how much a forecast takes of the last output and of its change; and how noisy these outputs are. A step between the
    timesteps takes the nearest.

    Args:
        timesteps: S values, of skipped steps, whose forecasts are corrected.
        channels: of each cached module's output.
        full_timesteps: F values, of full steps, whose computed outputs are corrected.
        learned_timesteps: L values, of skipped steps, whose forecasts are weighted, before they are corrected.
        learned_modules: M names of those that are.
        noise: of each cached module, for forecasts that know it.
    """

    def __init__(
        self,
        timesteps: Sequence[float] = (),
        channels: dict[str, int] | None = None,
        full_timesteps: Sequence[float] = (),
        learned_timesteps: Sequence[float] = (),
        learned_modules: Sequence[str] = (),
        noise: Noise | None = None,
    ) -> None:
        super().__init__()
        self.noise = noise
        self.timesteps, self.full_timesteps = list(timesteps), list(full_timesteps)
        self.learned_timesteps, self.learned_modules = list(learned_timesteps), list(learned_modules)
        ones = torch.ones(len(learned_modules), 2)
        self.units: list[Tensor] | None = (
            None  # of the last output's weights, while they are learned: (M,) at each step
        )
        # one tensor a step, so that those of a gap can be one while they are learned
        self.learned = Shares(nn.Parameter(ones.clone(), requires_grad=False) for _ in learned_timesteps)
        self.channels, rows = dict(channels or {}), len(timesteps) + len(full_timesteps)
        for name, count in self.channels.items():
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
    def settled(self) -> Fitted:
        """Weights as they are stored: in no units, and those of each step for itself."""
        if self.units is not None:
            found = [weights.detach().clone() for weights in self.learned]
            for weights, unit in zip(found, self.units, strict=True):
                weights[:, 0] = 1 + unit * (weights[:, 0] - 1)
            self.learned = Shares(nn.Parameter(weights, requires_grad=False) for weights in found)
            self.units = None
        return self

    def with_learned(self, other: Fitted | None) -> Fitted:
        """This one with the learned weights of another."""
        if other is not None:
            self.learned_timesteps, self.learned_modules = other.learned_timesteps, other.learned_modules
            self.learned = other.learned
        return self

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Fitted:
        """Empty tensors of the sizes in an export's section ``cache``, and the noise that it holds.

        Raises:
            ValueError: a value is none that could be stored there.
        """
        given = {key: stored[key] for key in KEYS if stored.get(key) is not None}
        for key, value in given.items():
            kind, of, words = KEYS[key]
            inside = value.values() if isinstance(value, dict) else value
            if not isinstance(value, kind) or not all(isinstance(v, of) for v in inside):
                raise ValueError(f"{key} must be {words} (found {str(value)[:60]})")
        if wrong := [name for name, pair in given.get("noise", {}).items() if len(pair) != 2]:
            raise ValueError(f"noise of {wrong[0]} must be two numbers, of output and of input")
        noise = {name: (float(out), float(into)) for name, (out, into) in given.get("noise", {}).items()}
        return cls(
            given.get("correction_timesteps", ()),
            given.get("correction_channels"),
            given.get("correction_full_timesteps", ()),
            given.get("learned_timesteps", ()),
            given.get("learned_modules", ()),
            noise or None,
        )

    def to_dict(self, plan: CachePlan) -> dict[str, Any]:
        """Its part of that section, as far as the plan makes use of it; the tensors are stored as such."""
        found: dict[str, Any] = {}
        if plan.uses_noise and self.noise is not None:
            found["noise"] = {name: list(pair) for name, pair in self.noise.items()}
        if plan.fits:
            found["correction_timesteps"] = list(self.timesteps)
            found["correction_full_timesteps"] = list(self.full_timesteps)
            found["correction_channels"] = self.channels
        if plan.learned:
            found["learned_timesteps"] = list(self.learned_timesteps)
            found["learned_modules"] = list(self.learned_modules)
        return found


def _nearest(known: list[float], timestep: float) -> int:
    return min(range(len(known)), key=lambda i: abs(known[i] - timestep))
