"""The rollout is diffusers' own: bit-equal to the pipeline, for every scheduler that can be handled."""

from __future__ import annotations

import pytest
import torch
from helpers import decoder_input
from pipelines import make_pipeline, make_pixart

from accuquant.errors import RecipeError
from accuquant.pipeline.loading import set_scheduler
from accuquant.model.rollout import Conditions, Rollout
from accuquant.recipe import Sampling

SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_equal_to_pipeline(scheduler: str, guidance: float, learned_variance: bool) -> None:
    pipeline = make_pipeline(learned_variance=learned_variance)
    set_scheduler(pipeline, scheduler)
    sampling = Sampling(num_inference_steps=7, guidance_scale=guidance)
    rollout = Rollout(pipeline, sampling)
    latents, _ = rollout.trajectory(rollout.conditions([1, 2, 3], [5, 6, 7]))
    assert torch.equal(latents[-1], decoder_input(pipeline, [1, 2, 3], [5, 6, 7], sampling))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_coefficients_reproduce_the_trajectory(scheduler: str) -> None:
    """The probed table and `predict` give the scheduler's own latents, step by step, history included."""
    pipeline = make_pipeline(learned_variance=True)
    set_scheduler(pipeline, scheduler)
    rollout = Rollout(pipeline, Sampling(num_inference_steps=8, guidance_scale=2.0))
    conditions = rollout.conditions([1, 2], [3, 4])
    latents, predictions = rollout.trajectory(conditions)
    x = {i: latents[i] for i in range(len(latents))}
    eps = {i: predictions[i] for i in range(len(predictions))}
    for i in range(rollout.num_steps):
        torch.testing.assert_close(rollout.predict(i, latents[i], conditions), predictions[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rollout.solver.step(i, x, eps), latents[i + 1], rtol=1e-3, atol=1e-3)


def test_ddim_coefficients_are_the_closed_form() -> None:
    rollout = Rollout(make_pipeline(), Sampling(num_inference_steps=10))
    alphas = rollout.pipeline.scheduler.alphas_cumprod.double()
    for i, t in enumerate(rollout.timesteps):
        at, previous = alphas[int(t)], int(t) - 100
        a_s = alphas[previous] if previous >= 0 else rollout.pipeline.scheduler.final_alpha_cumprod.double()
        assert float(rollout.solver.A[i, i]) == pytest.approx(float((a_s / at).sqrt()), rel=1e-5)
        b = (1 - a_s).sqrt() - (a_s * (1 - at) / at).sqrt()
        assert float(rollout.solver.B[i, i]) == pytest.approx(float(b), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_random_schedulers_are_refused_by_name(scheduler: str) -> None:
    pipeline = make_pipeline()
    set_scheduler(pipeline, scheduler)
    with pytest.raises(RecipeError, match=scheduler):
        Rollout(pipeline, Sampling(num_inference_steps=5))


def test_clipping_scheduler_is_refused() -> None:
    pipeline = make_pipeline()
    pipeline.scheduler.register_to_config(clip_sample=True)
    with pytest.raises(RecipeError, match=r"DDIMScheduler.*clipping"):
        Rollout(pipeline, Sampling(num_inference_steps=5))


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="DDIMScheduler"):
        set_scheduler(make_pipeline(), "DDIMSheduler")


def test_take_and_join_keep_guidance_halves_paired() -> None:
    rollout = Rollout(make_pipeline(), Sampling(num_inference_steps=4))
    whole = rollout.conditions([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    pieces = rollout.conditions([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], batch_size=2)
    assert torch.equal(whole.kwargs["class_labels"], torch.tensor([1, 2, 3, 4, 5] + [1000] * 5))
    assert torch.equal(whole.kwargs["class_labels"], pieces.kwargs["class_labels"])
    assert torch.equal(whole.noise, pieces.noise)
    taken: Conditions = whole.take(torch.tensor([4, 0]))
    assert torch.equal(taken.kwargs["class_labels"], torch.tensor([5, 1, 1000, 1000]))


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_text_pipeline_is_equal_too(scheduler: str, guidance: float) -> None:
    """PixArt: prompts, the unconditional half first, learned variance, noise scaled by the scheduler."""
    pipeline = make_pixart()
    set_scheduler(pipeline, scheduler)
    prompts, seeds = ["a red cat", "photo of the dog"], [1, 2]
    rollout = Rollout(pipeline, Sampling(num_inference_steps=5, guidance_scale=guidance))
    latents, _ = rollout.trajectory(rollout.conditions(prompts, seeds))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    expected = pipeline(
        prompts, num_inference_steps=5, guidance_scale=guidance, generator=generators, output_type="latent"
    ).images
    assert torch.equal(latents[-1], expected)
