"""The main job, top to bottom: recipe -> pipeline -> full-precision trajectories -> quantized modules -> first scales
-> AccuQuant updates -> packed safetensors -> evaluation -> one folder that diffusers loads.

Everything is written to `<output>.partial` and renamed when it is whole. An interrupted run leaves its state there.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from accuquant.caching.correct import fit_correction
from accuquant.caching.search import search_calls, searched
from accuquant.calibration.choice import Trial, choose_objective, is_searched, search_cost, trial_budgets
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives import AUTO, WITH_CACHE
from accuquant.calibration.objectives.base import Cost, Job
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.plan import PlannedModule, count_macs
from accuquant.calibration.session import Session, job_of, open_model, prepare
from accuquant.errors import RecipeError
from accuquant.evaluation.card import model_card
from accuquant.evaluation.costs import call_seconds
from accuquant.evaluation.measure import HeldOut, held_out_reference, latent_metrics, sample
from accuquant.export.formats import check_format, write_format
from accuquant.export.native import store_cache
from accuquant.export.run_folder import check_output, publish
from accuquant.pipeline.data import calibration_samples
from accuquant.programs.evaluate import NAIVE_LATENTS, evaluate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Objective, Recipe
from accuquant.recipe.file import dump_recipe
from accuquant.runtime.cache.fitted import Correction
from accuquant.runtime.cache.hooks import cached


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
    """
    _check_sections(recipe)
    output = Path(recipe.export.output)
    partial = output.with_name(output.name + ".partial")
    _check_output(recipe, output, partial, resume, overwrite)

    rollout, planned, split = open_model(recipe)
    dimensions = check_format(recipe, rollout, planned, split)
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    held_out = held_out_reference(rollout, recipe, reporter)
    session = prepare(recipe, rollout, planned, split, reporter, partial / "reference.safetensors")

    initial = _held_out_metrics(session, held_out, reporter, partial / "initial.json", "before calibration")
    started = time.monotonic()
    alone, trials = calibrate_alone(session, reporter, partial, resume)
    history, cache, naive, correction = alone.history, None, None, None
    if recipe.cache is not None:
        cache = _cache(recipe.cache, session, reporter, partial / "cache.json")
        uncorrected = cache.uncorrected  # a correction is fitted last, to the weights as they end up
        kept, stacked = partial / "naive.json", Cache(**tuning["naive"]) if tuning and tuning["naive"] else uncorrected
        naive = _held_out_metrics(session, held_out, reporter, kept, "naive stacking", stacked)
        further = calibrate_cached(session, recipe.objective, uncorrected, alone, reporter, partial, resume)
        if further is not None:
            history, correction = history + counted_on(further.history, alone), learned_forecasts(further)
            cache = cache if correction is None else correction.named_in(cache)
        if cache.fits:
            cache, correction = fit_correction(session, cache, reporter, correction)

    staging = partial / "export"
    shutil.rmtree(staging, ignore_errors=True)
    write_format(session, dimensions)
    if cache is not None:
        store_cache(rollout.denoiser, cache, correction)
    rollout.pipeline.save_pretrained(staging, max_shard_size=recipe.export.max_shard_size)
    (staging / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    record = {
        "initial": initial,
        "naive": naive,
        "calibration": {
            "history": history,
            "network_evaluations": history[-1]["network_evaluations"] if history else 0,
            "seconds": round(history[-1]["seconds"], 1) if history else 0.0,
            "target": alone.objective.target,
            "steps_per_group": alone.steps_per_group,
            "gradient": recipe.objective.gradient,
            "loss": recipe.objective.loss,
            "cached_learn": recipe.objective.cached_learn,
            "learning_rates": alone.objective.learning_rates.model_dump(),
            "auto": [asdict(trial) for trial in trials] or None,
        },
    }
    (staging / "calibration.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    if naive is not None:
        shutil.copyfile(partial / NAIVE_LATENTS, staging / NAIVE_LATENTS)
    if tuning is not None:
        (staging / "tuning.json").write_text(json.dumps(tuning, indent=1), encoding="utf-8")
    reporter.detail(f"tuned and saved after {time.monotonic() - started:.0f} s; evaluating what was saved")
    metrics = evaluate(staging, recipe, reporter, held_out)
    (staging / "README.md").write_text(model_card(recipe, metrics), encoding="utf-8")
    publish(staging, output)
    shutil.rmtree(partial)
    return output


def calibrate_alone(
    session: Session, reporter: Reporter, partial: Path, resume: bool
) -> tuple[UpdateLoop, list[Trial]]:
    """Make the updates without a cache, of the objective that is nearest in trials if the recipe leaves it open.

    Returns:
        the loop that made them, and the trials.
    """
    objective, trials = session.recipe.objective, list[Trial]()
    if is_searched(objective):
        objective, trials = choose_objective(session, reporter, partial, resume)
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    if objective.target == AUTO:  # no updates are asked for
        objective = objective.model_copy(update={"target": "trajectory"})
    loop = session.loop(objective, steps)
    how = f"M = {steps}" if objective.target == "trajectory" else objective.target
    _update(loop, f"calibrating, {how}", reporter, partial / "state.safetensors", resume)
    return loop, trials


def calibrate_cached(
    session: Session,
    objective: Objective,
    cache: Cache,
    alone: UpdateLoop,
    reporter: Reporter,
    partial: Path,
    resume: bool,
) -> UpdateLoop | None:
    """Go on calibrating with the cache on; returns what did, or None where nothing was to be done."""
    state = partial / "state-cached.safetensors"
    if not objective.cached_iterations:
        return None
    loop = session.loop(*cached_objective(objective, alone.steps_per_group, session.rollout.num_steps), cache)
    _update(loop, "calibrating with the cache on", reporter, state, resume)
    if (forecasts := learned_forecasts(loop)) is not None:
        forecasts.settled()
    return loop


def cached_objective(objective: Objective, steps_per_group: int, num_steps: int) -> tuple[Objective, int]:
    """The settings and the M of the updates with the cache on, after those without it."""
    learn = objective.cached_learn or objective.learn
    changes: dict[str, Any] = {"iterations": objective.cached_iterations, "learn": learn, "warmup_fraction": 0.0}
    if "forecast" in learn:  # learned by less than the whole trajectory, forecasts get worse: errors add up (measured)
        steps_per_group, changes = num_steps, changes | {"gradient": "exact"}
    return objective.model_copy(update=changes), steps_per_group


def cached_cost(job: Job, cache: Cache) -> Cost:
    """Of the updates with the cache on."""
    objective, steps = cached_objective(job.objective, job.steps_per_group, job.num_steps)
    return WITH_CACHE.cost(replace(job, objective=objective, steps_per_group=steps, cache=cache))


def learned_forecasts(loop: UpdateLoop) -> Correction | None:
    """What a loop with a cache on has learned of its forecasts, if anything."""
    return loop.source.learned if isinstance(loop.source, CachedTrajectory) else None


def _update(loop: UpdateLoop, what: str, reporter: Reporter, state: Path, resume: bool) -> None:
    """Make the updates that ``state`` does not keep yet."""
    if resume and state.is_file():
        loop.load(state)
        if len(loop.history) == loop.updates:
            reporter.say(f"{what}: all {loop.updates} updates are kept")
            return
        reporter.say(f"{what}: resuming at update {len(loop.history)} of {loop.updates}")
    with reporter.bar(what, loop.updates, len(loop.history)) as advance:
        loop.run(state, lambda entry: advance(f"loss {entry['loss']:.2e}"))
    loop.save(state)


def counted_on(history: list[dict[str, Any]], alone: UpdateLoop) -> list[dict[str, Any]]:
    """Records of updates with the cache on, counted on from those without it."""
    before = {
        "iteration": len(alone.history),
        "network_evaluations": alone.network_evaluations,
        "seconds": alone.seconds,
    }
    return [entry | {k: round(entry[k] + before[k], 3) for k in before} | {"cached": True} for entry in history]


def describe(recipe: Recipe) -> tuple[list[PlannedModule], dict[str, Any]]:
    """What `--dry-run` prints: modules with types and costs, and the run's evaluations, memory and time.

    The time is extrapolated from a measured call of the denoiser, and so is rough.
    """
    _check_sections(recipe)
    rollout, planned, split = open_model(recipe)
    check_format(recipe, rollout, planned, split)
    objective, data = recipe.objective, recipe.data
    batch = min(objective.batch_size, data.num_samples)
    samples = calibration_samples(split, data.model_copy(update={"num_samples": batch}))
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    planned = count_macs(rollout.denoiser, planned, lambda: rollout.predict(0, conditions.noise, conditions), batch)
    seconds = call_seconds(rollout, conditions)
    job = job_of(recipe, rollout, planned)
    cost = search_cost(job)
    tuning, kept = cost.evaluations, cost.kept_bytes
    if recipe.cache is not None and objective.cached_iterations:
        tuning += cached_cost(job, recipe.cache).evaluations
    per_batch = rollout.num_steps / batch
    sampling = round((data.num_samples + data.validation_samples + 3 * recipe.evaluation.num_samples) * per_batch)
    sampling += round(len(trial_budgets(job)) * data.validation_samples * per_batch)
    sampling += search_calls(recipe.cache, rollout.num_steps, batch) if recipe.cache else 0
    trainable = sum(p.shape[0] * p.shape[1] for p in planned if p.spec)
    calls = sampling + 3.5 * tuning  # a backward pass and the fake quantization cost about 2.5 calls
    latents = (data.num_samples + data.validation_samples + recipe.evaluation.num_samples) * conditions.noise[0].numel()
    return planned, {
        "network_evaluations": {"tuning": tuning, "sampling": sampling},
        "seconds": seconds * calls,
        "memory_bytes": 4 * (5 * trainable + 2 * rollout.num_steps * latents) + kept,
    }


def _cache(config: Cache, session: Session, reporter: Reporter, kept: Path) -> Cache:
    """The recipe's cache with all that has to be found of it; a resumed run finds it in ``kept``."""
    if not config.searches and not config.noise_aware:
        return config
    if kept.is_file():
        return Cache.model_validate_json(kept.read_text(encoding="utf-8"))
    config = searched(config, session, reporter)
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(config.model_dump_json(), encoding="utf-8")
    temporary.rename(kept)
    return config


def _held_out_metrics(
    session: Session, held_out: HeldOut, reporter: Reporter, kept: Path, what: str, cache: Cache | None = None
) -> dict[str, Any]:
    """Held-out error of the model as it is now, under the cache if one is given; a resumed run finds it in ``kept``."""
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    with nullcontext() if cache is None else cached(session.rollout.denoiser, cache):
        latents = sample(session.rollout, held_out.conditions, session.recipe, reporter, f"held-out, {what}")
    metrics = latent_metrics(latents, held_out.latents)
    if cache is not None:  # for the report's images
        shown = latents[-1][: session.recipe.evaluation.num_images].contiguous()
        save_file({"latents": shown}, kept.with_name(NAIVE_LATENTS))
    kept.write_text(json.dumps(metrics), encoding="utf-8")
    return metrics


def _check_sections(recipe: Recipe) -> None:
    """No section may be passed over in silence, nor be missing; an export can well be evaluated without its cache."""
    if recipe.tune is not None:
        raise RecipeError("tune: is for `accuquant tune`; to calibrate without a search, add --set tune=null")
    if recipe.objective.cached_iterations and recipe.cache is None:
        raise RecipeError("objective.cached_iterations: needs a cache: section, which it calibrates with")


def _check_output(recipe: Recipe, output: Path, partial: Path, resume: bool, overwrite: bool) -> None:
    check_output(output, overwrite)
    if resume:
        if not (partial / "recipe.yaml").is_file():
            raise RecipeError(f"--resume: there is no interrupted run in {partial}")
        begun = yaml.safe_load((partial / "recipe.yaml").read_text(encoding="utf-8"))
        wanted = yaml.safe_load(dump_recipe(recipe))
        if not isinstance(begun, dict) or begun | {"cache": None} != wanted | {"cache": None}:
            raise RecipeError(f"--resume: the recipe has changed since {partial} was begun; --overwrite starts over")
        if begun.get("cache") != wanted["cache"]:  # a target that could not be met may be put right
            for name in ("cache.json", "naive.json", "state-cached.safetensors"):
                (partial / name).unlink(missing_ok=True)
    elif partial.exists() and not overwrite:
        raise RecipeError(f"{partial} holds an interrupted run; --resume continues it, --overwrite starts over")
