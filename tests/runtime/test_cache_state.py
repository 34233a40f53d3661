"""The cache finds out by itself where a trajectory begins, which calls are guidance, and which steps are full."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, HeunDiscreteScheduler
from helpers import Abort, aborted, images
from pipelines import flux_arguments, make_flux, make_pipeline
from torch import Tensor

from accuquant.core.schedule import RCS
from accuquant.errors import CacheError
from accuquant.pipeline.data import Samples
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.tape import Tape
from accuquant.recipe import Cache, Sampling
from accuquant.runtime.cache.attach import attach_cache, detach_cache
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats

EVERY_THIRD = Cache(interval=3, warmup=2, order=1)  # of 10 steps, full at 0, 1, 4, 7
CONFIGS = [
    EVERY_THIRD,
    Cache(interval=4, warmup=3, order=2, estimation="taylor"),
    Cache(schedule=[0, 3, 4, 8], estimation="reuse"),
    Cache(tau=1.0, order=2, differences="newton"),
    Cache(target_nfc=4, full_timesteps=[900, 500, 400], order=1),
]


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    return make_pipeline()


@pytest.fixture(params=CONFIGS, ids=["interval", "taylor", "reuse", "tau", "timesteps"])
def controller(pipeline: DiTPipeline, request: pytest.FixtureRequest) -> Iterator[Controller]:
    yield attach_cache(pipeline.transformer, request.param)
    detach_cache(pipeline.transformer)


@functools.cache
def tape_of(labels: tuple[int, ...], seed: int, steps: int, guidance: float) -> Tape:
    recorder = Recorder(make_pipeline(), Sampling(num_inference_steps=steps, guidance_scale=guidance))
    return recorder.tape(Samples([{"class_labels": label} for label in labels], [seed + i for i in range(len(labels))]))


def sampled(
    pipeline: DiTPipeline, labels: tuple[int, ...] = (1, 2), seed: int = 5, steps: int = 10, guidance: float = 1.5
) -> Tensor:
    """Final latents of a loop that, unlike a pipeline, does not tell the cache of its end."""
    tape = tape_of(labels, seed, steps, guidance)
    return tape.per_sample(tape.rolled({"transformer": pipeline.transformer})[-1])


def fresh(config: Cache | CachePlan, **run: Any) -> tuple[Tensor, CacheStats]:
    """The same run on a cache that has never run."""
    pipeline = make_pipeline()
    controller = attach_cache(pipeline.transformer, config)
    return sampled(pipeline, **run), controller.stats()


def assert_as_fresh(pipeline: DiTPipeline, controller: Controller, **run: Any) -> None:
    expected, stats = fresh(controller.plan, **run)
    assert torch.equal(sampled(pipeline, **run), expected)
    assert controller.stats() == stats
    assert 0 < stats.nfc < stats.num_steps


# ---- where a trajectory begins


def test_each_run_begins_anew(pipeline: DiTPipeline, controller: Controller) -> None:
    for run in ({"seed": 1}, {"seed": 2}, {"seed": 2}, {"seed": 2, "labels": (7, 8)}, {"seed": 1, "steps": 14}):
        assert_as_fresh(pipeline, controller, **run)


def test_batch_size_and_guidance_may_change_between_runs(pipeline: DiTPipeline, controller: Controller) -> None:
    for run in ({"labels": (1, 2, 3)}, {"labels": (1,)}, {"guidance": 1.0}, {"guidance": 3.0}, {"labels": (1, 2, 3)}):
        assert_as_fresh(pipeline, controller, **run)


def test_the_pipeline_itself_begins_anew(pipeline: DiTPipeline, controller: Controller) -> None:
    """Its end resets the cache, and the record of the run can be read after it."""
    first = images(pipeline)
    assert controller.state.memories == {}
    stats = controller.stats()
    images(pipeline, class_labels=[8, 9])
    assert (images(pipeline) == first).all()
    assert controller.stats() == stats == fresh(controller.plan)[1]
    plain = images(make_pipeline())
    assert (first != plain).any()


def abort_after(pipeline: DiTPipeline, calls: int, **changes: Any) -> None:
    """Run the pipeline, and raise out of its denoiser after that many calls."""
    aborted(pipeline.transformer, calls, lambda: images(pipeline, **changes))


@pytest.mark.parametrize("calls", [2, 3, 5, 10])
def test_an_aborted_run_is_forgotten(pipeline: DiTPipeline, controller: Controller, calls: int) -> None:
    abort_after(pipeline, calls)
    assert_as_fresh(pipeline, controller, labels=(7, 8))


def test_a_run_that_fails_inside_a_block_is_forgotten(pipeline: DiTPipeline, controller: Controller) -> None:
    """Half of the modules have taken the step, half have not."""
    steps = iter(range(100))

    def fail(*_: Any) -> None:
        if next(steps) == 3:
            raise Abort

    handle = pipeline.transformer.transformer_blocks[1].norm1.register_forward_hook(fail)
    with pytest.raises(Abort):
        images(pipeline)
    handle.remove()
    assert_as_fresh(pipeline, controller, labels=(7, 8))


@pytest.mark.parametrize("seed", [5, 9])
def test_a_run_aborted_after_its_first_step_spoils_nothing(seed: int) -> None:
    """With the same noise, the next run's first call looks like guidance of the aborted one: at the price of a few
    full steps more, nothing of the aborted run gets into the next."""
    pipeline = make_pipeline()
    controller = attach_cache(pipeline.transformer, EVERY_THIRD)
    abort_after(pipeline, 1)
    found, stats = sampled(pipeline, labels=(7, 8), seed=seed), controller.stats()
    given = Cache(schedule=stats.full_steps, order=1)
    assert torch.equal(found, fresh(given, labels=(7, 8), seed=seed)[0])
    expected = fresh(EVERY_THIRD, labels=(7, 8), seed=seed)[1]
    assert stats.num_steps == 10
    assert set(expected.full_steps) <= set(stats.full_steps)
    assert stats.nfc <= expected.nfc + (1 if seed == 5 else 0)


@pytest.mark.parametrize("order", [1, 2])
def test_what_was_aborted_after_its_first_step_does_not_matter(order: int) -> None:
    results = list[Tensor]()
    for labels in ([3, 4], [5, 6]):
        pipeline = make_pipeline()
        attach_cache(pipeline.transformer, Cache(interval=3, order=order))
        abort_after(pipeline, 1, class_labels=labels)
        results.append(sampled(pipeline, labels=(7, 8)))
    assert torch.equal(*results)


# ---- bare loops: guidance in two calls


TIMESTEPS = [float(t) for t in range(950, 0, -100)]


def latent_at(i: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 8, 8, generator=generator) + 0.05 * i * torch.randn(
        batch, 4, 8, 8, generator=generator
    )


@torch.no_grad()
def call(model: DiTTransformer2DModel, i: int, label: int, batch: int = 2) -> Tensor:
    timestep = torch.full((batch,), TIMESTEPS[i])
    prediction: Tensor = model(latent_at(i, batch), timestep=timestep, class_labels=torch.full((batch,), label)).sample
    return prediction


COND, UNCOND = 3, 1000


@pytest.mark.parametrize("config", [*CONFIGS[:3], Cache(target_nfc=3, full_timesteps=[900, 850, 400], order=1)])
def test_two_unnamed_calls_a_step_are_kept_apart(pipeline: DiTPipeline, config: Cache) -> None:
    """Bit-equal to two denoisers with a cache each, over two trajectories; NFC counts steps, not calls."""
    both, one, other = (copy.deepcopy(pipeline.transformer) for _ in range(3))
    controllers = [attach_cache(model, config) for model in (both, one, other)]
    if config.full_steps and 1 not in config.full_steps:  # step 1 is full where a call was repeated at step 0
        config = config.changed(schedule=(0, 1, *config.full_steps[1:]))
        for controller in controllers[1:]:
            controller.plan = CachePlan.of(config)
    for _ in range(2):
        for i in range(len(TIMESTEPS)):
            assert torch.equal(call(both, i, COND), call(one, i, COND)), i
            assert torch.equal(call(both, i, UNCOND), call(other, i, UNCOND)), i
    assert [c.stats().full_steps for c in controllers[1:]] == [controllers[0].stats().full_steps] * 2
    assert 0 < controllers[0].stats().nfc < controllers[0].stats().num_steps == len(TIMESTEPS)


def test_two_calls_a_step_are_the_guidance_batch(pipeline: DiTPipeline) -> None:
    """Norms are of samples, so halves of one batch forecast as two calls do."""
    split, batched = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    controllers = [attach_cache(split, EVERY_THIRD), attach_cache(batched, EVERY_THIRD)]
    labels = torch.tensor([COND, COND, UNCOND, UNCOND])
    for i, t in enumerate(TIMESTEPS):
        with torch.no_grad():
            expected = batched(
                latent_at(i).repeat(2, 1, 1, 1), timestep=torch.full((4,), t), class_labels=labels
            ).sample
        found = torch.cat([call(split, i, COND), call(split, i, UNCOND)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert controllers[0].stats().full_steps == controllers[1].stats().full_steps == (0, 1, 4, 7)
    assert controllers[0].stats().nbytes == controllers[1].stats().nbytes


def test_rcs_looks_at_every_step_with_two_unnamed_calls_too(pipeline: DiTPipeline) -> None:
    model = copy.deepcopy(pipeline.transformer)
    controller = attach_cache(model, Cache(tau=0.8, order=1, warmup=1))
    watched = list[Tensor]()
    model.transformer_blocks[0].attn1.register_forward_pre_hook(lambda _, args: watched.append(args[0]))
    for i in range(len(TIMESTEPS)):
        call(model, i, COND)
        call(model, i, UNCOND)
    stats = controller.stats()
    assert len(stats.input_errors) == stats.num_steps == len(TIMESTEPS)
    # step 1 is full here whatever RCS says: it must know of it, its forecasts start from the full steps
    rcs = RCS(0.8, 1, warmup=2)
    assert stats.full_steps == tuple(i for i, x in enumerate(watched[::2]) if rcs.is_full(i, x))


def test_guidance_that_ends_half_way_goes_on_with_what_is_left(pipeline: DiTPipeline) -> None:
    """Guidance only at the first five steps, as guidance intervals do; the second run is as the first."""
    model = copy.deepcopy(pipeline.transformer)
    controller, runs = attach_cache(model, EVERY_THIRD), list[list[Tensor]]()
    for _ in range(2):
        found = list[Tensor]()
        for i in range(len(TIMESTEPS)):
            found.append(call(model, i, COND))
            if i < 5:
                found.append(call(model, i, UNCOND))
        runs.append(found)
    assert controller.stats().num_steps == len(TIMESTEPS)
    assert {0, 1, 4, 7} <= set(controller.stats().full_steps) <= {0, 1, 4, 6, 7}
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_another_batch_size_begins_a_new_trajectory_below_an_aborted_one(pipeline: DiTPipeline) -> None:
    """Image to image starts at a lower noise level, so the timestep does not rise."""
    model, fresh_model = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    controllers = [attach_cache(m, EVERY_THIRD) for m in (model, fresh_model)]
    for i in range(3):
        call(model, i, COND, batch=2)
    for i in range(4, 10):
        assert torch.equal(call(model, i, COND, batch=3), call(fresh_model, i, COND, batch=3))
    assert controllers[0].stats() == controllers[1].stats()
    assert controllers[0].stats().full_steps == (0, 1, 4)


# ---- named contexts


@pytest.mark.parametrize("config", [EVERY_THIRD, Cache(interval=3, warmup=1, order=1), Cache(schedule=[0, 3, 6])])
def test_named_contexts_are_kept_apart_and_counted_once(config: Cache) -> None:
    """On a model of diffusers that has `cache_context`; what the schedule says is what is full."""
    model = make_flux()
    both, one, other = model, copy.deepcopy(model), copy.deepcopy(model)
    controllers = [attach_cache(m, config) for m in (both, one, other)]
    runs = []
    for _ in range(2):
        for i in range(8):
            for name, alone, seed in (("cond", one, 1), ("uncond", other, 2)):
                with both.cache_context(name):
                    found = flux_call(both, i, seed)
                assert torch.equal(found, flux_call(alone, i, seed)), (name, i)
        runs.append([c.stats().full_steps for c in controllers])
        assert controllers[0].stats().num_steps == 8
    expected = tuple(config.full_steps or ((0, 1, 4, 7) if config.warmup == 2 else (0, 3, 6)))
    assert runs == [[expected] * 3] * 2


@torch.no_grad()
def flux_call(model: Any, i: int, seed: int) -> Tensor:
    still, moving = torch.randn(2, 2, 16, 4, generator=torch.Generator().manual_seed(3))
    prediction: Tensor = model(
        still + 0.1 * i * moving, timestep=torch.full((2,), 0.9 - 0.1 * i), **flux_arguments(seed=seed)
    ).sample
    return prediction


def test_a_context_named_twice_at_one_timestep_begins_a_new_trajectory() -> None:
    """One-step runs of a distilled model: the timestep never rises."""
    model = make_flux()
    controller = attach_cache(model, EVERY_THIRD)
    for seed in (1, 2, 3):
        with model.cache_context("cond"):
            found = flux_call(model, 0, seed)
        assert torch.equal(found, flux_call(make_flux(), 0, seed))
        assert controller.stats().num_steps == 1


# ---- which steps are full


def timesteps_of(pipeline: DiTPipeline, steps: int) -> list[float]:
    pipeline.scheduler.set_timesteps(steps)
    return [float(t) for t in pipeline.scheduler.timesteps]


@pytest.mark.parametrize("steps", [10, 25, 7])
def test_full_timesteps_are_noise_levels_at_any_number_of_steps(pipeline: DiTPipeline, steps: int) -> None:
    """As many full steps: the first of all, and for each further level the first one at or below it that is left."""
    timesteps = timesteps_of(pipeline, 10)
    levels = [timesteps[i] for i in (0, 1, 3, 6)]
    found, stats = fresh(Cache(target_nfc=4, full_timesteps=levels, order=1), steps=steps)
    schedule = timesteps_of(pipeline, steps)
    full_steps = [0]
    for level in levels[1:]:
        below = next(i for i, t in enumerate(schedule) if t <= level)
        full_steps.append(max(full_steps[-1] + 1, below))
    assert stats.full_steps == tuple(full_steps)
    expected, _ = fresh(Cache(schedule=stats.full_steps, order=1), steps=steps)
    assert torch.equal(found, expected)
    if steps == 10:
        assert stats.full_steps == (0, 1, 3, 6)


def test_second_order_solvers_call_a_timestep_twice_in_one_trajectory(pipeline: DiTPipeline) -> None:
    """Heun's 2 T - 1 calls are one trajectory of that many steps, not T trajectories of which none is cached."""
    pipeline = make_pipeline()
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    controller = attach_cache(pipeline.transformer, EVERY_THIRD)
    images(pipeline)
    assert controller.stats().num_steps == 2 * 10 - 1
    assert controller.stats().full_steps == (0, 1, 4, 7, 10, 13, 16)


def test_rcs_watches_the_first_cached_module(pipeline: DiTPipeline) -> None:
    """Its decisions are those of the formula on that module's inputs, which no forecast touches."""
    model, watched = copy.deepcopy(pipeline.transformer), list[Tensor]()
    controller = attach_cache(model, Cache(tau=0.8, order=2, warmup=2, max_gap=4))
    model.transformer_blocks[0].attn1.register_forward_pre_hook(lambda _, args: watched.append(args[0]))
    for i in range(len(TIMESTEPS)):
        call(model, i, COND)
    rcs = RCS(0.8, 2, 2, 4)
    stats = controller.stats()
    assert stats.full_steps == tuple(i for i, x in enumerate(watched) if rcs.is_full(i, x))
    assert stats.input_errors == tuple(rcs.history)
    assert 2 < stats.nfc < 10


@pytest.mark.parametrize("steps", [9, 10])  # the last step is full, and it is not
@pytest.mark.parametrize("calls", [1, 2])
def test_memory_is_free_after_the_last_step_when_it_is_known(pipeline: DiTPipeline, steps: int, calls: int) -> None:
    config = Cache(interval=3, warmup=3, order=1)  # 0, 1, 2, 5, 8
    plain, freed = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    kept = attach_cache(plain, config)
    controller = attach_cache(freed, config.changed(num_inference_steps=steps))
    for _ in range(2):
        for i in range(steps):
            assert i == 0 or controller.state.memories
            for label in (COND, UNCOND)[:calls]:
                assert torch.equal(call(freed, i, label), call(plain, i, label))
        assert controller.state.memories == {}
        assert kept.state.memories
    assert controller.stats() == kept.stats()


def test_timesteps_may_rise(pipeline: DiTPipeline) -> None:
    """Mochi's do; the direction is that of the first two, and only a turn begins a new trajectory."""
    controller = attach_cache(copy.deepcopy(pipeline.transformer), EVERY_THIRD)
    latent = torch.zeros(2, 4, 8, 8)
    for _ in range(2):
        for i in range(10):
            controller.enter(None, 100.0 * i, latent + i)
        assert controller.stats().num_steps == 10
        assert controller.stats().full_steps == (0, 1, 4, 7)


def test_a_latent_that_is_written_in_place_is_another_latent(pipeline: DiTPipeline) -> None:
    controller, latent = attach_cache(copy.deepcopy(pipeline.transformer), EVERY_THIRD), torch.zeros(1, 4, 8, 8)
    controller.enter(None, 900.0, latent)
    controller.enter(None, 900.0, latent)
    assert controller.state.context == "call 1"
    controller.enter(None, 900.0, latent.add_(1))
    assert controller.state.context == "call 0"


def test_a_step_more_than_was_promised_is_an_error(pipeline: DiTPipeline) -> None:
    attach_cache(pipeline.transformer, EVERY_THIRD.changed(num_inference_steps=6))
    try:
        with pytest.raises(CacheError, match="num_inference_steps is 6"):
            sampled(pipeline)
    finally:
        detach_cache(pipeline.transformer)
