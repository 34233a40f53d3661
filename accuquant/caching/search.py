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
from accuquant.calibration.session import Session
from accuquant.core.choice import log_error
from accuquant.core.forecasts import FORECASTS
from accuquant.core.metrics import relative_l2
from accuquant.core.schedule import DIFFUSERS_OFFSET, ForecastErrors, best_steps, dps_steps, filled_interval_steps
from accuquant.errors import CacheError
from accuquant.model.rollout import Conditions, Rollout
from accuquant.pipeline.data import draw
from accuquant.progress import Reporter
from accuquant.recipe import ESTIMATIONS, Cache
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.hooks import cached
from accuquant.runtime.cache.plan import CachePlan

EMPHASES = (0.0, 1.0, 2.0)  # of late steps over early ones, for the lists that dynamic programming proposes
RECORDED_SAMPLES = 2
RECORDED_BYTES = 2 << 30  # of features kept for the Gram matrices; with large models only some modules are recorded
TAU_TOLERANCE, TAU_TRIALS = 0.1, 20
SEARCH_SAMPLES = 8
DPS_SAMPLES = 2
CHOICE_SAMPLES = 64  # between forecasts, half of them for validation: at four bits fewer take the wrong one (measured)


def search_on_inputs(
    rollout: Rollout, inputs: list[Any], first_seed: int, config: Cache, reporter: Reporter
) -> CachePlan:
    """`search_cache` by samples of these inputs, against the model as it is without a cache."""
    samples = draw(inputs, CHOICE_SAMPLES if config.estimation == "auto" else samples_of(config), first_seed)
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    reference = torch.cat([rollout.trajectory(part)[0] for part in conditions.batches(SEARCH_SAMPLES)], 1)
    return search_cache(rollout, conditions, reference, config, reporter)


def samples_of(config: Cache, usual: int = SEARCH_SAMPLES) -> int:
    """Calibration samples that a search takes; more than usual where dps asks for them."""
    return max(usual, config.dps_samples or DPS_SAMPLES) if config.schedule == "dps" else usual


def search_cache(
    rollout: Rollout,
    conditions: Conditions,
    reference: Tensor,
    config: Cache,
    reporter: Reporter,
    fitted: Fitted | None = None,
) -> CachePlan:
    """The plan for what is asked, with a list of full timesteps or a tau in the place of the target.

    Args:
        conditions: of B calibration samples.
        reference: (T + 1, B, C, H, W), the latents to come near to: those of full precision without a cache.
        fitted: the noise that forecasts know, where they are to.

    Raises:
        CacheError: the target cannot be met.
    """
    if config.estimation == "auto":
        listed = config.changed(estimation="taylor")
        if listed.searches:
            few = torch.arange(min(len(conditions), SEARCH_SAMPLES), device=reference.device)
            given = (conditions.take(few), reference[:, few])
            plan = search_cache(rollout, *given, listed, reporter, fitted)
        else:
            plan = CachePlan.of(listed)
        return _choose_forecast(rollout, conditions, reference, plan, reporter, fitted)
    if config.schedule == "dps":
        return _dps(rollout, conditions, config, reporter, fitted)
    nfc = config.target_nfc or _nfc_of_seconds(rollout, conditions, config, fitted)
    if nfc > rollout.num_steps:
        raise CacheError(f"target_nfc: {nfc:g} is more than the {rollout.num_steps} steps there are")
    if config.schedule == "rcs":
        return _search_tau(rollout, conditions, config, nfc, reporter, fitted)
    return _search_steps(rollout, conditions, reference, config, int(nfc), reporter, fitted)


def _choose_forecast(
    rollout: Rollout,
    conditions: Conditions,
    reference: Tensor,
    plan: CachePlan,
    reporter: Reporter,
    fitted: Fitted | None,
) -> CachePlan:
    """The forecast whose final latent is nearest, at the same full steps.

    One that knows the noise has to be nearer than the best of the others by two standard errors of the difference:
    most often it is by chance (measured).
    """
    tried: dict[str, tuple[Tensor, CachePlan]] = {}
    kinds = [(name, 0, False) for name, (_, highest) in ESTIMATIONS.items() if not highest]
    others = [name for name, (_, highest) in reversed(ESTIMATIONS.items()) if highest]
    for aware in (False, True) if fitted is not None and fitted.noise else (False,):
        kinds += [(name, i, aware) for i in range(1, plan.order + 1) for name in others if i <= ESTIMATIONS[name][1]]
    with reporter.bar("choosing the forecast", len(kinds)) as advance:
        for name, order, aware in kinds:
            one = replace(plan, estimation=name, order=order, noise_aware=aware)
            words = f"{name} {order}{' noise-aware' if aware else ''}"
            try:
                with cached(rollout.denoiser, one.uncorrected, fitted):
                    parts = [rollout.trajectory(part)[0][-1] for part in conditions.batches(SEARCH_SAMPLES)]
                    final = torch.cat(parts)
            except CacheError as error:  # a U-Net's blocks have no input for rfe
                reporter.detail(f"{words}: {error}")
            else:
                tried[words] = relative_l2(final, reference[-1]), one
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


def _search_steps(
    rollout: Rollout,
    conditions: Conditions,
    reference: Tensor,
    config: Cache,
    nfc: int,
    reporter: Reporter,
    fitted: Fitted | None,
) -> CachePlan:
    """The best list of ``nfc`` full steps that was found."""
    num_steps, warmup = rollout.num_steps, min(config.warmup, rollout.num_steps)
    errors: dict[tuple[int, ...], float] = {}
    images = rollout.decode(reference[-1])

    def error(steps: tuple[int, ...]) -> float:
        with cached(rollout.denoiser, CachePlan.of(config, full_steps=steps).uncorrected, fitted):
            final = rollout.trajectory(conditions)[0][-1]
        both = relative_l2(final, reference[-1]), relative_l2(rollout.decode(final), images)
        errors[steps] = math.exp(float(log_error(*both).mean()))
        return errors[steps]

    # proposals: the fixed interval that comes nearest from below, at both offsets, and dynamic programming
    proposals = {filled_interval_steps(num_steps, nfc, warmup, offset) for offset in (None, DIFFUSERS_OFFSET)}
    longest = config.max_gap or max(
        8, math.ceil(4 * num_steps / nfc), math.ceil((num_steps - warmup + 1) / (nfc - warmup + 1))
    )
    inputs, outputs = record_grams(rollout, conditions, config, fitted)
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
    timesteps = tuple(float(rollout.timesteps[i]) for i in best)
    reporter.say(f"cache: {len(best)} full steps of {num_steps}, error {errors[best]:.4f} on calibration samples")
    return CachePlan.of(config, full_timesteps=timesteps, measured_nfc=(float(len(best)), 0.0))


def _search_tau(
    rollout: Rollout, conditions: Conditions, config: Cache, nfc: float, reporter: Reporter, fitted: Fitted | None
) -> CachePlan:
    """RCS's threshold, by bisection; each sample is a trajectory of its own, as its NFC is."""
    singles, low, high = conditions.batches(1), 1e-4, 100.0
    best: CachePlan | None = None
    with reporter.bar(f"searching tau for NFC {nfc:g}", TAU_TRIALS) as advance:
        for _ in range(TAU_TRIALS):
            tau, counts = math.sqrt(low * high), []
            for single in singles:
                with cached(rollout.denoiser, CachePlan.of(config, tau=tau), fitted) as controller:
                    rollout.trajectory(single)
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


def _dps(
    rollout: Rollout, conditions: Conditions, config: Cache, reporter: Reporter, fitted: Fitted | None
) -> CachePlan:
    """CacheQuant's list of full steps, from cached modules' outputs along a trajectory of the model as it is."""
    distances = torch.zeros(rollout.num_steps, rollout.num_steps, dtype=torch.float64)
    count = min(config.dps_samples or DPS_SAMPLES, len(conditions))
    looked_at = conditions.take(torch.arange(count, device=conditions.noise.device))
    for few in looked_at.batches(RECORDED_SAMPLES):  # the L1 distances of samples add up
        for pairs in record_features(rollout, few, config, config.dps_feature or ".*", fitted).values():
            outputs = torch.stack([output.flatten() for _, output in pairs])
            distances += torch.cdist(outputs, outputs, p=1).double()
    try:
        steps = dps_steps(distances, config.interval or rollout.num_steps / (config.target_nfc or 1))
    except ValueError as error:
        raise CacheError(f"cache.{'interval' if config.interval else 'target_nfc'}: {error}") from error
    reporter.say(f"cache: {len(steps)} full steps of {rollout.num_steps}, by the features of {count} samples")
    timesteps = tuple(float(rollout.timesteps[i]) for i in steps)
    return CachePlan.of(config, full_timesteps=timesteps, measured_nfc=(float(len(steps)), 0.0))


def record_grams(
    rollout: Rollout, conditions: Conditions, config: Cache, fitted: Fitted | None = None
) -> tuple[Tensor, Tensor]:
    """Inner products of the cached modules' inputs and outputs over one full trajectory, each (modules, B, T, T)."""
    grams, kept = [], record_features(rollout, conditions, config, fitted=fitted)
    for side in (0, 1):
        stacked = [torch.stack([pair[side] for pair in pairs]).double() for pairs in kept.values()]
        grams.append(torch.stack([torch.einsum("ibd,jbd->bij", x, x) for x in stacked]))
    return grams[0], grams[1]


@torch.no_grad()
def record_features(
    rollout: Rollout, conditions: Conditions, config: Cache, pattern: str = ".*", fitted: Fitted | None = None
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output (B, ...) of cached modules at every step of one full trajectory, of `RECORDED_SAMPLES` at most.

    Raises:
        CacheError: ``pattern``, the config's dps_feature, matches no cached module.
    """
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    taken = conditions.take(torch.arange(min(RECORDED_SAMPLES, len(conditions)), device=conditions.noise.device))
    probe = CachePlan.of(config, full_steps=tuple(range(rollout.num_steps))).uncorrected
    with cached(rollout.denoiser, probe, fitted) as controller:
        names, every = [n for n in controller.modules if re.fullmatch(pattern, n)], 0
        if not names:
            raise CacheError(f"dps_feature: {pattern!r} matches none of {', '.join(controller.modules)}")

        def record(module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
            nonlocal every
            tensor = output[0] if isinstance(output, tuple) else output
            if every == 0:
                each = 2 * rollout.num_steps * tensor.numel() * tensor.element_size()
                every = math.ceil(len(names) / max(1, RECORDED_BYTES // each))
            if module in names and names.index(module) % every == 0:
                kept.setdefault(module, []).append((inputs[0].flatten(1).cpu(), tensor.flatten(1).cpu()))

        controller.see = record
        rollout.trajectory(taken)
    return kept


def _nfc_of_seconds(rollout: Rollout, conditions: Conditions, config: Cache, fitted: Fitted | None) -> float:
    """NFC at which one trajectory takes the asked time, from the times of all steps full and of the fewest."""
    fewest = min(rollout.num_steps, max(config.warmup, config.forecast_order + 1))
    seconds = []
    for full in (rollout.num_steps, fewest):
        with cached(rollout.denoiser, CachePlan.of(config, full_steps=tuple(range(full))).uncorrected, fitted):
            times = []
            for _ in range(3):
                started = time.perf_counter()
                rollout.trajectory(conditions)
                if conditions.noise.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        seconds.append(sorted(times)[1])
    assert config.target_seconds is not None
    if seconds[0] <= config.target_seconds:  # without skipping anything
        return rollout.num_steps
    if not seconds[1] < config.target_seconds:
        raise CacheError(
            f"target_seconds: {config.target_seconds:g} s cannot be met; {len(conditions)} samples take "
            f"{seconds[1]:.2f} s with {fewest} full steps and {seconds[0]:.2f} s with all"
        )
    share = (config.target_seconds - seconds[1]) / max(seconds[0] - seconds[1], 1e-9)
    return min(rollout.num_steps, fewest + math.floor(share * (rollout.num_steps - fewest)))


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
    num_steps = session.rollout.num_steps
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
        reference = session.reference.first(samples_of(config, samples))
        published = config.measured_on == "full_precision"
        if config.estimation == "auto":  # by samples too that the weights are not fitted to
            half = CHOICE_SAMPLES // 2
            reference = session.reference.first(half).join(session.validation.first(half))
        given = (session.rollout, reference.conditions, reference.latents)
        with session.full_precision() if published and config.schedule == "dps" else nullcontext():
            plan = search_cache(*given, config, reporter, fitted)
    return plan, fitted
