"""Joint tuning: bit widths, forecast, full steps and correction together, under a budget; calibration in between.

For each combination of types, the most promising by tables first (`budget.py`):

    calibrate without a cache                                              quantization, as if alone
    every forecast under every schedule, with the full steps that the budget pays for
    the best few again with their full steps refined, and the best of all with each correction
    rounds: calibrate with the best cache on, search and correct again
    fewer full steps, for the Pareto front

Tables choose nothing: every candidate is confirmed by a rollout of the quantized, cached model, on noise that neither
calibration nor evaluation uses. What was chosen becomes a recipe, and `calibrate` makes the export from it, as anybody
can again. What was tried is kept line by line in `<output>.tuning`; an interrupted run goes on from there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from accuquant.budget import (
    LEAST_NFC,
    Combination,
    base_settings,
    open_session,
    ordered,
    step_times,
    type_combinations,
)
from accuquant.calibrate import calibrate, calibrate_alone, calibrate_cached, searched
from accuquant.console import Reporter
from accuquant.core.metrics import relative_l2
from accuquant.core.schedule import filled_interval_steps
from accuquant.correct import fit_correction
from accuquant.export import check_output
from accuquant.model.cache_state import CacheError
from accuquant.model.caching import cached
from accuquant.noise import measure_noise
from accuquant.optimise import Tuner
from accuquant.recipe import Cache, Recipe, RecipeError, Tune
from accuquant.recipe.file import dump_recipe
from accuquant.session import Session

ALONE, NAIVE = "alone", "naive stacking"
CORRECTED = {
    "none": "",
    "cache": ", forecasts corrected",
    "quantization": ", full steps corrected",
    "both": ", all corrected",
}
PARTS = {"none": (False, False), "cache": (True, False), "quantization": (False, True), "both": (True, True)}
TUNING_SAMPLES = 16  # that full steps are searched on; fewer do not carry over to other classes
WRITTEN = ("noise", "correction_timesteps", "correction_full_timesteps", "correction_channels", "measured_nfc")
Row = dict[str, Any]
Forecast = tuple[str, int, bool]  # estimation, order, noise_aware


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
    _begin(recipe, work, resume, overwrite)
    combinations = ordered(recipe, type_combinations(recipe), work, reporter)[: section.combinations]
    tried, bests = Tried(work / "tried.jsonl"), list[Row]()
    for number, combination in enumerate(combinations):
        reporter.say(f"types {number + 1} of {len(combinations)}: {combination.name}")
        bests += search(combination, section, tried, work, reporter)

    if not bests:
        raise RecipeError(f"tune.seconds: {section.seconds} s pay for fewer than {LEAST_NFC} full steps of any types")
    best = min(bests, key=lambda row: float(row["E_qc"] * row["image_error"]))
    reporter.say(f"chosen: {best['types']}; {best['cache']}; NFC {best['nfc']:g}, E_qc {best['E_qc']:.4f}")
    final = chosen_recipe(next(c.recipe for c in combinations if c.name == best["types"]), best)
    folder = calibrate(final, reporter, resume and partial.is_dir(), overwrite, record(section, tried.rows, best))
    shutil.rmtree(work)
    return folder


class Tried:
    """Every candidate that was confirmed, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.path, self.rows = path, [json.loads(line) for line in lines if line.endswith("}")]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")  # the last was cut off

    def find(self, key: str) -> Row | None:
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def search(combination: Combination, section: Tune, tried: Tried, work: Path, reporter: Reporter) -> list[Row]:
    """Calibrate one combination of types and confirm its candidates; the best, or none where seconds do not suffice."""
    folder = work / f"types-{'-'.join(map(str, combination.picks)) or 'as-given'}"
    folder.mkdir(exist_ok=True)
    session = open_session(combination, work, reporter)
    alone, _ = calibrate_alone(session, reporter, folder, resume=True)
    seconds = step_times(session, combination, folder / "seconds.json")
    most = combination.full_steps(section, seconds)
    if most < LEAST_NFC:
        reporter.say(f"{section.seconds} s pay for fewer than {LEAST_NFC} full steps of these types")
        return []
    place = Place(combination, section, session, seconds, tried, reporter)
    levels = [max(LEAST_NFC, math.floor(share * most + 1e-9)) for share in section.levels]
    for nfc in sorted({*levels} - {most}):
        place.try_forecasts(nfc)
        place.correct(nfc)
    place.naive(most)
    place.cachequant(most)
    place.try_forecasts(most)
    for forecast in place.best_forecasts(most, section.finalists):
        place.refine(forecast, most)
    place.correct(most)
    rounds(place, alone, most, folder)
    return [place.best(most)]


def rounds(place: Place, alone: Tuner, nfc: int, folder: Path) -> None:
    """Calibrate with the best cache on, then confirm it again and search for full steps that suit the new weights."""
    iterations = place.session.recipe.objective.cached_iterations
    for number in range(1, place.section.rounds + 1 if iterations else 1):
        row = place.best(nfc)
        state = folder / f"round-{number}"
        state.mkdir(exist_ok=True)
        config = as_cache(row).uncorrected
        calibrate_cached(place.session, config, alone, place.reporter, state, resume=True)
        place.calibrated, place.cached_iterations = f"with the cache, round {number}", number * iterations
        place.confirm(as_forecast(row), row["schedule"], "none", nfc, lambda config=config: config)  # type: ignore[misc]
        place.refine(as_forecast(row), nfc)
        place.correct(nfc)


@dataclass
class Place:
    """A combination of types being searched.

    Attributes:
        seconds: of a full and of a skipped step of eight samples.
        calibrated, cached_iterations: how the session's model has been, by now.
    """

    combination: Combination
    section: Tune
    session: Session
    seconds: tuple[float, float]
    tried: Tried
    reporter: Reporter
    calibrated: str = ALONE
    cached_iterations: int = 0
    noises: dict[tuple[str, int], Any] = field(default_factory=dict)  # as calibrated, by gap

    def try_forecasts(self, nfc: int) -> None:
        """Every forecast under every schedule, with lists of full steps as they are found without refining."""
        lists = dict[str, Cache]()  # one list serves all orders of an estimation
        total = len(self.forecasts(nfc)) * len(self.section.schedules)
        with self.reporter.bar(f"forecasts and schedules, NFC {nfc}", total) as advance:
            for forecast in self.forecasts(nfc):
                for schedule in self.section.schedules:

                    def make(forecast: Forecast = forecast, schedule: str = schedule) -> Cache:
                        if schedule != "best":
                            return self.searched(self.cache(forecast, schedule, nfc))
                        if forecast[0] not in lists:
                            lists[forecast[0]] = self.searched(self.cache(forecast, schedule, nfc, trials=0))
                        found = {"full_timesteps": lists[forecast[0]].full_timesteps}
                        return self.searched(self.cache(forecast, schedule, nfc).model_copy(update=found))

                    row = self.confirm(forecast, schedule, "none", nfc, make)
                    advance(f"{row['cache']}: {row['E_qc']:.4f}" if row else "")

    def refine(self, forecast: Forecast, nfc: int) -> None:
        """Full steps that are searched for this very forecast."""
        config = self.cache(forecast, "best", nfc, trials=self.section.trials)
        self.confirm(forecast, "refined", "none", nfc, lambda: self.searched(config))

    def correct(self, nfc: int) -> None:
        """Every correction of the best candidate without one, of the model as it is."""
        rows = [r for r in self.own_rows(nfc) if r["parts"] == "none" and r["calibrated"] == self.calibrated]
        row = min(rows, key=self.score)
        for parts in self.section.corrections:
            self.confirm(as_forecast(row), row["schedule"], parts, nfc, lambda: as_cache(row))

    def naive(self, nfc: int) -> Row:
        """Naive stacking: TaylorSeer, as if alone, on the model calibrated alone. Candidates are judged against it."""
        config = self.cache(("taylor", 2, False), "interval", nfc)
        row = self.confirm(("taylor", 2, False), "interval", "none", nfc, lambda: config, NAIVE)
        assert row is not None
        return row

    def cachequant(self, nfc: int) -> None:
        """The other rival, by module as ours, and with one feature as published."""
        reuse = ("reuse", 0, False)
        published = self.cache(reuse, "dps", nfc, measured_on="full_precision")
        self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(published), "CacheQuant")
        if published.modules is None and published.feature == "modules":
            one = published.model_copy(update={"feature": "blocks"})
            self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(one), "CacheQuant, one feature")

    def confirm(
        self, forecast: Forecast, schedule: str, parts: str, nfc: int, make: Callable[[], Cache], rival: str = ""
    ) -> Row | None:
        """Roll the candidate out, unless that was done; None where there is no such cache."""
        words = f"{_words(forecast)}, {schedule} steps{CORRECTED[parts]}"
        calibrated = ALONE if rival else self.calibrated  # rivals are measured first, and stay what they were
        key = f"{self.combination.name} | {words} | NFC {nfc} | {calibrated} | {rival}"
        if (known := self.tried.find(key)) is not None:
            return known
        started = time.monotonic()
        try:
            config, correction = make(), None
        except CacheError as error:  # no tau meets the target, or groups cannot be cut so
            self.reporter.detail(f"{words}: {error}")
            return None
        of_forecasts, of_full_steps = PARTS[parts]
        if of_forecasts or of_full_steps:
            if config.tau is not None:  # RCS skips other steps with every sample
                return None
            wanted = {"corrected": of_forecasts, "corrected_quantization": of_full_steps}
            config, correction = fit_correction(self.session, config.model_copy(update=wanted), Reporter(quiet=True))
        with cached(self.session.rollout.denoiser, config, correction) as controller:
            finals, counts = [], []
            size = 1 if config.tau else self.session.recipe.evaluation.batch_size
            for batch in self.session.validation.conditions.batches(size):
                finals.append(self.session.rollout.trajectory(batch)[0][-1])
                counts.append(controller.stats().nfc)
        mean, skipped_by = sum(counts) / len(counts), (*controller.modules, *controller.bypassed)
        final, true = torch.cat(finals), self.session.validation.latents[-1]
        decode = self.session.rollout.decode
        full, skipped = self.seconds
        return self.tried.add(
            {
                "key": key,
                "types": self.combination.name,
                "cache": words,
                "forecast": list(forecast),
                "schedule": schedule,
                "parts": parts,
                "asked_nfc": nfc,
                "nfc": mean,
                "bit_operations": self.combination.bit_operations(mean, skipped_by),
                "seconds": mean * full + (self.session.rollout.num_steps - mean) * skipped,
                "E_qc": float(relative_l2(final, true).mean()),
                "image_error": float(relative_l2(decode(final), decode(true)).mean()),
                "calibrated": calibrated,
                "cached_iterations": self.cached_iterations,
                "elapsed": round(time.monotonic() - started, 2),
                "rival": rival or None,
                "config": config.model_dump(mode="json", exclude_none=True),
            }
        )

    def searched(self, config: Cache) -> Cache:
        quiet = Reporter(quiet=True)
        if config.noise_aware and config.noise is None:
            full_steps = config.target_nfc or len(config.full_steps or config.full_timesteps or ())
            gap = max(1, round(self.session.rollout.num_steps / full_steps))
            if (self.calibrated, gap) not in self.noises:
                self.noises[self.calibrated, gap] = measure_noise(self.session, gap, quiet, config.modules)
            config = config.model_copy(update={"noise": self.noises[self.calibrated, gap]})
        return searched(config, self.session, quiet, worse_of_both=True, samples=TUNING_SAMPLES)

    def forecasts(self, nfc: int) -> list[Forecast]:
        """Those that the section allows and ``nfc`` full steps are enough for."""
        found: list[Forecast] = [("reuse", 0, False)] if "reuse" in self.section.estimations else []
        for estimation in ("taylor", "rfe"):
            for order in self.section.orders if estimation in self.section.estimations else ():
                found += [(estimation, order, aware) for aware in self.section.noise_aware if order < nfc]
        return found

    def cache(self, forecast: Forecast, schedule: str, nfc: int, **more: Any) -> Cache:
        """A candidate before anything of it was searched for."""
        estimation, order, noise_aware = forecast
        settings = base_settings(self.combination.recipe)
        given: dict[str, Any] = {"estimation": estimation, "order": order, "noise_aware": noise_aware, **more}
        if schedule == "interval":
            warmup = settings.pop("warmup", 2)  # the list says it
            given["schedule"] = filled_interval_steps(self.session.rollout.num_steps, nfc, warmup)
        else:
            given |= {"schedule": schedule, "target_nfc": nfc}
        return Cache(**(settings | given))

    def own_rows(self, nfc: int) -> list[Row]:
        """Of this combination, this NFC, and no later calibration."""
        return [
            row
            for row in self.tried.rows
            if (row["types"], row["asked_nfc"], row["rival"]) == (self.combination.name, nfc, None)
            and row["cached_iterations"] <= self.cached_iterations
        ]

    def score(self, row: Row) -> float:
        """The worse of latent and image error, each in that of naive stacking: both have to be better."""
        return worse_error(row, self.naive(row["asked_nfc"]))

    def best(self, nfc: int) -> Row:
        return min(self.own_rows(nfc), key=self.score)

    def best_forecasts(self, nfc: int, count: int) -> list[Forecast]:
        """The best different ones, before corrections."""
        rows = [row for row in self.own_rows(nfc) if row["parts"] == "none" and row["calibrated"] == ALONE]
        return list(dict.fromkeys(as_forecast(row) for row in sorted(rows, key=self.score)))[:count]


def chosen_recipe(recipe: Recipe, row: Row) -> Recipe:
    """The recipe that makes the chosen candidate from nothing; what calibration writes into a cache is left to it."""
    cache = as_cache(row).model_copy(update=dict.fromkeys(WRITTEN))
    objective = recipe.objective.model_copy(update={"cached_iterations": row["cached_iterations"]})
    return recipe.model_copy(update={"cache": cache, "objective": objective})


def record(section: Tune, rows: list[Row], best: Row) -> Row:
    """What the export and its report keep of the search."""
    own = [row for row in rows if not row["rival"]]

    def on_front(row: Row) -> bool:
        cheaper = [r for r in own if r["bit_operations"] <= row["bit_operations"] and r is not row]
        return not row["rival"] and all(_error(row) < _error(r) for r in cheaper)

    same = [row for row in rows if all(row[key] == best[key] for key in ("types", "asked_nfc"))]
    naive = next((row for row in same if row["rival"] == NAIVE), None)
    shown = [{k: v for k, v in row.items() if k not in ("config", "key", "forecast")} for row in rows]
    marks = [{"front": on_front(row), "chosen": row is best} for row in rows]
    return {
        "budget": {key: getattr(section, key) for key in ("nfc", "bit_operations", "seconds")},
        "tried": [row | mark for row, mark in zip(shown, marks, strict=True)],
        "seconds": round(sum(row["elapsed"] for row in rows), 1),
        "naive": naive["config"] if naive else None,
    }


def worse_error(row: Row, naive: Row) -> float:
    """Of latents and images, each in that of naive stacking."""
    return max(float(row[name] / max(naive[name], 1e-30)) for name in ("E_qc", "image_error"))


def as_cache(row: Row) -> Cache:
    return Cache.model_validate_json(json.dumps(row["config"]))


def as_forecast(row: Row) -> Forecast:
    estimation, order, noise_aware = row["forecast"]
    return estimation, order, noise_aware


def _error(row: Row) -> float:
    return float(row["E_qc"])


def _words(forecast: Forecast) -> str:
    estimation, order, noise_aware = forecast
    return f"{estimation} {order}{' noise-aware' if noise_aware else ''}" if order else estimation


def _begin(recipe: Recipe, work: Path, resume: bool, overwrite: bool) -> None:
    """The folder of the search, new or gone on with.

    Raises:
        RecipeError: there is an interrupted search and it was not said what to do with it, or none to go on with.
    """
    kept, text = work / "recipe.yaml", dump_recipe(recipe)
    if resume:
        if not kept.is_file():
            raise RecipeError(f"--resume: there is no interrupted search in {work}")
        if yaml.safe_load(kept.read_text(encoding="utf-8")) != yaml.safe_load(text):
            raise RecipeError(f"--resume: the recipe has changed since {work} was begun; --overwrite starts over")
        return
    if work.exists() and not overwrite:
        raise RecipeError(f"{work} holds an interrupted search; --resume continues it, --overwrite starts over")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    kept.write_text(text, encoding="utf-8")
