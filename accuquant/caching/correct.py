"""Fits CacheQuant's decoupled error correction: of forecasts, and of what full steps compute with quantized layers.

Both parts are affine maps of each channel of a cached module's output, one for each step. Published (CVPR 2025, arXiv
2503.01323), the second is fitted to output channels of quantized layers with the bias kept out of both tensors. The
last layer of attention and MLP is such a layer, and least squares finds the same map with the bias inside. Ours departs
in two ways: slopes are drawn half way to 1, unless `correction_ridge` is 0 (`core.correction`), and layers outside of
what is cached are not corrected.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from accuquant.calibration.session import Session
from accuquant.core.correction import RIDGE, apply_affine, fit_affine
from accuquant.core.forecasts import Memory
from accuquant.errors import CacheError
from accuquant.pipeline.tape import Tape
from accuquant.progress import Advance, Reporter
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.observe import Call, observed

CORRECTION_SAMPLES = 16
KEPT_BYTES = 1 << 30  # of what full precision gives, for the other fits of a session

Maps = dict[str, dict[float, Tensor]]  # module -> timestep -> (2, C)


class Targets:
    """What cached modules give in full precision along a session's reference, kept between fits as far as it fits."""

    def __init__(self) -> None:
        self.kept, self.bytes = dict[tuple[str, ...], dict[int, dict[str, Tensor]]](), 0

    def at(self, session: Session, controller: Controller, i: int, tape: Tape) -> dict[str, Tensor]:
        """Module -> output at step i."""
        of_these = self.kept.setdefault(tuple(controller.modules), {})
        if i in of_these:
            return of_these[i]
        seen = features_at(session, controller, i, tape, full_precision=True)
        outputs = {module: output for module, (_, output) in seen.items()}
        size = sum(output.nbytes for output in outputs.values())
        if self.bytes + size <= KEPT_BYTES:
            of_these[i] = outputs
            self.bytes += size
        return outputs


@torch.no_grad()
def fit_correction(
    session: Session,
    plan: CachePlan,
    reporter: Reporter,
    fitted: Fitted | None = None,
    targets: Targets | None = None,
) -> Fitted:
    """Slope and intercept of every channel of every cached module: at skipped steps, at full ones, or at both.

    The target is what the module gives in full precision at the reference trajectory's latent.

    Args:
        fitted: learned weights of the forecasts and the noise they know, where the plan has some; they are kept.
        targets: of earlier fits of this session.

    Returns:
        what was given, with the correction.

    Raises:
        CacheError: the denoiser is called more than once in a step, or a module in a call of it; two steps are at one
            noise level; or the pipeline takes single samples only.
    """
    forecasts, computed = Maps(), Maps()  # by kind of step
    (tape, *others), denoiser = session.few(CORRECTION_SAMPLES, CORRECTION_SAMPLES), session.model.only
    if others:
        raise CacheError(
            f"corrected: {type(tape.pipeline).__name__} takes these samples one by one, and a correction is fitted to "
            "several at once; leave corrected and corrected_quantization out"
        )
    if len(set(session.levels)) < len(session.levels):
        raise CacheError(
            "corrected: two steps of this scheduler are at one noise level, by which a correction is found again; "
            "leave corrected and corrected_quantization out, or take another scheduler"
        )
    if any(sum(one.component == denoiser.name for one in step.calls) > 1 for step in tape.steps):
        raise CacheError(
            f"corrected: {type(tape.pipeline).__name__} calls {denoiser.name} more than once in a step, and a "
            "correction is fitted to one call; leave corrected and corrected_quantization out"
        )
    with (
        reporter.bar("correction of the cached modules", session.num_steps) as advance,
        cached(denoiser.network, plan.uncorrected, fitted) as controller,
    ):
        given = (session, tape, plan, controller, forecasts, computed, advance)
        if plan.measured_on == "full_precision":
            _fit_as_published(*given)
        else:
            _fit_on_own_trajectory(*given, targets or Targets())
    skipped, full = (sorted(next(iter(maps.values())), reverse=True) if maps else [] for maps in (forecasts, computed))
    channels = {name: next(iter(found.values())).shape[1] for name, found in (computed | forecasts).items()}
    correction = Fitted(skipped, channels, full, noise=fitted.noise if fitted else None).with_learned(fitted)
    for name in channels:
        rows = [forecasts[name][t] for t in skipped] + [computed[name][t] for t in full]
        correction(name).copy_(torch.stack(rows))
    return correction.to(tape.state(0).latents[0].device)


def ridge_of(plan: CachePlan) -> float:
    return RIDGE if plan.correction_ridge is None else plan.correction_ridge


def _fit_on_own_trajectory(
    session: Session,
    tape: Tape,
    plan: CachePlan,
    controller: Controller,
    forecasts: Maps,
    computed: Maps,
    advance: Advance,
    targets: Targets,
) -> None:
    """The model walks its own trajectory, quantized and cached and corrected so far."""
    ridge, state = ridge_of(plan), tape.state(0)
    true: dict[str, Tensor] = {}

    def correct(module: str, output: Tensor, is_computed: bool) -> Tensor:
        if not (plan.corrected_quantization if is_computed else plan.corrected):
            return output
        found = fit_affine(output, true[module], ridge)
        (computed if is_computed else forecasts).setdefault(module, {})[controller.state.timestep] = found
        return apply_affine(found, output)

    controller.correct = correct
    for i in range(len(tape)):
        true |= targets.at(session, controller, i, tape)
        state = tape.step(i, state)
        advance("")


def _fit_as_published(
    session: Session,
    tape: Tape,
    plan: CachePlan,
    controller: Controller,
    forecasts: Maps,
    computed: Maps,
    advance: Advance,
) -> None:
    """On the reference latents: forecasts of full precision's features, and quantized modules beside them."""
    ridge, memories = ridge_of(plan), dict[str, Memory]()
    for i in range(len(tape)):
        timestep = session.levels[i]
        controller.enter(None, timestep, tape.state(i).latents[0])
        true = features_at(session, controller, i, tape, full_precision=True)
        if controller.state.full and plan.corrected_quantization:
            noisy = features_at(session, controller, i, tape, full_precision=False)
            for module, (_, output) in noisy.items():
                computed.setdefault(module, {})[timestep] = fit_affine(output, true[module][1], ridge)
        for module, (input, output) in true.items():
            forecast = controller.forecasts[module]
            if controller.state.full:
                memories[module] = forecast.update(memories.get(module), i, output, input)
            elif plan.corrected:
                plain = forecast.predict(memories[module], i, input)
                if controller.weigh is not None:
                    plain = controller.weigh(module, plain, memories[module].factors[0])
                forecasts.setdefault(module, {})[timestep] = fit_affine(plain, output, ridge)
        advance("")


def features_at(
    session: Session, controller: Controller, i: int, tape: Tape, full_precision: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features (input, output) at step i without the cache, on full precision's latents.

    Raises:
        CacheError: a module works more than once in a call of the denoiser.
    """
    names = [*controller.modules, *controller.begins.values()]
    seen: dict[str, Call] = {}

    def see(module: str, call: Call) -> None:
        if module in seen:
            raise CacheError(
                f"corrected: {module} works more than once in a call of the denoiser, and a correction is fitted to "
                "one output; leave corrected and corrected_quantization out, or name other modules"
            )
        seen[module] = call

    controller.paused = True
    with (
        session.full_precision() if full_precision else nullcontext(),
        observed(session.model.only.network, names, see),
    ):
        tape.step(i, tape.state(i))
    controller.paused = False
    return controller.features(seen)


def fit_calls(config: Cache, num_steps: int, batch_size: int) -> int:
    """Calls of the denoiser, of ``batch_size`` samples each, that `fit_correction` makes: two each step."""
    return round(2 * num_steps * CORRECTION_SAMPLES / batch_size) if config.fits else 0
