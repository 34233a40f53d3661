"""A pipeline's tape is the pipeline: the same latents, the same gradients, for every solver and way of guidance."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import make_pipeline
from torch import Tensor

from accuquant.core.trajectory import State
from accuquant.pipeline.record import record
from accuquant.pipeline.seams import Seams, previous_sample, unwrapped
from accuquant.pipeline.tape import Tape

SOLVERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMScheduler clipped": {"clip_sample": True},
    "DDIMScheduler thresholding": {"thresholding": True, "prediction_type": "epsilon"},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler sde": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {},
    "EDMEulerScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "UniPCMultistepScheduler": {},
}
DIT = {"class_labels": [1, 2], "guidance_scale": 1.5, "num_inference_steps": 5}
SD = {"prompt": ["a cat", "b"], "height": 32, "width": 32, "num_inference_steps": 4}


def call(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run; noise that is drawn without a generator is the same, too."""
    torch.manual_seed(0)
    return given | {"generator": torch.Generator().manual_seed(1)}


class Ended(Exception):
    pass


def latents_of(pipeline: DiffusionPipeline, given: dict[str, Any], steps: int = 99) -> list[Tensor]:
    """What the schedulers' first steps return in the pipeline's own loop, with whatever gradient mode is on."""
    found: list[Tensor] = []

    def on_step(_: str, step: Any, args: Any, kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found.append(previous_sample(result))
        if len(found) == steps:  # what follows in DiT's pipeline takes no gradient
            raise Ended
        return result

    seams = Seams(pipeline, lambda name, method, args, kwargs: method(*args, **kwargs), on_step)
    with seams.held(), suppress(Ended):
        unwrapped(pipeline)(**call(given), output_type="latent")
    return found


def replayed(tape: Tape) -> list[State]:
    states = [tape.state(0)]
    for i in range(len(tape)):
        states.append(tape.step(i, states[-1]))
    return states[1:]


def with_solver(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    pipeline = make_pipeline(dtype=dtype)
    pipeline.vae.to(dtype)
    kind = getattr(diffusers, name.split()[0])
    pipeline.scheduler = kind(num_train_timesteps=1000, **SOLVERS[name])
    return pipeline


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_tape_is_the_pipeline(solver: str) -> None:
    pipeline = with_solver(solver)
    with torch.no_grad():
        expected = latents_of(pipeline, DIT)
        tape = record(pipeline, **call(DIT))
        again = replayed(tape)
    assert len(tape) == len(expected) >= 5 and tape.denoisers == {"transformer"}
    for i, latents in enumerate(expected):
        assert torch.equal(tape.state(i + 1).latents[0], latents)
        assert torch.equal(again[i].latents[0], latents)
        for a, b in zip(again[i].history, tape.state(i + 1).history, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_the_unwrapped_pipeline(solver: str) -> None:
    """Full back-propagation through the real loop, in float64: of the last latents, in every parameter."""
    pipeline = with_solver(solver, torch.float64)
    parameters = list(pipeline.transformer.parameters())
    tape = record(pipeline, **call(DIT))
    weights = torch.randn(tape.state(0).latents[0].shape, dtype=torch.float64, generator=torch.manual_seed(5))
    expected = torch.autograd.grad(
        (latents_of(pipeline, DIT, len(tape))[-1] * weights).sum(), parameters, allow_unused=True
    )
    found = torch.autograd.grad((replayed(tape)[-1].latents[0] * weights).sum(), parameters, allow_unused=True)
    total = sum(g.abs().sum() for g in expected if g is not None)
    assert total > 1
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            # several solvers work in float32 inside, the pipeline too
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(total) / len(parameters))
