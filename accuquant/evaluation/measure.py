"""What is measured of a model against full precision: latents, images, modules, cost, and what its cache did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.calibration.opened import OpenedModel
from accuquant.core.metrics import relative_l2
from accuquant.core.schedule import RCS
from accuquant.core.trajectory import State
from accuquant.evaluation.metrics import Sides, measured
from accuquant.pipeline.data import Samples, held_out_samples
from accuquant.pipeline.rows import asked_for
from accuquant.pipeline.tape import Components, Tape
from accuquant.progress import Reporter
from accuquant.recipe import Evaluation, Recipe
from accuquant.runtime.cache.attach import cached, controller_of, uncached
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.clock import StepClock
from accuquant.runtime.observe import Call, observed

MODULE_ERROR_STEPS = 10  # steps of the trajectory at which every module's own error is measured
MODULE_ERROR_SAMPLES = 8


@dataclass(frozen=True)
class Sampled:
    """What a model made of samples.

    Attributes:
        errors: (T + 1, B), relative L2 of each sample's latents before each step and after the last.
        latents: (B, N), the last ones.
        finals: the last state of each tape.
    """

    errors: Tensor
    latents: Tensor
    finals: list[State]


@dataclass(frozen=True)
class HeldOut:
    """Full-precision side of the comparison: samples, their tapes, and what these hold."""

    samples: Samples
    tapes: list[Tape]

    @property
    def latents(self) -> Tensor:
        """(B, N), the last ones of all samples."""
        return last_latents(self.tapes, self.finals)

    @property
    def inputs(self) -> list[Any]:
        """What each sample was asked for."""
        return [asked_for(row) for row in self.samples.rows]

    @property
    def finals(self) -> list[State]:
        return [tape.state(len(tape)) for tape in self.tapes]

    def frames(self, finals: list[State]) -> Tensor | None:
        """What the pipeline makes of the last states of a model: (B, F, C, H, W) in [0, 1], an image being one frame.

        None where it decodes nothing, or something that is no picture, as sound.
        """
        found = list[Tensor]()
        for tape, state in zip(self.tapes, finals, strict=True):
            made = tape.images(state)
            if made is None or made.dim() not in (4, 5) or made.shape[-3] not in (1, 3):
                return None
            found.append(made if made.dim() == 5 else made[:, None])
        return torch.cat(found).float()


def last_latents(tapes: list[Tape], finals: list[State]) -> Tensor:
    return torch.cat([tape.per_sample(state) for tape, state in zip(tapes, finals, strict=True)])


def middle_frames(frames: Tensor, rows: int) -> Tensor:
    """(rows, C, H, W) to look at: of the first samples the frame in the middle."""
    return frames[:rows, frames.shape[1] // 2].cpu()


def held_out_reference(model: OpenedModel, recipe: Recipe, reporter: Reporter) -> HeldOut:
    """Sample the held-out set in full precision."""
    samples, evaluation = held_out_samples(model.split, recipe.data, recipe.evaluation.num_samples), recipe.evaluation
    # RCS decides for a batch; tau is for single samples
    size = 1 if recipe.cache is not None and recipe.cache.decides_while_running else evaluation.batch_size
    tapes = model.recorder.tapes(samples, size, reporter, "held-out, full precision", evaluation.reconstruct)
    return HeldOut(samples, tapes)


def evaluation_calls(evaluation: Evaluation, cached: bool, num_steps: int) -> int:
    """Calls of the denoiser, with a sample each: in full precision, before and after; with a cache, all it is laid to.

    Those are naive stacking, quantized without the cache, and full precision with it.
    """
    return (6 if cached else 3) * evaluation.num_samples * num_steps


def sample(
    tapes: list[Tape],
    reporter: Reporter,
    what: str,
    components: Components | None = None,
    after: Callable[[], None] = lambda: None,
) -> Sampled:
    """Run all tapes by the networks as they are now, or by others; ``after`` is called when a batch is done."""
    errors, finals = list[Tensor](), list[State]()
    with reporter.bar(f"sampling {what}", sum(map(len, tapes))) as advance:
        for tape in tapes:
            found = list[Tensor]()
            for i, state in enumerate(tape.rolling(components)):
                found.append(relative_l2(tape.per_sample(state), tape.per_sample(tape.state(i))))
                if i > 0:
                    advance("")
            errors.append(torch.stack(found))
            finals.append(state)
            after()
    return Sampled(torch.cat(errors, 1), last_latents(tapes, finals), finals)


def latent_metrics(made: Sampled, reference: Tensor) -> dict[str, Any]:
    """Figures that need no images.

    Args:
        reference: (B, N), the last latents in full precision.
    """
    return {
        **measured("latents", Sides(made.latents, reference)),
        "relative_l2_per_step": made.errors.mean(1).tolist(),
        "relative_l2_per_step_std": made.errors.std(1).tolist(),
    }


@torch.no_grad()
def module_errors(
    full: OpenedModel, layers: Mapping[str, nn.Module], clocks: list[StepClock], held_out: HeldOut
) -> dict[str, float]:
    """Relative error of each quantized module's output on the inputs its float twin sees in full precision.

    Args:
        layers: the quantized twins; ``clocks`` say to them which step it is, where they ask.
    """
    error, energy = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def compare(name: str, call: Call) -> None:
        error[name] += float((layers[name](call.input) - call.output).double().square().sum())
        energy[name] += float(call.output.double().square().sum())

    tapes = held_out.tapes[: max(1, MODULE_ERROR_SAMPLES // held_out.tapes[0].num_samples)]
    with observed(full.network, layers, compare):
        for tape in tapes:
            for i in range(0, len(tape), max(1, len(tape) // MODULE_ERROR_STEPS)):
                for clock in clocks:
                    clock.set(full.levels[i])
                tape.step(i, tape.state(i), full.networks)  # the pipeline that was recorded may be quantized by now
    return {n: (error[n] / max(energy[n], 1e-30)) ** 0.5 for n in layers}


def decompose(
    full: OpenedModel, quantized: nn.Module, both: Sampled, held_out: HeldOut, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, list[State]]]:
    """Where the error of a quantized model with a cache comes from: relative L2 against full precision, same noise.

    E_q: quantized only; E_c: cache only, without corrections and shares, which are for the quantized model; E_qc: both;
    interaction = E_qc - E_q - E_c, which holds what those take back; of the final latent, and per step.

    Args:
        quantized: the denoiser; ``both``: what it makes with its cache.

    Returns:
        the figures, and the last states of the model quantized only and cached only.
    """
    controller, name, tapes = controller_of(quantized), full.only.name, held_out.tapes
    assert controller is not None
    with uncached(quantized):
        alone = sample(tapes, reporter, "held-out, quantized without the cache", {name: quantized})
    with cached(full.only.network, controller.plan.unfitted):
        only = sample(tapes, reporter, "held-out, full precision with the cache", full.networks)
    curves = {name: made.errors.mean(1) for name, made in (("E_q", alone), ("E_c", only), ("E_qc", both))}
    curves["interaction"] = curves["E_qc"] - curves["E_q"] - curves["E_c"]
    final: dict[str, Any] = {name: float(curve[-1]) for name, curve in curves.items()}
    figures = final | {"decomposition": {name: curve.tolist() for name, curve in curves.items()}}
    return figures, {"quantized": alone.finals, "cached": only.finals}


def input_errors(
    full: OpenedModel, held_out: HeldOut, controller: Controller, full_steps: tuple[int, ...]
) -> list[float]:
    """RCS's e at each step of one trajectory: how far the first cached module's input is from its Taylor forecast."""
    first, tape = controller.modules[0], full.recorder.tape(held_out.samples.first(1))
    rcs, inputs = RCS(math.inf, max(1, controller.plan.order), 1), list[Tensor]()

    def watch(name: str, call: Call) -> None:
        inputs.append(call.input)

    with torch.no_grad(), observed(full.only.network, [first], watch):
        for i in range(len(tape)):
            inputs.clear()
            tape.step(i, tape.state(i))
            rcs.is_full(i, inputs[0], forced=i in full_steps)  # of the calls of a step RCS decides by the first
    return rcs.history
