"""Block reconstruction, the baseline: block after block learns to give what it gave in full precision.

Of the two papers it follows, BRECQ (Li et al. 2021, arXiv 2102.05426) takes the block as the unit and its inputs from
the network whose earlier blocks are quantized already; Q-Diffusion (Li et al. 2023, arXiv 2302.04304) takes these
inputs at timesteps spread over the full-precision trajectory. The error is squared and not weighed by gradients, as in
the published code of the latter. Its budget is another: 20000 updates of a block, from thousands of inputs. Here a
recipe says how many, and each batch of inputs serves about ten of them. Nothing knows where an error goes in the steps
that follow: that is what `accuquant.core.trajectory` is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from accuquant.calibration.layers import Trainable, full_precision, trainable_layers
from accuquant.calibration.objectives.base import Cost, GradientSource, Job, Material
from accuquant.core.rounding import decided
from accuquant.pipeline.denoisers import Denoiser
from accuquant.runtime.attention import PRODUCTS
from accuquant.runtime.observe import run_until

# of a transformer, or of one inside a U-Net, and a U-Net's residual blocks
BLOCK = re.compile(r"(?:.*?\.)?(?:transformer_blocks|single_transformer_blocks|blocks|resnets)\.\d+(?=\.)")
LEAST_CALLS = 10  # of a block, whose inputs and outputs are kept
UPDATES_PER_CALL = 10
INPUTS = 3  # stream of the draws


def block_of(layer: str) -> str:
    """The block a layer belongs to; one outside of all blocks is reconstructed by itself."""
    found = BLOCK.match(layer)
    return found[0] if found else layer.partition(f".{PRODUCTS}.")[0]  # of an input of products, what attends


def spread_calls(groups: list[int], iterations: int) -> list[int]:
    """Steps at which a block's inputs are taken, ascending; where there are more than steps, some come again.

    Args:
        groups: timestep group of each step, ascending. All have as many calls: each has scales to learn.
    """
    found, wanted = list[int](), max(LEAST_CALLS, iterations // UPDATES_PER_CALL)
    count = -(-wanted // len(set(groups)))
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        found += [members[(2 * k + 1) * len(members) // (2 * count)] for k in range(count)]
    return found


def evaluations_made(updates: int, iterations: int, calls: int, parts: Collection[tuple[float, float]]) -> int:
    """Forward calls of the network behind so many updates.

    Args:
        parts: `parts_of` the blocks; up to its end the network is run twice for each of ``calls`` inputs and outputs of
            a block, and an update runs the block alone.
    """
    total = 0.0
    for index, (reached, share) in enumerate(parts):
        made = min(updates - index * iterations, iterations)
        if made > 0:
            total += 2 * calls * reached + made * share
    return round(total)


def parts_of(macs: dict[str, int], learning: Collection[str]) -> dict[str, tuple[float, float]]:
    """Blocks with something to learn, in the order in which layers run: shares of the network up to it, and in it."""
    names, total, parts = list(macs), sum(macs.values()), {}
    for block in dict.fromkeys(block_of(name) for name in names if name in learning):
        own = [k for k, name in enumerate(names) if block_of(name) == block]
        reached, alone = sum(macs[n] for n in names[: own[-1] + 1]), sum(macs[names[k]] for k in own)
        parts[block] = (reached / total, alone / total)
    return parts


@dataclass
class BlockCall:
    """One call of a block: the noise level it was made at, what it was given and has to give, and how far that is."""

    level: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    scales: list[Tensor]


@final
class Blocks(GradientSource):
    """The blocks of a network in the order in which they run, each with ``objective.iterations`` updates.

    What else is quantized is part of the blocks as it is. A parameter that layers of several blocks share learns with
    the block it is listed under. Targets are what blocks give along full-precision trajectories.

    Attributes:
        blocks: their names, in order.
        steps: at which each block's inputs are taken: its denoiser may not work in all.
        gathered: number of the block whose ``calls`` are kept.
    """

    trials: ClassVar = ((1, 1.0), (1, 2.0))

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.iterations = material.objective.iterations
        self.layers = trainable_layers(material.network)
        learning: dict[str, list[nn.Parameter]] = {}
        for parameters in self.parameters.values():
            for name, parameter in parameters.items():
                learning.setdefault(name, []).append(parameter)
        self.parts = parts_of(self._macs(), learning)
        self.blocks = list(self.parts)
        self.learning = {
            b: [p for name in learning if block_of(name) == b for p in learning[name]] for b in self.blocks
        }
        self.steps = {block: self._spread(block) for block in self.blocks}
        self.gathered: int | None = None
        self.calls: list[BlockCall] = []

    @classmethod
    def cost(cls, job: Job) -> Cost:
        iterations = job.objective.iterations
        if not iterations:
            return Cost(0)
        sizes = {p.name: p.macs or p.shape[0] * p.shape[1] for p in job.planned if p.spec}
        for p in (p for p in job.planned if p.attention):  # where they run, among the layers of what attends
            names = list(sizes)
            place = max((i for i, n in enumerate(names) if n.startswith(f"{p.module}.")), default=len(names) - 1)
            sizes = {n: sizes.get(n, 0) for n in (*names[: place + 1], *p.layers, *names[place + 1 :])}
        parts = parts_of(sizes, {name for p in job.planned if p.tune for name in p.layers}).values()
        calls = len(spread_calls(job.timestep_groups, iterations))
        layers = [p for p in job.planned if p.is_layer]
        widest = max(p.macs // max(p.shape) for p in layers)  # tokens and channels of a block's input
        kept = 4 * 2 * 2 * job.batch * widest * calls  # float32; with guidance; inputs and targets
        return Cost(evaluations_made(iterations * len(parts), iterations, calls, parts), kept)

    @property
    def updates(self) -> int:
        return self.iterations * len(self.blocks)

    def place(self, update: int) -> tuple[int, int]:
        """Number of the block that is learning, and how many updates it has had."""
        return divmod(update, self.iterations)

    def where(self, update: int) -> str:
        return self.blocks[self.place(update)[0]]

    def done(self, update: int) -> float:
        return self.place(update)[1] / self.iterations

    def gradient(self, update: int) -> tuple[float, dict[str, Any]]:
        """Add the gradient of one call's squared error to the block's parameters.

        The error is relative to the squared change that the block makes to its input.
        """
        index, position = self.place(update)
        if index != self.gathered:
            self.gather(index)
        call = self.calls[self.material.draws.one_of(position, len(self.calls))]
        for clock in {layer.clock for layer in self.layers.values()}:
            clock.set(call.level)
        outputs = _tensors(self._module(index)(*call.args, **call.kwargs))
        known = zip(outputs, call.targets, call.scales, strict=True)
        loss = torch.stack([(o - t).float().square().mean() / scale for o, t, scale in known]).mean()
        count = sum(target.numel() for target in call.targets)  # float16 has no room for the gradients of a mean
        (loss * count).backward()
        self.scaled_back(count)
        if update == self.updates - 1:
            self.calls, self.gathered = [], None
        calls = max(map(len, self.steps.values()))
        self.network_evaluations = evaluations_made(update + 1, self.iterations, calls, self.parts.values())
        return float(loss.detach()), {"block": self.blocks[index]}

    def _module(self, index: int) -> nn.Module:
        return self.material.network.get_submodule(self.blocks[index])

    @torch.no_grad()
    def gather(self, index: int) -> None:
        """A batch at each step: inputs with all that is quantized so far, outputs in full precision."""
        finished = self.blocks[:index]
        for name, layer in self.layers.items():
            if layer.rounding_logits is not None and block_of(name) in finished:
                layer.rounding_logits.copy_(decided(layer.rounding_logits))
        for block, parameters in self.learning.items():
            for parameter in parameters:
                parameter.requires_grad_(block == self.blocks[index])
        block, module, of, calls = self.blocks[index], self._module(index), self.material, list[BlockCall]()
        denoiser, self.calls = self._denoiser(block), []
        for k, step in enumerate(self.steps[block]):
            tape = of.reference.tapes[of.draws.tape(index * len(self.steps[block]) + k, stream=INPUTS)]
            step, level = of.step_of(tape, step, denoiser)
            # guidance may call the network more than once in a step: each call in its turn
            times = k % max(1, sum(one.component == denoiser.name for one in tape.steps[step].calls))
            run = partial(tape.step, step, tape.state(step))
            with full_precision(self.layers.values()):
                targets = _tensors(run_until(module, run, times).returned)
            call = run_until(module, run, times)
            entered = next((t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)), None)
            scales = [_displacement(module, entered, target) for target in targets]
            calls.append(BlockCall(level, call.args, call.kwargs, targets, scales))
        self.gathered, self.calls = index, calls

    @torch.no_grad()
    def _macs(self) -> dict[str, int]:
        """Of each quantized layer, in the order in which they run; a U-Net's modules are listed in another."""
        found, names = dict[str, int](), {layer: name for name, layer in self.layers.items()}

        def count(layer: Trainable, tokens: Tensor) -> None:
            name = names[layer]
            found[name] = found.get(name, 0) + tokens.numel() * layer.out_features

        for layer in self.layers.values():
            layer.observer = count
        try:
            tape = self.material.tape(0)
            for step in sorted({min(one.levels) for one in self.material.denoisers}):
                tape.step(step, tape.state(step))
        finally:
            for layer in self.layers.values():
                layer.observer = None
        return found

    def _denoiser(self, block: str) -> Denoiser:
        """Whose block it is."""
        return next(one for one in self.material.denoisers if block.startswith(one.prefix))

    def _spread(self, block: str) -> list[int]:
        """Steps of its denoiser, the same number of each timestep group."""
        steps, groups = sorted(self._denoiser(block).levels), self.material.timestep_groups
        return [steps[k] for k in spread_calls([groups[i] for i in steps], self.iterations)]


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]


def _displacement(module: nn.Module, given: Tensor | None, target: Tensor) -> Tensor:
    """Mean square of what a block adds to its input; of the output, where that is another tensor altogether."""
    if given is not None and given.shape == target.shape and not isinstance(module, Trainable):
        target = target - given
    return target.float().square().mean().clamp_min(1e-20)
