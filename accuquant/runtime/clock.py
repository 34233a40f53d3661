"""What all quantized layers of a model share: which timestep group the denoiser is in, and the input quantized last."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.coordinate import Coordinate
from accuquant.errors import AccuQuantError, nearest


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
    """Maps the noise level a denoiser is called at to a group of static activation scales.

    Groups are keyed by the level's *value* (a timestep, a sigma), not by its index, so that sampling with another
    number of steps than calibration still finds the scales measured at that noise level.

    Args:
        edges: descending levels between neighbouring groups; ``len(edges) + 1`` groups.
        coordinate: the argument of the denoiser that says its level.
    """

    def __init__(self, edges: list[float], coordinate: Coordinate | None = None) -> None:
        if any(a <= b for a, b in itertools.pairwise(edges)):
            raise AccuQuantError(f"timestep edges must descend strictly, found {edges}")
        self.edges, self.coordinate = edges, coordinate or Coordinate()
        self.position = 0
        self._in_graphs = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._of_thread = threading.local()  # threads may share a denoiser
        self.last_input = LastInput()

    @classmethod
    def from_timesteps(
        cls, timesteps: Iterable[Any], num_groups: int, coordinate: Coordinate | None = None
    ) -> StepClock:
        """Cut a descending schedule of T levels into ``num_groups`` runs of nearly equal length.

        Levels that are equal (two steps may round to one value in bfloat16) are of one group; there may be fewer then.
        """
        values = [float(t) for t in timesteps]
        starts = [round(k * len(values) / num_groups) for k in range(1, num_groups)]
        edges = [(values[s - 1] + values[s]) / 2 for s in starts if values[s - 1] > values[s]]
        return cls(edges, coordinate)

    @property
    def num_groups(self) -> int:
        return len(self.edges) + 1

    def group_of(self, timestep: float) -> int:
        return sum(timestep < edge for edge in self.edges)

    def groups(self, timesteps: Iterable[Any]) -> list[int]:
        """Of each step of a schedule of T levels."""
        return [self.group_of(float(t)) for t in timesteps]

    @property
    def index(self) -> Tensor:
        """(1,) the current group: a tensor, so that one graph serves all groups."""
        if torch.compiler.is_compiling():
            return self._in_graphs
        index: Tensor = getattr(self._of_thread, "index", self._in_graphs)
        return index

    def own(self, values: Tensor) -> Tensor:
        """(1,) that of the current group, of (groups,) values."""
        return values.index_select(0, self.index.to(values.device))

    @property
    def group(self) -> int:
        """The current group; the device is asked once."""
        known: int | None = getattr(self._of_thread, "group", None)
        if known is None:
            known = self._of_thread.group = int(self.index)
        return known

    def set(self, timestep: float | Tensor) -> None:
        """Have the level be this one; the largest, where there is one for each sample or token.

        Nothing is read back from a tensor's device, so this also runs in a graph.
        """
        device = timestep.device if isinstance(timestep, Tensor) else "cpu"  # whatever the default device is
        value = torch.as_tensor(timestep, dtype=torch.float64, device=device).flatten().amax(0, keepdim=True)
        edges = torch.tensor(self.edges, dtype=torch.float64, device=value.device)
        self._in_graphs = (value < edges).sum(0, keepdim=True)
        if not torch.compiler.is_compiling():
            self._of_thread.index, self._of_thread.group = self._in_graphs, None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_thread = threading.local()

    def attach(self, denoiser: nn.Module) -> None:
        """Follow the denoiser's calls: the argument that says the level is read before each forward pass.

        The clock becomes ``denoiser.step_clock``; a deep copy of the denoiser has, and follows, a clock of its own.

        Raises:
            AccuQuantError: the denoiser's forward has no such argument.
        """
        parameters, argument = list(inspect.signature(denoiser.forward).parameters), self.coordinate.argument
        if argument not in parameters:
            raise AccuQuantError(
                f"{type(denoiser).__name__}.forward has no argument {argument!r}{nearest(argument, parameters)}: it "
                "cannot be followed"
            )
        self.position = parameters.index(argument)
        denoiser.step_clock = self  # type: ignore[assignment]
        denoiser.register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    clock: StepClock = denoiser.step_clock
    argument = clock.coordinate.argument
    given = kwargs[argument] if argument in kwargs else args[clock.position]
    clock.set(given if clock.coordinate.falls else -given)
