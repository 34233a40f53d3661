"""A pipeline as a tape: recorded once, then replayed step by step as a pure, differentiable function of its state.

    tape = record(pipeline, prompt="a cat", num_inference_steps=20)
    state = tape.state(7)            # latents and the solver's history before step 7, as recorded
    state = tape.step(7, state)      # one step, by whatever networks the pipeline holds now

Neither pipeline nor scheduler nor generator takes part in a step: timesteps, conditions, and noise are constants of it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from accuquant.core.trajectory import State
from accuquant.pipeline.lowering import Apply, Instruction, Invoke
from accuquant.pipeline.processors import processing

Components = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Step:
    """The code of one step, and the slots that cross the boundaries before and after it."""

    code: tuple[Apply | Invoke, ...]
    latents_in: tuple[int, ...]
    history_in: tuple[int, ...]
    latents_out: tuple[int, ...]
    history_out: tuple[int, ...]

    @property
    def calls(self) -> list[Invoke]:
        return [one for one in self.code if isinstance(one, Invoke)]


@dataclass(frozen=True)
class Tail:
    """From the last state to what the pipeline returned.

    Attributes:
        output: its slot.
        finished: whether it is what was returned; else a decoder's output in [-1, 1].
    """

    code: tuple[Apply | Invoke, ...]
    latents_in: tuple[int, ...]
    history_in: tuple[int, ...]
    output: int
    finished: bool

    @property
    def decodes(self) -> bool:
        return any(isinstance(one, Invoke) and one.component.endswith(".decode") for one in self.code)


class Tape:
    """The steps of one run of a pipeline.

    Attributes:
        pipeline: whose networks the steps call.
        steps: in the order of the run.
        denoisers: names of the components whose output reaches the latents without passing through another one.
        looped: names of all components that are called in steps.
        tail: from the last state to what was returned, where torch can follow it.
        num_samples: rows of data that the run was of.
    """

    num_samples = 1

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        steps: list[Step],
        states: list[State],
        denoisers: frozenset[str],
        looped: frozenset[str],
        tail: Tail | None,
    ) -> None:
        self.pipeline, self.steps, self.tail = pipeline, steps, tail
        self.denoisers, self.looped = denoisers, looped
        self._states = dict(enumerate(states))

    def __len__(self) -> int:
        return len(self.steps)

    def state(self, i: int) -> State:
        """The state before step ``i`` as recorded; ``state(len(tape))`` is the last."""
        return self._states[i]

    def step(self, i: int, state: State, components: Components | None = None) -> State:
        """The state after step ``i``; differentiable in ``state`` and in the networks.

        Args:
            components: networks to call in the place of the pipeline's, by name.
        """
        step = self.steps[i]
        values = dict(zip(step.latents_in + step.history_in, state.tensors, strict=True))
        run(step.code, values, partial(self._call, values, components or {}))
        return State(tuple(values[n] for n in step.latents_out), tuple(values[n] for n in step.history_out))

    def bound(self, pipeline: DiffusionPipeline) -> Tape:
        """The same run, replayed by the networks of another pipeline of the same model."""
        made = copy.copy(self)
        made.pipeline = pipeline
        return made

    @torch.no_grad()
    def rolling(self, components: Components | None = None) -> Iterator[State]:
        """Each state from the first on, by the networks as they are now, without gradient; none of them is kept."""
        state = self.state(0)
        yield state
        for i in range(len(self)):
            state = self.step(i, state, components)
            yield state

    def rolled(self, components: Components | None = None) -> list[State]:
        """All states from the first on."""
        return list(self.rolling(components))

    def end(self, components: Components | None = None) -> State:
        """The last of them."""
        return deque(self.rolling(components), maxlen=1).pop()

    def ends(self) -> Tape:
        """The same run without the states between its first and its last."""
        made = copy.copy(self)
        made._states = {0: self.state(0), len(self): self.state(len(self))}
        return made

    def per_sample(self, state: State) -> Tensor:
        """(B, N) all that the latents of a state hold of each of the B samples.

        Of halves that begin equal the first counts: DiT's pipeline steps both halves of guidance, and returns that one.
        """
        parts = []
        for latents, first in zip(state.latents, self.state(0).latents, strict=True):
            half, odd = divmod(len(first), 2) if first.dim() else (0, 1)
            if half and not odd and half % self.num_samples == 0 and same(first[:half], first[half:]):
                latents = latents[:half]
            parts.append(latents.reshape(self.num_samples, -1))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def images(self, state: State) -> Tensor | None:
        """Images (B, C, H, W), or films (B, F, C, H, W), in [0, 1] of the last state; None of a run that made none."""
        if self.tail is None or not (self.tail.decodes or self.in_pixels):
            return None
        found = self.returned(state)
        return found if self.tail.finished else (found / 2 + 0.5).clamp(0, 1)

    @property
    def in_pixels(self) -> bool:
        """Whether it is pictures that are denoised: the pipeline has nothing that decodes."""
        parts = self.pipeline.components.values()
        return not any(isinstance(part, nn.Module) and hasattr(part, "decode") for part in parts)

    def returned(self, state: State) -> Tensor:
        """What the pipeline returns after the last state: its latents, or what it makes of them."""
        if self.tail is None:
            return state.latents[0]
        values = dict(zip(self.tail.latents_in + self.tail.history_in, state.tensors, strict=True))
        run(self.tail.code, values, partial(self._call, values, {}))
        return values[self.tail.output]

    def _call(self, values: dict[int, Tensor], given: Components, one: Invoke) -> Sequence[Tensor]:
        component, _, method = one.component.partition(".")
        owner = given.get(component) or getattr(self.pipeline, component)
        args, kwargs = one.given.filled(values)
        with called_as(one, owner):
            return tensors_of((getattr(owner, method) if method else owner)(*args, **kwargs))

    @property
    def nbytes(self) -> int:
        """Memory of constants and states, each tensor counted once."""
        constants = (t for step in self.steps for one in step.code for t in one.given.constants)
        states = (t for state in self._states.values() for t in state.tensors)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*constants, *states)}
        return sum(storages.values())


def run(code: Sequence[Instruction], values: dict[int, Tensor], call: Callable[[Invoke], Sequence[Tensor]]) -> None:
    """Executes instructions; ``values`` gains what they define."""
    for one in code:
        if isinstance(one, Apply):
            args, kwargs = one.given.filled(values)
            result = one.function(*args, **kwargs)
            if isinstance(result, Tensor):
                values[one.outputs[0]] = result
            else:
                values.update(zip(one.outputs, tensors_of(result), strict=True))
        elif isinstance(one, Invoke):
            values.update(zip(one.outputs, call(one), strict=True))


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def called_as(one: Invoke, network: Any) -> Iterator[None]:
    """The mixed precision, the cache context and the attention processors that a network was recorded with."""
    with ExitStack() as stack:
        if one.around.processors is not None:
            stack.enter_context(processing(network, one.around.processors))
        for mode in one.around.autocast:
            stack.enter_context(torch.autocast(mode.device_type, mode.dtype, mode.enabled))
        if one.around.context is not None:
            stack.enter_context(network.cache_context(one.around.context))
        yield


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, NaN with NaN."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(torch.isclose(a, b, 0, 0, equal_nan=True).all()))
