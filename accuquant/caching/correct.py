"""Fits CacheQuant's decoupled error correction: of forecasts, and of what full steps compute with quantized layers.

Both parts are affine maps of each channel of a cached module's output, one for each step. Published (CVPR 2025, arXiv
2503.01323), the second is fitted to output channels of quantized layers with the bias kept out of both tensors. The
last layer of attention and MLP is such a layer, and least squares finds the same map with the bias inside. Ours departs
in two ways, also where it is the rival: slopes are drawn half way to 1 (`core.correction`, which helps), and layers
outside of what is cached are not corrected.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from accuquant.calibration.reference import Reference
from accuquant.calibration.session import Session, watched
from accuquant.core.correction import apply_affine, fit_affine
from accuquant.core.forecasts import Memory
from accuquant.model.rollout import Conditions
from accuquant.progress import Advance, Reporter
from accuquant.recipe import Cache
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.fitted import Correction
from accuquant.runtime.cache.hooks import cached

CORRECTION_SAMPLES = 16
KEPT_BYTES = 1 << 30  # of what full precision gives, for the other fits of a session

Fitted = dict[str, dict[float, Tensor]]  # module -> timestep -> (2, C)


class Targets:
    """What cached modules give in full precision along a session's reference, kept between fits as far as it fits."""

    def __init__(self) -> None:
        self.kept, self.bytes = dict[tuple[str, ...], dict[int, dict[str, Tensor]]](), 0

    def at(self, session: Session, controller: Controller, i: int, reference: Reference) -> dict[str, Tensor]:
        """Module -> output at step i."""
        of_these = self.kept.setdefault(tuple(controller.modules), {})
        if i in of_these:
            return of_these[i]
        seen = _look(session, controller, i, reference.latents[i], reference.conditions, full_precision=True)
        outputs = {module: output for module, (_, output) in seen.items()}
        size = sum(output.nbytes for output in outputs.values())
        if self.bytes + size <= KEPT_BYTES:
            of_these[i] = outputs
            self.bytes += size
        return outputs


@torch.no_grad()
def fit_correction(
    session: Session,
    config: Cache,
    reporter: Reporter,
    learned: Correction | None = None,
    targets: Targets | None = None,
) -> tuple[Cache, Correction]:
    """Slope and intercept of every channel of every cached module: at skipped steps, at full ones, or at both.

    The target is what the module gives in full precision at the reference trajectory's latent.

    Args:
        learned: weights of the forecasts, where the config has learned some; they are kept.
        targets: of earlier fits of this session.

    Returns:
        the config, with the corrected timesteps and channels written into it, and the tensors.
    """
    forecasts, computed = Fitted(), Fitted()  # by kind of step
    with (
        reporter.bar("correction of the cached modules", session.rollout.num_steps) as advance,
        cached(session.rollout.denoiser, config.uncorrected, learned) as controller,
    ):
        given = (session, session.reference.first(CORRECTION_SAMPLES), config, controller, forecasts, computed, advance)
        if config.measured_on == "full_precision":
            _fit_as_published(*given)
        else:
            _fit_on_own_trajectory(*given, targets or Targets())
    skipped, full = (
        sorted(next(iter(fitted.values())), reverse=True) if fitted else [] for fitted in (forecasts, computed)
    )
    channels = {name: next(iter(found.values())).shape[1] for name, found in (computed | forecasts).items()}
    correction = Correction(skipped, channels, full).with_learned(learned)
    for name in channels:
        rows = [forecasts[name][t] for t in skipped] + [computed[name][t] for t in full]
        correction(name).copy_(torch.stack(rows))
    written = {
        "correction_timesteps": tuple(skipped),
        "correction_full_timesteps": tuple(full),
        "correction_channels": channels,
    }
    return config.model_copy(update=written), correction.to(session.reference.latents.device)


def _fit_on_own_trajectory(
    session: Session,
    reference: Reference,
    config: Cache,
    controller: Controller,
    forecasts: Fitted,
    computed: Fitted,
    advance: Advance,
    targets: Targets,
) -> None:
    """The model walks its own trajectory, quantized and cached and corrected so far."""
    rollout, conditions = session.rollout, reference.conditions
    x, predictions = {0: conditions.noise}, dict[int, Tensor]()
    true: dict[str, Tensor] = {}

    def correct(module: str, output: Tensor, is_computed: bool) -> Tensor:
        if not (config.corrected_quantization if is_computed else config.corrected):
            return output
        found = fit_affine(output, true[module])
        (computed if is_computed else forecasts).setdefault(module, {})[controller.timestep] = found
        return apply_affine(found, output)

    controller.correct = correct
    for i in range(rollout.num_steps):
        true |= targets.at(session, controller, i, reference)
        predictions[i] = rollout.predict(i, x[i], conditions)
        x[i + 1] = rollout.solver.step(i, x, predictions)
        advance("")


def _fit_as_published(
    session: Session,
    reference: Reference,
    config: Cache,
    controller: Controller,
    forecasts: Fitted,
    computed: Fitted,
    advance: Advance,
) -> None:
    """On the reference latents: forecasts of full precision's features, and quantized modules beside them."""
    rollout, conditions = session.rollout, reference.conditions
    memories: dict[str, Memory] = {}
    for i in range(rollout.num_steps):
        latents, timestep = reference.latents[i], float(rollout.timesteps[i])
        controller.enter(None, timestep, latents)
        true = _look(session, controller, i, latents, conditions, full_precision=True)
        if controller.full and config.corrected_quantization:
            noisy = _look(session, controller, i, latents, conditions, full_precision=False)
            for module, (_, output) in noisy.items():
                computed.setdefault(module, {})[timestep] = fit_affine(output, true[module][1])
        for module, (input, output) in true.items():
            forecast = controller.forecasts[module]
            if controller.full:
                memories[module] = forecast.update(memories.get(module), i, output, input)
            elif config.corrected:
                plain = forecast.predict(memories[module], i, input)
                if controller.weigh is not None:
                    plain = controller.weigh(module, plain, memories[module].factors[0])
                forecasts.setdefault(module, {})[timestep] = fit_affine(plain, output)
        advance("")


def _look(
    session: Session, controller: Controller, i: int, latents: Tensor, conditions: Conditions, full_precision: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features (input, output) at step i without the cache."""
    names = [*controller.modules, *controller.begins.values()]
    controller.paused = True
    with (
        session.full_precision() if full_precision else nullcontext(),
        watched(session.rollout.denoiser, names) as seen,
    ):
        session.rollout.predict(i, latents, conditions)
    controller.paused = False
    return controller.features(seen)
