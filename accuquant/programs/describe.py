"""The dry run: what a recipe's run will cost, as the sum of what each part of it says that it costs."""

from __future__ import annotations

from typing import Any

from accuquant.caching.correct import fit_calls
from accuquant.caching.search import search_calls
from accuquant.calibration.choice import search_cost, trial_budgets
from accuquant.calibration.opened import planned_model
from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.session import job_of
from accuquant.calibration.updates import cached_cost
from accuquant.evaluation.costs import call_seconds
from accuquant.evaluation.measure import evaluation_calls
from accuquant.evaluation.neighbours import neighbours_calls
from accuquant.export.formats import check_format
from accuquant.pipeline.data import calibration_samples
from accuquant.programs.calibrate import check_sections
from accuquant.recipe import Recipe
from accuquant.runtime.cache.features import in_cache, skipped_modules


def describe(recipe: Recipe) -> tuple[list[PlannedModule], dict[str, Any]]:
    """What `--dry-run` prints: modules with types and costs, and the run's evaluations, memory and time.

    The time is extrapolated from a measured call of the denoiser, and so is rough; ``slowdown`` is how many times
    longer a call takes now than it would, were the machine free.
    """
    check_sections(recipe)
    model, planned = planned_model(recipe)
    objective, data, cache, steps = recipe.objective, recipe.data, recipe.cache, model.num_steps
    check_format(recipe.export.format, model, planned)
    planned = model.counted(planned)
    # one batch of them; a pipeline may take single samples only
    samples = model.recorder.batches(calibration_samples(model.split, data), objective.batch_size)[0]
    tape, batch = model.recorder.tape(samples, rehearsed=True), len(samples)
    call = call_seconds(tape)

    job = job_of(objective, model.groups(model.clocks(recipe.quantization.timestep_groups)), planned, data.num_samples)
    alone = search_cost(job)
    tuning, kept = alone.evaluations, alone.kept_bytes
    if cache is not None and objective.cached_iterations:
        tuning += cached_cost(job, cache).evaluations
    referred = data.num_samples + data.validation_samples
    settings = [one.num_inference_steps for one in recipe.sampling.each]
    mean_steps = steps * sum(settings) / len(settings) / settings[0]
    sampling = round((referred * mean_steps + evaluation_calls(recipe.evaluation, cache is not None, steps)) / batch)
    sampling += round(neighbours_calls(recipe.evaluation, steps) / batch)
    sampling += round(len(trial_budgets(job)) * data.validation_samples * steps / batch)
    sampling += search_calls(cache, steps, batch) if cache else 0
    sampling += fit_calls(cache, steps, batch) if cache else 0

    saved = None  # by a skipped step, of the products of layers, as `cache_stats` counts them
    if cache is not None:
        skipped = skipped_modules(model.only.network, cache)
        layers = [p for p in planned if p.is_layer]
        inside = sum(p.macs for p in layers if in_cache(p.name, skipped))
        saved = inside / max(1, sum(p.macs for p in layers))
    trainable = sum(p.shape[0] * p.shape[1] for p in planned if p.spec)
    kept += round(tape.nbytes / batch * (referred + recipe.evaluation.num_samples))
    return planned, {
        "network_evaluations": {"tuning": tuning, "sampling": sampling},
        "seconds": call.free * (sampling + 3.5 * tuning),  # gradients and fake quantization cost about 2.5 calls
        "slowdown": call.slowdown,
        "saved": saved,
        "memory_bytes": 4 * 5 * trainable + kept,
    }
