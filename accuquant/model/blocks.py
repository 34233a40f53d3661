"""Block reconstruction, the baseline: block after block learns to give what it gave in full precision.

Of the two papers it follows, BRECQ (Li et al. 2021, arXiv 2102.05426) takes the block as the unit and its inputs from
the network whose earlier blocks are quantized already; Q-Diffusion (Li et al. 2023, arXiv 2302.04304) takes these
inputs at timesteps spread over the full-precision trajectory. The error is squared and not weighed by gradients, as in
the published code of the latter, which makes 20000 updates of a block; a recipe says how many here. Nothing knows where
an error goes in the steps that follow: that is what `accuquant.core.objective` is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.model.clock import StepClock
from accuquant.model.layers import full_precision, trainable_layers
from accuquant.model.rollout import Conditions, Rollout

# of a transformer, or of one inside a U-Net, and a U-Net's residual blocks
BLOCK = re.compile(r"(?:.*?\.)?(?:transformer_blocks|single_transformer_blocks|blocks|resnets)\.\d+(?=\.)")
LEAST_STEPS = 10  # of the trajectory, at which a block's inputs are taken


def block_of(layer: str) -> str:
    """The block a layer belongs to; one outside of all blocks is reconstructed by itself."""
    found = BLOCK.match(layer)
    return found[0] if found else layer


def evaluations_made(updates: int, iterations: int, num_blocks: int, num_steps: int) -> int:
    """Forward calls of the network behind so many updates; a block counts as one of ``num_blocks`` equal parts.

    For its inputs and its outputs the network is run twice, up to the block, at each of ``num_steps`` timesteps.
    """
    reached = -(-updates // iterations)
    return round((num_steps * reached * (reached + 1) + updates) / num_blocks)


@dataclass
class Call:
    """One call of a block: the step it was made at, what it was given, and what it has to give."""

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]


class Reconstruction:
    """The blocks of a network in the order in which they run, each with ``iterations`` updates.

    Args:
        layers: those to be tuned; what else is quantized is part of the blocks as it is.
        latents: (T + 1, B, C, H, W) of full-precision trajectories, whose blocks' outputs are the targets.
        batch: samples of the n-th batch, as an index into ``conditions``.
    """

    def __init__(
        self,
        rollout: Rollout,
        clock: StepClock,
        layers: Iterable[str],
        latents: Tensor,
        conditions: Conditions,
        iterations: int,
        batch: Callable[[int], Tensor],
    ) -> None:
        self.rollout, self.clock, self.latents, self.conditions = rollout, clock, latents, conditions
        self.iterations, self.batch = iterations, batch
        self.blocks = list(dict.fromkeys(block_of(name) for name in self._order(set(layers))))
        self.steps = spread_steps(clock.groups(rollout.timesteps))
        self.gathered: int | None = None
        self.calls: list[Call] = []

    @property
    def updates(self) -> int:
        return self.iterations * len(self.blocks)

    def place(self, update: int) -> tuple[int, int]:
        """Number of the block that is learning, and how many updates it has had."""
        return divmod(update, self.iterations)

    def evaluations(self, updates: int) -> int:
        return evaluations_made(updates, self.iterations, len(self.blocks), len(self.steps))

    def gradient(self, update: int, pick: Callable[[int, int], int]) -> float:
        """Add the gradient of one call's squared error, relative to how far the block moves its input.

        Args:
            pick: of the n-th update of a block, which of so many calls.
        """
        index, _ = self.place(update)
        if index != self.gathered:
            self._gather(index)
        call = self.calls[pick(update, len(self.calls))]
        self.clock.set(self.rollout.timesteps[call.step])
        outputs = _tensors(self._module(index)(*call.args, **call.kwargs))
        moved = [_displacement(target, call) for target in call.targets]
        pairs = zip(outputs, call.targets, moved, strict=True)
        loss = torch.stack([(o - t).float().square().mean() / m for o, t, m in pairs]).mean()
        loss.backward()
        return float(loss.detach())

    def _module(self, index: int) -> nn.Module:
        return self.rollout.denoiser.get_submodule(self.blocks[index])

    @torch.no_grad()
    def _gather(self, index: int) -> None:
        """A batch at each step: inputs with all that is quantized so far, outputs in full precision."""
        self.gathered, self.calls = index, []
        module = self._module(index)
        for k, step in enumerate(self.steps):
            samples = self.batch(index * len(self.steps) + k)
            given = (step, self.latents[step, samples], self.conditions.take(samples))
            with full_precision(trainable_layers(self.rollout.denoiser).values()):
                targets = _tensors(self._stopped_after(module, *given)[2])
            args, kwargs, _ = self._stopped_after(module, *given)
            self.calls.append(Call(step, args, kwargs, targets))

    def _stopped_after(self, module: nn.Module, step: int, x: Tensor, conditions: Conditions) -> tuple[Any, ...]:
        """Arguments, keyword arguments and output of the module's call; what comes after it is not computed."""

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            raise _Reached(args, kwargs, output)

        handle = module.register_forward_hook(stop, with_kwargs=True)
        try:
            self.rollout.predict(step, x, conditions)
        except _Reached as reached:
            return reached.args
        finally:
            handle.remove()
        raise AssertionError("a layer that ran before does not run now")

    @torch.no_grad()
    def _order(self, names: set[str]) -> list[str]:
        """Names of the layers as they run; a U-Net's modules are in another order."""
        seen: dict[str, None] = {}
        layers = trainable_layers(self.rollout.denoiser)
        for name in names:
            layers[name].observer = lambda layer, tokens: seen.setdefault(layer.name)
        try:
            self.rollout.predict(0, self.latents[0, :1], self.conditions.first(1))
        finally:
            for name in names:
                layers[name].observer = None
        return list(seen)


class _Reached(Exception):
    """Carries what was wanted out of a forward pass whose rest is not."""


def spread_steps(groups: list[int]) -> list[int]:
    """At least ``LEAST_STEPS`` of the steps, evenly spread, and some of every timestep group: each has a scale.

    Args:
        groups: group of each step, ascending.
    """
    found = []
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        count = min(len(members), -(-LEAST_STEPS // len(set(groups))))
        found += [members[(2 * k + 1) * len(members) // (2 * count)] for k in range(count)]
    return found


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]


def _displacement(target: Tensor, call: Call) -> Tensor:
    given = next((t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)), target)
    residual = given is not target and given.shape == target.shape
    return (target - given if residual else target).float().square().mean().clamp_min(1e-20)
