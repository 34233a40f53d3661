"""A cache goes on and off a denoiser without a trace, does what its settings say, or says why it does not."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from helpers import images, sampled
from pipelines import flux_arguments, make_flux, make_pipeline
from torch import Tensor, nn

from accuquant.errors import CacheError
from accuquant.recipe import Cache, TaylorSeerConfig
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.cache.features import cached_modules
from accuquant.runtime.cache.plan import CachePlan

EVERY_THIRD = Cache(interval=3, warmup=2, order=1)  # of 10 steps, full at 0, 1, 4, 7


@pytest.fixture
def pipeline() -> DiTPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """Without a cache."""
    return sampled(make_pipeline())


@pytest.fixture(scope="module")
def cached() -> Tensor:
    """With `EVERY_THIRD` and nothing else."""
    pipeline = make_pipeline()
    attach_cache(pipeline.transformer, EVERY_THIRD)
    return sampled(pipeline)


# ---- what it does


@pytest.mark.parametrize(
    "config",
    [
        Cache(interval=1, order=2),
        Cache(interval=1, estimation="reuse"),
        Cache(schedule=list(range(10)), estimation="taylor", order=4),
        Cache(tau=1e-9, norm="token", differences="newton"),
        Cache(interval=7, warmup=10, factors_dtype="bfloat16"),
    ],
)
def test_all_steps_full_is_no_cache(pipeline: DiTPipeline, plain: Tensor, config: Cache) -> None:
    expected = images(pipeline)
    controller = attach_cache(pipeline.transformer, config)
    assert torch.equal(sampled(pipeline), plain)
    assert controller.stats().nfc == controller.stats().num_steps == 10
    assert (images(pipeline) == expected).all()
    assert controller.stats().nfc == controller.stats().num_steps == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"order": 1},
        {"order": 2},
        {"order": 1, "norm": "batch"},
        {"order": 1, "estimation": "taylor"},
        {"order": 0, "estimation": "reuse"},
        {"interval": 4, "order": 1},
    ],
)
def test_the_schedule_says_which_steps_are_full(pipeline: DiTPipeline, plain: Tensor, changes: dict[str, Any]) -> None:
    config = Cache(**({"interval": 3} | changes))
    controller = attach_cache(pipeline.transformer, config)
    found, stats = sampled(pipeline), controller.stats()
    assert stats.full_steps == ((0, 1, 4, 7) if config.interval == 3 else (0, 1, 5, 9))
    assert stats.num_steps == 10 and stats.input_errors == ()
    assert found.isfinite().all()
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(("warmup", "interval"), [(2, 4), (3, 2)])
def test_offset_one_is_the_taylorseer_of_diffusers(pipeline: DiTPipeline, warmup: int, interval: int) -> None:
    """The same full steps as diffusers' own hook, and the same images, given our modules and float32 factors."""
    model, computed = pipeline.transformer, [0]
    handle = model.get_submodule("transformer_blocks.1.ff.net.0").register_forward_hook(lambda *_: computed.append(1))
    theirs = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(map(re.escape, cached_modules(pipeline.transformer)[0])),
    )
    apply_taylorseer_cache(model, theirs)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    _set_cache_context(model, CacheContext("both"))
    expected = sampled(pipeline)
    registry.remove_hook("taylorseer_cache", recurse=True)
    handle.remove()
    config = TaylorSeerConfig(interval=interval, warmup=warmup, offset=1)
    controller = attach_cache(model, config)
    found = sampled(pipeline)
    assert controller.stats().full_steps == (*range(warmup), *range(warmup + 1, 10, interval))
    assert controller.stats().nfc == sum(computed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_setting_forecasts_in_its_own_way(pipeline: DiTPipeline) -> None:
    """No option is read and then forgotten."""
    changes: list[dict[str, Any]] = [
        {},
        {"order": 2},
        {"order": 2, "differences": "newton"},
        {"norm": "token"},
        {"norm": "channel"},
        {"norm": "batch"},
        {"estimation": "taylor"},
        {"estimation": "reuse", "order": 0},
        {"warmup": 3},
        {"interval": 4},
        {"modules": r"transformer_blocks\.\d+\.ff"},
        {"factors_dtype": "bfloat16"},
    ]
    results = list[Tensor]()
    for change in changes:
        attach_cache(pipeline.transformer, Cache(**({"interval": 3, "order": 1} | change)))
        results.append(sampled(pipeline))
        detach_cache(pipeline.transformer)
    same = [
        (changes[i], changes[j]) for j in range(len(results)) for i in range(j) if torch.equal(results[i], results[j])
    ]
    assert same == []


def test_a_pattern_picks_modules(pipeline: DiTPipeline) -> None:
    controller = attach_cache(pipeline.transformer, Cache(interval=3, order=1, modules=r".*\.1\.(attn1|ff)"))
    assert controller.modules == ("transformer_blocks.1.attn1", "transformer_blocks.1.ff")
    remembered = set[str]()
    controller.see = lambda module, inputs, output: remembered.add(module)
    sampled(pipeline)
    assert remembered == set(controller.modules)


def test_memory_is_what_the_tensors_take(pipeline: DiTPipeline) -> None:
    """Of 4 modules: the last outputs, one input, and one number a sample."""
    controller = attach_cache(pipeline.transformer, EVERY_THIRD.changed(order=2))
    sampled(pipeline)
    tensor, samples = 4 * 16 * 32 * 4, 4  # 2 with guidance, 16 tokens, 32 channels
    assert controller.stats().nbytes == 4 * (3 * tensor + tensor + samples * 4)


# ---- on and off


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("run", [False, True])
def test_off_again_nothing_stays(pipeline: DiTPipeline, plain: Tensor, run: bool) -> None:
    model = pipeline.transformer
    before = snapshot(model)
    for _ in range(2):
        attach_cache(model, EVERY_THIRD)
        if run:
            sampled(pipeline)
            images(pipeline)
        detach_cache(model)
    after = snapshot(model)
    assert {name: set(found) for name, found in after.items()} == {name: set(found) for name, found in before.items()}
    assert all(after[name][key] is before[name][key] for name in before for key in before[name])
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(sampled(pipeline), plain)


class Doubled(ModelHook):
    """A hook of somebody else."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_others_stay(pipeline: DiTPipeline, plain: Tensor, first: bool) -> None:
    """On a cached module, put there before the cache and after it."""
    model, module = pipeline.transformer, pipeline.transformer.transformer_blocks[0].ff
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubled(), "doubled")
    expected = sampled(pipeline)
    HookRegistry.check_if_exists_or_initialize(module).remove_hook("doubled")
    assert torch.equal(sampled(pipeline), plain) and not torch.equal(expected, plain)

    if first:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubled(), "doubled")
    attach_cache(model, Cache(interval=1, order=1))
    if not first:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubled(), "doubled")
    assert torch.equal(sampled(pipeline), expected)
    detach_cache(model)
    assert torch.equal(sampled(pipeline), expected)
    assert set(module._diffusers_hook.hooks) == {"doubled"}


# ---- refusals


def test_a_second_cache_is_refused(pipeline: DiTPipeline, cached: Tensor) -> None:
    attach_cache(pipeline.transformer, EVERY_THIRD)
    with pytest.raises(CacheError, match="has a cache already"):
        attach_cache(pipeline.transformer, EVERY_THIRD)
    assert torch.equal(sampled(pipeline), cached)  # the first one works on


def test_taking_off_what_is_not_there_is_refused(pipeline: DiTPipeline) -> None:
    with pytest.raises(CacheError, match="has no cache"):
        detach_cache(pipeline.transformer)
    attach_cache(pipeline.transformer, EVERY_THIRD)
    detach_cache(pipeline.transformer)
    with pytest.raises(CacheError, match="has no cache"):
        detach_cache(pipeline.transformer)


def test_a_pattern_without_a_match_is_refused_with_names(pipeline: DiTPipeline) -> None:
    before = snapshot(pipeline.transformer)
    with pytest.raises(CacheError, match=r"'blocks.attn'.*transformer_blocks\.0\.attn1"):
        attach_cache(pipeline.transformer, Cache(interval=3, modules="blocks.attn"))
    assert snapshot(pipeline.transformer) == before
    with pytest.raises(CacheError, match=r"no module of Sequential.*include 0"):
        attach_cache(nn.Sequential(nn.Linear(2, 2)), EVERY_THIRD)


@pytest.mark.parametrize("target", [{"target_nfc": 8}, {"target_seconds": 2}, {"target_nfc": 8, "schedule": "rcs"}])
def test_a_target_without_its_search_is_refused(pipeline: DiTPipeline, target: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match="need a search"):
        attach_cache(pipeline.transformer, Cache(**target))
    assert controller_of(pipeline.transformer) is None


@torch.no_grad()
def flux_loop(model: Any) -> Tensor:
    still, moving = torch.randn(2, 2, 16, 4, generator=torch.Generator().manual_seed(3))
    with model.cache_context("cond"):
        calls = [
            model(still + 0.1 * i * moving, timestep=torch.full((2,), 0.9 - 0.1 * i), **flux_arguments()).sample
            for i in range(8)
        ]
    return torch.stack(calls)


def test_caches_of_diffusers_and_ours_refuse_each_other() -> None:
    model, config = make_flux(layers=3), FirstBlockCacheConfig(threshold=0.1)
    expected = flux_loop(model)
    model.enable_cache(config)
    with pytest.raises(CacheError, match="has a cache already"):
        attach_cache(model, EVERY_THIRD)
    model.disable_cache()
    attach_cache(model, EVERY_THIRD)
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(config)
    assert not torch.equal(flux_loop(model), expected)
    detach_cache(model)
    assert not model.is_cache_enabled
    assert torch.equal(flux_loop(model), expected)
    model.enable_cache(config)


# ---- number formats and places


@pytest.mark.parametrize(("estimation", "order"), [("rfe", 1), ("taylor", 2), ("reuse", 0)])
def test_bfloat16_models_stay_bfloat16(estimation: str, order: int) -> None:
    pipeline = make_pipeline(dtype=torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    full = sampled(pipeline)
    attach_cache(pipeline.transformer, Cache(interval=1, order=order, estimation=estimation))
    assert torch.equal(sampled(pipeline), full)
    detach_cache(pipeline.transformer)
    controller = attach_cache(pipeline.transformer, Cache(interval=3, order=order, estimation=estimation))
    seen = set[torch.dtype]()
    module = pipeline.transformer.transformer_blocks[1].attn1
    module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    found = sampled(pipeline)
    assert seen == {torch.bfloat16}
    assert found.isfinite().all() and not torch.equal(found, full)
    assert controller.stats().nfc == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_may_be_kept_in_half_the_room(pipeline: DiTPipeline, cached: Tensor, dtype: str) -> None:
    whole = attach_cache(pipeline.transformer, EVERY_THIRD)
    sampled(pipeline)
    detach_cache(pipeline.transformer)
    controller = attach_cache(pipeline.transformer, EVERY_THIRD.changed(factors_dtype=dtype))
    found = sampled(pipeline)
    assert found.dtype == torch.float32
    ratios = 4 * 4 * 4  # modules, samples, bytes: they stay in float32
    assert 2 * (controller.stats().nbytes - ratios) == whole.stats().nbytes - ratios
    assert not torch.equal(found, cached)
    assert (found - cached).norm() < 0.1 * cached.norm()


def test_factors_of_bfloat16_models_may_be_float32() -> None:
    pipeline = make_pipeline(dtype=torch.bfloat16)
    controller = attach_cache(pipeline.transformer, EVERY_THIRD.changed(factors_dtype="float32"))
    pipeline.vae.to(torch.bfloat16)
    kept = set[torch.dtype]()

    def look(module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
        kept.update(t.dtype for ms in controller.state.memories.values() for m in ms if m for t in m.tensors())

    controller.see = look
    assert sampled(pipeline).isfinite().all()
    assert kept == {torch.float32}


def test_factors_may_wait_elsewhere(pipeline: DiTPipeline, cached: Tensor) -> None:
    controller = attach_cache(pipeline.transformer, EVERY_THIRD.changed(factors_device="cpu"))
    assert torch.equal(sampled(pipeline), cached)
    detach_cache(pipeline.transformer)
    # the device is the one that is asked for: nothing can be forecast from `meta`
    controller = attach_cache(pipeline.transformer, replace(CachePlan.of(EVERY_THIRD), factors_device="meta"))
    devices = set[str]()

    def look(module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
        memories = controller.state.memories.values()
        devices.update(t.device.type for ms in memories for m in ms if m for t in m.tensors())

    controller.see = look
    with pytest.raises(NotImplementedError, match="meta"):
        sampled(pipeline)
    assert devices == {"meta"}


def test_a_cached_model_refuses_to_be_copied(pipeline: DiTPipeline) -> None:
    """The hooks of a copy would go on running the original's weights."""
    attach_cache(pipeline.transformer, EVERY_THIRD)
    with pytest.raises(CacheError, match="disable_cache"):
        copy.deepcopy(pipeline.transformer)
    detach_cache(pipeline.transformer)
    copy.deepcopy(pipeline.transformer)


def test_a_pattern_of_everything_caches_the_outermost_modules_once() -> None:
    """Parts of a module that is cached never run alone, nor do parts of a fused block."""
    model = make_flux()
    controller = attach_cache(model, Cache(interval=2, order=1, modules=r".*(attn|ff|proj_out|proj_mlp|to_q).*"))
    names = controller.modules
    assert len(set(names)) == len(names)
    assert not any(a != b and b.startswith(f"{a}.") for a in names for b in names)
    assert any(name.endswith(".proj_out") for name in names)
    detach_cache(model)


def test_an_order_that_was_never_reached_is_said(pipeline: DiTPipeline) -> None:
    attach_cache(pipeline.transformer, Cache(interval=8, order=3, estimation="taylor"))
    with pytest.warns(UserWarning, match="order 3 needs 4 full computations, this trajectory of 10 steps had 3"):
        images(pipeline)
    detach_cache(pipeline.transformer)
