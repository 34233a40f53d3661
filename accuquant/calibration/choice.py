"""Which objective: `target: auto` tries each on the model it is for, and keeps the one that errs least.

None is best everywhere: block reconstruction is ahead on one network and number type and far behind on another, and
which M is best, at which rate, differs as well. So each candidate is tried at the same number of network evaluations,
by successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): all with the first share of the budget, the better
half with the next, and so on; the best of the last rung is taken. Errors are of final latents on validation noise,
which neither calibration nor evaluation uses.

Each trial is a whole small calibration, and so is what comes after the last: all start anew from the initial scales.
Going on from a trial's weights would save its updates, but rates and AdaRound's decisions follow one schedule to its
end, and blocks are reconstructed once each; and so the export is, bit for bit, that of a recipe which names the choice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from accuquant.calibration.objectives import AUTO, OBJECTIVES
from accuquant.calibration.objectives.base import Cost, Job
from accuquant.calibration.session import Session, validation_errors
from accuquant.errors import RecipeError
from accuquant.progress import Reporter
from accuquant.recipe import Objective

RUNGS = (1 / 8, 1 / 4)  # of the budget, for each candidate that is left
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

    def updates(self, job: Job, evaluations: int) -> int:
        """The most `iterations` that so many network evaluations pay for."""

        def cost(iterations: int) -> int:
            objective = self.applied(job.objective, iterations)
            one = replace(job, objective=objective, steps_per_group=self.steps_per_group)
            return OBJECTIVES[self.target].cost(one).evaluations

        low, high = 0, 1
        while cost(high) <= evaluations and high <= evaluations:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= evaluations else (low, middle)
        return low


@dataclass(frozen=True)
class Trial:
    """What a candidate did with a share of the budget.

    Attributes:
        budget: network evaluations it was given; evaluations: that it made.
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


def halve(
    found: list[Candidate],
    evaluations: int,
    updates: Callable[[Candidate, int], int],
    attempt: Callable[[Candidate, int], Trial],
) -> tuple[Candidate, list[Trial]]:
    """Successive halving.

    A candidate that a rung's share does not pay `LEAST_UPDATES` updates of joins at the next.

    Args:
        evaluations: the budget, of which `RUNGS` are shares.
        updates: that a candidate makes of so many evaluations.
        attempt: tries a candidate with so many evaluations.

    Returns:
        the choice, and all trials in their order; the first candidate where the budget pays for no trial at all.
    """
    left, trials = list(found), list[Trial]()
    for number, share in enumerate(RUNGS):
        budget = round(share * evaluations)
        later = [c for c in left if updates(c, budget) < LEAST_UPDATES]
        rung = [attempt(c, budget) for c in left if c not in later]
        trials += rung
        if not rung:
            continue
        ranked = [t.candidate for t in sorted(rung, key=lambda t: t.loss)]
        if number == len(RUNGS) - 1:
            return ranked[0], trials
        left = ranked[: math.ceil(len(ranked) / 2)] + later
    return left[0], trials


def search_cost(job: Job) -> Cost:
    """Of a recipe's updates without a cache; where the objective is found by trials, with these."""
    objective = job.objective
    if not is_searched(objective):
        return OBJECTIVES["trajectory" if objective.target == AUTO else objective.target].cost(job)
    kept = [
        OBJECTIVES[c.target].cost(replace(job, objective=c.applied(objective, c.updates(job, objective.iterations))))
        for c in candidates(objective, job.num_steps)
    ]
    return Cost(objective.iterations + sum(trial_budgets(job)), max(cost.kept_bytes for cost in kept))


def trial_budgets(job: Job) -> list[int]:
    """Network evaluations of each trial that a recipe asks for; each is judged by a rollout of validation samples."""
    objective = job.objective
    if not is_searched(objective):
        return []

    def nothing(c: Candidate, budget: int) -> Trial:
        return Trial(**asdict(c), budget=budget, updates=0, evaluations=0, error=None, standard_error=None)

    found = candidates(objective, job.num_steps)
    return [t.budget for t in halve(found, objective.iterations, lambda c, n: c.updates(job, n), nothing)[1]]


def choose_objective(session: Session, reporter: Reporter, folder: Path, resume: bool) -> tuple[Objective, list[Trial]]:
    """Try what the recipe leaves open, and write the choice out.

    The model is left as it was. Trials that are over are kept in ``folder``, as is the one under way when interrupted.

    Returns:
        the section `objective` with target, M, iterations and rates decided, and the trials.
    """
    wish, job, kept = session.recipe.objective, session.job(), folder / "auto.json"
    found, start = candidates(wish, job.num_steps), session.snapshot()
    rows = json.loads(kept.read_text(encoding="utf-8")) if resume and kept.is_file() else []
    if not isinstance(rows, list):
        raise RecipeError(f"{kept} was written by another version; start over with --overwrite")
    known, made = [Trial(**row) for row in rows], list[Trial]()

    with reporter.bar("choosing the objective", len(trial_budgets(job))) as advance:

        def attempt(candidate: Candidate, budget: int) -> Trial:
            number = len(made)
            if number < len(known):
                made.append(known[number])
            else:
                state = folder / f"trial-{number}.safetensors"
                made.append(try_candidate(session, candidate, budget, state, resume))
                session.restore(start)
                temporary = kept.with_suffix(".tmp")
                temporary.write_text(json.dumps([asdict(trial) for trial in made]), encoding="utf-8")
                os.replace(temporary, kept)
                state.unlink(missing_ok=True)
            advance(f"{candidate.name}, rates x {candidate.rate:g}: {made[-1].loss:.4f}")
            return made[-1]

        choice, trials = halve(found, wish.iterations, lambda c, budget: c.updates(job, budget), attempt)
    updates = max(1, choice.updates(job, wish.iterations))
    for line in told(choice, updates, trials, found):
        reporter.say(line)
    return choice.applied(wish, updates), trials


def try_candidate(session: Session, candidate: Candidate, budget: int, state: Path, resume: bool) -> Trial:
    """A small calibration with so many network evaluations, judged on validation noise; it changes the model."""
    objective = candidate.applied(session.recipe.objective, candidate.updates(session.job(), budget))
    loop = session.loop(objective, candidate.steps_per_group)
    if resume and state.is_file():
        loop.load(state)
    error = spread = None
    try:
        loop.run(state)
    except FloatingPointError:  # rates that are too high for this model: it loses
        errors = torch.tensor([math.nan])
    else:
        with session.hardened() if "rounding" in objective.learn else nullcontext():  # decided, as in an export
            errors = validation_errors(session)
    if errors.isfinite().all():
        error = float(errors.mean())
        spread = float(errors.std() / math.sqrt(len(errors))) if len(errors) > 1 else None
    updates, evaluations = loop.updates, loop.network_evaluations
    return Trial(
        **asdict(candidate), budget=budget, updates=updates, evaluations=evaluations, error=error, standard_error=spread
    )


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
        f"  {c.name}, rates x {c.rate:g}: not tried, {RUNGS[-1]:.0%} of the budget pays for fewer than "
        f"{LEAST_UPDATES} updates{' of each block' if c.target == 'blocks' else ''}"
        for c in found
        if c not in tried
    ]
    return [f"objective: {choice.name}, rates x {choice.rate:g}, {updates} updates; tried:", *lines]
