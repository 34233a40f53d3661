"""What an export was calibrated for: steps, guidance, sizes. A call outside of it may be worse, and that is said.

Activation scales were measured on these inputs, and weights follow these trajectories.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accuquant.runtime.calls import calling_frame
from accuquant.runtime.observe import by_name


@dataclass(frozen=True)
class Calibrated:
    """One setting that a denoiser was calibrated for; stored in the export's config.json.

    Attributes:
        num_inference_steps: that the pipeline was asked for.
        guidance_scale: None where the pipeline has none.
        size: of one sample of the latents, as the denoiser is given them.
    """

    num_inference_steps: int
    guidance_scale: float | None
    size: tuple[int, ...]


def outside(settings: Sequence[Calibrated], steps: int | None, guidance: float | None, size: tuple[int, ...]) -> str:
    """What of a call lies outside of all that was calibrated, in words; empty where nothing does, or is known to."""
    found = list[str]()
    known = [one.num_inference_steps for one in settings]
    if steps is not None and not min(known) <= steps <= max(known):
        found.append(f"{steps} steps (calibrated for {_span(known)})")
    scales = [one.guidance_scale for one in settings if one.guidance_scale is not None]
    if guidance is not None and scales and not min(scales) <= guidance <= max(scales):
        found.append(f"guidance {guidance:g} (calibrated for {_span(scales)})")
    if size not in (sizes := [one.size for one in settings]):
        shapes = " and ".join(dict.fromkeys(_shape(each) for each in sizes))
        found.append(f"latents of {_shape(size)} (calibrated for {shapes})")
    return ", ".join(found)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def latents_of(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor of more than a number each that a denoiser is given, in its own order."""
    given = by_name(names, args, kwargs).values()
    return next((v for v in given if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)


class Envelope:
    """Looks at the calls of a denoiser until one was outside of what it was calibrated for; a copy looks anew."""

    def __init__(self, settings: Sequence[Calibrated], names: list[str]) -> None:
        self.settings, self.names = settings, names
        self.said = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Envelope:
        return Envelope(self.settings, self.names)

    def look(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn of a call that is outside, the first time."""
        latents = latents_of(self.names, args, kwargs)
        size = self.settings[0].size if latents is None else tuple(latents.shape[1:])
        steps, guidance = list[int](), None
        if (frame := calling_frame()) is not None:
            own = frame.f_locals
            scheduler = getattr(own["self"], "scheduler", None)
            # a pipeline may begin in the middle, and a scheduler count other steps than it was asked for
            asked = (own.get("num_inference_steps"), getattr(scheduler, "num_inference_steps", None))
            steps = [n for n in map(_number, asked) if n is not None]
            guidance = _number(own.get("guidance_scale"))
        words = outside(self.settings, max(steps, default=None), guidance, size)
        if words:
            self.said = True
            warnings.warn(
                f"{name} is called with {words}: its error there is not what the report says; sampling.also in a "
                "recipe calibrates for several settings at once",
                stacklevel=1,
            )


def watch(denoiser: Any, settings: Sequence[Calibrated]) -> None:
    """Warn of the first call of a denoiser that is outside of what it was calibrated for."""
    denoiser.envelope = Envelope(settings, list(inspect.signature(denoiser.forward).parameters))
    denoiser.register_forward_pre_hook(_look, with_kwargs=True)


def _look(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling() and not denoiser.envelope.said:
        denoiser.envelope.look(type(denoiser).__name__, args, kwargs)


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
