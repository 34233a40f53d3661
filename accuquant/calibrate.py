"""The main job, top to bottom: recipe -> pipeline -> full-precision trajectories -> quantized modules -> first scales
-> AccuQuant updates -> packed safetensors -> evaluation -> one folder that diffusers loads.

Everything is written to `<output>.partial` and renamed when it is whole. An interrupted run leaves its state there.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from accuquant.console import Reporter
from accuquant.correct import fit_correction
from accuquant.data import calibration_samples
from accuquant.evaluate import NAIVE_LATENTS, evaluate
from accuquant.export import check_output, model_card, publish
from accuquant.formats import check_format, write_format
from accuquant.measure import HeldOut, call_seconds, held_out_reference, latent_metrics, sample
from accuquant.model.caching import cached
from accuquant.model.checkpoint import store_cache
from accuquant.model.plan import PlannedModule, count_macs
from accuquant.noise import measure_noise
from accuquant.optimise import Tuner
from accuquant.recipe import Cache, Objective, Recipe, RecipeError
from accuquant.recipe.file import dump_recipe
from accuquant.search import CHOICE_SAMPLES, SEARCH_SAMPLES, samples_of, search_cache, search_calls
from accuquant.session import Session, block_costs, open_model, prepare, validation_error

AUTO_CANDIDATES = (1, 2, 5)
TYPICAL_NFC = 14  # for the gap that noise is measured over, where tau or a time leaves it open
AUTO_SHARE = 0.25  # of the budget, spent on each candidate's trial


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
        tuning: what `accuquant.tune` has tried, for the export and its report.

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
    tuner, tried = calibrate_alone(session, reporter, partial, resume)
    history, cache, naive, correction = tuner.history, None, None, None
    if recipe.cache is not None:
        cache = _cache(recipe.cache, session, reporter, partial / "cache.json")
        uncorrected = cache.uncorrected  # a correction is fitted last, to the weights as they end up
        kept, stacked = partial / "naive.json", Cache(**tuning["naive"]) if tuning and tuning["naive"] else uncorrected
        naive = _held_out_metrics(session, held_out, reporter, kept, "naive stacking", stacked)
        further = calibrate_cached(session, recipe.objective, uncorrected, tuner, reporter, partial, resume)
        if further is not None:
            history, correction = history + counted_on(further.history, tuner), further.learned
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
            "target": "trajectory" if tuner.blocks is None else "blocks",
            "steps_per_group": tuner.steps_per_group,
            "gradient": recipe.objective.gradient,
            "loss": recipe.objective.loss,
            "cached_learn": recipe.objective.cached_learn,
            "auto": tried,
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
) -> tuple[Tuner, dict[str, float]]:
    """Run the objective; with ``steps_per_group: auto`` choose M first. Returns the tuner and the trials' errors."""
    objective, state, chosen = session.recipe.objective, partial / "state.safetensors", partial / "auto.json"
    tried: dict[str, float] = {}
    if objective.steps_per_group != "auto":
        steps = objective.steps_per_group
    else:
        if resume and chosen.is_file():
            tried = json.loads(chosen.read_text(encoding="utf-8"))
        else:
            tried = try_steps_per_group(session, reporter)
            chosen.write_text(json.dumps(tried), encoding="utf-8")
        steps = int(min(tried, key=lambda m: tried[m]))
        reporter.say(
            f"steps_per_group: {steps} (validation error {', '.join(f'M={m}: {e:.4f}' for m, e in tried.items())})"
        )
        objective = equal_cost(objective, steps)
    tuner = session.tuner(objective, steps)
    what = f"calibrating, M = {steps}" if tuner.blocks is None else f"reconstructing {len(tuner.blocks.blocks)} blocks"
    _update(tuner, what, reporter, state, resume)
    return tuner, tried


def calibrate_cached(
    session: Session, objective: Objective, cache: Cache, alone: Tuner, reporter: Reporter, partial: Path, resume: bool
) -> Tuner | None:
    """Go on calibrating with the cache on; returns what did, or None where nothing was to be done."""
    state = partial / "state-cached.safetensors"
    if not objective.cached_iterations:
        return None
    learn, steps = objective.cached_learn or objective.learn, alone.steps_per_group
    changes: dict[str, Any] = {"iterations": objective.cached_iterations, "learn": learn, "warmup_fraction": 0.0}
    if "forecast" in learn:  # learned by less than the whole trajectory, forecasts get worse: errors add up (measured)
        steps, changes = session.rollout.num_steps, changes | {"gradient": "exact"}
    tuner = session.tuner(objective.model_copy(update=changes), steps, cache)
    _update(tuner, "calibrating with the cache on", reporter, state, resume)
    if tuner.learned is not None:
        tuner.learned.settled()
    return tuner


def _update(tuner: Tuner, what: str, reporter: Reporter, state: Path, resume: bool) -> None:
    """Make the updates that ``state`` does not keep yet."""
    if resume and state.is_file():
        tuner.load(state)
        if len(tuner.history) == tuner.updates:
            reporter.say(f"{what}: all {tuner.updates} updates are kept")
            return
        reporter.say(f"{what}: resuming at update {len(tuner.history)} of {tuner.updates}")
    with reporter.bar(what, tuner.updates, len(tuner.history)) as advance:
        tuner.run(state, lambda entry: advance(f"loss {entry['loss']:.2e}"))
    tuner.save(state)


def counted_on(history: list[dict[str, Any]], alone: Tuner) -> list[dict[str, Any]]:
    """Records of updates with the cache on, counted on from those without it."""
    before = {
        "iteration": len(alone.history),
        "network_evaluations": alone.network_evaluations,
        "seconds": alone.seconds,
    }
    return [entry | {k: round(entry[k] + before[k], 3) for k in before} | {"cached": True} for entry in history]


def equal_cost(objective: Objective, steps_per_group: int) -> Objective:
    """The same number of network evaluations that ``iterations`` updates with M = 1 make; one update makes 2 M - 1."""
    iterations = max(1, round(objective.iterations / (2 * steps_per_group - 1))) if objective.iterations else 0
    return objective.model_copy(update={"iterations": iterations})


def try_steps_per_group(session: Session, reporter: Reporter) -> dict[str, float]:
    """Short trials of each M at equal cost from the same start; relative L2 of the final latent on validation noise."""
    start, objective = session.snapshot(), session.recipe.objective
    budget = max(1, round(AUTO_SHARE * objective.iterations))
    tried: dict[str, float] = {}
    candidates = [m for m in AUTO_CANDIDATES if m <= session.rollout.num_steps]
    with reporter.bar("choosing steps_per_group", len(candidates)) as advance:
        for m in candidates:
            trial = equal_cost(objective.model_copy(update={"iterations": budget}), m)
            session.tuner(trial, m).run()
            tried[str(m)] = validation_error(session)
            session.restore(start)
            advance(f"M = {m}: {tried[str(m)]:.4f}")
    return tried


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
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    tuning, kept = objective.iterations * (2 * steps - 1), 0
    if objective.steps_per_group == "auto":
        tuning = round(tuning * (1 + AUTO_SHARE * len(AUTO_CANDIDATES)))
    if objective.target == "blocks" and objective.iterations:
        tuning, calls_kept = block_costs(rollout, planned, recipe)
        widest = max(p.macs // max(p.shape) for p in planned)  # tokens and channels of a block's input
        kept = 2 * 2 * batch * widest * calls_kept
    if recipe.cache is not None and objective.cached_iterations:
        whole = "forecast" in (objective.cached_learn or ())
        listed = len(recipe.cache.full_steps or ())
        nfc = recipe.cache.target_nfc or listed or rollout.num_steps / (recipe.cache.interval or 4)
        inside = nfc if whole else max(1.0, nfc * steps / rollout.num_steps)  # full steps in a group: rolled, and again
        tuning += round(objective.cached_iterations * 2 * inside)
    per_batch = rollout.num_steps / batch
    sampling = round((data.num_samples + data.validation_samples + 3 * recipe.evaluation.num_samples) * per_batch)
    sampling += search_calls(recipe.cache, rollout.num_steps, batch) if recipe.cache else 0
    trainable = sum(p.shape[0] * p.shape[1] for p in planned if p.spec)
    calls = sampling + 3.5 * tuning  # a backward pass and the fake quantization cost about 2.5 calls
    latents = (data.num_samples + data.validation_samples + recipe.evaluation.num_samples) * conditions.noise[0].numel()
    return planned, {
        "network_evaluations": {"tuning": tuning, "sampling": sampling},
        "seconds": seconds * calls,
        "memory_bytes": 4 * (5 * trainable + 2 * rollout.num_steps * latents + kept),
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


def searched(
    config: Cache,
    session: Session,
    reporter: Reporter,
    worse_of_both: bool = False,
    samples: int = SEARCH_SAMPLES,
) -> Cache:
    """The cache with its noise measured, and its target searched for, on the session's model as it is."""
    num_steps = session.rollout.num_steps
    if config.noise_aware and config.noise is None:
        listed = len(config.full_steps or config.full_timesteps or ())
        gap = config.interval or round(num_steps / (config.target_nfc or listed or TYPICAL_NFC))
        config = config.model_copy(update={"noise": measure_noise(session, max(1, gap), reporter, config.modules)})
    if config.searches:
        reference = session.reference.first(samples_of(config, samples))
        published = config.measured_on == "full_precision"
        if config.estimation == "auto":  # by samples too that the weights are not fitted to
            half = CHOICE_SAMPLES // 2
            reference = session.reference.first(half).join(session.validation.first(half))
        given = (session.rollout, reference.conditions, reference.latents)
        with session.full_precision() if published and config.schedule == "dps" else nullcontext():
            config = search_cache(*given, config, reporter, worse_of_both)
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
