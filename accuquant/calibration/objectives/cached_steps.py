"""Steps of a tape under a feature cache, whose features are part of the state and can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accuquant.core.forecasts import Memory
from accuquant.core.trajectory import State
from accuquant.pipeline.tape import Tape
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.state import Key, Memories


@dataclass(frozen=True)
class Kept:
    """What a forecast's memory is made of, beside its tensors."""

    steps: tuple[int, ...]
    factors: int
    has_input: bool
    has_ratio: bool

    def memory(self, tensors: list[Tensor]) -> Memory:
        """Takes its own off the front of ``tensors``."""
        factors = tuple(tensors.pop(0) for _ in range(self.factors))
        input, ratio = (tensors.pop(0) if there else None for there in (self.has_input, self.has_ratio))
        return Memory(self.steps, factors, input, ratio)


Layout = dict[Key, tuple[Kept | None, ...]]


class CachedSteps:
    """The step function of a tape whose denoiser has a cache on: `core.trajectory` follows its features as well.

    Args:
        levels: the noise level of each step, as the cache's stored timesteps are.
        full_steps: that are computed in full; each step before the first one would have nothing to forecast from.
    """

    def __init__(self, tape: Tape, controller: Controller, levels: Sequence[float], full_steps: Sequence[int]) -> None:
        self.tape, self.controller, self.levels = tape, controller, levels
        self.full_steps = frozenset(full_steps)
        self.layouts: dict[int, Layout] = {}  # of the features before a step
        self.full_evaluations = 0

    def __call__(self, i: int, state: State) -> State:
        full = i in self.full_steps
        self.full_evaluations += full
        layout = self.layouts[i] if state.features else Layout()
        self.controller.drive(i, self.levels[i], full, memories_of(layout, state.features))
        after = self.tape.step(i, State(state.latents, state.history))
        features = state.features
        if full:
            layout, features = taken_apart(self.controller.state.memories)
        self.layouts[i + 1] = layout
        return State(after.latents, after.history, features)

    @torch.no_grad()
    def before(self, i: int, states: Sequence[State]) -> State:
        """The state before full step ``i``, with what the cache has kept of the full steps before it.

        Args:
            states: of the trajectory up to there, without features.
        """
        history = self.controller.plan.highest_order
        earlier = sorted(step for step in self.full_steps if step < i)[-history:] if history else []
        features: tuple[Tensor, ...] = ()
        for step in earlier:
            found = states[step]
            features = self(step, State(found.latents, found.history, features)).features
            for between in range(step + 1, i + 1):
                self.layouts[between] = self.layouts[step + 1]
        return State(states[i].latents, states[i].history, features)


def taken_apart(memories: Memories) -> tuple[Layout, tuple[Tensor, ...]]:
    """The tensors of all memories, and how to put them together again."""
    layout: Layout = {}
    tensors: list[Tensor] = []
    for key, found in memories.items():
        layout[key] = tuple(
            None if m is None else Kept(m.steps, len(m.factors), m.input is not None, m.ratio is not None)
            for m in found
        )
        tensors += [t for m in found if m is not None for t in m.tensors()]
    return layout, tuple(tensors)


def memories_of(layout: Layout, tensors: tuple[Tensor, ...]) -> Memories:
    left = list(tensors)
    return {key: tuple(None if k is None else k.memory(left) for k in kept) for key, kept in layout.items()}
