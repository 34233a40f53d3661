"""Joint tuning: bit widths, forecast, full steps and correction together, under a budget; calibration in between.

For each combination of types, the most promising by tables first (`budget.py`):

    calibrate without a cache                                              quantization, as if alone
    every forecast under every schedule, with the full steps that the budget pays for
    the best few again with their full steps refined, and the best of all with each correction
    calibrate with the best cache on (its forecasts; weights and forecasts), and correct again
    fewer full steps, for the Pareto front
    more samples for those that lead, until they are told apart; of equals the cheapest

Tables choose nothing: every candidate is confirmed by a rollout of the quantized, cached model, on noise that neither
calibration nor evaluation uses. What was chosen becomes a recipe; `calibrate` makes the export from it and from what
the search has calibrated already, and makes the same, bit for bit, from the recipe alone. What was tried is kept line
by line in `<output>.tuning`; an interrupted run goes on from there.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from accuquant.calibration.choice import TRIED
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.sampled import REFERENCE
from accuquant.calibration.session import open_session
from accuquant.calibration.updates import CACHED_STATE, STATE, calibrate_alone, calibrate_cached
from accuquant.errors import RecipeError
from accuquant.export.run_folder import RunFolder
from accuquant.files import KeptFiles
from accuquant.programs.calibrate import calibrate, run_folder
from accuquant.progress import Reporter
from accuquant.recipe import Recipe, Tune
from accuquant.runtime.cache.plan import CachePlan
from accuquant.tuning.budget import (
    KEPT,
    LEAST_NFC,
    Combination,
    base_settings,
    ordered,
    step_times,
    type_combinations,
)
from accuquant.tuning.candidates import Place
from accuquant.tuning.choice import Choice, choose, ratio, settle
from accuquant.tuning.tried import LEARNED, NAIVE, Candidate, Tried


def tune(recipe: Recipe, reporter: Reporter, resume: bool = False, overwrite: bool = False) -> Path:
    """Search under the recipe's budget; return the folder of the chosen point's export.

    Raises:
        RecipeError: there is no budget or none that can be met, or the output folder has to be changed by the user.
    """
    output, section = Path(recipe.export.output), recipe.tune
    if section is None:
        raise RecipeError("tune: the recipe has no such section; give it a budget, for example --set tune.nfc=14")
    run, calibration = RunFolder(output, reporter, ".tuning", "search"), run_folder(recipe, reporter)
    if resume and calibration.finish():
        run.drop()
        return output
    with run.opened(recipe, resume, overwrite):
        if not resume:
            _make_room(calibration, overwrite)
        run.begin(recipe, resume)
        final, told = find_point(recipe, section, run, calibration, reporter)
        folder = calibrate(final, reporter, True, overwrite, told)
        run.drop()
    return folder


def find_point(
    recipe: Recipe, section: Tune, run: RunFolder, calibration: RunFolder, reporter: Reporter
) -> tuple[Recipe, dict[str, Any]]:
    """Search, and hand over what is made of the chosen point; its recipe, and what is told of the search."""
    if recipe.cache is not None and (given := recipe.cache.model_fields_set - {*KEPT}):
        reporter.say(f"cache: the search has its own {', '.join(sorted(given))}; the rest holds for all candidates")
    combinations = ordered(section, type_combinations(recipe), run.kept, reporter)[: section.combinations]
    tried, leading = Tried(run.kept.path("tried.jsonl")), list[Candidate]()
    for number, combination in enumerate(combinations):
        reporter.say(f"types {number + 1} of {len(combinations)}: {combination.name}")
        leading += search(combination, section, tried, run.kept, reporter, alone=len(combinations) == 1)

    if not leading:
        raise RecipeError(f"tune.seconds: {section.seconds} s pay for fewer than {LEAST_NFC} full steps of any types")
    choice = choose(leading)
    best = choice.best
    name = f" ({best.rival})" if best.rival else ""
    errors = f"E_qc {mean(best.latent_errors):.4f}, images {mean(best.image_errors):.4f} on {best.samples} samples"
    reporter.say(f"chosen: {best.types}; {best.cache}{name}; NFC {best.nfc:g}, {errors}")
    if len(choice.equal) > 1:
        reporter.say(f"the cheapest of {len(choice.equal)} that are equal within the standard error")
    combination = next(c for c in combinations if c.name == best.types)
    final = chosen_recipe(combination.recipe, best)
    if not calibration.says(final):
        hand_over(final, best, run.kept, kept_in(run.kept, combination), calibration)
    return final, record(section, tried.candidates, choice)


def search(
    combination: Combination, section: Tune, tried: Tried, kept: KeptFiles, reporter: Reporter, alone: bool = True
) -> list[Candidate]:
    """Calibrate one combination of types and confirm its candidates; those that lead, of all levels of the budget.

    None where seconds do not suffice. What is cheaper may be better too: more full steps are not always nearer.

    Args:
        alone: these types are the only ones that are searched.
    """
    folder, settings = kept_in(kept, combination), base_settings(combination.recipe.cache)
    session = open_session(combination.recipe, reporter, kept)
    loop, _ = calibrate_alone(session, combination.recipe.objective, folder, reporter)
    full, skipped = folder.json("seconds.json", lambda: step_times(session, settings, section))
    seconds = (full, skipped)
    most = combination.full_steps(section, seconds)
    if most < LEAST_NFC:
        reporter.say(f"{section.seconds} s pay for fewer than {LEAST_NFC} full steps of these types")
        return []
    place = Place(combination, section, session, seconds, tried, reporter, kept)
    levels = [max(LEAST_NFC, math.floor(share * most + 1e-9)) for share in section.levels]
    fewer = sorted({*levels} - {most})
    for nfc in fewer:
        place.naive(nfc)
        place.try_forecasts(nfc)
        place.correct(nfc)
    explore(place, loop, most, folder)
    candidates = [candidate for nfc in (*fewer, most) for candidate in place.own(nfc)]
    return settle(place, candidates, not alone, partial(model_as, place, loop, most, folder))


def explore(place: Place, alone: UpdateLoop, nfc: int, folder: KeptFiles) -> None:
    """Confirm all that is tried at an NFC: rivals, forecasts, full steps of the best, corrections, what is learned."""
    place.naive(nfc)
    place.cachequant(nfc)
    place.try_forecasts(nfc)
    for forecast in place.best_forecasts(nfc, place.section.finalists):
        place.refine(forecast, nfc)
    place.correct(nfc)
    learn(place, alone, nfc, folder)


def learn(place: Place, alone: UpdateLoop, nfc: int, folder: KeptFiles) -> None:
    """Calibrate with the best cache on, its forecasts or weights or both, and confirm and correct what comes out."""
    best = place.best_uncorrected(nfc)
    if not place.combination.recipe.objective.cached_iterations or best.nfc == place.session.num_steps:
        return
    for what in place.section.learning:
        place.restore()
        found = calibrate_with(place, what, alone, nfc, folder), best.fitted
        place.confirm(best.forecast, best.schedule, "none", nfc, lambda found=found: found)  # type: ignore[misc]
        place.correct(nfc)


def model_as(place: Place, alone: UpdateLoop, nfc: int, folder: KeptFiles, calibrated: str) -> None:
    """Have the model as it was with this calibration, by what is kept of it."""
    place.restore()
    for what, words in LEARNED.items():
        if words == calibrated:
            calibrate_with(place, what, alone, nfc, folder)


def calibrate_with(place: Place, what: str, alone: UpdateLoop, nfc: int, folder: KeptFiles) -> CachePlan:
    """Have the model, as calibrated alone, learn with the best cache on; updates that are kept are not made again."""
    recipe, state = place.combination.recipe, learned_in(folder, nfc, what)
    objective = recipe.objective.model_copy(update={"cached_learn": learnable(recipe, what)})
    best = place.best_uncorrected(nfc)
    loop = calibrate_cached(place.session, objective, best.plan, best.fitted, alone, state, place.reporter)
    assert loop is not None and isinstance(loop.source, CachedTrajectory)
    place.calibrated, place.learned = LEARNED[what], loop.source.learned
    return loop.source.cache


def learnable(recipe: Recipe, what: str) -> tuple[str, ...]:
    """`objective.cached_learn` for what `tune.learning` calls so."""
    weights = () if what == "forecast" else recipe.objective.learn
    return weights if what == "weights" else (*weights, "forecast")


def chosen_recipe(recipe: Recipe, best: Candidate) -> Recipe:
    """The recipe that makes the chosen candidate from nothing; what calibration writes into a cache is left to it."""
    cache, what = best.plan.as_recipe(), best.learned
    if best.plan.tau and best.noise:  # over which gap it was measured, tau does not say
        cache = cache.changed(noise=best.noise)
    changes = {"cached_learn": learnable(recipe, what)} if what else {"cached_iterations": 0, "cached_learn": None}
    objective = recipe.objective.model_copy(update=changes)
    return recipe.model_copy(update={"cache": cache, "objective": objective})


def hand_over(final: Recipe, best: Candidate, search: KeptFiles, folder: KeptFiles, calibration: RunFolder) -> None:
    """What the search has sampled and calibrated for the chosen point, for `calibrate` to go on from."""
    kept = [search.path(REFERENCE), folder.path(STATE)]
    if folder.path(TRIED).is_file():
        kept.append(folder.path(TRIED))
    if what := best.learned:
        kept.append(learned_in(folder, best.asked_nfc, what).path(CACHED_STATE))
    shutil.rmtree(search.path("handed"), ignore_errors=True)
    handed = search.inside("handed")
    for path in kept:
        handed.copy(path)
    calibration.take_over(handed, final)  # in the place of another choice, made before an interruption


def kept_in(search: KeptFiles, combination: Combination) -> KeptFiles:
    return search.inside(f"types-{'-'.join(map(str, combination.picks)) or 'as-given'}")


def learned_in(folder: KeptFiles, nfc: int, what: str) -> KeptFiles:
    return folder.inside(f"{nfc}-{what}")


def record(section: Tune, candidates: list[Candidate], choice: Choice) -> dict[str, Any]:
    """What the export and its report keep of the search; errors are of the samples that all candidates have."""
    best, samples = choice.best, min(c.samples for c in candidates)
    error = {c.key: mean(c.latent_errors[:samples]) for c in candidates}
    front, least = set[str](), math.inf
    for one in sorted(candidates, key=lambda c: (c.bit_operations, error[c.key], c.rival is not None)):
        if error[one.key] < least:
            front, least = front | {one.key}, error[one.key]

    same = [c for c in candidates if (c.types, c.asked_nfc) == (best.types, best.asked_nfc)]
    naive = next(c for c in same if c.rival == NAIVE)
    equal = {c.key for c in choice.equal}
    names = ("types", "cache", "schedule", "parts", "asked_nfc", "nfc", "bit_operations", "seconds", "calibrated")
    return {
        "budget": {key: getattr(section, key) for key in ("nfc", "bit_operations", "seconds")},
        "tried": [
            {name: getattr(one, name) for name in (*names, "elapsed", "rival", "samples")}
            | {"E_qc": error[one.key], "image_error": mean(one.image_errors[:samples]), "ratio": ratio(one, naive)}
            | {"front": one.key in front, "chosen": one.key == best.key, "equal": one.key in equal}
            for one in candidates
        ],
        "samples": samples,
        "leaders_samples": choice.samples,
        "seconds": round(sum(one.elapsed for one in candidates), 1),
        "naive": naive.plan.to_dict(),
    }


def _make_room(calibration: RunFolder, overwrite: bool) -> None:
    """Drop an interrupted calibration, whose place the search's choice will take.

    Raises:
        RecipeError: there is one, and it was not said what to do with it.
    """
    calibration.check_ours()
    if calibration.is_begun and not overwrite:
        raise RecipeError(
            f"{calibration.work} holds an interrupted calibration; finish it (`accuquant calibrate --resume`), give it "
            "up with --overwrite, or choose another export.output"
        )
    calibration.drop()
