"""Which objective: `target: auto` tries each on the model it is for, and keeps the one that errs least.

None is best everywhere: block reconstruction is ahead on one network and number type and far behind on another, and
which M is best, at which rate, differs as well. So each candidate is tried by successive halving (Jamieson & Talwalkar
2016, arXiv 1502.07943): all with the first share, the better half with the next, and so on; the best of the last rung
is taken. Errors are of final latents on validation noise, which neither calibration nor evaluation uses.

What is shared out are updates: each candidate makes the same part of those that the recipe's network evaluations would
pay it. Of evaluations a share would be unfair to blocks, which sample the inputs of each block before its first update,
and would be left with next to none.

Each trial is a whole small calibration, and so is what comes after the last: all start anew from the initial scales.
Going on from a trial's weights would save its updates, but rates and AdaRound's decisions follow one schedule to its
end, and blocks are reconstructed once each; and so the export is, bit for bit, that of a recipe which names the choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from accuquant.calibration.objectives import AUTO, OBJECTIVES
from accuquant.calibration.objectives.base import Cost, Job
from accuquant.calibration.session import Session, validation_errors
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.recipe import Objective

RUNGS = (1 / 8, 1 / 4)  # of its updates, for each candidate that is left
TRIED = "auto.json"
LEAST_UPDATES = 3  # of a trial, and of each block; with fewer it says nothing


@dataclass(frozen=True)
class Candidate:
    """An objective, its M, and a factor of the recipe's learning rates."""

    target: str
    steps_per_group: int
    rate: float

    @property
    def name(self) -> str:
        """Such as ``M = 5``."""
        return f"M = {self.steps_per_group}" if self.target == "trajectory" else self.target

    def applied(self, objective: Objective, iterations: int) -> Objective:
        """The recipe's section with this choice written out."""
        rates = objective.learning_rates
        scaled = {k: v if k == "forecast" else v * self.rate for k, v in rates.model_dump().items()}
        changes = {
            "target": self.target,
            "steps_per_group": self.steps_per_group,
            "iterations": iterations,
            "learning_rates": rates.model_copy(update=scaled),
        }
        return objective.model_copy(update=changes)

    def cost(self, job: Job, iterations: int) -> Cost:
        objective = self.applied(job.objective, iterations)
        return OBJECTIVES[self.target].cost(replace(job, objective=objective, steps_per_group=self.steps_per_group))

    def updates(self, job: Job, evaluations: int) -> int:
        """The most `iterations` that so many network evaluations pay for."""

        def cost(iterations: int) -> int:
            return self.cost(job, iterations).evaluations

        low, high = 0, 1
        while cost(high) <= evaluations and high <= evaluations:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= evaluations else (low, middle)
        return low


@dataclass(frozen=True)
class Trial:
    """What a candidate did with a share of its updates.

    Attributes:
        budget: network evaluations that these were planned to take; evaluations: that it made.
        error: mean relative L2 of the final latent over validation samples; None: its loss was not finite.
        standard_error: of that mean; None of a single sample.
    """

    target: str
    steps_per_group: int
    rate: float
    budget: int
    updates: int
    evaluations: int
    error: float | None
    standard_error: float | None

    @property
    def loss(self) -> float:
        """What the least of wins."""
        return math.inf if self.error is None else self.error

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.target, self.steps_per_group, self.rate)


def is_searched(objective: Objective) -> bool:
    """Whether the objective, or its M, is to be found by trials."""
    return AUTO in (objective.target, objective.steps_per_group) and objective.iterations > 0


def candidates(objective: Objective, num_steps: int) -> list[Candidate]:
    """What is tried: every objective, or the M of the one that the recipe names."""
    targets = OBJECTIVES if objective.target == AUTO else (objective.target,)
    return [Candidate(t, m, rate) for t in targets for m, rate in OBJECTIVES[t].trials if m <= num_steps]


def whole_updates(job: Job) -> dict[Candidate, int]:
    """What is tried, and the `iterations` that the recipe's network evaluations pay each."""
    evaluations = job.objective.iterations
    return {c: c.updates(job, evaluations) for c in candidates(job.objective, job.num_steps)}


def halve(updates: dict[Candidate, int], attempt: Callable[[Candidate, int], Trial]) -> tuple[Candidate, list[Trial]]:
    """Successive halving.

    A candidate that a rung's share leaves fewer than `LEAST_UPDATES` updates joins at the next.

    Args:
        updates: `iterations` that each candidate would have in the end, of which `RUNGS` are shares.
        attempt: tries a candidate with so many.

    Returns:
        the choice, and all trials in their order; the first candidate where none has enough updates for a trial.
    """
    left, trials = list(updates), list[Trial]()
    for number, share in enumerate(RUNGS):
        counts = {c: int(share * updates[c]) for c in left}
        later = [c for c in left if counts[c] < LEAST_UPDATES]
        rung = [attempt(c, counts[c]) for c in left if c not in later]
        trials += rung
        if not rung:
            continue
        ranked = [t.candidate for t in sorted(rung, key=lambda t: t.loss)]
        if number == len(RUNGS) - 1:
            return ranked[0], trials
        left = ranked[: math.ceil(len(ranked) / 2)] + later
    return left[0], trials


def search_cost(job: Job) -> Cost:
    """Of a recipe's updates without a cache; where the objective is found by trials, with these, at their most."""
    objective = job.objective
    if not is_searched(objective):
        return OBJECTIVES["trajectory" if objective.target == AUTO else objective.target].cost(job)
    kept = [c.cost(job, count) for c, count in whole_updates(job).items()]
    return Cost(objective.iterations + sum(trial_budgets(job)), max(cost.kept_bytes for cost in kept))


def trial_budgets(job: Job) -> list[int]:
    """Network evaluations of each trial that a recipe asks for; each is judged by a rollout of validation samples.

    Candidates do not cost the same, and which go on is not known: here the dearest do.
    """
    if not is_searched(job.objective):
        return []

    def dearest(c: Candidate, iterations: int) -> Trial:
        budget = c.cost(job, iterations).evaluations
        return Trial(**asdict(c), budget=budget, updates=0, evaluations=0, error=-budget, standard_error=None)

    return [trial.budget for trial in halve(whole_updates(job), dearest)[1]]


def choose_objective(
    session: Session, wish: Objective, kept: KeptFiles, reporter: Reporter
) -> tuple[Objective, list[Trial]]:
    """Try what the recipe leaves open, and write the choice out.

    The model is left as it was. Trials that are over are kept, as is the one under way when interrupted.

    Returns:
        the section `objective` with target, M, iterations and rates decided, and the trials.
    """
    job, made = session.job(wish), list[Trial]()
    whole, start = whole_updates(job), session.snapshot()
    known = kept.read(TRIED, _read_trials) or []

    with reporter.bar("choosing the objective", len(trial_budgets(job))) as advance:

        def attempt(candidate: Candidate, iterations: int) -> Trial:
            number = len(made)
            if number < len(known):
                made.append(known[number])
            else:
                state = f"trial-{number}.safetensors"
                made.append(try_candidate(session, wish, candidate, iterations, kept, state))
                session.restore(start)
                kept.write_json(TRIED, [asdict(trial) for trial in made])
                kept.path(state).unlink(missing_ok=True)
            advance(f"{candidate.name}, rates x {candidate.rate:g}: {made[-1].loss:.4f}")
            return made[-1]

        choice, trials = halve(whole, attempt)
    updates = max(1, whole[choice])
    for line in told(choice, updates, trials, list(whole)):
        reporter.say(line)
    return choice.applied(wish, updates), trials


def _read_trials(path: Path) -> list[Trial]:
    return [Trial(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def try_candidate(
    session: Session, wish: Objective, candidate: Candidate, iterations: int, kept: KeptFiles, state: str
) -> Trial:
    """A small calibration with so many updates, judged on validation noise; it changes the model.

    Args:
        state: name of the file that keeps its updates.
    """
    objective, budget = candidate.applied(wish, iterations), candidate.cost(session.job(wish), iterations).evaluations
    loop = session.loop(objective, candidate.steps_per_group)
    kept.read(state, loop.load)
    error = spread = None
    try:
        loop.run(kept.path(state))
    except FloatingPointError:  # rates that are too high for this model: it loses
        errors = torch.tensor([math.nan])
    else:
        with session.hardened() if "rounding" in objective.learn else nullcontext():  # decided, as in an export
            errors = validation_errors(session)
    if errors.isfinite().all():
        error = float(errors.mean())
        spread = float(errors.std() / math.sqrt(len(errors))) if len(errors) > 1 else None
    made = (budget, loop.updates, loop.network_evaluations)
    return Trial(candidate.target, candidate.steps_per_group, candidate.rate, *made, error, spread)


def told(choice: Candidate, updates: int, trials: list[Trial], found: list[Candidate]) -> list[str]:
    """The table of trials, in words for the terminal."""
    lines = [
        f"  {t.candidate.name}, rates x {t.rate:g}: {t.updates} updates, {t.evaluations} network evaluations, "
        + (f"validation error {t.error:.4f}" if t.error is not None else "its loss was not finite")
        + (f" ± {t.standard_error:.4f}" if t.standard_error is not None else "")
        for t in trials
    ]
    tried = {t.candidate for t in trials}
    lines += [
        f"  {c.name}, rates x {c.rate:g}: not tried, {RUNGS[-1]:.0%} of the updates that the budget pays "
        f"are fewer than {LEAST_UPDATES}{' of each block' if c.target == 'blocks' else ''}"
        for c in found
        if c not in tried
    ]
    return [f"objective: {choice.name}, rates x {choice.rate:g}, {updates} updates; tried:", *lines]
