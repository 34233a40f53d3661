"""What an export was calibrated for: steps, guidance, sizes. A call outside of it may be worse, and that is said.

Activation scales were measured on these inputs, and weights follow these trajectories.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.runtime.calls import calling_frame


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
    given = dict(zip(names, args, strict=False)) | kwargs
    ordered = (given[name] for name in names if name in given)
    return next((v for v in ordered if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)


def watch(denoiser: nn.Module, settings: Sequence[Calibrated]) -> None:
    """Warn of the first call of a denoiser that is outside of what it was calibrated for."""
    denoiser.register_forward_pre_hook(
        _watching(settings, list(inspect.signature(denoiser.forward).parameters)), with_kwargs=True
    )


def _watching(settings: Sequence[Calibrated], names: list[str]) -> Callable[..., None]:
    said = list[str]()

    def look(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if said or torch.compiler.is_compiling():
            return
        latents = latents_of(names, args, kwargs)
        size = settings[0].size if latents is None else tuple(latents.shape[1:])
        steps = guidance = None
        if (frame := calling_frame()) is not None:
            own = frame.f_locals
            steps = getattr(getattr(own["self"], "scheduler", None), "num_inference_steps", None)
            guidance = own.get("guidance_scale")
        words = outside(settings, _number(steps), _number(guidance), size)
        if words:
            said.append(words)
            warnings.warn(
                f"{type(denoiser).__name__} is called with {words}: its error there is not what the report says; "
                "sampling.also in a recipe calibrates for several settings at once",
                stacklevel=1,
            )

    return look


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
