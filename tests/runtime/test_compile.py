"""torch.compile: one graph for the whole quantized denoiser, which serves every timestep group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from pipelines import make_pipeline
from torch import Tensor

import accuquant
from accuquant import Cache, CacheError
from accuquant.calibration.layers import quantize_model
from accuquant.export.native import harden_model
from accuquant.kernels import select
from accuquant.runtime.cache.attach import controller_of
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import quantized_layers
from accuquant.runtime.spec import LayerSpec

pytestmark = pytest.mark.usefixtures("fresh_compiler")

STEPS, GROUPS = 50, 10
BLOCK = "transformer_blocks.0"
STATIC, DYNAMIC = LayerSpec("int8", "int8"), LayerSpec("int8", "int8", activation_scale="dynamic")
SPECS = {
    "pos_embed.proj": STATIC,
    f"{BLOCK}.norm1.linear": DYNAMIC,
    f"{BLOCK}.attn1.to_q": STATIC,
    f"{BLOCK}.attn1.to_k": DYNAMIC,
    f"{BLOCK}.attn1.to_v": LayerSpec("int4", "int8", group_size=16),
    f"{BLOCK}.attn1.to_out.0": LayerSpec("int3", "int8", symmetric=False),
    f"{BLOCK}.ff.net.0.proj": LayerSpec("int6"),
    f"{BLOCK}.ff.net.2": STATIC,
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipeline() -> DiTPipeline:
    """Every kind of layer, with scales that differ much between the timestep groups."""
    pipeline = make_pipeline(layers=1)
    pipeline.scheduler.set_timesteps(STEPS)
    clock = StepClock.from_timesteps(pipeline.scheduler.timesteps, GROUPS)
    samples = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    for layer in quantize_model(pipeline.transformer, SPECS, clock, search=False).values():
        if layer.spec.static:
            layer.set_activation_scale([samples * 0.6**k for k in range(GROUPS)], search=False)
    harden_model(pipeline.transformer, clock)
    for layer in quantized_layers(pipeline.transformer).values():
        layer.take(select.named(layer.paths()[0]))  # whatever the rule says on this CPU
    return pipeline


def call(model: Any, timestep: Tensor) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    prediction: Tensor = model(x, timestep=timestep.repeat(2), class_labels=torch.tensor([1, 2])).sample
    return prediction


@torch.no_grad()
def trajectory(model: Any, pipeline: DiTPipeline) -> list[Tensor]:
    """The prediction at every step; nothing is compiled again once the group has changed for the first time."""
    predictions = []
    for i, timestep in enumerate(pipeline.scheduler.timesteps):
        with torch._dynamo.config.patch(error_on_recompile=i > STEPS // GROUPS):
            predictions.append(call(model, timestep))
    return predictions


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Floats that a compiler adds in another order fall on the other side of a rounding now and then."""
    assert len(found) == len(expected) == STEPS
    assert len({float(e.norm()) for e in expected}) == STEPS
    assert max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)) < 2e-2


def test_groups_matter(pipeline: DiTPipeline) -> None:
    """With the scales of another group the prediction is another one: what follows can see a stale group."""
    model, clock = pipeline.transformer, pipeline.transformer.step_clock
    with torch.no_grad():
        right = call(model, torch.tensor(500))
        clock.edges = [e - 300 for e in clock.edges]
        wrong = call(model, torch.tensor(500))
    assert float((wrong - right).norm() / right.norm()) > 0.1


@pytest.mark.parametrize("how", ["model", "in-place", "function"])
def test_whole_denoiser_is_one_graph(pipeline: DiTPipeline, how: str) -> None:
    """torch calls the hooks of a module that is compiled itself from outside: the clock is then a graph of its own."""
    model = pipeline.transformer
    expected = trajectory(model, pipeline)
    options: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}
    if how == "in-place":
        model.compile(**options)
        found = trajectory(model, pipeline)
    elif how == "model":
        found = trajectory(torch.compile(model, **options), pipeline)
    else:
        found = trajectory(torch.compile(lambda x, **rest: model(x, **rest), **options), pipeline)
    assert_near(found, expected)
    assert model.step_clock.group == GROUPS - 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if how == "function" else 2)


def test_compiled_denoiser_computes_the_same(pipeline: DiTPipeline) -> None:
    """With generated code."""
    expected = trajectory(pipeline.transformer, pipeline)
    assert_near(trajectory(torch.compile(pipeline.transformer, fullgraph=True), pipeline), expected)


def test_blocks_alone_can_be_compiled(pipeline: DiTPipeline) -> None:
    expected = trajectory(pipeline.transformer, pipeline)
    for block in pipeline.transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_near(trajectory(pipeline.transformer, pipeline), expected)


@pytest.mark.parametrize(("feature", "graphs"), [("modules", 2), ("blocks", 1)])
def test_what_a_cache_computes_can_be_compiled(pipeline: DiTPipeline, feature: Any, graphs: int) -> None:
    """Attention and MLP, or a block: each one graph, below the hooks that decide whether they run, until disabled."""
    model = pipeline.transformer
    accuquant.enable_cache(pipeline, Cache(interval=3, feature=feature))
    expected = trajectory(model, pipeline)
    model._reset_stateful_cache()
    accuquant.compile_cached(pipeline, backend="aot_eager", fullgraph=True)
    assert_near(trajectory(model, pipeline), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    accuquant.disable_cache(pipeline)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trajectory(model, pipeline)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with pytest.raises(CacheError, match="call enable_cache first"):
        accuquant.compile_cached(model)


def test_blocks_share_what_is_compiled_below_a_cache() -> None:
    """More of them than torch compiles one function for; and nothing is compiled anew when the cache is on again."""
    model = make_pipeline(layers=12).transformer
    for _ in range(2):
        accuquant.enable_cache(model, Cache(interval=1))
        accuquant.compile_cached(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            call(model, torch.tensor(500))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        accuquant.disable_cache(model)


def test_a_pipeline_whose_denoiser_is_compiled_can_be_cached(pipeline: DiTPipeline) -> None:
    model = pipeline.transformer
    pipeline.transformer = torch.compile(model, backend="aot_eager")
    accuquant.enable_cache(pipeline, Cache(interval=3))
    assert controller_of(model) is not None
    accuquant.disable_cache(pipeline)
    assert controller_of(model) is None


def test_every_path_is_there(pipeline: DiTPipeline) -> None:
    """So that the graphs above hold all that there are, where this CPU has them."""
    layers = quantized_layers(pipeline.transformer)
    paths = {layer.path for layer in layers.values()}
    assert paths >= {"float", "int_mm"} and ("onednn" in paths) == ("onednn" in layers[f"{BLOCK}.ff.net.2"].paths())
