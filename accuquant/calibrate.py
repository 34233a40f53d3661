"""The main job, top to bottom: recipe -> pipeline -> full-precision trajectories -> quantized modules -> first scales
-> AccuQuant updates -> packed safetensors -> evaluation -> one folder that diffusers loads.

Everything is written to `<output>.partial` and renamed when it is whole. An interrupted run leaves its state there.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant.console import Reporter
from accuquant.core.metrics import relative_l2
from accuquant.data import Samples, Split, calibration_samples, draw, load_split
from accuquant.evaluate import evaluate
from accuquant.export import check_output, model_card, publish
from accuquant.measure import HeldOut, held_out_reference, latent_metrics, sample
from accuquant.model.caching import cached_modules
from accuquant.model.checkpoint import harden_model, store_cache
from accuquant.model.clock import StepClock
from accuquant.model.families import load_pipeline, set_scheduler
from accuquant.model.layers import TrainableLayer, quantize_model
from accuquant.model.plan import PlannedModule, count_macs, plan_modules
from accuquant.model.rollout import Rollout
from accuquant.optimise import Reference, Tuner
from accuquant.recipe import Cache, Objective, Recipe, RecipeError
from accuquant.recipe_file import dump_recipe
from accuquant.search import SEARCH_SAMPLES, search_cache, search_calls

AUTO_CANDIDATES = (1, 2, 5)
AUTO_SHARE = 0.25  # of the budget, spent on each candidate's trial
VALIDATION_SAMPLES = 8
VALIDATION_SEED_OFFSET = 500_000  # noise that neither calibration nor evaluation uses
OBSERVED_VALUES = 16384  # activations kept per module and timestep group for the scale search


@dataclass
class Session:
    """A model ready to be tuned: quantized in place, with initial scales and its full-precision reference."""

    recipe: Recipe
    rollout: Rollout
    clock: StepClock
    planned: list[PlannedModule]
    layers: dict[str, TrainableLayer]
    reference: Reference
    validation: Reference

    def tuner(self, objective: Objective, steps_per_group: int) -> Tuner:
        tuned = {p.name: self.layers[p.name] for p in self.planned if p.tune}
        return Tuner(self.rollout, self.clock, tuned, self.reference, objective, self.recipe.data.seed, steps_per_group)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Everything calibration may change."""
        return {n: {k: v.clone() for k, v in layer.state_dict().items()} for n, layer in self.layers.items()}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        for name, layer in self.layers.items():
            if "rounding_logits" not in snapshot[name]:
                layer.rounding_logits = None
            layer.load_state_dict(snapshot[name])


def calibrate(
    recipe: Recipe,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run a recipe and return the folder of the finished export.

    Args:
        resume: continue the interrupted run in ``<output>.partial``.
        overwrite: replace an existing output, once the new one is whole, and drop an interrupted run.

    Raises:
        RecipeError: anything about the recipe or the output folder that has to be changed by the user.
    """
    output = Path(recipe.export.output)
    partial = output.with_name(output.name + ".partial")
    _check_output(recipe, output, partial, resume, overwrite)

    rollout, planned, split = open_model(recipe)
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    held_out = held_out_reference(rollout, recipe, reporter)
    session = prepare(recipe, rollout, planned, split, reporter, partial / "reference.safetensors")

    initial = _initial_metrics(session, held_out, reporter, partial / "initial.json")
    started = time.monotonic()
    tuner, tried = tune(session, reporter, partial, resume)

    staging = partial / "export"
    shutil.rmtree(staging, ignore_errors=True)
    harden_model(rollout.denoiser, session.clock)
    if recipe.cache is not None:
        store_cache(rollout.denoiser, _cache(recipe.cache, session, reporter, partial / "cache.json"))
    rollout.pipeline.save_pretrained(staging, max_shard_size=recipe.export.max_shard_size)
    (staging / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    record = {
        "initial": initial,
        "calibration": {
            "history": tuner.history,
            "network_evaluations": tuner.network_evaluations,
            "seconds": round(tuner.seconds, 1),
            "steps_per_group": tuner.steps_per_group,
            "gradient": recipe.objective.gradient,
            "loss": recipe.objective.loss,
            "auto": tried,
        },
    }
    (staging / "calibration.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    reporter.detail(f"tuned and saved after {time.monotonic() - started:.0f} s; evaluating what was saved")
    metrics = evaluate(staging, recipe, reporter, held_out)
    (staging / "README.md").write_text(model_card(recipe, metrics), encoding="utf-8")
    publish(staging, output)
    shutil.rmtree(partial)
    return output


def open_model(recipe: Recipe) -> tuple[Rollout, list[PlannedModule], Split]:
    """Load pipeline and data names and apply the rules; whatever is wrong with a recipe shows here.

    Raises:
        RecipeError: see `load_pipeline`, `plan_modules`, `load_split` and `Rollout`.
    """
    pipeline = load_pipeline(recipe.model)
    set_scheduler(pipeline, recipe.sampling.scheduler)
    rollout = Rollout(pipeline, recipe.sampling)
    planned = plan_modules(rollout.denoiser, recipe.quantization.rules)
    if recipe.cache is not None:
        cached_modules(rollout.denoiser, recipe.cache.modules)
    split = load_split(recipe.data, rollout.family.condition)
    if rollout.family.condition == "class_id":
        highest, count = max(split.calibration + split.held_out), int(rollout.denoiser.config.num_embeds_ada_norm)  # type: ignore[union-attr, arg-type]
        if highest >= count:
            raise RecipeError(f"data.path: {recipe.data.path} has class_id {highest}; this model has 0 to {count - 1}")
    return rollout, planned, split


def prepare(
    recipe: Recipe,
    rollout: Rollout,
    planned: list[PlannedModule],
    split: Split,
    reporter: Reporter,
    kept: Path | None = None,
) -> Session:
    """Sample the references in full precision, replace the modules, and find the initial scales.

    Args:
        kept: file that keeps the reference trajectories, so that a resumed run need not sample them again.
    """
    samples = calibration_samples(split, recipe.data)
    checked = draw(split.calibration, VALIDATION_SAMPLES, recipe.data.seed * 100_000 + VALIDATION_SEED_OFFSET)
    reference = _reference(rollout, samples, checked, recipe, reporter, kept)
    index = torch.arange(len(samples) + len(checked), device=reference.latents.device)

    specs = {p.name: p.spec for p in planned if p.spec is not None}
    clock = StepClock.from_timesteps(rollout.timesteps, recipe.quantization.timestep_groups)
    search = recipe.quantization.initialization == "mse"
    reporter.detail(f"initial weight scales of {len(specs)} modules ({recipe.quantization.initialization})")
    layers = quantize_model(rollout.denoiser, specs, clock, search)
    session = Session(
        recipe,
        rollout,
        clock,
        planned,
        layers,
        reference.take(index[: len(samples)]),
        reference.take(index[len(samples) :]),
    )
    _activation_scales(session, search, reporter)
    return session


def tune(session: Session, reporter: Reporter, partial: Path, resume: bool) -> tuple[Tuner, dict[str, float]]:
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
    if resume and state.is_file():
        tuner.load(state)
        reporter.say(f"resuming at update {len(tuner.history)} of {objective.iterations}")
    with reporter.bar(f"calibrating, M = {steps}", objective.iterations, len(tuner.history)) as advance:
        tuner.run(state, lambda entry: advance(f"loss {entry['loss']:.2e}"))
    return tuner, tried


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


def validation_error(session: Session) -> float:
    """Relative L2 of the final latent on the session's validation noise, as the model is now."""
    latents, _ = session.rollout.trajectory(session.validation.conditions)
    return float(relative_l2(latents[-1], session.validation.latents[-1]).mean())


def describe(recipe: Recipe) -> tuple[list[PlannedModule], dict[str, Any]]:
    """What `--dry-run` prints: modules with types and costs, and the run's evaluations, memory and time.

    The time is extrapolated from one measured call of the denoiser, and so is rough.
    """
    rollout, planned, split = open_model(recipe)
    objective, data = recipe.objective, recipe.data
    batch = min(objective.batch_size, data.num_samples)
    samples = calibration_samples(split, data.model_copy(update={"num_samples": batch}))
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    planned = count_macs(rollout.denoiser, planned, lambda: rollout.predict(0, conditions.noise, conditions), batch)
    started = time.monotonic()
    with torch.no_grad():
        rollout.predict(0, conditions.noise, conditions)
    seconds = time.monotonic() - started

    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    tuning = objective.iterations * (2 * steps - 1)
    if objective.steps_per_group == "auto":
        tuning = round(tuning * (1 + AUTO_SHARE * len(AUTO_CANDIDATES)))
    per_batch = rollout.num_steps / batch
    sampling = round((data.num_samples + VALIDATION_SAMPLES + 3 * recipe.evaluation.num_samples) * per_batch)
    sampling += search_calls(recipe.cache, rollout.num_steps, batch) if recipe.cache else 0
    trainable = sum(p.shape[0] * p.shape[1] for p in planned if p.spec)
    calls = sampling + 3.5 * tuning  # a backward pass and the fake quantization cost about 2.5 calls
    latents = (data.num_samples + VALIDATION_SAMPLES + recipe.evaluation.num_samples) * conditions.noise[0].numel()
    return planned, {
        "network_evaluations": {"tuning": tuning, "sampling": sampling},
        "seconds": seconds * calls,
        "memory_bytes": 4 * (5 * trainable + 2 * rollout.num_steps * latents),
    }


def _reference(
    rollout: Rollout, samples: Samples, checked: Samples, recipe: Recipe, reporter: Reporter, kept: Path | None
) -> Reference:
    """Full-precision trajectories of calibration and validation samples, in this order."""
    conditions = rollout.conditions(samples.inputs + checked.inputs, samples.seeds + checked.seeds)
    if kept is not None and kept.is_file():
        found = load_file(kept, device=str(conditions.noise.device))
        return Reference(found["latents"], found["predictions"], conditions)
    batches = conditions.batches(recipe.objective.batch_size)
    parts = []
    with reporter.bar("sampling calibration set, full precision", rollout.num_steps * len(batches)) as advance:
        for batch in batches:
            parts.append(rollout.trajectory(batch, lambda: advance("")))
    latents, predictions = (torch.cat([p[k] for p in parts], 1) for k in (0, 1))
    if kept is not None:
        temporary = kept.with_suffix(".tmp")
        save_file({"latents": latents.contiguous(), "predictions": predictions.contiguous()}, temporary)
        temporary.rename(kept)
    return Reference(latents, predictions, conditions)


@torch.no_grad()
def _activation_scales(session: Session, search: bool, reporter: Reporter) -> None:
    """Static scales per timestep group, from the inputs modules see along the full-precision trajectories."""
    observed = {n: layer for n, layer in session.layers.items() if layer.spec.static}
    if not observed:
        return
    rollout, reference, clock = session.rollout, session.reference, session.clock
    groups = torch.tensor([clock.group_of(float(t)) for t in rollout.timesteps])
    values: dict[str, list[list[Tensor]]] = {n: [[] for _ in range(clock.num_groups)] for n in observed}
    chosen = torch.arange(
        min(len(reference.conditions), session.recipe.objective.batch_size), device=reference.latents.device
    )
    conditions = reference.conditions.take(chosen)

    def observe(layer: TrainableLayer, tokens: Tensor) -> None:
        share = OBSERVED_VALUES // int((groups == clock.group).sum())
        flat = tokens.flatten()
        picked = torch.randint(len(flat), (share,), generator=torch.Generator().manual_seed(0)).to(flat.device)
        # the ends always belong to the sample: round-to-nearest covers the whole range
        values[layer.name][clock.group].append(torch.cat([flat[picked], flat.min()[None], flat.max()[None]]))

    for layer in session.layers.values():
        layer.quantized = False
    for layer in observed.values():
        layer.observer = observe
    with reporter.bar("activation scales", rollout.num_steps) as advance:
        for i in range(rollout.num_steps):
            rollout.predict(i, reference.latents[i][chosen], conditions)
            advance("")
    for layer in session.layers.values():
        layer.observer, layer.quantized = None, True
    for name, layer in observed.items():
        layer.set_activation_scale([torch.cat(v) for v in values[name]], search)


def _cache(config: Cache, session: Session, reporter: Reporter, kept: Path) -> Cache:
    """The recipe's cache with its target searched for on the quantized model, against full precision."""
    if not config.searches:
        return config
    if kept.is_file():
        return Cache.model_validate_json(kept.read_text(encoding="utf-8"))
    reference = session.reference
    chosen = torch.arange(min(SEARCH_SAMPLES, len(reference.conditions)), device=reference.latents.device)
    config = search_cache(
        session.rollout, reference.conditions.take(chosen), reference.latents[:, chosen], config, reporter
    )
    kept.write_text(config.model_dump_json(), encoding="utf-8")
    return config


def _initial_metrics(session: Session, held_out: HeldOut, reporter: Reporter, kept: Path) -> dict[str, Any]:
    """Held-out error before any update, for the report."""
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    latents = sample(session.rollout, held_out.conditions, session.recipe, reporter, "held-out, before calibration")
    metrics = latent_metrics(latents, held_out.latents)
    kept.write_text(json.dumps(metrics), encoding="utf-8")
    return metrics


def _check_output(recipe: Recipe, output: Path, partial: Path, resume: bool, overwrite: bool) -> None:
    check_output(output, overwrite)
    if resume:
        if not (partial / "recipe.yaml").is_file():
            raise RecipeError(f"--resume: there is no interrupted run in {partial}")
        if (partial / "recipe.yaml").read_text(encoding="utf-8") != dump_recipe(recipe):
            raise RecipeError(f"--resume: the recipe has changed since {partial} was begun; --overwrite starts over")
    elif partial.exists() and not overwrite:
        raise RecipeError(f"{partial} holds an interrupted run; --resume continues it, --overwrite starts over")
