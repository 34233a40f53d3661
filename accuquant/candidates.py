"""Candidates of the tuner, for one choice of types: caches made, corrected and confirmed by a rollout, and the best.

Every candidate is judged on noise that neither calibration nor evaluation uses, by the worse of its latent and image
error, each in that of naive stacking.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accuquant.budget import LEAST_NFC, Combination, base_settings
from accuquant.calibrate import searched
from accuquant.console import Reporter
from accuquant.core.metrics import relative_l2
from accuquant.core.schedule import DIFFUSERS_OFFSET, filled_interval_steps
from accuquant.correct import Targets, fit_correction
from accuquant.model.cache_state import CacheError, Correction
from accuquant.model.caching import cached, cached_features
from accuquant.noise import measure_noise
from accuquant.recipe import Cache, Tune
from accuquant.search import TAU_TOLERANCE
from accuquant.session import Session

ALONE, NAIVE = "alone", "naive stacking"
CORRECTED = {
    "none": "",
    "cache": ", forecasts corrected",
    "quantization": ", full steps corrected",
    "both": ", all corrected",
}
LEARNED = {
    "forecast": "forecasts, with the cache on",
    "weights": "weights, with the cache on",
    "both": "weights and forecasts, with the cache on",
}
PARTS = {"none": (False, False), "cache": (True, False), "quantization": (False, True), "both": (True, True)}
TUNING_SAMPLES = 16  # that full steps are searched on; fewer do not carry over to other classes
Row = dict[str, Any]
Forecast = tuple[str, int, bool]  # estimation, order, noise_aware


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


@dataclass
class Place:
    """A combination of types being searched.

    Attributes:
        seconds: of a full and of a skipped step of eight samples.
        calibrated: how the session's model has been, by now: alone, or what was learned with the cache on.
        learned: weights of the forecasts, where these were.
    """

    combination: Combination
    section: Tune
    session: Session
    seconds: tuple[float, float]
    tried: Tried
    reporter: Reporter
    calibrated: str = ALONE
    learned: Correction | None = None
    noises: dict[tuple[str, int], Any] = field(default_factory=dict)  # as calibrated, by gap
    targets: Targets = field(default_factory=Targets)

    def try_forecasts(self, nfc: int) -> None:
        """Every forecast under every schedule, with lists of full steps as they are found without refining."""
        total = len(self.forecasts(nfc)) * len(self.section.schedules)
        with self.reporter.bar(f"forecasts and schedules, NFC {nfc}", total) as advance:
            for forecast in self.forecasts(nfc):
                for schedule in self.section.schedules:

                    def make(forecast: Forecast = forecast, schedule: str = schedule) -> Cache:
                        config = self.cache(forecast, schedule, nfc)
                        if schedule == "best":
                            found = self.full_timesteps(forecast, nfc)
                            config = config.model_copy(update={"full_timesteps": found})
                        return self.searched(config)

                    row = self.confirm(forecast, schedule, "none", nfc, make)
                    advance(f"{row['cache']}: {row['E_qc']:.4f}" if row else "")

    def full_timesteps(self, forecast: Forecast, nfc: int) -> tuple[float, ...] | None:
        """A list without refining, which serves all orders of an estimation."""
        rows = [r for r in self.own_rows(nfc) if r["schedule"] == "best" and r["calibrated"] == self.calibrated]
        known = next((row for row in rows if row["forecast"][0] == forecast[0]), None)
        config = as_cache(known) if known else self.searched(self.cache(forecast, "best", nfc, trials=0))
        return config.full_timesteps

    def refine(self, forecast: Forecast, nfc: int) -> None:
        """Full steps that are searched for this very forecast."""
        config = self.cache(forecast, "best", nfc, trials=self.section.trials)
        self.confirm(forecast, "refined", "none", nfc, lambda: self.searched(config))

    def correct(self, nfc: int) -> None:
        """Every correction of the best candidate without one, as the model is; both, of other estimations' best."""
        rows = [r for r in self.own_rows(nfc) if r["parts"] == "none" and r["calibrated"] == self.calibrated]
        rows = [r for r in rows if as_cache(r).tau is None]  # RCS skips other steps with every sample
        best = dict[str, Row]()
        for row in sorted(rows, key=self.score):
            best.setdefault(as_forecast(row)[0], row)
        for number, row in enumerate(best.values()):
            for parts in self.section.corrections if number == 0 else {"both"} & {*self.section.corrections}:
                self.confirm(as_forecast(row), row["schedule"], parts, nfc, lambda row=row: as_cache(row))  # type: ignore[misc]

    def naive(self, nfc: int) -> Row:
        """Naive stacking: TaylorSeer, as if alone, on the model calibrated alone. Candidates are judged against it.

        Of two offsets, as published and diffusers', it has the one with the lower product of latent and image error.
        """
        forecast, found = ("taylor", 2, False), self.tried.rows
        mine = (row for row in found if (row["types"], row["asked_nfc"]) == (self.combination.name, nfc))
        known: Row | None = next((row for row in mine if row["rival"] == NAIVE), None)
        if known is not None:
            return known
        published = self.cache(forecast, "interval", nfc)
        rollout, rows = self.session.rollout, list[Row]()
        steps = filled_interval_steps(rollout.num_steps, nfc, published.warmup, DIFFUSERS_OFFSET)
        offset = published.model_copy(update={"full_timesteps": tuple(float(rollout.timesteps[i]) for i in steps)})
        for name, config in (("interval", published), (f"offset-{DIFFUSERS_OFFSET} interval", offset)):
            row = self.confirm(forecast, name, "none", nfc, lambda config=config: config)  # type: ignore[misc]
            assert row is not None
            rows.append(row)
        best = min(rows, key=lambda row: float(row["E_qc"] * row["image_error"]))
        row = self.confirm(forecast, best["schedule"], "none", nfc, lambda: as_cache(best), NAIVE)
        assert row is not None
        return row

    def cachequant(self, nfc: int) -> None:
        """The other rival, by module as ours, and with one feature as published."""
        reuse = ("reuse", 0, False)
        published = self.cache(reuse, "dps", nfc, measured_on="full_precision")
        self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(published), "CacheQuant")
        if published.modules is None and published.feature == "modules":
            one = published.model_copy(update={"feature": "blocks"})
            fewer = self.same_cost(one, nfc)  # the outer blocks are computed at every step
            if fewer >= LEAST_NFC:
                one = one.model_copy(update={"target_nfc": fewer})
                self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(one), "CacheQuant, one feature")

    def same_cost(self, other: Cache, nfc: int) -> int:
        """The most full steps with which a cache of other modules takes no more bit-operations than ours with nfc."""
        modules, _, bypassed, _ = cached_features(self.session.rollout.denoiser, other)
        counts, budget = range(nfc, 0, -1), self.combination.bit_operations(nfc) * (1 + 1e-9)
        return next((n for n in counts if self.combination.bit_operations(n, (*modules, *bypassed)) <= budget), 0)

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
            config, correction = make(), self.learned
        except CacheError as error:  # no tau meets the target, or groups cannot be cut so
            self.reporter.detail(f"{words}: {error}")
            return None
        of_forecasts, of_full_steps = PARTS[parts]
        if of_forecasts or of_full_steps:
            wanted = {"corrected": of_forecasts, "corrected_quantization": of_full_steps}
            config = config.model_copy(update=wanted)
            config, correction = fit_correction(self.session, config, Reporter(quiet=True), self.learned, self.targets)
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
        blocks = base_settings(self.combination.recipe).get("feature") == "blocks"  # noise is measured of modules
        knowing = [aware for aware in self.section.noise_aware if not (aware and blocks)]
        for estimation in ("taylor", "rfe"):
            for order in self.section.orders if estimation in self.section.estimations else ():
                found += [(estimation, order, aware) for aware in knowing if order < nfc]
        return found

    def cache(self, forecast: Forecast, schedule: str, nfc: int, **more: Any) -> Cache:
        """A candidate before anything of it was searched for."""
        estimation, order, noise_aware = forecast
        settings = base_settings(self.combination.recipe)
        given: dict[str, Any] = {"estimation": estimation, "order": order, "noise_aware": noise_aware, **more}
        if schedule == "interval":  # by timestep, as lists that are searched: at any number of steps they mean the same
            rollout = self.session.rollout
            steps = filled_interval_steps(rollout.num_steps, nfc, settings.get("warmup", 2))
            given["full_timesteps"] = tuple(float(rollout.timesteps[i]) for i in steps)
        else:
            given |= {"schedule": schedule, "target_nfc": nfc}
        return Cache(**(settings | given))

    def own_rows(self, nfc: int) -> list[Row]:
        """Of this combination, this NFC, and no later calibration; what a rival does may be chosen too.

        Not under a budget of seconds: a skipped step of one feature takes others than those that were measured. RCS may
        have more full steps than on the samples that tau was searched on, and does not count where it has.
        """
        stages = [ALONE, *(LEARNED[what] for what in self.section.learning)]
        known = stages[: stages.index(self.calibrated) + 1]
        mine = [r for r in self.tried.rows if (r["types"], r["asked_nfc"]) == (self.combination.name, nfc)]
        mine = [row for row in mine if row["rival"] in (None, NAIVE) or not self.section.seconds]
        mine = [row for row in mine if row["nfc"] <= nfc + TAU_TOLERANCE]
        return [row for row in mine if row["calibrated"] in known]

    def score(self, row: Row) -> float:
        """The worse of latent and image error, each in that of naive stacking: both have to be better."""
        return worse_error(row, self.naive(row["asked_nfc"]))

    def best(self, nfc: int) -> Row:
        return min(self.own_rows(nfc), key=lambda row: (self.score(row), row["rival"] is not None))

    def best_uncorrected(self, nfc: int) -> Row:
        """The best whose skipped steps are the same for all samples, on the model calibrated alone."""
        rows = [row for row in self.own_rows(nfc) if row["parts"] == "none" and row["calibrated"] == ALONE]
        return min((row for row in rows if as_cache(row).tau is None), key=self.score)

    def best_forecasts(self, nfc: int, count: int) -> list[Forecast]:
        """The best different ones, before corrections."""
        rows = [row for row in self.own_rows(nfc) if row["parts"] == "none" and row["calibrated"] == ALONE]
        return list(dict.fromkeys(as_forecast(row) for row in sorted(rows, key=self.score)))[:count]


def worse_error(row: Row, naive: Row) -> float:
    """Of latents and images, each in that of naive stacking."""
    return max(float(row[name] / max(naive[name], 1e-30)) for name in ("E_qc", "image_error"))


def as_cache(row: Row) -> Cache:
    return Cache.model_validate_json(json.dumps(row["config"]))


def learned_of(row: Row) -> str | None:
    """What the candidate's model has learned with the cache on, in the words of `tune.learning`."""
    return next((what for what, words in LEARNED.items() if words == row["calibrated"]), None)


def as_forecast(row: Row) -> Forecast:
    estimation, order, noise_aware = row["forecast"]
    return estimation, order, noise_aware


def _words(forecast: Forecast) -> str:
    estimation, order, noise_aware = forecast
    return f"{estimation} {order}{' noise-aware' if noise_aware else ''}" if order else estimation
