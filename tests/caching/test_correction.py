"""CacheQuant's correction of forecasts: the least-squares fit, what it gains, and its way into the export and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import dit_tapes, finals, output_at, recipe_tree, recorded_finals, trajectory
from safetensors.torch import load_file
from torch import Tensor

from accuquant.caching import correct
from accuquant.caching.correct import fit_correction
from accuquant.calibration.opened import open_model
from accuquant.calibration.session import Session, open_session
from accuquant.core.correction import apply_affine, fit_affine
from accuquant.core.metrics import relative_l2
from accuquant.errors import CacheError, RecipeError
from accuquant.evaluation.measure import held_out_reference
from accuquant.export.load import load_export, recipe_of
from accuquant.pipeline.loading import load_pipeline
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import attach_cache, cached
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)
CACHE: dict[str, Any] = {"interval": 3, "estimation": "reuse", "corrected": True}


def make_recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    return parse_recipe(recipe_tree(model, output, **({"cache": CACHE} | changes)), "test")


@pytest.fixture(scope="module")
def session(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    recipe = make_recipe(model_folder, tmp_path_factory.mktemp("correction") / "out")
    return open_session(recipe, QUIET)


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("correction") / "out"), QUIET)


# ---- the fit


def test_the_fit_is_least_squares_without_the_ridge() -> None:
    torch.manual_seed(0)
    h, y = torch.randn(3, 50, 4).double(), torch.randn(3, 50, 4).double()
    found = fit_affine(h, y, ridge=0.0)
    for c in range(4):
        design = torch.stack([h[..., c].flatten(), torch.ones(150)], 1)
        expected = torch.linalg.lstsq(design, y[..., c].flatten()).solution
        torch.testing.assert_close(found[:, c].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_ridge_draws_the_slope_half_way_to_one_and_keeps_the_mean() -> None:
    torch.manual_seed(1)
    h = torch.randn(200, 5).double()
    y = 3 * h + 2 + 0.1 * torch.randn(200, 5).double()
    plain, drawn = fit_affine(h, y, ridge=0.0), fit_affine(h, y, ridge=1.0)
    torch.testing.assert_close(drawn[0], (plain[0] + 1) / 2)
    torch.testing.assert_close(apply_affine(drawn, h).mean(0), y.mean(0), rtol=1e-5, atol=1e-5)


def test_a_constant_channel_keeps_the_slope_one() -> None:
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(2))
    found = fit_affine(torch.full((20, 2), 5.0), y)
    torch.testing.assert_close(found[0], torch.ones(2))
    torch.testing.assert_close(found[1], y.mean(0) - 5)


# ---- on a model


@pytest.mark.parametrize("kept_bytes", [0, 200_000, 1 << 30])
def test_fits_that_share_their_targets_find_what_fits_alone_find(
    session: Session, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    """Of the same modules, of others, and with the model calibrated on in between."""
    configs = [CACHE, {**CACHE, "interval": 2, "corrected_quantization": True}, {**CACHE, "modules": r".*\.ff"}]
    looks, look, start = list[int](), correct.features_at, session.snapshot()
    monkeypatch.setattr(correct, "KEPT_BYTES", kept_bytes)

    def counted(*args: Any, **kwargs: Any) -> Any:
        looks.append(args[2])
        return look(*args, **kwargs)

    monkeypatch.setattr(correct, "features_at", counted)
    shared, counts = correct.Targets(), list[int]()
    for config in (*configs, configs[0]):
        looks.clear()
        together = fit_correction(session, CachePlan.of(Cache(**config)), QUIET, targets=shared)
        counts.append(len(looks))
        alone = fit_correction(session, CachePlan.of(Cache(**config)), QUIET)
        first, second = alone.state_dict(), together.state_dict()
        assert first and first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        for layer in session.layers.values():
            layer.log_weight_scale.data += 0.05
    session.restore(start)
    steps = session.num_steps
    assert counts[0] == counts[2] == steps  # the third has other modules
    assert shared.bytes <= kept_bytes
    assert counts[1] == counts[3] == {0: steps, 1 << 30: 0}.get(kept_bytes, counts[1])
    assert kept_bytes != 200_000 or 0 < counts[1] < steps


def test_it_lowers_the_error_of_the_cached_trajectory(session: Session) -> None:
    """On validation noise that the fit has not seen."""

    def error(config: Cache, correction: Any = None) -> float:
        with cached(session.network, config, correction):
            found = finals(session.validation.tapes)
        return float(relative_l2(found, recorded_finals(session.validation.tapes)).mean())

    correction = fit_correction(session, CachePlan.of(Cache(**CACHE)), QUIET)
    assert error(Cache(**CACHE), correction) < error(Cache(**CACHE | {"corrected": False}))


def test_it_is_fitted_where_steps_are_skipped(session: Session) -> None:
    """Against the definition, at the first skipped step, whose forecast no correction has touched yet."""
    correction = fit_correction(session, CachePlan.of(Cache(**CACHE)), QUIET)
    assert correction.timesteps == [t for i, t in enumerate(session.levels) if i not in (0, 1, 4)]
    name, outputs = "transformer_blocks.0.ff", list[Tensor]()
    module = session.network.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(output))
    with cached(session.network, Cache(**CACHE | {"corrected": False})):
        finals(session.reference.tapes)
    handle.remove()
    forecast = torch.cat(outputs[2 :: session.num_steps])
    for layer in session.layers.values():
        layer.quantized = False
    target = output_at(session, name, 2)
    for layer in session.layers.values():
        layer.quantized = True
    torch.testing.assert_close(correction(name)[0], fit_affine(forecast, target), rtol=1e-4, atol=1e-5)


def test_the_export_carries_it(export: Path) -> None:
    tensors = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [key for key in tensors if key.startswith("cache_correction.")]
    assert len(names) == 4  # attention and MLP of two blocks
    assert all(tensors[name].shape == (3, 2, 32) for name in names)
    assert any(not torch.equal(tensors[name][:, 0], torch.ones(3, 32)) for name in names)
    pipeline = DiTPipeline.from_pretrained(export)
    for name in names:
        assert torch.equal(pipeline.transformer.get_parameter(name), tensors[name])


def test_the_loaded_model_applies_it(export: Path) -> None:
    """Its cached steps are those of the plain cache, each forecast put through slope and intercept."""
    recipe = recipe_of(export)
    (tape,) = dit_tapes(load_pipeline(recipe.model), recipe.sampling.num_inference_steps)
    loaded: Any = load_export(export, recipe)
    found = trajectory(tape, {"transformer": loaded.transformer})
    uncorrected: Any = load_export(export, recipe_of(export, ["cache.corrected=false"]))
    plain = uncorrected.transformer
    without = trajectory(tape, {"transformer": plain})
    assert torch.equal(found[:3], without[:3])  # steps 0 and 1 are full
    assert not torch.equal(found[3], without[3])
    correction = loaded.transformer.cache_correction

    def correct(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            step = len(seen)
            return None if step in (0, 1, 4) else apply_affine(correction(name)[(2, 3, 5).index(step)], output)

        return hook

    seen: list[int] = []
    for name in ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.1.attn1"):
        plain.get_submodule(name).register_forward_hook(correct(name))
    plain.get_submodule("transformer_blocks.1.ff").register_forward_hook(correct("transformer_blocks.1.ff"))
    plain.register_forward_hook(lambda *_: seen.append(1))
    expected = trajectory(tape, {"transformer": plain})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_metrics_are_of_the_corrected_cache(export: Path) -> None:
    metrics = json.loads((export / "metrics.json").read_text())
    assert metrics["E_qc"] < metrics["E_naive"]


def test_cached_only_is_without_what_was_fitted_to_the_quantized_model(export: Path) -> None:
    recipe, metrics = recipe_of(export), json.loads((export / "metrics.json").read_text())
    full = open_model(recipe)
    held_out = held_out_reference(full, recipe, QUIET)
    with cached(full.network, Cache(**(CACHE | {"corrected": False}))):
        final = finals(held_out.tapes)
    assert metrics["E_c"] == pytest.approx(float(relative_l2(final, held_out.latents).mean()), rel=1e-6)


def test_saved_again_it_is_the_same(export: Path, tmp_path: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(export)
    pipeline.save_pretrained(tmp_path / "again")
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(export / name), load_file(tmp_path / "again" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    DiTPipeline.from_pretrained(tmp_path / "again")


def test_another_cache_cannot_have_its_correction(export: Path) -> None:
    with pytest.raises(RecipeError, match=r"cache\.corrected"):
        load_export(export, recipe_of(export, ["cache.interval=2"]))


def test_without_a_fit_it_is_refused(session: Session) -> None:
    with pytest.raises(CacheError, match="nothing was fitted"):
        attach_cache(session.network, Cache(**CACHE))


def test_a_module_that_works_twice_in_a_call_has_no_correction(session: Session) -> None:
    blocks = session.model.only.network.transformer_blocks
    own, blocks[1].ff = blocks[1].ff, blocks[0].ff
    try:
        with pytest.raises(CacheError, match=r"transformer_blocks\.0\.ff works more than once in a call"):
            fit_correction(session, CachePlan.of(Cache(**CACHE)), QUIET)
    finally:
        blocks[1].ff = own


def test_rcs_has_no_steps_to_correct(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cache\.corrected: steps that RCS skips differ"):
        make_recipe(model_folder, tmp_path / "out", cache={"tau": 0.2, "order": 1, "corrected": True})


def test_a_session_keeps_no_cache(session: Session) -> None:
    fit_correction(session, CachePlan.of(Cache(**CACHE)), QUIET)
    attach = cached(session.network, Cache(interval=2, order=1))
    with attach:
        pass
