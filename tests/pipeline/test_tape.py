"""A pipeline's tape is the pipeline: the same latents, the same gradients, for every solver and way of guidance."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import make_ddpm, make_pipeline, make_stable_diffusion
from torch import Tensor
from zoo.others import stable_cascade_prior

from accuquant.core.trajectory import State
from accuquant.pipeline.lowering import TapeError
from accuquant.pipeline.record import record, rehearse
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


def test_a_rehearsal_has_the_steps_of_the_run_for_one_evaluation() -> None:
    pipeline, evaluated = with_solver("HeunDiscreteScheduler"), 0
    forward = pipeline.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal evaluated
        evaluated += 1
        return forward(*args, **kwargs)

    tape = record(pipeline, **call(DIT))
    pipeline.transformer.forward = counted
    rehearsed = rehearse(pipeline, **call(DIT))
    assert evaluated == 1 and len(rehearsed) == len(tape) == 9
    for a, b in zip(rehearsed.steps, tape.steps, strict=True):
        assert [one.component for one in a.calls] == [one.component for one in b.calls]
        assert [t.shape for t in tape.state(1).tensors] == [t.shape for t in rehearsed.state(1).tensors]
        assert len(a.code) == len(b.code)


class Remembers(torch.nn.Module):
    """A layer that gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_networks_that_remember_are_refused() -> None:
    pipeline = make_pipeline()
    pipeline.transformer.proj_out_2 = torch.nn.Sequential(pipeline.transformer.proj_out_2, Remembers())
    with pytest.raises(TapeError, match=r"DiTPipeline cannot be replayed.*transformer gives something else"):
        record(pipeline, **call(DIT))


def test_networks_that_write_into_their_arguments_are_refused() -> None:
    pipeline = make_pipeline()
    forward = pipeline.transformer.forward

    def writing(hidden_states: Tensor, **kwargs: Any) -> Any:
        out = forward(hidden_states, **kwargs)
        hidden_states.add_(1)
        return out

    pipeline.transformer.forward = writing
    with pytest.raises(TapeError, match="transformer writes into what it is given"):
        record(pipeline, **call(DIT))


class Reads(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler whose step is decided by a number that Python read."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        scale = 1 + float(model_output.mean())
        return super().step(model_output * scale, timestep, sample, **kwargs)


def test_numbers_that_python_read_are_refused() -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = Reads(clip_sample=False)
    with pytest.raises(TapeError, match=r"cannot be replayed: step 0 of 5 .* that Python read"):
        record(pipeline, **call(DIT))


def test_a_single_step_is_refused() -> None:
    with pytest.raises(TapeError, match="DiTPipeline made a single step"):
        record(make_pipeline(), **call(DIT | {"num_inference_steps": 1}))


def test_generators_are_left_where_one_run_leaves_them() -> None:
    pipeline = with_solver("DDPMScheduler")
    given, other = call(DIT), call(DIT)
    record(pipeline, **given)
    after, drawn = given["generator"].get_state(), torch.get_rng_state()
    call(DIT)
    with torch.no_grad():
        unwrapped(pipeline)(**other)
    assert torch.equal(other["generator"].get_state(), after) and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_tape_keeps_unique_constants_and_states(solver: str) -> None:
    """Twice the steps: twice the states, and no constant more."""
    pipeline = with_solver(solver)
    short, long = (record(pipeline, **call(DIT | {"num_inference_steps": n})) for n in (6, 12))
    latent = short.state(0).latents[0].nbytes
    most = max(len(state.tensors) for state in (long.state(i) for i in range(len(long) + 1)))
    assert long.nbytes <= (len(long) + 1) * most * latent + 2 * latent
    assert long.nbytes < 2.6 * short.nbytes


def test_the_tail_makes_the_pipelines_images() -> None:
    pipeline = make_stable_diffusion()
    with torch.no_grad():
        expected = pipeline(**call(SD), output_type="pt").images
        tape = record(pipeline, **call(SD), output_type="pt")
        found = tape.images(replayed(tape)[-1])
    assert found is not None and torch.equal(found, expected)
    assert record(pipeline, **call(SD)).images(tape.state(len(tape))) is None  # latents were all that it made


def test_the_tail_where_images_went_through_numpy() -> None:
    pipeline = make_pipeline()
    with torch.no_grad():
        expected = torch.as_tensor(pipeline(**call(DIT), output_type="np").images).permute(0, 3, 1, 2)
        tape = record(pipeline, **call(DIT))
        found = tape.images(tape.state(len(tape)))
    assert found is not None and torch.equal(found, expected)


def test_the_tail_where_embeddings_are_returned_beside_latents() -> None:
    pipeline, row, settings = stable_cascade_prior()
    given = row | settings | {"num_inference_steps": 3}
    with torch.no_grad():
        expected = pipeline(**call(given), output_type="np")
        tape = record(pipeline, **call(given), output_type="np")
    assert torch.is_tensor(expected.prompt_embeds_pooled)  # the first tensor, and nothing of the latents
    assert torch.equal(tape.returned(replayed(tape)[-1]), torch.as_tensor(expected.image_embeddings))


class Hurries(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler that stops a step earlier each time that it is asked."""

    asked = 0

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        self.timesteps = self.timesteps[: num_inference_steps - self.asked]
        self.asked += 1


def test_fewer_steps_the_second_time_are_refused() -> None:
    pipeline = make_ddpm()  # which calls nothing after its loop
    pipeline.scheduler = Hurries()
    with pytest.raises(TapeError, match="it steps its schedulers 5 times, and 4 times when it is called again"):
        record(pipeline, num_inference_steps=5)


def test_attention_processors_that_a_pipeline_sets_for_its_call_are_of_the_tape() -> None:
    """Perturbed attention guidance: without them a replay would attend as usual, and draw something else."""
    parts = make_stable_diffusion().components
    pipeline = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["down"])
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": 3, "pag_scale": 3.0}
    tape = record(pipeline, **call(given))
    expected = latents_of(pipeline, given)
    assert torch.equal(replayed(tape)[-1].latents[0], expected[-1])
    plain = latents_of(pipeline, given | {"pag_scale": 0.0})
    assert not torch.equal(plain[-1], expected[-1])
