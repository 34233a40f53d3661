"""Which updates a session makes: the objective's, with M chosen first where that is asked, and more with a cache on.

What a folder keeps of them is not made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accuquant.calibration.loop import Tuner
from accuquant.calibration.session import Session, validation_error
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Objective
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

AUTO_CANDIDATES = (1, 2, 5)
AUTO_SHARE = 0.25  # of the budget, spent on each candidate's trial
STATE, CACHED_STATE, TRIED = "state.safetensors", "state-cached.safetensors", "auto.json"


def calibrate_alone(
    session: Session, objective: Objective, kept: KeptFiles, reporter: Reporter
) -> tuple[Tuner, dict[str, float]]:
    """Run the objective; with ``steps_per_group: auto`` choose M first. Returns the tuner and the trials' errors."""
    tried: dict[str, float] = {}
    if objective.steps_per_group != "auto":
        steps = objective.steps_per_group
    else:
        tried = kept.json(TRIED, lambda: try_steps_per_group(session, objective, reporter))
        steps = int(min(tried, key=lambda m: tried[m]))
        reporter.say(
            f"steps_per_group: {steps} (validation error {', '.join(f'M={m}: {e:.4f}' for m, e in tried.items())})"
        )
        objective = equal_cost(objective, steps)
    tuner = session.tuner(objective, steps)
    what = f"calibrating, M = {steps}" if tuner.blocks is None else f"reconstructing {len(tuner.blocks.blocks)} blocks"
    _update(tuner, what, kept, STATE, reporter)
    return tuner, tried


def calibrate_cached(
    session: Session,
    objective: Objective,
    plan: CachePlan,
    fitted: Fitted,
    alone: Tuner,
    kept: KeptFiles,
    reporter: Reporter,
) -> Tuner | None:
    """Go on calibrating with the cache on; returns what did, or None where nothing was to be done.

    Args:
        fitted: what the plan's forecasts know already.
    """
    if not objective.cached_iterations:
        return None
    learn, steps = objective.cached_learn or objective.learn, alone.steps_per_group
    changes: dict[str, Any] = {"iterations": objective.cached_iterations, "learn": learn, "warmup_fraction": 0.0}
    if "forecast" in learn:  # learned by less than the whole trajectory, forecasts get worse: errors add up (measured)
        steps, changes = session.rollout.num_steps, changes | {"gradient": "exact"}
    tuner = session.tuner(objective.model_copy(update=changes), steps, plan, fitted)
    _update(tuner, "calibrating with the cache on", kept, CACHED_STATE, reporter)
    if tuner.learned is not None:
        tuner.learned.settled()
    return tuner


def _update(tuner: Tuner, what: str, kept: KeptFiles, name: str, reporter: Reporter) -> None:
    """Make the updates that are not kept yet."""

    def go_on(path: Path) -> bool:
        tuner.load(path)
        return True

    if kept.read(name, go_on):
        if len(tuner.history) == tuner.updates:
            reporter.say(f"{what}: all {tuner.updates} updates are kept")
            return
        reporter.say(f"{what}: resuming at update {len(tuner.history)} of {tuner.updates}")
    state = kept.path(name)
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


def try_steps_per_group(session: Session, objective: Objective, reporter: Reporter) -> dict[str, float]:
    """Short trials of each M at equal cost from the same start; relative L2 of the final latent on validation noise."""
    start = session.snapshot()
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


def alone_calls(objective: Objective) -> int:
    """Calls of the denoiser by `calibrate_alone` along trajectories; `blocks.cost` says those of blocks."""
    auto = objective.steps_per_group == "auto"
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    calls = objective.iterations * (2 * steps - 1)
    return round(calls * (1 + AUTO_SHARE * len(AUTO_CANDIDATES))) if auto else calls


def cached_calls(objective: Objective, cache: Cache, num_steps: int) -> int:
    """Full calls of the denoiser by `calibrate_cached`."""
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    nfc = cache.target_nfc or len(cache.full_steps or ()) or num_steps / (cache.interval or 4)
    # full steps in a group: rolled, and again for the gradient
    inside = nfc if "forecast" in (objective.cached_learn or ()) else max(1.0, nfc * steps / num_steps)
    return round(objective.cached_iterations * 2 * inside)
