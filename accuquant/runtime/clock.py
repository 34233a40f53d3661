"""What all quantized layers of a model share: which timestep group the denoiser is in, and the input quantized last."""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.errors import AccuQuantError


class LastInput:
    """The tensor that was quantized last and what it became: Q, K and V read one tensor, which is quantized once.

    That it was written to is known by its version, which writes through ``.data`` or a NumPy array of the same memory
    do not move: between two layers they are not seen. Of inference_mode's tensors, which have none, nothing is kept.
    """

    def __init__(self) -> None:
        self.kept: tuple[Any, ...] | None = None

    def find(self, x: Tensor, how: tuple[Any, ...]) -> Any:
        """What ``x`` became in this way, or None; ``how`` is compared by identity."""
        kept = self.kept  # one read: another thread may write
        if kept is None or kept[0]() is not x or kept[1] != _versions(x, *how):
            return None
        return kept[3] if all(a is b for a, b in zip(kept[2], how, strict=True)) else None

    def keep(self, x: Tensor, how: tuple[Any, ...], found: Any) -> None:
        self.kept = (weakref.ref(x, self._drop), _versions(x, *how), how, found)

    def _drop(self, dead: Any) -> None:
        self.kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastInput:
        return LastInput()

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": None}


def _versions(*found: Any) -> tuple[int, ...]:
    """Of each tensor among them, how often it was written to."""
    return tuple(0 if t.is_inference() else t._version for t in found if isinstance(t, Tensor))


class StepClock:
    """Maps the timestep a denoiser is called with to a group of static activation scales.

    Groups are keyed by the timestep's *value* (sigma for flow models), not by its index, so that sampling with another
    number of steps than calibration still finds the scales measured at that noise level.

    Args:
        edges: descending timestep values between neighbouring groups; ``len(edges) + 1`` groups.
    """

    def __init__(self, edges: list[float]) -> None:
        if any(a <= b for a, b in itertools.pairwise(edges)):
            raise AccuQuantError(f"timestep edges must descend strictly, found {edges}")
        self.edges = edges
        self.position = 0
        # the current group: a tensor, so that one graph serves all groups
        self.index = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._group: int | None = 0  # the same number, where it is known without asking the device
        self.last_input = LastInput()

    @classmethod
    def from_timesteps(cls, timesteps: Tensor, num_groups: int) -> StepClock:
        """Cut a descending schedule of T timesteps into ``num_groups`` runs of nearly equal length."""
        values = [float(t) for t in timesteps]
        starts = [round(k * len(values) / num_groups) for k in range(1, num_groups)]
        return cls([(values[s - 1] + values[s]) / 2 for s in starts])

    @property
    def num_groups(self) -> int:
        return len(self.edges) + 1

    def group_of(self, timestep: float) -> int:
        return sum(timestep < edge for edge in self.edges)

    def groups(self, timesteps: Tensor) -> list[int]:
        """Of each step of a schedule (T,)."""
        return [self.group_of(float(t)) for t in timesteps]

    @property
    def group(self) -> int:
        if self._group is None:
            self._group = int(self.index)
        return self._group

    def set(self, timestep: float | Tensor) -> None:
        """Of a tensor the first value counts. Nothing is read back from its device, so this also runs in a graph."""
        device = timestep.device if isinstance(timestep, Tensor) else "cpu"  # whatever the default device is
        value = torch.as_tensor(timestep, dtype=torch.float64, device=device).flatten()[:1]
        edges = torch.tensor(self.edges, dtype=torch.float64, device=value.device)
        self.index, self._group = (value < edges).sum(0, keepdim=True), None

    def attach(self, denoiser: nn.Module) -> None:
        """Follow the denoiser's calls: the argument named ``timestep`` is read before each forward pass.

        The clock becomes ``denoiser.step_clock``; a deep copy of the denoiser has, and follows, a clock of its own.

        Raises:
            AccuQuantError: the denoiser's forward has no such argument.
        """
        parameters = list(inspect.signature(denoiser.forward).parameters)
        if "timestep" not in parameters:
            raise AccuQuantError(f"{type(denoiser).__name__}.forward has no argument 'timestep': it cannot be followed")
        self.position = parameters.index("timestep")
        denoiser.step_clock = self  # type: ignore[assignment]
        denoiser.register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    clock: StepClock = denoiser.step_clock
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[clock.position]
    clock.set(timestep)
