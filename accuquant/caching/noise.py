"""How much fresh noise quantization puts on the inputs and outputs of cached modules, for forecasts that know it.

The quantized and the full-precision model see the same latents; e_t is the difference of a module's output at step t.
A part of e_t stays from step to step (weight errors mostly): it cancels in differences and is no noise to a forecast.
What counts is the part that changes over the gap N between full computations (derived, not published):

    sigma^2 = 1/2 E ||e_t - e_{t+N}||^2,    stored over E ||O_t||^2, and likewise for the input.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from accuquant.calibration.session import Session
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.runtime.cache.features import cached_modules
from accuquant.runtime.cache.fitted import Noise
from accuquant.runtime.observe import observed

NOISE_SAMPLES = 4


@torch.no_grad()
def measure_noise(session: Session, gap: int, reporter: Reporter, pattern: str | None = None) -> Noise:
    """Relative energies (output, input) of the non-persistent quantization error of each cached module.

    Args:
        gap: N, steps between full computations.
        pattern: of the cached modules; the default one if None.
    """
    denoiser, tapes = session.model.only.network, session.few(NOISE_SAMPLES, NOISE_SAMPLES)
    names, fused = cached_modules(denoiser, pattern)
    names = [*names, *(f"{block}.proj_out" for block in fused)]

    changed, energy = torch.zeros(len(names), 2, dtype=torch.float64), torch.zeros(len(names), 2, dtype=torch.float64)
    pairs = 0
    with reporter.bar("quantization noise of cached modules", session.num_steps * len(tapes)) as advance:
        for tape in tapes:
            errors = deque[list[tuple[Tensor, Tensor]]](maxlen=gap + 1)
            for i in range(len(tape)):
                with session.full_precision():
                    true = _seen(denoiser, names, tape, i)
                noisy = _seen(denoiser, names, tape, i)
                errors.append([tuple(a - b for a, b in zip(noisy[n], true[n], strict=True)) for n in names])  # type: ignore[misc]
                for k, name in enumerate(names):
                    for side in (0, 1):
                        energy[k, side] += float(true[name][side].double().square().sum()) / session.num_steps
                        if len(errors) == gap + 1:
                            apart = errors[-1][k][side] - errors[0][k][side]
                            changed[k, side] += float(apart.double().square().sum()) / 2
                pairs += len(errors) == gap + 1
                advance("")
    # of both sums the number of tapes drops out
    pairs //= len(tapes)
    relative = changed / max(pairs, 1) / energy.clamp_min(1e-30)
    return {name: (float(relative[k, 1]), float(relative[k, 0])) for k, name in enumerate(names)}


def _seen(denoiser: nn.Module, names: list[str], tape: Tape, i: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the named modules at step i, on full precision's latents."""
    with observed(denoiser, names) as seen:
        tape.step(i, tape.state(i))
    return {name: (call.input, call.output) for name, call in seen.items()}
