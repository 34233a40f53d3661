"""Where to compute in full, and by which forecast: the search behind ``target_nfc``, ``target_seconds`` and ``auto``.

A list of full steps (`schedule: best`, the default of a target) is found in three stages, each dearer and nearer to the
truth than the one before: dynamic programming over forecast errors of one recorded trajectory, for several weightings
of early against late steps; a sampled trajectory for each of these lists and the fixed interval; moves of single full
steps, kept where a sampled trajectory gets nearer to the reference: by the geometric mean of the relative errors of
latents and images, over both and over samples, for what is far in one can be near in the other (`core.choice`: the mean
log ratio to the fixed interval, but for what is the same for all lists). `schedule: rcs` searches tau.
"""

from __future__ import annotations

import math
import random
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accuquant.caching.noise import measure_noise
from accuquant.caching.runs import Runs, errors_from
from accuquant.calibration.session import Session, final_errors
from accuquant.core.choice import log_error
from accuquant.core.forecasts import FORECASTS
from accuquant.core.schedule import DIFFUSERS_OFFSET, ForecastErrors, best_steps, dps_steps, filled_interval_steps
from accuquant.errors import CacheError
from accuquant.pipeline.data import draw
from accuquant.pipeline.denoisers import denoisers_of, several, step_levels
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.rows import Row
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import ESTIMATIONS, Cache
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.state import Key

EMPHASES = (0.0, 1.0, 2.0)  # of late steps over early ones, for the lists that dynamic programming proposes
RECORDED_SAMPLES = 2
RECORDED_BYTES = 2 << 30  # of features kept for the Gram matrices; with large models only some modules are recorded
TAU_TOLERANCE, TAU_TRIALS = 0.1, 20
SEARCH_SAMPLES = 8
DPS_SAMPLES = 2
CHOICE_SAMPLES = 64  # between forecasts, half of them for validation: at four bits fewer take the wrong one (measured)


def search_on_rows(
    recorder: Recorder, rows: list[Row], first_seed: int, config: Cache, reporter: Reporter
) -> CachePlan:
    """`search_cache` by samples of these rows, against the pipeline as it is without a cache.

    Raises:
        CacheError: it has several denoisers, or the target cannot be met.
    """
    samples, kept = draw(rows, CHOICE_SAMPLES, first_seed), dict[tuple[int, int], list[Tape]]()

    def few(count: int, batch_size: int) -> list[Tape]:
        if (count, batch_size) not in kept:
            given = (samples.first(count), batch_size, reporter, "without the cache")
            kept[count, batch_size] = recorder.tapes(*given, images=True)
        return kept[count, batch_size]

    denoisers = denoisers_of(recorder.tape(samples.first(1), rehearsed=True))
    if len(denoisers) > 1:
        raise CacheError(several(type(recorder.pipeline).__name__, (one.name for one in denoisers)))
    given = (few, lambda: few(CHOICE_SAMPLES, SEARCH_SAMPLES))
    runs = Runs(denoisers[0].network, step_levels(denoisers), samples_of(config), *given)
    return search_cache(runs, config, reporter)


def samples_of(config: Cache, usual: int = SEARCH_SAMPLES) -> int:
    """Calibration samples that a search takes; more than usual where dps asks for them."""
    return max(usual, config.dps_samples or DPS_SAMPLES) if config.schedule == "dps" else usual


def search_cache(runs: Runs, config: Cache, reporter: Reporter, fitted: Fitted | None = None) -> CachePlan:
    """The plan for what is asked, with a list of full timesteps or a tau in the place of the target.

    Args:
        fitted: the noise that forecasts know, where they are to.

    Raises:
        CacheError: the target cannot be met.
    """
    if config.estimation == "auto":
        listed = config.changed(estimation="taylor")
        plan = search_cache(runs, listed, reporter, fitted) if listed.searches else CachePlan.of(listed)
        return _choose_forecast(runs, plan, reporter, fitted)
    if config.schedule == "dps":
        return _dps(runs, config, reporter, fitted)
    nfc = config.target_nfc or _nfc_of_seconds(runs, config, fitted)
    if nfc > runs.num_steps:
        raise CacheError(f"target_nfc: {nfc:g} is more than the {runs.num_steps} steps there are")
    if config.schedule == "rcs":
        return _search_tau(runs, config, nfc, reporter, fitted)
    return _search_steps(runs, config, int(nfc), reporter, fitted)


def _choose_forecast(runs: Runs, plan: CachePlan, reporter: Reporter, fitted: Fitted | None) -> CachePlan:
    """The forecast whose final latent is nearest, at the same full steps.

    One that knows the noise has to be nearer than the best of the others by two standard errors of the difference:
    most often it is by chance (measured).
    """
    tried: dict[str, tuple[Tensor, CachePlan]] = {}
    kinds = [(name, 0, False) for name, (_, highest) in ESTIMATIONS.items() if not highest]
    others = [name for name, (_, highest) in reversed(ESTIMATIONS.items()) if highest]
    for aware in (False, True) if fitted is not None and fitted.noise else (False,):
        kinds += [(name, i, aware) for i in range(1, plan.order + 1) for name in others if i <= ESTIMATIONS[name][1]]
    tapes = runs.choice()  # before a cache is on: it may sample them now
    with reporter.bar("choosing the forecast", len(kinds)) as advance:
        for name, order, aware in kinds:
            one = replace(plan, estimation=name, order=order, noise_aware=aware)
            words = f"{name} {order}{' noise-aware' if aware else ''}"
            try:
                with cached(runs.denoiser, one.uncorrected, fitted):
                    tried[words] = final_errors(tapes), one
            except CacheError as error:  # a U-Net's blocks have no input for rfe
                reporter.detail(f"{words}: {error}")
            advance(words)
    means = {words: float(error.mean()) for words, (error, _) in tried.items()}
    best = min((words for words, (_, one) in tried.items() if not one.noise_aware), key=means.__getitem__)
    for words in [words for words, (_, one) in tried.items() if one.noise_aware]:
        gain = tried[best][0] - tried[words][0]
        if float(gain.mean()) > 2 * float(gain.std()) / math.sqrt(len(gain)):
            best = words
    reporter.say(f"cache: {best} ({', '.join(f'{words} {error:.4f}' for words, error in means.items())})")
    return tried[best][1]


def search_calls(config: Cache, num_steps: int, batch_size: int) -> int:
    """Network evaluations, of ``batch_size`` samples each, that a search makes at most; full ones count as one."""
    if not config.searches:
        return 0
    if config.schedule == "dps":
        return math.ceil(num_steps * (config.dps_samples or DPS_SAMPLES) / batch_size)
    trials = TAU_TRIALS if config.schedule == "rcs" else config.trials + len(EMPHASES) + 3
    orders = [min(highest, config.forecast_order) for _, highest in ESTIMATIONS.values()]
    kinds = sum(orders) * (2 if config.noise_aware else 1) + orders.count(0)
    chosen = kinds if config.estimation == "auto" else 0
    samples = trials * SEARCH_SAMPLES + chosen * CHOICE_SAMPLES
    return round((config.target_nfc or num_steps) * samples / batch_size)


def _search_steps(runs: Runs, config: Cache, nfc: int, reporter: Reporter, fitted: Fitted | None) -> CachePlan:
    """The best list of ``nfc`` full steps that was found."""
    num_steps, warmup, tapes = runs.num_steps, min(config.warmup, runs.num_steps), runs.usual()
    errors: dict[tuple[int, ...], float] = {}
    images = [tape.images(tape.state(num_steps)) for tape in tapes]

    def error(steps: tuple[int, ...]) -> float:
        found = list[Tensor]()
        with cached(runs.denoiser, CachePlan.of(config, full_steps=steps).uncorrected, fitted):
            for tape, wanted in zip(tapes, images, strict=True):
                found.append(log_error(*errors_from(tape, tape.end(), wanted)))
        errors[steps] = math.exp(float(torch.cat(found).mean()))
        return errors[steps]

    # proposals: the fixed interval that comes nearest from below, at both offsets, and dynamic programming
    proposals = {filled_interval_steps(num_steps, nfc, warmup, offset) for offset in (None, DIFFUSERS_OFFSET)}
    longest = config.max_gap or max(
        8, math.ceil(4 * num_steps / nfc), math.ceil((num_steps - warmup + 1) / (nfc - warmup + 1))
    )
    inputs, outputs = record_grams(runs, config, fitted)
    needs_input = FORECASTS[config.estimation].needs_input
    for emphasis in EMPHASES:
        table = ForecastErrors(inputs, outputs, config.forecast_order, needs_input, emphasis)
        proposals.add(best_steps(table.cost, num_steps, nfc, warmup, longest))
    best = min(sorted(proposals), key=error)

    # moves of single full steps, in random order, until none helps or the trials are used up
    rng, left, moved = random.Random(0), config.trials, True
    with reporter.bar(f"searching {nfc} full steps", config.trials) as advance:
        while moved and left > 0:
            moved = False
            moves = [(k, by) for k in range(min(warmup, len(best)), len(best)) for by in (-1, 1)]
            rng.shuffle(moves)
            for k, by in moves:
                tried = (*best[:k], best[k] + by, *best[k + 1 :])
                if left == 0 or tried in errors or len(set(tried)) < len(tried) or tried[-1] >= num_steps:
                    continue
                left -= 1
                if error(tried) < errors[best]:
                    best, moved = tried, True
                advance(f"{errors[best]:.4f}")
    reporter.say(f"cache: {len(best)} full steps of {num_steps}, error {errors[best]:.4f} on calibration samples")
    return CachePlan.of(config, **runs.listed(best), measured_nfc=(float(len(best)), 0.0))


def _search_tau(runs: Runs, config: Cache, nfc: float, reporter: Reporter, fitted: Fitted | None) -> CachePlan:
    """RCS's threshold, by bisection; each sample is a trajectory of its own, as its NFC is."""
    singles, low, high = runs.few(runs.samples, 1), 1e-4, 100.0
    best: CachePlan | None = None
    with reporter.bar(f"searching tau for NFC {nfc:g}", TAU_TRIALS) as advance:
        for _ in range(TAU_TRIALS):
            tau, counts = math.sqrt(low * high), []
            for single in singles:
                with cached(runs.denoiser, CachePlan.of(config, tau=tau), fitted) as controller:
                    single.rolled()
                    counts.append(float(controller.stats().nfc))
            mean, std = torch.tensor(counts).mean().item(), torch.tensor(counts).std(correction=0).item()
            if best is None or best.measured_nfc is None or abs(mean - nfc) < abs(best.measured_nfc[0] - nfc):
                best = CachePlan.of(config, tau=tau, measured_nfc=(mean, std))
            advance(f"tau {tau:.4g}: {mean:.2f}")
            if abs(mean - nfc) <= TAU_TOLERANCE:
                break
            low, high = (tau, high) if mean > nfc else (low, tau)
    assert best is not None and best.measured_nfc is not None
    if abs(best.measured_nfc[0] - nfc) > TAU_TOLERANCE:
        raise CacheError(
            f"target_nfc: no tau gives {nfc:g} on these {len(singles)} samples, the nearest gives "
            f"{best.measured_nfc[0]:.2f}; ask for that, or leave schedule: rcs out"
        )
    reporter.say(f"cache: tau {best.tau:.4g}, NFC {best.measured_nfc[0]:.2f} ± {best.measured_nfc[1]:.2f}")
    return best


def _dps(runs: Runs, config: Cache, reporter: Reporter, fitted: Fitted | None) -> CachePlan:
    """CacheQuant's list of full steps, from cached modules' outputs along a trajectory of the model as it is."""
    distances = torch.zeros(runs.num_steps, runs.num_steps, dtype=torch.float64)
    count = config.dps_samples or DPS_SAMPLES
    for tape in runs.few(count, RECORDED_SAMPLES):  # the L1 distances of samples add up
        for pairs in record_features(runs, tape, config, config.dps_feature or ".*", fitted).values():
            outputs = torch.stack([output.flatten() for _, output in pairs])
            distances += torch.cdist(outputs, outputs, p=1).double()
    try:
        steps = dps_steps(distances, config.interval or runs.num_steps / (config.target_nfc or 1))
    except ValueError as error:
        raise CacheError(f"cache.{'interval' if config.interval else 'target_nfc'}: {error}") from error
    reporter.say(f"cache: {len(steps)} full steps of {runs.num_steps}, by the features of {count} samples")
    return CachePlan.of(config, **runs.listed(steps), measured_nfc=(float(len(steps)), 0.0))


def record_grams(runs: Runs, config: Cache, fitted: Fitted | None = None) -> tuple[Tensor, Tensor]:
    """Inner products of the cached modules' inputs and outputs over one full trajectory, each (modules, B, T, T)."""
    grams: tuple[list[Tensor], list[Tensor]] = [], []
    for tape in runs.few(RECORDED_SAMPLES, RECORDED_SAMPLES):
        kept = record_features(runs, tape, config, fitted=fitted)
        for side in (0, 1):
            stacked = [torch.stack([pair[side] for pair in pairs]).double() for pairs in kept.values()]
            grams[side].append(torch.stack([torch.einsum("ibd,jbd->bij", x, x) for x in stacked]))
    return torch.cat(grams[0], 1), torch.cat(grams[1], 1)


@torch.no_grad()
def record_features(
    runs: Runs, tape: Tape, config: Cache, pattern: str = ".*", fitted: Fitted | None = None
) -> dict[Key, list[tuple[Tensor, Tensor]]]:
    """Input and output (B, ...) of cached modules at every step of one full trajectory, each call apart.

    Raises:
        CacheError: ``pattern``, the config's dps_feature, matches no cached module.
    """
    kept: dict[Key, list[tuple[Tensor, Tensor]]] = {}
    probe = CachePlan.of(config, full_steps=tuple(range(runs.num_steps))).uncorrected
    with cached(runs.denoiser, probe, fitted) as controller:
        names, every = [n for n in controller.modules if re.fullmatch(pattern, n)], 0
        if not names:
            raise CacheError(f"dps_feature: {pattern!r} matches none of {', '.join(controller.modules)}")

        def record(module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
            nonlocal every
            tensor = output[0] if isinstance(output, tuple) else output
            if every == 0:
                each = 2 * runs.num_steps * tensor.numel() * tensor.element_size()
                every = math.ceil(len(names) / max(1, RECORDED_BYTES // each))
            if module in names and names.index(module) % every == 0:
                pair = inputs[0].flatten(1).cpu(), tensor.flatten(1).cpu()
                kept.setdefault(controller.state.key(module), []).append(pair)

        controller.see = record
        tape.rolled()
    return kept


def _nfc_of_seconds(runs: Runs, config: Cache, fitted: Fitted | None) -> float:
    """NFC at which one trajectory takes the asked time, from the times of all steps full and of the fewest."""
    fewest = min(runs.num_steps, max(config.warmup, config.forecast_order + 1))
    tapes, seconds = runs.usual(), list[float]()
    for full in (runs.num_steps, fewest):
        with cached(runs.denoiser, CachePlan.of(config, full_steps=tuple(range(full))).uncorrected, fitted):
            times = []
            for _ in range(3):
                started = time.perf_counter()
                for tape in tapes:
                    tape.rolled()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        seconds.append(sorted(times)[1])
    assert config.target_seconds is not None
    if seconds[0] <= config.target_seconds:  # without skipping anything
        return runs.num_steps
    if not seconds[1] < config.target_seconds:
        raise CacheError(
            f"target_seconds: {config.target_seconds:g} s cannot be met; {sum(tape.num_samples for tape in tapes)} "
            f"samples take {seconds[1]:.2f} s with {fewest} full steps and {seconds[0]:.2f} s with all"
        )
    share = (config.target_seconds - seconds[1]) / max(seconds[0] - seconds[1], 1e-9)
    return min(runs.num_steps, fewest + math.floor(share * (runs.num_steps - fewest)))


TYPICAL_NFC = 14  # for the gap that noise is measured over, where tau or a time leaves it open


def searched(
    config: Cache,
    session: Session,
    reporter: Reporter,
    samples: int = SEARCH_SAMPLES,
    noise: Noise | None = None,
) -> tuple[CachePlan, Fitted]:
    """The plan for what is asked, its target searched for, and the noise of it, on the session's model as it is.

    Args:
        noise: if it was measured before.
    """
    num_steps = session.num_steps
    if config.noise is not None:
        noise = {name: (out, into) for name, (out, into) in config.noise.items()}
    if config.noise_aware and noise is None:
        listed = len(config.full_steps or config.full_timesteps or ())
        gap = config.interval or round(num_steps / (config.target_nfc or listed or TYPICAL_NFC))
        noise = measure_noise(session, max(1, gap), reporter, config.modules)
    fitted = Fitted(noise=noise)
    if not config.searches:
        plan = CachePlan.of(config)
    else:
        half, published = CHOICE_SAMPLES // 2, config.measured_on == "full_precision"

        def choice() -> list[Tape]:  # by samples too that the weights are not fitted to
            return [*session.reference.main.first(half), *session.validation.main.first(half)]

        runs = Runs(session.model.only.network, session.levels, samples_of(config, samples), session.few, choice)
        with session.full_precision() if published and config.schedule == "dps" else nullcontext():
            plan = search_cache(runs, config, reporter, fitted)
    return plan, fitted
