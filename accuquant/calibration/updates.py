"""Which updates a session makes: the objective's, found by trials where that is asked, and more with a cache on.

What a folder keeps of them is not made again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accuquant.calibration.choice import Trial, choose_objective, is_searched
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives import AUTO, WITH_CACHE
from accuquant.calibration.objectives.base import Cost, Job
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.session import Session
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Objective
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

STATE, CACHED_STATE = "state.safetensors", "state-cached.safetensors"


def calibrate_alone(
    session: Session, objective: Objective, kept: KeptFiles, reporter: Reporter
) -> tuple[UpdateLoop, list[Trial]]:
    """Make the updates without a cache, of the objective that is nearest in trials if the recipe leaves it open.

    Returns:
        the loop that made them, and the trials.
    """
    trials = list[Trial]()
    if is_searched(objective):
        objective, trials = choose_objective(session, objective, kept, reporter)
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    if objective.target == AUTO:  # no updates are asked for
        objective = objective.model_copy(update={"target": "trajectory"})
    loop = session.loop(objective, steps)
    how = f"M = {steps}" if objective.target == "trajectory" else objective.target
    _update(loop, f"calibrating, {how}", kept, STATE, reporter)
    return loop, trials


def calibrate_cached(
    session: Session,
    objective: Objective,
    plan: CachePlan,
    fitted: Fitted,
    alone: UpdateLoop,
    kept: KeptFiles,
    reporter: Reporter,
) -> UpdateLoop | None:
    """Go on calibrating with the cache on; returns what did, or None where nothing was to be done.

    Args:
        fitted: what the plan's forecasts know already.
    """
    if not objective.cached_iterations:
        return None
    how = cached_objective(objective, alone.steps_per_group, session.num_steps)
    loop = session.loop(*how, plan, fitted)
    _update(loop, "calibrating with the cache on", kept, CACHED_STATE, reporter)
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


def learned_forecasts(loop: UpdateLoop) -> Fitted | None:
    """What a loop with a cache on has learned of its forecasts, if anything."""
    return loop.source.learned if isinstance(loop.source, CachedTrajectory) else None


def _update(loop: UpdateLoop, what: str, kept: KeptFiles, name: str, reporter: Reporter) -> None:
    """Make the updates that are not kept yet."""

    def go_on(path: object) -> bool:
        loop.load(kept.path(name))
        return True

    if kept.read(name, go_on):
        if len(loop.history) == loop.updates:
            reporter.say(f"{what}: all {loop.updates} updates are kept")
            return
        reporter.say(f"{what}: resuming at update {len(loop.history)} of {loop.updates}")
    state = kept.path(name)
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
