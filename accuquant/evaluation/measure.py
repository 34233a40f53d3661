"""What is measured of a model against full precision: latents, images, modules, cost, and what its cache did."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.calibration.plan import PlannedModule
from accuquant.console import Reporter
from accuquant.core.metrics import latent_psnr, relative_l2, trajectory_error
from accuquant.core.schedule import RCS
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.model.rollout import Conditions, Rollout
from accuquant.pipeline.data import held_out_samples, load_split
from accuquant.recipe import Recipe
from accuquant.runtime.cache.controller import CacheStats, Controller, Correction
from accuquant.runtime.cache.hooks import cached, controller_of, in_cache, uncached
from accuquant.runtime.clock import StepClock

MODULE_ERROR_STEPS = 10  # steps of the trajectory at which every module's own error is measured
MODULE_ERROR_SAMPLES = 8


@dataclass
class HeldOut:
    """Full-precision side of the comparison: inputs, conditions and latents (T + 1, B, C, H, W)."""

    inputs: list[Any]
    conditions: Conditions
    latents: Tensor


def held_out_reference(rollout: Rollout, recipe: Recipe, reporter: Reporter) -> HeldOut:
    """Sample the held-out set in full precision."""
    split = load_split(recipe.data, rollout.family.condition)
    samples = held_out_samples(split, recipe.data, recipe.evaluation.num_samples)
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    return HeldOut(
        samples.inputs, conditions, sample(rollout, conditions, recipe, reporter, "held-out, full precision")
    )


def sample(
    rollout: Rollout,
    conditions: Conditions,
    recipe: Recipe,
    reporter: Reporter,
    what: str,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (T + 1, B, C, H, W) of all samples, in batches; ``after`` is called when a batch is done."""
    controller, parts = controller_of(rollout.denoiser), []
    alone = controller is not None and controller.rcs is not None  # RCS decides for a batch; tau is for single samples
    batches = conditions.batches(1 if alone else recipe.evaluation.batch_size)
    with reporter.bar(f"sampling {what}", rollout.num_steps * len(batches)) as advance:
        for batch in batches:
            parts.append(rollout.trajectory(batch, lambda: advance(""))[0])
            after()
    return torch.cat(parts, 1)


def latent_metrics(latents: Tensor, reference: Tensor) -> dict[str, Any]:
    """Figures that need no images."""
    final = relative_l2(latents[-1], reference[-1])
    mean, std = trajectory_error(latents, reference)
    spread = {"mean": final.mean(), "std": final.std(), "min": final.min(), "max": final.max()}
    return {
        "final_relative_l2": {k: float(v) for k, v in spread.items()},
        "latent_psnr": latent_psnr(latents[-1], reference[-1]),
        "relative_l2_per_step": mean.tolist(),
        "relative_l2_per_step_std": std.tolist(),
    }


def image_metrics(
    quantized: Tensor, full: Tensor, inputs: list[Any], classifier: DigitClassifier | None
) -> dict[str, Any]:
    """PSNR, SSIM and, with a classifier, Frechet distance and agreement; images (B, C, H, W) in [0, 1].

    The Frechet distance is between the classifier's features of both image sets. On few samples it is biased upwards,
    for both sides alike; read it against another run of the same size.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    from torchmetrics.image.fid import FrechetInceptionDistance

    found: dict[str, Any] = {
        "psnr": float(peak_signal_noise_ratio(quantized, full, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(quantized, full, data_range=1.0)),  # type: ignore[arg-type]
    }
    if classifier is None:
        return found
    frechet = FrechetInceptionDistance(feature=_Features(copy.deepcopy(classifier)), normalize=True, antialias=False)
    frechet.set_dtype(torch.float64)  # the copy too
    frechet.update(full, real=True)
    frechet.update(quantized, real=False)
    predictions = [classifier(images * 2 - 1).argmax(1) for images in (full, quantized)]
    asked = torch.tensor(inputs, device=full.device)
    found["frechet_distance"] = float(frechet.compute())
    found["agreement"] = {
        "full_precision": float((predictions[0] == asked).double().mean()),
        "quantized": float((predictions[1] == asked).double().mean()),
        "same_prediction": float((predictions[0] == predictions[1]).double().mean()),
    }
    return found


class _Features(nn.Module):
    """What torchmetrics asks of a feature extractor: images in, features out, and their number."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, 64

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W), uint8 or [0, 1] -> (B, 64)."""
        unit = images.double() / 255 if images.dtype == torch.uint8 else images.double()
        return self.classifier.features(unit * 2 - 1)


@torch.no_grad()
def module_errors(
    full: Rollout, layers: Mapping[str, nn.Module], clock: StepClock | None, held_out: HeldOut
) -> dict[str, float]:
    """Relative error of each quantized module's output on the inputs its float twin sees in full precision.

    Args:
        layers: the quantized twins; ``clock`` says to them which step it is, where they ask.
    """
    error, energy = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def compare(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            error[name] += float((layer(args[0]) - output).double().square().sum())
            energy[name] += float(output.double().square().sum())

        return hook

    handles = [full.denoiser.get_submodule(n).register_forward_hook(compare(n, q)) for n, q in layers.items()]
    count = min(MODULE_ERROR_SAMPLES, len(held_out.conditions))
    chosen = torch.arange(count, device=held_out.latents.device)
    conditions = held_out.conditions.take(chosen)
    try:
        for i in range(0, full.num_steps, max(1, full.num_steps // MODULE_ERROR_STEPS)):
            if clock is not None:
                clock.set(float(full.timesteps[i]))
            full.predict(i, held_out.latents[i][chosen], conditions)
    finally:
        for handle in handles:
            handle.remove()
    return {n: (error[n] / max(energy[n], 1e-30)) ** 0.5 for n in layers}


def cost_metrics(planned: list[PlannedModule], denoiser: nn.Module, sizes: dict[str, int]) -> dict[str, Any]:
    """Size of the whole denoiser and of its quantized layers, whose bytes are ``sizes``; bit-operations of one call."""
    inside = [p for p in planned if p.spec is not None]
    float_layers, packed = sum(p.float_bytes for p in inside), sum(sizes[p.name] for p in inside)
    float_bytes = sum(4 * p.numel() for p in denoiser.parameters())
    operations, planned_operations = sum(p.macs * 32 * 32 for p in planned), sum(p.bit_operations for p in planned)
    return {
        "size": {
            "float_bytes": float_bytes,
            "quantized_bytes": float_bytes - float_layers + packed,
            "ratio": (float_bytes - float_layers + packed) / float_bytes,
            "layers_ratio": packed / max(float_layers, 1),
        },
        "bit_operations": {
            "float": operations,
            "quantized": planned_operations,
            "ratio": planned_operations / max(operations, 1),
        },
    }


def decompose(
    full: Rollout, quantized: Rollout, both: Tensor, held_out: HeldOut, recipe: Recipe, reporter: Reporter
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
        alone = sample(quantized, held_out.conditions, recipe, reporter, "held-out, quantized without the cache")
    with cached(full.denoiser, controller.config.unfitted):
        only = sample(full, held_out.conditions, recipe, reporter, "held-out, full precision with the cache")
    sides = (("E_q", alone), ("E_c", only), ("E_qc", both))
    curves = {name: trajectory_error(latents, held_out.latents)[0] for name, latents in sides}
    curves["interaction"] = curves["E_qc"] - curves["E_q"] - curves["E_c"]
    final: dict[str, Any] = {name: float(curve[-1]) for name, curve in curves.items()}
    figures = final | {"decomposition": {name: curve.tolist() for name, curve in curves.items()}}
    return figures, {"quantized": alone[-1], "cached": only[-1]}


@torch.no_grad()
def call_seconds(rollout: Rollout, conditions: Conditions) -> float:
    """Wall time of one call of the denoiser: the least of three, for other work may have the cores."""
    found = math.inf
    for _ in range(3):
        started = time.perf_counter()
        rollout.predict(0, conditions.noise, conditions)
        found = min(found, time.perf_counter() - started)
    return found


def step_seconds(rollout: Rollout, conditions: Conditions) -> list[float]:
    """Wall time of each step of one trajectory of these samples."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if conditions.noise.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    rollout.trajectory(conditions, mark)
    return [b - a for a, b in itertools.pairwise(marks)]


def input_errors(full: Rollout, held_out: HeldOut, controller: Controller, full_steps: tuple[int, ...]) -> list[float]:
    """RCS's e at each step of one trajectory: how far the first cached module's input is from its Taylor forecast."""
    first, index = controller.modules[0], torch.arange(1, device=held_out.latents.device)
    rcs, found = RCS(math.inf, max(1, controller.config.forecast_order), 1), list[float]()

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rcs.is_full(len(found), args[0] if args else kwargs["hidden_states"], forced=len(found) in full_steps)
        found.append(rcs.history[-1])

    handle = full.denoiser.get_submodule(first).register_forward_pre_hook(watch, with_kwargs=True)
    try:
        for i in range(full.num_steps):
            with torch.no_grad():
                full.predict(i, held_out.latents[i][index], held_out.conditions.take(index))
    finally:
        handle.remove()
    return found


def cache_metrics(
    controller: Controller,
    traces: list[CacheStats],
    planned: list[PlannedModule],
    seconds: list[float],
    input_errors: list[float],
    correction: Correction | None = None,
) -> dict[str, Any]:
    """Full computations, memory and step times of the cache, its learned shares, bit-operations of a trajectory."""
    shares = None  # least, mean and largest of all modules, at each skipped step: of the last output and of its change
    if correction is not None and correction.learned_timesteps:
        sides = torch.stack(list(correction.learned)).double().cpu().unbind(-1)
        shares = [torch.stack([s.amin(1), s.mean(1), s.amax(1)], 1).tolist() for s in sides]
    full_steps = set(controller.stats().full_steps)
    times: dict[bool, list[float]] = {True: [], False: []}
    for i, each in enumerate(seconds):
        times[i in full_steps].append(each)
    nfc = torch.tensor([float(trace.nfc) for trace in traces], dtype=torch.float64)
    steps = traces[0].num_steps
    skipped = [p for p in planned if in_cache(p.name, (*controller.modules, *controller.bypassed))]
    operations, inside = sum(p.bit_operations for p in planned), sum(p.bit_operations for p in skipped)
    with_cache = operations - inside * (1 - float(nfc.mean()) / steps)
    return {
        "cache": {
            "estimation": controller.config.estimation,
            "order": controller.config.forecast_order,
            "nfc": {"mean": float(nfc.mean()), "std": float(nfc.std(correction=0))},
            "num_steps": steps,
            "full_steps": list(traces[0].full_steps),
            "input_errors": input_errors,
            "tau": controller.config.tau,
            "nbytes": max(trace.nbytes for trace in traces),
            "modules": len(controller.modules),
            "shares": shares,
            "seconds": {
                "full_step": statistics.median(times[True]),
                "cached_step": statistics.median(times[False]) if times[False] else None,
            },
            "bit_operations_ratio": with_cache / max(1, sum(p.macs * 32 * 32 for p in planned)),
        }
    }


def module_row(p: PlannedModule, error: float | None, size: int | None) -> dict[str, Any]:
    return {
        "name": p.name,
        "kind": p.kind,
        "weight": p.spec.weight if p.spec else "float",
        "activation": p.spec.activation if p.spec else "float",
        "group_size": p.spec.group_size if p.spec else None,
        "relative_error": error,
        "float_bytes": p.float_bytes,
        "quantized_bytes": p.float_bytes if size is None else size,
    }
