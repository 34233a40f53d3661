"""What is measured of a model against full precision: latents, images, modules, cost, and what its cache did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.metrics import trajectory_error
from accuquant.core.schedule import RCS
from accuquant.evaluation.metrics import Sides, measured
from accuquant.model.rollout import Conditions, Rollout
from accuquant.pipeline.data import held_out_samples, load_split
from accuquant.progress import Reporter
from accuquant.recipe import Data, Evaluation
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.hooks import cached, controller_of, uncached
from accuquant.runtime.clock import StepClock
from accuquant.runtime.observe import Call, observed

MODULE_ERROR_STEPS = 10  # steps of the trajectory at which every module's own error is measured
MODULE_ERROR_SAMPLES = 8


@dataclass
class HeldOut:
    """Full-precision side of the comparison: inputs, conditions and latents (T + 1, B, C, H, W)."""

    inputs: list[Any]
    conditions: Conditions
    latents: Tensor


def held_out_reference(rollout: Rollout, data: Data, evaluation: Evaluation, reporter: Reporter) -> HeldOut:
    """Sample the held-out set in full precision."""
    samples = held_out_samples(load_split(data, rollout.family.condition), data, evaluation.num_samples)
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    latents = sample(rollout, conditions, evaluation.batch_size, reporter, "held-out, full precision")
    return HeldOut(samples.inputs, conditions, latents)


def evaluation_calls(evaluation: Evaluation, cached: bool, num_steps: int) -> int:
    """Calls of the denoiser, with a sample each: in full precision, before and after; with a cache, all it is laid to.

    Those are naive stacking, quantized without the cache, and full precision with it.
    """
    return (6 if cached else 3) * evaluation.num_samples * num_steps


def sample(
    rollout: Rollout,
    conditions: Conditions,
    batch_size: int,
    reporter: Reporter,
    what: str,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (T + 1, B, C, H, W) of all samples, in batches; ``after`` is called when a batch is done."""
    controller, parts = controller_of(rollout.denoiser), []
    alone = controller is not None and controller.rcs is not None  # RCS decides for a batch; tau is for single samples
    batches = conditions.batches(1 if alone else batch_size)
    for latents, _ in rollout.trajectories(batches, reporter, f"sampling {what}"):
        parts.append(latents)
        after()
    return torch.cat(parts, 1)


def latent_metrics(latents: Tensor, reference: Tensor) -> dict[str, Any]:
    """Figures that need no images."""
    mean, std = trajectory_error(latents, reference)
    return {
        **measured("latents", Sides(latents[-1], reference[-1])),
        "relative_l2_per_step": mean.tolist(),
        "relative_l2_per_step_std": std.tolist(),
    }


@torch.no_grad()
def module_errors(
    full: Rollout, layers: Mapping[str, nn.Module], clock: StepClock | None, held_out: HeldOut
) -> dict[str, float]:
    """Relative error of each quantized module's output on the inputs its float twin sees in full precision.

    Args:
        layers: the quantized twins; ``clock`` says to them which step it is, where they ask.
    """
    error, energy = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def compare(name: str, call: Call) -> None:
        error[name] += float((layers[name](call.input) - call.output).double().square().sum())
        energy[name] += float(call.output.double().square().sum())

    count = min(MODULE_ERROR_SAMPLES, len(held_out.conditions))
    chosen = torch.arange(count, device=held_out.latents.device)
    conditions = held_out.conditions.take(chosen)
    with observed(full.denoiser, layers, compare):
        for i in range(0, full.num_steps, max(1, full.num_steps // MODULE_ERROR_STEPS)):
            if clock is not None:
                clock.set(float(full.timesteps[i]))
            full.predict(i, held_out.latents[i][chosen], conditions)
    return {n: (error[n] / max(energy[n], 1e-30)) ** 0.5 for n in layers}


def decompose(
    full: Rollout, quantized: Rollout, both: Tensor, held_out: HeldOut, batch_size: int, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where the error of a quantized model with a cache comes from: relative L2 against full precision, same noise.

    E_q: quantized only; E_c: cache only, without corrections and shares, which are for the quantized model; E_qc: both;
    interaction = E_qc - E_q - E_c, which holds what those take back; of the final latent, and per step.

    Args:
        both: (T + 1, B, C, H, W), latents of the quantized model with its cache.

    Returns:
        the figures, and the final latents (B, C, H, W) of the model quantized only and cached only.
    """
    controller = controller_of(quantized.denoiser)
    assert controller is not None
    with uncached(quantized.denoiser):
        alone = sample(quantized, held_out.conditions, batch_size, reporter, "held-out, quantized without the cache")
    with cached(full.denoiser, controller.plan.unfitted):
        only = sample(full, held_out.conditions, batch_size, reporter, "held-out, full precision with the cache")
    sides = (("E_q", alone), ("E_c", only), ("E_qc", both))
    curves = {name: trajectory_error(latents, held_out.latents)[0] for name, latents in sides}
    curves["interaction"] = curves["E_qc"] - curves["E_q"] - curves["E_c"]
    final: dict[str, Any] = {name: float(curve[-1]) for name, curve in curves.items()}
    figures = final | {"decomposition": {name: curve.tolist() for name, curve in curves.items()}}
    return figures, {"quantized": alone[-1], "cached": only[-1]}


def input_errors(full: Rollout, held_out: HeldOut, controller: Controller, full_steps: tuple[int, ...]) -> list[float]:
    """RCS's e at each step of one trajectory: how far the first cached module's input is from its Taylor forecast."""
    first, index = controller.modules[0], torch.arange(1, device=held_out.latents.device)
    rcs, found = RCS(math.inf, max(1, controller.plan.order), 1), list[float]()

    def watch(name: str, call: Call) -> None:
        rcs.is_full(len(found), call.input, forced=len(found) in full_steps)
        found.append(rcs.history[-1])

    with torch.no_grad(), observed(full.denoiser, [first], watch):
        for i in range(full.num_steps):
            full.predict(i, held_out.latents[i][index], held_out.conditions.take(index))
    return found
