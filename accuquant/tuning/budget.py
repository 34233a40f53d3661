"""What a budget pays for: the costs of every combination of types, and the order in which they are worth trying."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from accuquant.calibration.choice import search_cost
from accuquant.calibration.opened import planned_model
from accuquant.calibration.plan import deciding, go_by_kind, matches
from accuquant.calibration.session import Session, job_of, open_session, validation_error
from accuquant.core.forecasts import FORECASTS
from accuquant.core.schedule import filled_interval_steps
from accuquant.errors import RecipeError
from accuquant.evaluation.costs import call_seconds, step_seconds
from accuquant.files import KeptFiles
from accuquant.pipeline.data import draw
from accuquant.progress import Reporter
from accuquant.recipe import ESTIMATIONS, Cache, Recipe, Rule, Tune
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.features import in_cache, skipped_modules

LEAST_NFC = 3
TIMED_SAMPLES = 8
LEADERS = 4  # candidates that get more samples, at most, of each combination of types; 6 were no better (measured)
TABLE_NFC = (25, 14, 10, 7, 4)
KEPT = ("norm", "differences", "modules", "feature", "blocks", "factors_dtype", "factors_device", "warmup")


@dataclass(frozen=True)
class Combination:
    """One choice of types for each class of modules.

    Attributes:
        picks: index into `choose` of each class.
        recipe: with these types' rules and without the section `tune`.
        operations: bit-operations of each module at one step, over float32's of all.
        cached: names of the modules and blocks that the recipe's cache skips.
        num_steps: that the pipeline makes; some make others than they are asked for.
    """

    name: str
    picks: tuple[int, ...]
    recipe: Recipe
    operations: dict[str, float]
    cached: tuple[str, ...]
    num_steps: int

    @property
    def inside(self) -> float:
        """Of what runs at full steps only."""
        return sum(share for name, share in self.operations.items() if in_cache(name, self.cached))

    @property
    def outside(self) -> float:
        """Of what runs at every step."""
        return sum(self.operations.values()) - self.inside

    def bit_operations(self, nfc: float, cached: tuple[str, ...] | None = None) -> float:
        """Of a trajectory, as a fraction of float32 without a cache; ``cached`` where another cache skips others."""
        one = self if cached is None else replace(self, cached=cached)
        return one.outside + one.inside * nfc / self.num_steps

    def full_steps(self, tune: Tune, seconds: tuple[float, float] | None = None) -> int:
        """As many as all budgets pay for; ``seconds`` are those of a full and of a skipped step, where known."""
        steps = self.num_steps
        most = [float(steps)] + ([float(tune.nfc)] if tune.nfc else [])
        if tune.bit_operations:
            most.append((tune.bit_operations - self.outside) / self.inside * steps)
        if tune.seconds and seconds:
            full, skipped = seconds
            most.append((tune.seconds - steps * skipped) / max(full - skipped, 1e-9))
        return max(0, math.floor(min(most) + 1e-9))


def base_settings(cache: Cache | None) -> dict[str, Any]:
    """What a recipe's own cache says of every candidate."""
    return {} if cache is None else {k: getattr(cache, k) for k in KEPT}


def type_combinations(recipe: Recipe) -> list[Combination]:
    """Every choice of a rule for each class; these come before the recipe's own rules.

    Raises:
        RecipeError: the model has several denoisers, a class's pattern matches no module, or one of its rules does not
            fit its modules.
    """
    assert recipe.tune is not None
    plain, found = recipe.model_copy(update={"tune": None}), list[Combination]()
    model, planned = planned_model(recipe)
    planned = model.counted(planned)
    float32 = sum(p.macs for p in planned) * 32 * 32
    least = Cache(**base_settings(recipe.cache), estimation="reuse", interval=1)
    skipped = skipped_modules(model.only.network, least)
    choices = [rule for each in recipe.tune.types for rule in each.choose]
    kinds = model.kinds if go_by_kind((*choices, *recipe.quantization.rules)) else {}
    for picks in itertools.product(*(range(len(c.choose)) for c in recipe.tune.types)):
        chosen = tuple(c.choose[k] for c, k in zip(recipe.tune.types, picks, strict=True))
        rules = (*chosen, *recipe.quantization.rules)
        used = {deciding(rules, p.module, kinds.get(p.module, frozenset())) for p in planned if p.is_layer}
        kept = tuple(rule for i, rule in enumerate(rules) if i < len(chosen) or i in used)  # the rest is outdone
        quantization, objective = recipe.quantization.model_copy(update={"rules": kept}), recipe.objective
        attention = recipe.quantization.attention
        scales = any(rule.tune and rule.activation != "float" for rule in kept) or (attention and attention.tune)
        if not scales:  # there is none to be learned
            learn = tuple(kind for kind in objective.learn if kind != "activation_scale")
            objective = objective.model_copy(update={"learn": learn or objective.learn})
        with_types = plain.model_copy(update={"quantization": quantization, "objective": objective})
        operations = dict[str, float]()
        for p in model.counted(model.plan(with_types)):
            operations[p.name] = operations.get(p.name, 0.0) + p.bit_operations / float32
        name = " + ".join(_words(rule) for rule in chosen or kept[:1])
        found.append(Combination(name, picks, with_types, operations, skipped, model.num_steps))
    return found


def ordered(section: Tune, combinations: list[Combination], kept: KeptFiles, reporter: Reporter) -> list[Combination]:
    """Those that the budget leaves enough full steps for, the most promising first."""
    found = affordable(section, combinations)
    if len(found) == 1:
        return found
    tables = kept.json("tables.json", lambda: error_tables(section, combinations, kept, reporter))

    def predicted(combination: Combination) -> float:
        """Independent errors add in squares: good enough to order by."""
        nfc = combination.full_steps(section)
        known, error = min(tables["cache"], key=lambda pair: abs(math.log(pair[0] / nfc)))
        own = [tables["types"][i][k] for i, k in enumerate(combination.picks)]
        return math.hypot(error * known / nfc, *own)

    return sorted(found, key=predicted)


def affordable(section: Tune, combinations: list[Combination]) -> list[Combination]:
    """Those that the budget, but for seconds, leaves enough full steps for.

    Raises:
        RecipeError: there is none.
    """
    found = [c for c in combinations if c.full_steps(section) >= LEAST_NFC]
    if found:
        return found
    least = min(combinations, key=lambda c: c.bit_operations(LEAST_NFC))
    if (steps := least.num_steps) < LEAST_NFC:
        raise RecipeError(f"sampling.num_inference_steps: {steps} are fewer than the {LEAST_NFC} full steps of a cache")
    raise RecipeError(
        f"tune.bit_operations: {section.bit_operations} pays for fewer than {LEAST_NFC} full steps; the cheapest "
        f"types ({least.name}) take {least.bit_operations(LEAST_NFC):.4f} with that many"
    )


def error_tables(section: Tune, combinations: list[Combination], kept: KeptFiles, reporter: Reporter) -> dict[str, Any]:
    """Final error of each class at each of its types, all else in full precision; and of a cache, nothing quantized."""
    types: list[list[float]] = [[math.nan] * len(c.choose) for c in section.types]
    for k in range(max(map(len, types))):
        picks = tuple(min(k, len(errors) - 1) for errors in types)
        session = open_session(next(c for c in combinations if c.picks == picks).recipe, reporter, kept)
        for i, each in enumerate(section.types):
            for layer in session.layers.values():
                layer.quantized = False
            for p in session.planned:
                if p.name in session.layers:
                    session.layers[p.name].quantized = matches(each.choose[0], p.module, p.kinds)
            types[i][picks[i]] = validation_error(session)
    steps, cache = session.num_steps, list[tuple[int, float]]()
    settings = base_settings(combinations[0].recipe.cache)
    for nfc in [n for n in TABLE_NFC if n < steps] or [steps]:
        full_steps = filled_interval_steps(steps, nfc, 2)
        config = Cache(**(settings | {"warmup": 2}), estimation="taylor", order=1, schedule=full_steps)
        with session.full_precision(), cached(session.model.only.network, config) as controller:
            error = validation_error(session)
            cache.append((controller.stats().nfc, error))
    return {"types": types, "cache": cache}


def step_times(session: Session, settings: dict[str, Any], section: Tune) -> tuple[float, float]:
    """Median seconds of a full and of a skipped step of eight samples, of the layers as they will be exported.

    With the dearest of the forecasts that may be chosen: what is chosen then takes no longer.

    Args:
        settings: what holds for the cache of every candidate.
    """
    blocks_only = settings.get("feature") == "blocks"
    kinds = [kind for kind in ESTIMATIONS if not (blocks_only and FORECASTS[kind].needs_input)]
    dearest = next((kind for kind in kinds if kind in section.estimations), "reuse")
    order = min(ESTIMATIONS[dearest][1], max(section.orders), (session.num_steps - 1) // 2)
    config = Cache(**settings, estimation=dearest, order=order, interval=2)
    eight = session.few(TIMED_SAMPLES, TIMED_SAMPLES)
    with session.hardened(), cached(session.model.only.network, config) as controller:
        eight[0].rolled()
        times = [sum(each) for each in zip(*map(step_seconds, eight), strict=True)]
        full_steps = set(controller.stats().full_steps)
    full, skipped = ([t for i, t in enumerate(times) if (i in full_steps) == side] for side in (True, False))
    return statistics.median(full), statistics.median(skipped)


def _words(rule: Rule) -> str:
    """Different for different rules: what was tried is found again by it."""
    group = f" in groups of {rule.group_size}" if rule.group_size else ""
    others = {
        "asymmetric": not rule.symmetric,
        "dynamic": rule.activation_scale == "dynamic",
        "not tuned": not rule.tune,
        "symmetric activations": rule.static and rule.activation_symmetric is True,
        "asymmetric activations": rule.static and rule.activation_symmetric is False,
    }
    return f"{rule.weight}/{rule.activation}{group}" + "".join(f" {word}" for word, true in others.items() if true)


def describe_tuning(recipe: Recipe) -> tuple[list[tuple[str, int, float]], dict[str, float]]:
    """What `--dry-run` prints: (types, affordable full steps, bit-operations with them) of each combination, and costs.

    The time is extrapolated from a measured call of the denoiser, and so is rough.
    """
    section, objective = recipe.tune, recipe.objective
    assert section is not None
    combinations = type_combinations(recipe)
    affordable(section, combinations)
    rows = [(c.name, n := c.full_steps(section), c.bit_operations(n)) for c in combinations]
    model, planned = planned_model(recipe)
    samples = draw(model.split.calibration, recipe.data.validation_samples, 0)
    tape = model.recorder.tape(model.recorder.batches(samples, len(samples))[0], rehearsed=True)
    call = call_seconds(tape)
    steps = recipe.sampling.num_inference_steps
    paid = [n for _, n, _ in rows if n >= LEAST_NFC]
    tried, nfc = min(section.combinations, len(paid)), statistics.mean(paid)
    each = len(section.orders) * len(section.noise_aware)
    forecasts = sum(each if ESTIMATIONS[e][1] else 1 for e in section.estimations)
    proposals = forecasts * len(section.schedules) + 5 * len(section.estimations)
    stages = len(section.learning) * bool(objective.cached_iterations)  # of calibration with the cache on
    refined = (section.trials + 5) * section.finalists
    rollouts = tried * (proposals * len(section.levels) + refined)
    further = section.more_samples - 1  # times the samples of a rollout, that leaders get
    rollouts += tried * LEADERS * further
    fitted = len(set(section.corrections) - {"none"})
    fits = tried * ((fitted + len(section.estimations) - 1) * len(section.levels) + fitted * stages)
    m = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    # forecasts learn from whole trajectories
    whole = 2 * nfc if {"forecast", "both"} & set(section.learning) else 2 * m
    groups = model.groups(model.clocks(recipe.quantization.timestep_groups))
    job = job_of(objective, groups, planned, recipe.data.num_samples)
    alone = search_cost(job).evaluations
    updates = tried * (alone + stages * objective.cached_iterations * whole)
    sampling = 3 * recipe.evaluation.num_samples * steps / recipe.data.validation_samples
    sampling += further * steps
    calls = rollouts * (nfc + (steps - nfc) / 4) + fits * steps + 3.5 * updates + sampling
    return rows, {"combinations": tried, "rollouts": rollouts, "updates": updates} | {
        "seconds": call.free * calls,
        "slowdown": call.slowdown,
    }
