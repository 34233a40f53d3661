"""What an export loses at settings beside its own: half and twice the steps, 0.5 and 1.5 times the guidance.

Each is compared with full precision at the same setting, on the same few held-out samples; a cache stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from accuquant.calibration.opened import OpenedModel
from accuquant.errors import AccuQuantError
from accuquant.evaluation.measure import HeldOut, sample
from accuquant.pipeline.seams import default_of
from accuquant.progress import Reporter
from accuquant.recipe import Evaluation, Sampling

FACTORS = (0.5, 1.5)  # of the guidance


def neighbours_of(sampling: Sampling, guidance_scale: float | None) -> dict[str, Sampling]:
    """The settings by what is said of them; those of guidance where there is some.

    Args:
        guidance_scale: the pipeline's own, where the sampling names none.
    """
    own, steps, found = sampling.only, sampling.num_inference_steps, dict[str, Sampling]()
    for name, count in (("half the steps", max(2, round(steps / 2))), ("twice the steps", 2 * steps)):
        if count != steps:
            found[name] = own.model_copy(update={"num_inference_steps": count})
    guidance = guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    for factor in FACTORS if guidance else ():
        found[f"guidance × {factor:g}"] = own.model_copy(update={"guidance_scale": factor * (guidance or 0.0)})
    return found


def neighbours_calls(evaluation: Evaluation, num_steps: int) -> int:
    """Calls of the denoiser, with a sample each, in full precision and of the export, at each setting but its own."""
    return round(2 * (0.5 + 2 + len(FACTORS)) * min(evaluation.neighbours, evaluation.num_samples) * num_steps)


def at_neighbours(
    full: OpenedModel,
    quantized: dict[str, nn.Module],
    held_out: HeldOut,
    own: Tensor,
    evaluation: Evaluation,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """A row for each setting, the own one first: its name, steps, guidance, and the relative L2 of the final latents.

    Of a setting that the pipeline or the cache refuses the row has ``refused``, the reason.

    Args:
        own: (B,), the relative L2 of the held-out samples' final latents.
    """
    recorder, count = full.recorder, evaluation.neighbours
    samples = held_out.samples.first(count)
    rows = [_row("as it is sampled", recorder.sampling) | _measured(own[:count])]
    guidance = default_of(recorder.pipeline, "guidance_scale")
    for name, setting in neighbours_of(recorder.sampling, guidance).items():
        try:
            given = (samples, held_out.tapes[0].num_samples, reporter, f"{name}, full precision")
            tapes = replace(recorder, sampling=setting).tapes(*given)
            made = sample(tapes, reporter, f"{name}, quantized", quantized)
        except AccuQuantError as error:
            rows.append(_row(name, setting) | {"refused": str(error)})
            continue
        rows.append(_row(name, setting) | _measured(made.errors[-1]))
    return rows


def _row(name: str, setting: Sampling) -> dict[str, Any]:
    return {"name": name} | {key: getattr(setting, key) for key in ("num_inference_steps", "guidance_scale")}


def _measured(errors: Tensor) -> dict[str, Any]:
    spread = float(errors.std()) if len(errors) > 1 else 0.0
    return {"relative_l2": float(errors.mean()), "std": spread, "num_samples": len(errors)}
