"""A cached denoiser may be quantized, compiled and offloaded as any other, in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiTPipeline
from helpers import images, sampled
from pipelines import make_pipeline
from torch._dynamo.backends.registry import lookup_backend

from accuquant.calibration.layers import TrainableLayer, quantize_model
from accuquant.export.native import harden_model
from accuquant.kernels import select
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.cache.features import cached_modules
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import FITTED
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import quantized_layers
from accuquant.runtime.spec import LayerSpec

EVERY_THIRD = Cache(interval=3, warmup=2, order=1)  # of 10 steps, full at 0, 1, 4, 7


@pytest.fixture
def pipeline() -> DiTPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def plain() -> Any:
    """Without a cache."""
    return images(make_pipeline())


@pytest.fixture(scope="module")
def cached() -> Any:
    """With `EVERY_THIRD` and nothing else."""
    pipeline = make_pipeline()
    attach_cache(pipeline.transformer, EVERY_THIRD)
    return images(pipeline)


def test_quantized_models_are_cached_as_others(pipeline: DiTPipeline) -> None:
    model, clock = pipeline.transformer, StepClock([700.0, 250.0])
    specs = {
        f"transformer_blocks.{i}.{name}": LayerSpec("int4", "int8", group_size=16)
        for i in range(2)
        for name in ("attn1.to_q", "attn1.to_v", "ff.net.0.proj", "ff.net.2")
    }
    samples = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    for layer in quantize_model(model, specs, clock, search=True).values():
        layer.set_activation_scale([samples * 3**-k for k in range(clock.num_groups)], search=True)
    harden_model(model, clock)
    full = sampled(pipeline)
    attach_cache(model, Cache(interval=1, order=1))
    assert torch.equal(sampled(pipeline), full)
    detach_cache(model)
    controller = attach_cache(model, EVERY_THIRD)
    found = sampled(pipeline)
    assert controller.stats().full_steps == (0, 1, 4, 7)
    assert found.isfinite().all() and not torch.equal(found, full)
    assert torch.equal(sampled(pipeline), found)
    detach_cache(model)
    assert torch.equal(sampled(pipeline), full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_compiled_blocks_are_cached_as_others(pipeline: DiTPipeline, name: str) -> None:
    graphs = list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(name)(graph, inputs)

    controller = attach_cache(pipeline.transformer, EVERY_THIRD)
    cached = sampled(pipeline)
    torch._dynamo.reset()
    for block in pipeline.transformer.transformer_blocks:
        block.compile(fullgraph=False, backend=backend)
    compiled = list[int]()
    for _ in range(2):
        torch.testing.assert_close(sampled(pipeline), cached, rtol=1e-4, atol=1e-4)
        assert controller.stats().full_steps == (0, 1, 4, 7)
        compiled.append(len(graphs))
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("scaled_dot_product_attention" in target for target in targets)  # a cached module's own work is compiled
    assert compiled[0] == compiled[1]  # and nothing again in the next run


# ---- offload: accelerate replaces `forward` as we do, and puts back what it found


def offload_model(pipeline: DiTPipeline) -> None:
    """Whole models, one at a time. The pipeline's end takes its hooks off and puts them on again."""
    pipeline.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipeline: DiTPipeline) -> None:
    """Every module on its own: weights wait elsewhere, and their place in the module is empty until it is called."""
    cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))


def is_cached(pipeline: DiTPipeline) -> bool:
    controller = controller_of(pipeline.transformer)
    return controller is not None and controller.stats().full_steps == (0, 1, 4, 7)


OFFLOADS = [offload_model, offload_sequentially]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_denoisers_can_be_cached(pipeline: DiTPipeline, cached: Any, plain: Any, offload: Callable) -> None:
    offload(pipeline)
    assert (images(pipeline) == plain).all()
    attach_cache(pipeline.transformer, EVERY_THIRD)
    for _ in range(3):
        assert (images(pipeline) == cached).all()
        assert is_cached(pipeline)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_cached_denoisers_can_be_offloaded(pipeline: DiTPipeline, cached: Any, offload: Callable) -> None:
    attach_cache(pipeline.transformer, EVERY_THIRD)
    offload(pipeline)
    for _ in range(3):
        assert (images(pipeline) == cached).all()
        assert is_cached(pipeline)


SPECS = [
    LayerSpec("int8", "int8", activation_symmetric=True),
    LayerSpec("int8", "int8"),
    LayerSpec("int8", "int8", activation_scale="dynamic"),
]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("spec", SPECS, ids=["static", "asymmetric", "dynamic"])
@pytest.mark.parametrize("path", ["onednn", "int_mm", "float"])
@torch.no_grad()
def test_quantized_denoisers_can_be_offloaded(pipeline: DiTPipeline, offload: Any, spec: LayerSpec, path: Any) -> None:
    """On every path, and as they were before when that is over."""
    model, clock = pipeline.transformer, StepClock([500.0])
    names = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("attn1.to_q", "attn1.to_k", "ff.net.2")]
    for layer in quantize_model(model, dict.fromkeys(names, spec), clock, search=False).values():
        if spec.static:
            layer.set_activation_scale([torch.linspace(-2, 3, 99), torch.linspace(-3, 1, 99)], search=False)
    harden_model(model, clock)
    for layer in quantized_layers(model).values():
        if path not in layer.paths():
            pytest.skip("this CPU's oneDNN product is not exact")
        layer.take(select.named(path))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def call() -> Any:
        return model(x, timestep=torch.tensor([300, 300]), class_labels=torch.tensor([1, 2])).sample

    stored, expected = {k: v.clone() for k, v in model.state_dict().items()}, call()
    offload(pipeline)
    for _ in range(2):
        torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3)
    pipeline.remove_all_hooks()
    remove_hook_from_module(model, recurse=True)
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_what_was_fitted_for_a_cache_is_offloaded_too(pipeline: DiTPipeline, offload: Callable) -> None:
    model = pipeline.transformer
    pipeline.scheduler.set_timesteps(10)
    steps, modules = pipeline.scheduler.timesteps.tolist(), cached_modules(model)[0]
    fitted = Fitted(steps, dict.fromkeys(modules, 32), steps, steps, modules)
    for parameter in fitted.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    setattr(model, FITTED, fitted)
    config = EVERY_THIRD.changed(corrected=True, corrected_quantization=True)
    attach_cache(model, replace(CachePlan.of(config), learned=True))
    expected = images(pipeline)
    offload(pipeline)
    assert (images(pipeline) == expected).all() and is_cached(pipeline)


def test_sums_of_weights_go_where_the_layer_computes() -> None:
    layer = TrainableLayer(torch.nn.Linear(16, 8), SPECS[1], StepClock([]), "x", search=False).harden()
    layer.take(select.named("int_mm"))
    assert layer.weight_sums is not None and "weight_sums" not in layer.state_dict()
    add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("meta")))
    assert layer.weight_sums.is_meta and layer(torch.zeros(3, 16)).is_meta


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("offload_first", [False, True])
def test_the_cache_comes_off_and_offload_stays(
    pipeline: DiTPipeline, plain: Any, offload: Callable, offload_first: bool, run: bool
) -> None:
    model, seen = pipeline.transformer, list[bool]()
    if offload_first:
        offload(pipeline)
    attach_cache(model, EVERY_THIRD)
    if not offload_first:
        offload(pipeline)
    if run:
        images(pipeline)
    detach_cache(model)
    before = model._hf_hook.pre_forward
    model._hf_hook.pre_forward = lambda *args, **kwargs: (seen.append(True), before(*args, **kwargs))[1]
    assert (images(pipeline) == plain).all()
    assert len(seen) == 10  # accelerate still hears of every call


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("offload_first", [False, True])
def test_offload_ends_and_the_cache_stays(
    pipeline: DiTPipeline, cached: Any, plain: Any, offload: Callable, offload_first: bool
) -> None:
    model = pipeline.transformer
    if offload_first:
        offload(pipeline)
    attach_cache(model, EVERY_THIRD)
    if not offload_first:
        offload(pipeline)
    images(pipeline)
    pipeline.remove_all_hooks()
    remove_hook_from_module(model, recurse=True)
    assert (images(pipeline) == cached).all()
    assert is_cached(pipeline)
    detach_cache(model)
    assert (images(pipeline) == plain).all()
