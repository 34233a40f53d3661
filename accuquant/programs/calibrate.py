"""The main job, top to bottom: recipe -> pipeline -> full-precision trajectories -> quantized modules -> first scales
-> AccuQuant updates -> cache -> updates with it -> correction -> packed safetensors -> evaluation -> one folder that
diffusers loads.

Everything is written to `<output>.partial` and put in place when it is whole. An interrupted run leaves it there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accuquant.caching.correct import fit_correction
from accuquant.caching.search import searched
from accuquant.calibration.choice import Trial
from accuquant.calibration.layers import adopt_dynamic_scales
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.opened import planned_model
from accuquant.calibration.sampled import sample_references
from accuquant.calibration.session import Session, find_activation_scales, quantize
from accuquant.calibration.updates import (
    CACHED_STATE,
    calibrate_alone,
    calibrate_cached,
    counted_on,
    learned_forecasts,
)
from accuquant.errors import RecipeError
from accuquant.evaluation.card import model_card
from accuquant.evaluation.measure import HeldOut, held_out_reference, latent_metrics, middle_frames, sample
from accuquant.export.formats import check_format, write_format
from accuquant.export.native import store_cache
from accuquant.export.run_folder import RECIPE, RunFolder
from accuquant.files import KeptFiles
from accuquant.programs.evaluate import NAIVE_IMAGES, evaluate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Evaluation, Objective, Recipe
from accuquant.recipe.file import dump_recipe
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

INITIAL, CACHE, NAIVE = "initial.json", "cache.json", "naive.json"


def calibrate(
    recipe: Recipe,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
    tuning: dict[str, Any] | None = None,
) -> Path:
    """Run a recipe and return the folder of the finished export.

    Args:
        resume: continue the interrupted run in ``<output>.partial``.
        overwrite: replace an existing output, once the new one is whole, and drop an interrupted run.
        tuning: what `accuquant.programs.tune` has tried, for the export and its report.

    Raises:
        RecipeError: anything about the recipe or the output folder that has to be changed by the user.
        OSError: something could not be written; the message names it.
    """
    check_sections(recipe)
    run, started = run_folder(recipe, reporter), time.monotonic()
    objective, batch_size = recipe.objective, recipe.objective.batch_size
    if resume and run.finish():
        return run.output
    with run.opened(recipe, resume, overwrite):
        model, planned = planned_model(recipe)
        dimensions = check_format(recipe.export.format, model, planned)
        run.begin(recipe, resume)

        # full precision, of samples to judge by and of those to calibrate on
        held_out = held_out_reference(model, recipe, reporter)
        references = sample_references(model, recipe, reporter, run.kept)

        # quantization: first scales, then updates
        session = quantize(model, planned, references, recipe, reporter)
        if recipe.export.format == "torchao":
            adopt_dynamic_scales(session.layers.values())
        find_activation_scales(session, recipe.quantization, batch_size, reporter)
        initial = run.kept.json(INITIAL, lambda: measure_initial(held_out, reporter))
        alone, trials = calibrate_alone(session, objective, run.kept, reporter)

        # the cache: where to compute in full, updates with it on, and last a correction, to the weights as they end up
        history, plan, fitted, naive, images = alone.history, None, Fitted(), None, None
        if recipe.cache is not None:
            plan, fitted = find_plan(recipe.cache, session, run.kept, reporter)
            stacked = (plan.uncorrected, fitted)
            if tuning and tuning["naive"]:
                stacked = CachePlan.from_dict(tuning["naive"]), Fitted()
            naive, images = stack_naively(session, *stacked, held_out, recipe.evaluation, run.kept, reporter)
            further = calibrate_cached(session, objective, plan.uncorrected, fitted, alone, run.kept, reporter)
            if further is not None:
                history = history + counted_on(further.history, alone)
                if (learned := learned_forecasts(further)) is not None:
                    plan, fitted = replace(plan, learned=True), learned
            if plan.fits:
                fitted = fit_correction(session, plan, reporter, fitted)

        # the export, judged as it will be loaded
        write_format(session, recipe.export.format, dimensions, getattr(torch, recipe.model.dtype))
        if plan is not None:
            store_cache(model.only.network, plan, fitted)
        export = run.stage(model.recorder.pipeline, recipe.export.max_shard_size)
        export.write_text(RECIPE, dump_recipe(recipe))
        made = calibration_record(history, objective, alone, trials)
        export.write_json("calibration.json", {"initial": initial, "naive": naive, "calibration": made}, indent=1)
        if images is not None:
            export.write_tensors(NAIVE_IMAGES, {"images": images})
        if tuning is not None:
            export.write_json("tuning.json", tuning, indent=1)
        reporter.detail(f"tuned and saved after {time.monotonic() - started:.0f} s; evaluating what was saved")
        metrics = evaluate(export.folder, recipe, reporter, held_out)
        export.write_text("README.md", model_card(recipe.export, recipe.model.dtype, metrics))
        return run.publish()


def run_folder(recipe: Recipe, reporter: Reporter) -> RunFolder:
    """Where the recipe's run writes; what hangs on the cache is made again where that has changed."""
    return RunFolder(Path(recipe.export.output), reporter, of_cache=(CACHE, NAIVE, NAIVE_IMAGES, CACHED_STATE))


def check_sections(recipe: Recipe) -> None:
    """No section may be passed over in silence, nor be missing; an export can well be evaluated without its cache.

    Raises:
        RecipeError: one is.
    """
    if recipe.tune is not None:
        raise RecipeError("tune: is for `accuquant tune`; to calibrate without a search, add --set tune=null")
    if recipe.objective.cached_iterations and recipe.cache is None:
        raise RecipeError("objective.cached_iterations: needs a cache: section, which it calibrates with")


def find_plan(config: Cache, session: Session, kept: KeptFiles, reporter: Reporter) -> tuple[CachePlan, Fitted]:
    """The plan of the cache that is asked for, with all that has to be found for it."""
    if not config.searches and not config.noise_aware:
        return CachePlan.of(config), Fitted()
    found = kept.read(CACHE, _read_plan)
    if found is None:
        plan, fitted = found = searched(config, session, reporter)
        kept.write_json(CACHE, plan.to_dict() | fitted.to_dict(plan))
    return found


def _read_plan(path: Path) -> tuple[CachePlan, Fitted]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return CachePlan.from_dict(stored), Fitted.from_dict(stored)


def measure_initial(held_out: HeldOut, reporter: Reporter) -> dict[str, Any]:
    """Held-out error of the model as it is before any update."""
    return latent_metrics(sample(held_out.tapes, reporter, "held-out, before calibration"), held_out.latents)


def stack_naively(
    session: Session,
    plan: CachePlan,
    fitted: Fitted,
    held_out: HeldOut,
    evaluation: Evaluation,
    kept: KeptFiles,
    reporter: Reporter,
) -> tuple[dict[str, Any], Tensor | None]:
    """Held-out error of the model calibrated alone, with the cache put on it; the images that are shown of it."""
    error, shown = kept.read_json(NAIVE), kept.read_tensors(NAIVE_IMAGES)
    if error is not None and shown is not None:
        return error, shown.get("images")
    with cached(session.model.only.network, plan, fitted):
        made = sample(held_out.tapes, reporter, "held-out, naive stacking")
    error, images = latent_metrics(made, held_out.latents), None
    if evaluation.reconstruct and (frames := held_out.frames(made.finals)) is not None:
        images = middle_frames(frames, evaluation.num_images)
    kept.write_tensors(NAIVE_IMAGES, {} if images is None else {"images": images})
    kept.write_json(NAIVE, error)
    return error, images


def calibration_record(
    history: list[dict[str, Any]], objective: Objective, alone: UpdateLoop, trials: list[Trial]
) -> dict[str, Any]:
    """What metrics.json says of the updates."""
    return {
        "history": history,
        "network_evaluations": history[-1]["network_evaluations"] if history else 0,
        "seconds": round(history[-1]["seconds"], 1) if history else 0.0,
        "target": alone.objective.target,
        "steps_per_group": alone.steps_per_group,
        "gradient": objective.gradient,
        "loss": objective.loss,
        "cached_learn": objective.cached_learn,
        "learning_rates": alone.objective.learning_rates.model_dump(),
        "auto": [asdict(trial) for trial in trials] or None,
    }
