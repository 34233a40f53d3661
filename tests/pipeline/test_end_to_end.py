"""Pipelines of the zoo, end to end: calibrated, exported, loaded by plain diffusers, cached, and tuned with the cache.

Four of them run always, all with `make test-pipelines`, which writes what it found to docs/pipelines.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from test_zoo import STEPS, ZOO
from test_zoo import example as example  # a fixture
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import pages
from zoo.images import Example

import accuquant
from accuquant.caching.enable import denoisers_in
from accuquant.calibration.opened import OpenedModel
from accuquant.calibration.reference import Reference
from accuquant.calibration.session import Session, final_errors, find_activation_scales, quantize
from accuquant.export.formats import write_format
from accuquant.pipeline.data import Samples, Split
from accuquant.pipeline.denoisers import joined
from accuquant.pipeline.loading import left_out
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.rows import call_of
from accuquant.progress import Reporter
from accuquant.recipe import Attention, Cache, Data, Export, Model, Objective, Quantization, Recipe, Sampling
from accuquant.runtime.attention import quantized_attention
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.layer import quantized_layers
from accuquant.runtime.spec import Layer

QUIET = Reporter(quiet=True)
FULL, HALF = (Cache(estimation="reuse", interval=k, warmup=1) for k in (1, 2))  # an expert may have two steps
UPDATES = 24
LARGEST_ATTENTION = 1 << 30  # multiply-adds of a module's own products
SAMPLING = ("guidance_scale", "num_inference_steps")


def rows_of(row: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows: what the pipeline is called with, and the same of another prompt or class."""
    first = row | {
        key: value for key, value in settings.items() if key not in ("guidance_scale", "num_inference_steps")
    }
    second = dict(first)
    if "prompt" in row:
        second["prompt"] = "a red dog"
    return [first, second]


def opened(example: tuple[Example, Path]) -> tuple[OpenedModel, Recipe]:
    (pipeline, row, settings), folder = example
    rows = rows_of(row, settings)
    sampling = Sampling(num_inference_steps=STEPS, guidance_scale=settings.get("guidance_scale"))
    recorder = Recorder(pipeline, sampling, folder)
    rehearsal = recorder.tape(Samples(rows[:1], [0]), rehearsed=True)
    recipe = Recipe(
        model=Model(id="zoo"),
        sampling=sampling,
        data=Data(path="zoo", num_samples=2, validation_samples=1),
        quantization=Quantization(preset="w4a8", timestep_groups=2, initialization="round_to_nearest"),  # type: ignore[call-arg]
        objective=Objective(iterations=UPDATES, batch_size=2),
        export=Export(output="zoo"),
    )
    return OpenedModel(recorder, Split(rows, rows[:1], folder), rehearsal), recipe


def session_of(example: tuple[Example, Path]) -> tuple[Session, Recipe]:
    """Quantized, attention's own products among it, with its first scales."""
    model, recipe = opened(example)
    samples = Samples(model.split.calibration, [0, 1])
    reference = Reference(model.recorder.tapes(samples, 2, QUIET, "", False))
    validation = Reference(model.recorder.tapes(samples.first(1), 1, QUIET, "", False))
    # of HiDream's thousands of tokens a softmax in memory takes ten seconds a step
    if 0 < max(model.products.attention.values(), default=0) < LARGEST_ATTENTION:
        quantization = recipe.quantization.model_copy(update={"attention": Attention()})
        recipe = recipe.model_copy(update={"quantization": quantization})
    planned = model.plan(recipe)
    session = quantize(model, planned, (reference, validation), recipe, QUIET)
    find_activation_scales(session, recipe.quantization, recipe.objective.batch_size, QUIET)
    return session, recipe


def made(pipeline: Any, example: tuple[Example, Path]) -> list[Tensor]:
    """All tensors that a call of a pipeline gives, its latents where it can give them."""
    (_, row, settings), folder = example
    torch.manual_seed(0)
    rows = rows_of(row, settings)[:1]
    sampling = {k: v for k, v in settings.items() if k in SAMPLING}
    found = pipeline(**call_of(pipeline, rows, [3], sampling, folder), output_type="latent")
    leaves = tree_leaves(found if isinstance(found, tuple) else dict(found))
    return [torch.as_tensor(leaf) for leaf in leaves if hasattr(leaf, "dtype")]


def aligned(pipeline: Any) -> Any:
    """Float weights alike in what torch picks its products by, which differ in last bits.

    Files may have them at any byte, and matmul folds by whether a weight wants a gradient, without one as well.
    """
    for part in pipeline.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for parameter in () if isinstance(module, Layer) else module._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.clone()
                    parameter.requires_grad_(False)
    return pipeline


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:a skipped step saves")  # of U-Nets, whose convolutions go on
def test_end_to_end(example: tuple[Example, Path], request: pytest.FixtureRequest) -> None:
    pipeline, folder = example[0][0], example[1]
    kind, name = type(pipeline), request.node.callspec.id
    full_precision = made(pipeline, example)
    session, recipe = session_of(example)
    tapes = list(session.reference.tapes)
    try:
        # calibrated: nearer than before on its own samples, and every denoiser has learned
        before = float(final_errors(tapes).mean())
        start = session.snapshot()
        loop = session.loop(recipe.objective, 1)
        loop.run()
        after = float(final_errors(tapes).mean())
        print(f"{name}: {before:.4f} -> {after:.4f}")
        assert after < before, f"{before:.4f} -> {after:.4f}"
        for one in session.model.denoisers:
            own = [n for n, p in session.layers.items() if n.startswith(one.prefix)]
            assert any(not torch.equal(v, session.layers[n].state_dict()[k]) for n in own for k, v in start[n].items())

        # with a cache on, forecasts and weights together, where there is one denoiser
        if len(session.model.denoisers) == 1:
            cached_objective = recipe.objective.model_copy(update={"iterations": 2, "gradient": "exact"})
            cached_loop = session.loop(cached_objective, len(tapes[0]), CachePlan.of(HALF))
            cached_loop.run()
            assert all(torch.isfinite(torch.tensor(h["loss"])) for h in cached_loop.history)

        # exported, and loaded by plain diffusers: the same latents
        write_format(session, "accuquant", {}, torch.float32)
        hardened = made(aligned(pipeline), example)
        assert not same(hardened, full_precision)
        pipeline.save_pretrained(folder / "export")
        loaded: Any = kind.from_pretrained(folder / "export", **left_out(str(folder / "export")))
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, DiffusionPipeline)
        assert same(made(aligned(loaded), example), hardened)

        # cached: full steps change nothing, forecasts do, and nothing is left of it
        networks = {one.name: getattr(loaded, one.name) for one in session.model.denoisers}
        assert denoisers_in(loaded).keys() == networks.keys()
        assert set(quantized_attention(joined(networks))) == {p.module for p in session.planned if p.attention}
        for network in networks.values():
            assert quantized_layers(network)
            accuquant.enable_cache(network, FULL)
        assert same(made(loaded, example), hardened) and same(made(loaded, example), hardened)
        for network in networks.values():
            accuquant.disable_cache(network)
            accuquant.enable_cache(network, HALF)
        half = made(loaded, example)
        stats = [accuquant.cache_stats(network) for network in networks.values()]
        assert sum(s.num_steps for s in stats) == session.num_steps
        assert any(s.nfc < s.num_steps for s in stats) and all(s.nfc <= s.num_steps for s in stats)
        assert not same(half, hardened) and all(bool(t.isfinite().all()) for t in half if t.is_floating_point())
        assert same(made(loaded, example), half)
        for network in networks.values():
            accuquant.disable_cache(network)
        assert same(made(loaded, example), hardened)
    finally:  # the fixture is the module's
        restored: Any = kind.from_pretrained(folder / "saved", **left_out(str(folder / "saved")))
        for one in session.model.denoisers:
            pipeline.register_modules(**{one.name: getattr(restored, one.name)})
    pages.note(
        name,
        pipeline=kind.__name__,
        denoisers=[one.name for one in session.model.denoisers],
        coordinates=sorted({one.coordinate.argument for one in session.model.denoisers}),
        scheduler=type(copy.copy(pipeline.scheduler)).__name__,
        quantized=sum(p.spec is not None for p in session.planned),
        float=sum(p.spec is None and p.is_layer for p in session.planned),
        before=before,
        after=after,
        cached=sum(len(s.modules) for s in stats),
        saved=[s.saved for s in stats],
        nfc=[(s.nfc, s.num_steps) for s in stats],
    )


def test_every_row_of_the_page_is_of_the_zoo() -> None:
    """The page is what `make test-pipelines` wrote; a new example of the zoo needs it to be run."""
    assert pages.named() == {param.id for param in ZOO}
