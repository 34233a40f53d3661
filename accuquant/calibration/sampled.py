"""What full precision gives at each setting that is calibrated for, and what an export says of these."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import torch

from accuquant.calibration.opened import OpenedModel
from accuquant.calibration.reference import Reference
from accuquant.files import KeptFiles
from accuquant.pipeline.data import Samples, calibration_samples, validation_samples
from accuquant.pipeline.denoisers import Denoiser, denoisers_of
from accuquant.pipeline.seams import default_of
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Recipe, Sampling
from accuquant.runtime.envelope import Calibrated, latents_of
from accuquant.runtime.observe import run_until

REFERENCE = "reference"  # a folder of what full precision gave, a file for each tape


def sample_references(
    model: OpenedModel, recipe: Recipe, reporter: Reporter, kept: KeptFiles | None = None
) -> tuple[Reference, Reference]:
    """Full-precision trajectories of the calibration samples, and of those that choices are made by.

    Args:
        kept: keeps them in a folder, so that a resumed run need not sample them again.
    """
    data, size = recipe.data, recipe.objective.batch_size
    calibration = calibration_samples(model.split, data)
    validation = validation_samples(model.split, data, data.validation_samples)
    folder = None if kept is None else kept.inside(REFERENCE)

    given = (model, recipe.sampling.each, size, reporter)
    inside = [folder and folder.inside(name) for name in ("calibration", "validation")]
    what, images = "validation set, full precision", recipe.tune is not None
    return (
        referred(*given, calibration, "calibration set, full precision", inside[0]),
        referred(*given, validation, what, inside[1], images, between=False),
    )


def referred(
    model: OpenedModel,
    settings: list[Sampling],
    size: int,
    reporter: Reporter,
    samples: Samples,
    what: str,
    kept: KeptFiles | None,
    images: bool = False,
    between: bool = True,
) -> Reference:
    """Full-precision runs of samples, which are of each setting in turn, batch by batch."""
    if len(settings) == 1:
        return Reference(model.recorder.tapes(samples, size, reporter, what, images, kept, between))
    batches = model.recorder.batches(samples, min(size, len(samples) // len(settings)))
    tapes = dict[int, tuple[int, Tape]]()
    for k, setting in enumerate(settings):
        recorder, numbers = replace(model.recorder, sampling=setting), range(k, len(batches), len(settings))
        own = Samples([r for n in numbers for r in batches[n].rows], [s for n in numbers for s in batches[n].seeds])
        inside = kept and kept.inside(str(k))
        made = recorder.tapes(own, len(batches[k]), reporter, f"{what}, setting {k + 1}", images, inside, between)
        tapes |= {n: (k, tape) for n, tape in zip(numbers, made, strict=True)}
    ordered = [tapes[n] for n in sorted(tapes)]
    return Reference([tape for _, tape in ordered], [k for k, _ in ordered])


def calibrated_for(model: OpenedModel, reference: Reference, denoiser: Denoiser) -> list[Calibrated]:
    """The settings, with the size of the latents that a denoiser is given at each."""
    names, found = list(inspect.signature(denoiser.network.forward).parameters), list[Calibrated]()
    for number, sampling in enumerate(model.recorder.sampling.each):
        tape = reference.of(number)
        i = min(next(one for one in denoisers_of(tape) if one.name == denoiser.name).levels)
        with torch.no_grad():
            call = run_until(denoiser.network, partial(tape.step, i, tape.state(i)))
        latents = latents_of(names, call.args, call.kwargs)
        guidance = sampling.guidance_scale
        if guidance is None:
            guidance = default_of(model.recorder.pipeline, "guidance_scale")
        size = () if latents is None else tuple(latents.shape[1:])
        found.append(Calibrated(sampling.num_inference_steps, guidance, size))
    return found
