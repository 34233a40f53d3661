"""The best of what was tried: leaders get more samples until they are told apart, and of equals the cheapest is taken.

With as few validation samples as all candidates get, the least error is often the luckiest. More for all would double
the search; only those that may be the best are worth it. Their samples are doubled, and those that fall behind by more
than two standard errors are left out, until one is left, or the difference that may be left is too small to matter, or
all samples are used up that the recipe grants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from accuquant.core.choice import cheapest_equal, difference, leaders, undecided
from accuquant.tuning.budget import LEADERS
from accuquant.tuning.candidates import Place
from accuquant.tuning.tried import Candidate


@dataclass(frozen=True)
class Choice:
    """What was chosen of the leaders, and which of these are equal to the least error within the standard error."""

    best: Candidate
    equal: tuple[Candidate, ...]
    samples: int


def leading(candidates: list[Candidate], samples: int) -> list[Candidate]:
    """Those that ``samples`` do not tell apart from the best, the best first, and not more than `LEADERS`."""
    return [candidates[k] for k in leaders([c.measure(samples) for c in candidates])][:LEADERS]


def settle(place: Place, candidates: list[Candidate], whole: bool, model_as: Callable[[str], None]) -> list[Candidate]:
    """Give more samples to those of the candidates that may be the best; return what is left of them.

    Args:
        whole: they get all samples that there are for leaders, told apart or not: they will be compared with others,
            whose model is another.
        model_as: has the session's model calibrated as a candidate's was.
    """
    samples = place.samples
    most = samples * place.section.more_samples
    found = leading(candidates, samples)
    while samples < most and (whole or undecided([c.measure(samples) for c in found])):
        samples = most if len(found) == 1 else min(2 * samples, most)
        with place.reporter.bar(f"{samples} samples of those that lead", len(found)) as advance:
            for calibrated in dict.fromkeys(c.calibrated for c in found):
                if any(c.samples < samples for c in found if c.calibrated == calibrated):
                    model_as(calibrated)
                for k, candidate in enumerate(found):
                    if candidate.calibrated == calibrated:
                        found[k] = place.extended(candidate, samples)
                        advance(candidate.cache)
        found = leading(found, samples)
    return found


def choose(candidates: Iterable[Candidate]) -> Choice:
    """The cheapest of those that are equal to the best within the standard error, on the samples that all have."""
    found = list(candidates)
    samples = min(c.samples for c in found)
    measures = [c.measure(samples) for c in found]
    best = cheapest_equal(measures, [c.cost for c in found])
    return Choice(found[best], tuple(found[k] for k in leaders(measures, 1.0)), samples)


def ratio(candidate: Candidate, naive: Candidate) -> dict[str, Any]:
    """Mean log ratio of both errors to naive stacking's, on the samples that both have, and its standard error."""
    samples = min(candidate.samples, naive.samples)
    mean, error = difference(candidate.measure(samples), naive.measure(samples))
    return {"mean": mean, "standard_error": error, "samples": samples}
