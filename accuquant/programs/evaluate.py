"""How much was lost, and where: an export against full precision, on the same noise and held-out classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accuquant.calibration.opened import opened
from accuquant.evaluation.costs import cache_metrics, cost_metrics, module_row, step_seconds
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.images import image_metrics
from accuquant.evaluation.measure import (
    HeldOut,
    decompose,
    held_out_reference,
    input_errors,
    latent_metrics,
    middle_frames,
    module_errors,
    sample,
)
from accuquant.evaluation.neighbours import at_neighbours
from accuquant.evaluation.report import write_report
from accuquant.export.load import exported_layers, load_export, recipe_of
from accuquant.export.torchao import stored_tensors
from accuquant.files import write_json
from accuquant.pipeline.denoisers import joined
from accuquant.pipeline.loading import load_pipeline, resolve
from accuquant.pipeline.seams import is_scheduler
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.runtime.arithmetic import arithmetic_used
from accuquant.runtime.attention import PRODUCTS, quantized_attention
from accuquant.runtime.cache.attach import controller_of, uncached
from accuquant.runtime.cache.stats import CacheStats
from accuquant.runtime.layer import quantized_layers
from accuquant.version import __version__

NAIVE_IMAGES = "naive.safetensors"


def evaluate(folder: Path, recipe: Recipe, reporter: Reporter, held_out: HeldOut | None = None) -> dict[str, Any]:
    """Compare the export in ``folder`` with the recipe's full-precision model; write metrics.json and report.html.

    Args:
        held_out: reference trajectories, if they were sampled before.

    Raises:
        RecipeError: the folder is no export.
    """
    full_pipeline = load_pipeline(recipe.model)
    quantized_pipeline = load_export(folder, recipe, reporter)
    # the export carries the schedulers it was calibrated for; both sides use them
    full_pipeline.register_modules(**{n: p for n, p in quantized_pipeline.components.items() if is_scheduler(p)})
    full = opened(full_pipeline, recipe)
    quantized = {one.name: getattr(quantized_pipeline, one.name) for one in full.denoisers}
    network = joined(quantized)
    held_out = held_out or held_out_reference(full, recipe, reporter)
    controller, traces = controller_of(network), list[CacheStats]()
    made = sample(
        held_out.tapes,
        reporter,
        f"held-out, quantized{' and cached' if controller else ''}",
        quantized,
        lambda: traces.append(controller.stats()) if controller else None,
    )

    planned = full.counted(full.plan(recipe))
    with uncached(network):  # a pattern may cache the very layers that are looked at
        layers = exported_layers(network)
        clocks = [clock for one in quantized.values() if (clock := getattr(one, "step_clock", None)) is not None]
        twins = {p.module: network.get_submodule(p.module) for p in planned if p.name in layers}
        errors = module_errors(full, twins, clocks, held_out)
    packed = {**layers, **{f"{name}.{PRODUCTS}": m for name, m in quantized_attention(network).items()}}
    sizes = {name: sum(t.numel() * t.element_size() for t in stored_tensors(layer)) for name, layer in packed.items()}
    metrics: dict[str, Any] = {
        "accuquant": __version__,
        "model": recipe.model.id,
        "scheduler": next(type(p).__name__ for p in quantized_pipeline.components.values() if is_scheduler(p)),
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "guidance_scale": recipe.sampling.guidance_scale,
        "num_samples": len(held_out.inputs),
        "held_out": sorted(set(held_out.inputs), key=str),
        **latent_metrics(made, held_out.latents),
        **cost_metrics(planned, full.network, sizes),
        "modules": [module_row(p, errors.get(p.module), sizes.get(p.name)) for p in planned if p.is_layer],
    }
    if quantized_layers(network):
        metrics["arithmetic"] = arithmetic_used(network)
    if controller:
        # RCS has kept those that it decided by
        errors_of_input = list(traces[0].input_errors) or input_errors(full, held_out, controller, traces[0].full_steps)
        learned = controller.fitted if controller.plan.learned else None
        seconds = step_seconds(held_out.tapes[0], quantized)
        metrics |= cache_metrics(controller, traces, planned, seconds, errors_of_input, learned)
    if recipe.evaluation.neighbours:
        metrics["neighbours"] = at_neighbours(full, quantized, held_out, made.errors[-1], recipe.evaluation, reporter)
    full_images, quantized_images = None, None
    if recipe.evaluation.reconstruct:
        full_images, quantized_images = held_out.frames(held_out.finals), held_out.frames(made.finals)
        if full_images is None:
            reporter.say("evaluation.reconstruct: the pipeline decodes to no pictures; latents are compared")
    if full_images is not None and quantized_images is not None:
        with torch.no_grad():
            metrics |= image_metrics(
                quantized_images, full_images, held_out.inputs, _classifier(recipe.model.id, full_images.device)
            )
    rows, others, first = recipe.evaluation.num_images, dict[str, Tensor](), recipe_of(folder)
    # what was measured when the export was made counts only for the same trajectories
    same_samples = (recipe.sampling, recipe.evaluation.num_samples) == (first.sampling, first.evaluation.num_samples)
    same_cache = recipe.cache == first.cache
    if controller:
        figures, finals = decompose(full, network, made, held_out, reporter)
        metrics |= figures
        if full_images is not None:
            found = {name: held_out.frames(states) for name, states in finals.items()}
            others = {name: middle_frames(frames, rows) for name, frames in found.items() if frames is not None}
            if same_samples and same_cache and (folder / NAIVE_IMAGES).is_file():
                others["naive both"] = load_file(folder / NAIVE_IMAGES)["images"][:rows]
    calibration = folder / "calibration.json"
    if calibration.is_file():
        record = json.loads(calibration.read_text(encoding="utf-8"))
        if not same_samples:
            record["initial"] = None
        if not same_samples or not same_cache:
            record["naive"] = None
        metrics |= {key: value for key, value in record.items() if value is not None}
    naive = metrics.pop("naive", None)
    if controller:
        metrics["E_naive"] = naive["relative_l2_per_step"][-1] if naive else None
        metrics["decomposition"]["E_naive"] = naive["relative_l2_per_step"] if naive else None
    tuning = folder / "tuning.json"
    if tuning.is_file() and same_cache:
        metrics["tuning"] = json.loads(tuning.read_text(encoding="utf-8"))
    write_json(folder / "metrics.json", metrics, indent=2)
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    write_report(
        folder,
        metrics,
        text,
        None if full_images is None else middle_frames(full_images, rows),
        None if quantized_images is None else middle_frames(quantized_images, rows),
        others or None,
    )
    return metrics


def _classifier(model_id: str, device: torch.device) -> DigitClassifier | None:
    """The judge that lies beside the bundled model; other models have none."""
    folder = Path(resolve(model_id)) / "classifier"
    return DigitClassifier.from_folder(folder).to(device).eval() if folder.is_dir() else None
