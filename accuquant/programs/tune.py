"""Joint tuning: bit widths, forecast, full steps and correction together, under a budget; calibration in between.

For each combination of types, the most promising by tables first (`budget.py`):

    calibrate without a cache                                              quantization, as if alone
    every forecast under every schedule, with the full steps that the budget pays for
    the best few again with their full steps refined, and the best of all with each correction
    calibrate with the best cache on (its forecasts; weights and forecasts), and correct again
    fewer full steps, for the Pareto front

Tables choose nothing: every candidate is confirmed by a rollout of the quantized, cached model, on noise that neither
calibration nor evaluation uses. What was chosen becomes a recipe; `calibrate` makes the export from it and from what
the search has calibrated already, and makes the same, bit for bit, from the recipe alone. What was tried is kept line
by line in `<output>.tuning`; an interrupted run goes on from there.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import yaml

from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.errors import RecipeError
from accuquant.export.run_folder import check_output
from accuquant.programs.calibrate import calibrate, calibrate_alone, calibrate_cached
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe, Tune
from accuquant.recipe.file import dump_recipe
from accuquant.tuning.budget import (
    KEPT,
    LEAST_NFC,
    Combination,
    open_session,
    ordered,
    step_times,
    type_combinations,
)
from accuquant.tuning.candidates import (
    LEARNED,
    NAIVE,
    Place,
    Row,
    Tried,
    as_cache,
    as_forecast,
    learned_of,
    worse_error,
)

WRITTEN = (
    *("noise", "measured_nfc", "correction_timesteps", "correction_full_timesteps", "correction_channels"),
    *("learned_timesteps", "learned_modules"),
)


def tune(recipe: Recipe, reporter: Reporter, resume: bool = False, overwrite: bool = False) -> Path:
    """Search under the recipe's budget; return the folder of the chosen point's export.

    Raises:
        RecipeError: there is no budget or none that can be met, or the output folder has to be changed by the user.
    """
    output, section = Path(recipe.export.output), recipe.tune
    if section is None:
        raise RecipeError("tune: the recipe has no such section; give it a budget, for example --set tune.nfc=14")
    work, partial = output.with_name(output.name + ".tuning"), output.with_name(output.name + ".partial")
    check_output(output, overwrite)
    _begin(recipe, work, partial, resume, overwrite)
    if recipe.cache is not None and (given := recipe.cache.model_fields_set - {*KEPT}):
        reporter.say(f"cache: the search has its own {', '.join(sorted(given))}; the rest holds for all candidates")
    combinations = ordered(recipe, type_combinations(recipe), work, reporter)[: section.combinations]
    tried, bests = Tried(work / "tried.jsonl"), list[Row]()
    for number, combination in enumerate(combinations):
        reporter.say(f"types {number + 1} of {len(combinations)}: {combination.name}")
        bests += search(combination, section, tried, work, reporter)

    if not bests:
        raise RecipeError(f"tune.seconds: {section.seconds} s pay for fewer than {LEAST_NFC} full steps of any types")
    naive = min((row for row in tried.rows if row["rival"] == NAIVE), key=lambda row: float(row["E_qc"]))
    best = min(bests, key=lambda row: worse_error(row, naive))
    name = f" ({best['rival']})" if best["rival"] else ""
    reporter.say(f"chosen: {best['types']}; {best['cache']}{name}; NFC {best['nfc']:g}, E_qc {best['E_qc']:.4f}")
    combination = next(c for c in combinations if c.name == best["types"])
    final = chosen_recipe(combination.recipe, best)
    if not _says(partial / "recipe.yaml", final):
        hand_over(final, best, work, kept_in(work, combination), partial)
    folder = calibrate(final, reporter, True, overwrite, record(section, tried.rows, best))
    shutil.rmtree(work)
    return folder


def search(combination: Combination, section: Tune, tried: Tried, work: Path, reporter: Reporter) -> list[Row]:
    """Calibrate one combination of types and confirm its candidates; the best at each level of the budget.

    None where seconds do not suffice. What is cheaper may be better too: more full steps are not always nearer.
    """
    folder = kept_in(work, combination)
    folder.mkdir(exist_ok=True)
    session = open_session(combination, work, reporter)
    alone, _ = calibrate_alone(session, reporter, folder, resume=True)
    seconds = step_times(session, combination, section, folder / "seconds.json")
    most = combination.full_steps(section, seconds)
    if most < LEAST_NFC:
        reporter.say(f"{section.seconds} s pay for fewer than {LEAST_NFC} full steps of these types")
        return []
    place = Place(combination, section, session, seconds, tried, reporter)
    levels = [max(LEAST_NFC, math.floor(share * most + 1e-9)) for share in section.levels]
    fewer = sorted({*levels} - {most})
    for nfc in fewer:
        place.naive(nfc)
        place.try_forecasts(nfc)
        place.correct(nfc)
    place.naive(most)
    place.cachequant(most)
    place.try_forecasts(most)
    for forecast in place.best_forecasts(most, section.finalists):
        place.refine(forecast, most)
    place.correct(most)
    learn(place, alone, most, folder)
    return [place.best(nfc) for nfc in (*fewer, most)]


def learn(place: Place, alone: UpdateLoop, nfc: int, folder: Path) -> None:
    """Calibrate with the best cache on, its forecasts or weights or both, and confirm and correct what comes out."""
    row = place.best_uncorrected(nfc)
    if not place.combination.recipe.objective.cached_iterations or row["nfc"] == place.session.rollout.num_steps:
        return
    start = place.session.snapshot()
    for what in place.section.learning:
        place.session.restore(start)
        config = calibrate_with(place, what, alone, nfc, folder)
        place.confirm(as_forecast(row), row["schedule"], "none", nfc, lambda config=config: config)  # type: ignore[misc]
        place.correct(nfc)


def calibrate_with(place: Place, what: str, alone: UpdateLoop, nfc: int, folder: Path) -> Cache:
    """Have the model, as calibrated alone, learn with the best cache on; updates that are kept are not made again."""
    recipe, state = place.combination.recipe, learned_in(folder, nfc, what)
    state.mkdir(exist_ok=True)
    objective = recipe.objective.model_copy(update={"cached_learn": learnable(recipe, what)})
    config = as_cache(place.best_uncorrected(nfc))
    loop = calibrate_cached(place.session, objective, config, alone, place.reporter, state, resume=True)
    assert loop is not None and isinstance(loop.source, CachedTrajectory)
    place.calibrated, place.learned = LEARNED[what], loop.source.learned
    return loop.source.cache


def learnable(recipe: Recipe, what: str) -> tuple[str, ...]:
    """`objective.cached_learn` for what `tune.learning` calls so."""
    weights = () if what == "forecast" else recipe.objective.learn
    return weights if what == "weights" else (*weights, "forecast")


def chosen_recipe(recipe: Recipe, row: Row) -> Recipe:
    """The recipe that makes the chosen candidate from nothing; what calibration writes into a cache is left to it."""
    cache = as_cache(row)
    cache = cache.model_copy(update=dict.fromkeys(WRITTEN) | ({"noise": cache.noise} if cache.tau else {}))
    what = learned_of(row)
    changes = {"cached_learn": learnable(recipe, what)} if what else {"cached_iterations": 0, "cached_learn": None}
    objective = recipe.objective.model_copy(update=changes)
    return recipe.model_copy(update={"cache": cache, "objective": objective})


def hand_over(final: Recipe, best: Row, work: Path, folder: Path, partial: Path) -> None:
    """What the search has sampled and calibrated for the chosen point, for `calibrate` to go on from."""
    shutil.rmtree(partial, ignore_errors=True)  # of another choice, before it was interrupted
    partial.mkdir()
    kept = [work / "reference.safetensors", folder / "state.safetensors"]
    if (folder / "auto.json").is_file():
        kept.append(folder / "auto.json")
    if what := learned_of(best):
        kept.append(learned_in(folder, best["asked_nfc"], what) / "state-cached.safetensors")
    for path in kept:
        shutil.copyfile(path, partial / path.name)
    (partial / "recipe.yaml").write_text(dump_recipe(final), encoding="utf-8")  # last: it says that all is there


def kept_in(work: Path, combination: Combination) -> Path:
    return work / f"types-{'-'.join(map(str, combination.picks)) or 'as-given'}"


def learned_in(folder: Path, nfc: int, what: str) -> Path:
    return folder / f"{nfc}-{what}"


def record(section: Tune, rows: list[Row], best: Row) -> Row:
    """What the export and its report keep of the search."""
    front, least = list[Row](), math.inf
    for row in sorted(rows, key=lambda row: (row["bit_operations"], row["E_qc"], row["rival"] is not None)):
        if row["E_qc"] < least:
            front, least = [*front, row], row["E_qc"]

    same = [row for row in rows if all(row[key] == best[key] for key in ("types", "asked_nfc"))]
    naive = next((row for row in same if row["rival"] == NAIVE), None)
    shown = [{k: v for k, v in row.items() if k not in ("config", "key", "forecast")} for row in rows]
    marks = [{"front": any(row is r for r in front), "chosen": row is best} for row in rows]
    return {
        "budget": {key: getattr(section, key) for key in ("nfc", "bit_operations", "seconds")},
        "tried": [row | mark for row, mark in zip(shown, marks, strict=True)],
        "seconds": round(sum(row["elapsed"] for row in rows), 1),
        "naive": naive["config"] if naive else None,
    }


def _begin(recipe: Recipe, work: Path, partial: Path, resume: bool, overwrite: bool) -> None:
    """The folder of the search, new or gone on with; its export is made in ``partial``.

    Raises:
        RecipeError: there is an interrupted search or calibration and it was not said what to do with it, or no search
            to go on with.
    """
    kept = work / "recipe.yaml"
    if resume:
        if not kept.is_file():
            raise RecipeError(f"--resume: there is no interrupted search in {work}")
        if not _says(kept, recipe):
            raise RecipeError(f"--resume: the recipe has changed since {work} was begun; --overwrite starts over")
        return
    if work.exists() and not overwrite:
        raise RecipeError(f"{work} holds an interrupted search; --resume continues it, --overwrite starts over")
    if partial.exists() and not overwrite:
        raise RecipeError(
            f"{partial} holds an interrupted calibration; finish it (`accuquant calibrate --resume`), give it up with "
            "--overwrite, or choose another export.output"
        )
    for folder in (work, partial):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    kept.write_text(dump_recipe(recipe), encoding="utf-8")


def _says(kept: Path, recipe: Recipe) -> bool:
    """Whether the file is this very recipe."""
    return kept.is_file() and yaml.safe_load(kept.read_text(encoding="utf-8")) == yaml.safe_load(dump_recipe(recipe))
