"""Fits the correction of a cache's forecasts, on calibration samples and the quantized, cached model's trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from accuquant.console import Reporter
from accuquant.core.correction import apply_affine, fit_affine
from accuquant.model.cache_state import Correction
from accuquant.model.caching import cached
from accuquant.recipe import Cache
from accuquant.session import Session, watched

CORRECTION_SAMPLES = 8


@torch.no_grad()
def fit_correction(session: Session, config: Cache, reporter: Reporter) -> tuple[Cache, Correction]:
    """Slope and intercept of every channel of every cached module, at each step that is skipped.

    The model walks its own trajectory, quantized and cached and corrected so far. At a skipped step the target is what
    the module gives in full precision at the reference trajectory's latent.

    Returns:
        the config, with the corrected timesteps and channels written into it, and the tensors.
    """
    rollout, reference = session.rollout, session.reference
    chosen = torch.arange(min(CORRECTION_SAMPLES, len(reference.conditions)), device=reference.latents.device)
    conditions = reference.conditions.take(chosen)
    x, predictions = {0: conditions.noise}, dict[int, Tensor]()
    fitted: dict[str, dict[float, Tensor]] = {}
    plain = config.model_copy(update={"corrected": False})
    with (
        reporter.bar("correction of the cached modules", rollout.num_steps) as advance,
        cached(rollout.denoiser, plain) as controller,
    ):
        targets: dict[str, Tensor] = {}

        def correct(module: str, forecast: Tensor) -> Tensor:
            found = fit_affine(forecast, targets[module])
            fitted.setdefault(module, {})[controller.timestep] = found
            return apply_affine(found, forecast)

        controller.correct = correct
        for i in range(rollout.num_steps):
            controller.paused = True
            with session.full_precision(), watched(rollout.denoiser, controller.modules) as seen:
                rollout.predict(i, reference.latents[i][chosen], conditions)
            controller.paused = False
            targets |= {module: output for module, (_, output) in seen.items()}
            predictions[i] = rollout.predict(i, x[i], conditions)
            x[i + 1] = rollout.solver.step(i, x, predictions)
            advance("")
    timesteps = sorted(next(iter(fitted.values())), reverse=True) if fitted else []
    channels = {name: found[timesteps[0]].shape[1] for name, found in fitted.items()}
    correction = Correction(timesteps, channels)
    for name, found in fitted.items():
        correction.of(name).copy_(torch.stack([found[t] for t in timesteps]))
    written = {"correction_timesteps": tuple(timesteps), "correction_channels": channels}
    return config.model_copy(update=written), correction.to(x[0].device)
