"""Candidates of the tuner, for one choice of types: caches made, corrected and confirmed by a rollout, and the best.

Every candidate is judged on noise that neither calibration nor evaluation uses, by the mean of the logarithms of its
latent and its image error: by the geometric mean of both, over samples and in that of naive stacking.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accuquant.caching.correct import Targets, fit_correction
from accuquant.caching.noise import measure_noise
from accuquant.caching.runs import errors_from
from accuquant.caching.search import TAU_TOLERANCE, searched
from accuquant.calibration.session import Session, further_validation
from accuquant.core.schedule import DIFFUSERS_OFFSET, filled_interval_steps
from accuquant.errors import CacheError
from accuquant.files import KeptFiles
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import ESTIMATIONS, Cache, Tune
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.features import skipped_modules
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.plan import CachePlan
from accuquant.tuning.budget import LEAST_NFC, Combination, base_settings
from accuquant.tuning.tried import ALONE, CORRECTED, LEARNED, NAIVE, PARTS, Candidate, Forecast, Tried

TUNING_SAMPLES = 16  # that full steps are searched on; fewer do not carry over to other classes


@dataclass(frozen=True)
class Checked:
    """Validation samples: what full precision makes of them.

    Attributes:
        images: of each tape (B, C, H, W); None where the pipeline makes none.
    """

    tapes: list[Tape]
    images: list[Tensor | None]

    @classmethod
    def of(cls, tapes: Sequence[Tape]) -> Checked:
        return cls(list(tapes), [tape.images(tape.state(len(tape))) for tape in tapes])


@dataclass
class Place:
    """A combination of types being searched.

    Attributes:
        seconds: of a full and of a skipped step of eight samples.
        calibrated: how the session's model has been, by now: alone, or what was learned with the cache on.
        learned: weights of the forecasts, where these were.
        kept: keeps the references of further validation samples.
    """

    combination: Combination
    section: Tune
    session: Session
    seconds: tuple[float, float]
    tried: Tried
    reporter: Reporter
    kept: KeptFiles | None = None
    calibrated: str = ALONE
    learned: Fitted | None = None
    noises: dict[tuple[str, int], Noise] = field(default_factory=dict)  # as calibrated, by gap
    targets: Targets = field(default_factory=Targets)
    fitted: dict[str, Fitted] = field(default_factory=dict)  # to candidates that get more samples
    further: dict[tuple[int, int, int], Checked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self.session.snapshot()

    def restore(self) -> None:
        """Have the model as it was when the search of it began: calibrated alone."""
        self.session.restore(self._start)
        self.calibrated, self.learned = ALONE, None

    @property
    def samples(self) -> int:
        """Validation samples that every candidate gets."""
        return self.session.validation.num_samples

    @cached_property
    def checked(self) -> Checked:
        return Checked.of(self.session.validation.tapes)

    def try_forecasts(self, nfc: int) -> None:
        """Every forecast under every schedule, with lists of full steps as they are found without refining."""
        total = len(self.forecasts(nfc)) * len(self.section.schedules)
        with self.reporter.bar(f"forecasts and schedules, NFC {nfc}", total) as advance:
            for forecast in self.forecasts(nfc):
                for schedule in self.section.schedules:

                    def make(forecast: Forecast = forecast, schedule: str = schedule) -> tuple[CachePlan, Fitted]:
                        config = self.cache(forecast, schedule, nfc)
                        if schedule == "best":
                            config = config.changed(full_timesteps=self.full_timesteps(forecast, nfc))
                        return self.searched(config)

                    found = self.confirm(forecast, schedule, "none", nfc, make)
                    advance(f"{found.cache}: {math.exp(self.score(found)):.4f}" if found else "")

    def full_timesteps(self, forecast: Forecast, nfc: int) -> tuple[float, ...] | None:
        """A list without refining, which serves all orders of an estimation."""
        same = [c for c in self.own(nfc) if c.schedule == "best" and c.calibrated == self.calibrated]
        known = next((c for c in same if c.forecast[0] == forecast[0]), None)
        plan = known.plan if known else self.searched(self.cache(forecast, "best", nfc, trials=0))[0]
        return plan.full_timesteps

    def refine(self, forecast: Forecast, nfc: int) -> None:
        """Full steps that are searched for this very forecast."""
        config = self.cache(forecast, "best", nfc, trials=self.section.trials)
        self.confirm(forecast, "refined", "none", nfc, lambda: self.searched(config))

    def correct(self, nfc: int) -> None:
        """Every correction of the best candidate without one, as the model is; both, of other estimations' best."""
        best = dict[str, Candidate]()
        for candidate in sorted(self.plain(nfc, self.calibrated), key=self.score):
            best.setdefault(candidate.forecast[0], candidate)
        for number, one in enumerate(best.values()):
            made = one.plan, one.fitted
            for parts in self.section.corrections if number == 0 else {"both"} & {*self.section.corrections}:
                self.confirm(one.forecast, one.schedule, parts, nfc, lambda made=made: made)  # type: ignore[misc]

    def naive(self, nfc: int) -> Candidate:
        """Naive stacking: TaylorSeer, as if alone, on the model calibrated alone. Candidates are judged against it.

        Of two offsets, as published and diffusers', it has the one that is nearer on the validation samples.
        """
        forecast, mine = ("taylor", 2, False), (self.combination.name, nfc)
        found = (c for c in self.tried.candidates if (c.types, c.asked_nfc) == mine and c.rival == NAIVE)
        if (known := next(found, None)) is not None:
            return known
        published = self.cache(forecast, "interval", nfc)
        session, both = self.session, list[Candidate]()
        steps = filled_interval_steps(session.num_steps, nfc, published.warmup, DIFFUSERS_OFFSET)
        offset = published.changed(full_timesteps=tuple(session.levels[i] for i in steps))
        for name, config in (("interval", published), (f"offset-{DIFFUSERS_OFFSET} interval", offset)):
            made = CachePlan.of(config), Fitted()
            one = self.confirm(forecast, name, "none", nfc, lambda made=made: made)  # type: ignore[misc]
            assert one is not None
            both.append(one)
        best = min(both, key=self.score)
        chosen = self.confirm(forecast, best.schedule, "none", nfc, lambda: (best.plan, Fitted()), NAIVE)
        assert chosen is not None
        return chosen

    def cachequant(self, nfc: int) -> None:
        """The other rival, by module as ours, and with one feature as published."""
        reuse = ("reuse", 0, False)
        published = self.cache(reuse, "dps", nfc, measured_on="full_precision")
        self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(published), "CacheQuant")
        if published.modules is None and published.feature == "modules":
            one = published.changed(feature="blocks")
            fewer = self.same_cost(one, nfc)  # the outer blocks are computed at every step
            if fewer >= LEAST_NFC:
                one = one.changed(target_nfc=fewer)
                self.confirm(reuse, "dps", "both", nfc, lambda: self.searched(one), "CacheQuant, one feature")

    def same_cost(self, other: Cache, nfc: int) -> int:
        """The most full steps with which a cache of other modules takes no more bit-operations than ours with nfc."""
        skipped = skipped_modules(self.session.model.only.network, other)
        counts, budget = range(nfc, 0, -1), self.combination.bit_operations(nfc) * (1 + 1e-9)
        return next((n for n in counts if self.combination.bit_operations(n, skipped) <= budget), 0)

    def confirm(
        self,
        forecast: Forecast,
        schedule: str,
        parts: str,
        nfc: int,
        make: Callable[[], tuple[CachePlan, Fitted]],
        rival: str = "",
    ) -> Candidate | None:
        """Roll the candidate out, unless that was done; None where there is no such cache."""
        words = f"{_words(forecast)}, {schedule} steps{CORRECTED[parts]}"
        calibrated = ALONE if rival else self.calibrated  # rivals are measured first, and stay what they were
        key = f"{self.combination.name} | {words} | NFC {nfc} | {calibrated} | {rival}"
        if (known := self.tried.find(key)) is not None:
            return known
        started = time.monotonic()
        try:
            plan, fitted = make()
        except CacheError as error:  # no tau meets the target, or groups cannot be cut so
            self.reporter.detail(f"{words}: {error}")
            return None
        fitted = fitted.with_learned(self.learned)
        of_forecasts, of_full_steps = PARTS[parts]
        if of_forecasts or of_full_steps:
            plan = replace(plan, corrected=of_forecasts, corrected_quantization=of_full_steps)
            fitted = fit_correction(self.session, plan, Reporter(quiet=True), fitted, self.targets)
        latents, images, counts, skipped_by = self.rolled_out(plan, fitted, self.checked)
        mean, (full, skipped) = sum(counts) / len(counts), self.seconds
        return self.tried.add(
            Candidate(
                key=key,
                types=self.combination.name,
                cache=words,
                forecast=forecast,
                schedule=schedule,
                parts=parts,
                asked_nfc=nfc,
                nfc=mean,
                bit_operations=self.combination.bit_operations(mean, skipped_by),
                seconds=mean * full + (self.session.num_steps - mean) * skipped,
                latent_errors=latents,
                image_errors=images,
                calibrated=calibrated,
                elapsed=round(time.monotonic() - started, 2),
                plan=plan,
                noise=fitted.noise if plan.uses_noise else None,
                rival=rival or None,
            )
        )

    def rolled_out(
        self, plan: CachePlan, fitted: Fitted, checked: Checked
    ) -> tuple[tuple[float, ...], tuple[float, ...], list[int], tuple[str, ...]]:
        """Latent and image error of each sample, full computations of each batch, and names of what was skipped."""
        latents, images, counts = list[Tensor](), list[Tensor](), list[int]()
        if plan.tau and any(tape.num_samples > 1 for tape in checked.tapes):
            checked = self.singles(checked)
        with cached(self.session.model.only.network, plan, fitted) as controller:
            for tape, wanted in zip(checked.tapes, checked.images, strict=True):
                errors = errors_from(tape, tape.end(), wanted)
                latents.append(errors[0])
                images.append(errors[-1])  # of the latents once more, where there are no images
                counts.append(controller.stats().nfc)
        found = tuple(tuple(torch.cat(errors).tolist()) for errors in (latents, images))
        return found[0], found[1], counts, controller.skipped

    def singles(self, checked: Checked) -> Checked:
        """The same samples, one in each tape: RCS decides for a batch, and tau is for single samples."""
        first = 0 if checked is self.checked else next(k for k, one in self.further.items() if one is checked)[0]
        span = (first, first + sum(tape.num_samples for tape in checked.tapes))
        return self.validated(span, 1)

    def validated(self, span: tuple[int, int], batch_size: int) -> Checked:
        """Validation samples from the first of ``span`` up to the second."""
        if (*span, batch_size) not in self.further:
            data, quiet = self.combination.recipe.data, Reporter(quiet=True)
            kept = None if batch_size == 1 else self.kept
            tapes = further_validation(self.session, data, span, batch_size, quiet, kept)
            self.further[(*span, batch_size)] = Checked.of(tapes)
        return self.further[(*span, batch_size)]

    def extended(self, candidate: Candidate, samples: int) -> Candidate:
        """The candidate on this many validation samples; the model has to be as it was tried with."""
        if candidate.samples >= samples:
            return candidate
        started, span = time.monotonic(), (candidate.samples, samples)
        if candidate.key not in self.fitted:
            fitted, quiet = candidate.fitted.with_learned(self.learned), Reporter(quiet=True)
            if candidate.plan.fits:
                fitted = fit_correction(self.session, candidate.plan, quiet, fitted, self.targets)
            self.fitted[candidate.key] = fitted
        size = self.combination.recipe.evaluation.batch_size
        checked = self.validated(span, 1 if candidate.plan.tau else size)
        latents, images, *_ = self.rolled_out(candidate.plan, self.fitted[candidate.key], checked)
        more = replace(
            candidate,
            latent_errors=candidate.latent_errors + latents,
            image_errors=candidate.image_errors + images,
            elapsed=round(candidate.elapsed + time.monotonic() - started, 2),
        )
        return self.tried.add(more)

    def searched(self, config: Cache) -> tuple[CachePlan, Fitted]:
        quiet, noise = Reporter(quiet=True), None
        if config.noise_aware and config.noise is None:
            full_steps = config.target_nfc or len(config.full_steps or config.full_timesteps or ())
            gap = max(1, round(self.session.num_steps / full_steps))
            if (self.calibrated, gap) not in self.noises:
                self.noises[self.calibrated, gap] = measure_noise(self.session, gap, quiet, config.modules)
            noise = self.noises[self.calibrated, gap]
        return searched(config, self.session, quiet, samples=TUNING_SAMPLES, noise=noise)

    def forecasts(self, nfc: int) -> list[Forecast]:
        """Those that the section allows and ``nfc`` full steps are enough for."""
        wanted = [(name, ESTIMATIONS[name][1]) for name in reversed(ESTIMATIONS) if name in self.section.estimations]
        found: list[Forecast] = [(name, 0, False) for name, highest in wanted if not highest]
        blocks = base_settings(self.combination.recipe.cache).get("feature") == "blocks"  # noise is measured of modules
        knowing = [aware for aware in self.section.noise_aware if not (aware and blocks)]
        for estimation, highest in wanted:
            for order in [order for order in self.section.orders if order <= highest]:
                found += [(estimation, order, aware) for aware in knowing if order < nfc]
        return found

    def cache(self, forecast: Forecast, schedule: str, nfc: int, **more: Any) -> Cache:
        """A candidate before anything of it was searched for."""
        estimation, order, noise_aware = forecast
        settings = base_settings(self.combination.recipe.cache)
        given: dict[str, Any] = {"estimation": estimation, "order": order, "noise_aware": noise_aware, **more}
        if schedule == "interval":  # by timestep, as lists that are searched: at any number of steps they mean the same
            steps = filled_interval_steps(self.session.num_steps, nfc, settings.get("warmup", 2))
            given["full_timesteps"] = tuple(self.session.levels[i] for i in steps)
        else:
            given |= {"schedule": schedule, "target_nfc": nfc}
        return Cache(**(settings | given))

    def own(self, nfc: int) -> list[Candidate]:
        """Of this combination, this NFC, and no later calibration; what a rival does may be chosen too.

        Not under a budget of seconds: a skipped step of one feature takes others than those that were measured. RCS may
        have more full steps than on the samples that tau was searched on, and does not count where it has.
        """
        stages = [ALONE, *(LEARNED[what] for what in self.section.learning)]
        known = stages[: stages.index(self.calibrated) + 1]
        mine = [c for c in self.tried.candidates if (c.types, c.asked_nfc) == (self.combination.name, nfc)]
        mine = [c for c in mine if c.rival in (None, NAIVE) or not self.section.seconds]
        return [c for c in mine if c.nfc <= nfc + TAU_TOLERANCE and c.calibrated in known]

    def plain(self, nfc: int, calibrated: str = ALONE) -> list[Candidate]:
        """Those without a correction on the model calibrated so, whose skipped steps are the same for all samples."""
        found = [c for c in self.own(nfc) if c.parts == "none" and c.calibrated == calibrated]
        return [c for c in found if c.plan.tau is None]  # RCS skips other steps with every sample

    def score(self, candidate: Candidate) -> float:
        """Mean over samples and both errors of their logarithm, on the samples that every candidate has."""
        return float(candidate.measure(self.samples).mean())

    def best_uncorrected(self, nfc: int) -> Candidate:
        return min(self.plain(nfc), key=self.score)

    def best_forecasts(self, nfc: int, count: int) -> list[Forecast]:
        """The best different ones, before corrections."""
        found = [c for c in self.own(nfc) if c.parts == "none" and c.calibrated == ALONE]
        return list(dict.fromkeys(c.forecast for c in sorted(found, key=self.score)))[:count]


def _words(forecast: Forecast) -> str:
    estimation, order, noise_aware = forecast
    return f"{estimation} {order}{' noise-aware' if noise_aware else ''}" if order else estimation
