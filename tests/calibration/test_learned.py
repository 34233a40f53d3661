"""Forecasts whose shares are learned through the rollout: the gradient, what it gains, and the way into the export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import assert_same_weights, finals, interrupted_and_resumed, recipe_tree, recorded_finals, sampled
from safetensors.torch import load_file, save_file
from test_cached_steps import STEPS, levels_of, setting, taken

from accuquant.caching.correct import fit_correction
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.objectives.cached_steps import CachedSteps
from accuquant.calibration.reference import states_of
from accuquant.calibration.session import open_session, validation_error
from accuquant.calibration.updates import calibrate_alone, calibrate_cached
from accuquant.core.forecasts import RFE, Reuse, Taylor, weighted
from accuquant.core.metrics import relative_l2
from accuquant.core.trajectory import full_gradient, group_gradient
from accuquant.errors import CacheError, RecipeError
from accuquant.export.load import load_export, recipe_of
from accuquant.files import KeptFiles
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import attach_cache, cached, controller_of
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)
CACHE = {"schedule": [0, 1, 4], "order": 1}
OBJECTIVE = {"iterations": 2, "cached_iterations": 8, "batch_size": 2, "cached_learn": ["forecast"]}


def make_recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    return parse_recipe(recipe_tree(model, output, **({"cache": CACHE, "objective": OBJECTIVE} | changes)), "test")


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("learned") / "out"), QUIET)


# ---- the forecast


@pytest.mark.parametrize("forecast", [Reuse(), Taylor(2), RFE(1)])
def test_shares_of_one_are_the_forecast_and_others_scale_its_parts(forecast: Any) -> None:
    torch.manual_seed(0)
    memory = None
    for step in (0, 2, 4):
        memory = forecast.update(memory, step, torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double())
    assert memory is not None
    one = torch.ones(())
    plain, last = forecast.predict(memory, 6, torch.randn(2, 5, 3).double()), memory.factors[0]
    torch.testing.assert_close(weighted(plain, last, one, one), plain)
    torch.testing.assert_close(weighted(plain, last, 0.5 * one, 0 * one), 0.5 * last)
    torch.testing.assert_close(weighted(plain, last, 0 * one, 2 * one), 2 * (plain - last))


def test_settled_shares_are_those_that_were_learned() -> None:
    """Learned by gap and in units; stored by step and in none."""
    torch.manual_seed(0)
    learned = Fitted(learned_timesteps=[9.0, 8.0, 5.0], learned_modules=["a", "b"])
    learned.learned[1] = learned.learned[0]
    learned.units = [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([0.5, 0.6])]
    assert len(list(learned.learned.parameters())) == 2
    for share in learned.learned.parameters():
        share.data += 0.3 * torch.randn(2, 2)
    forecast, last = torch.randn(4, 3).double(), torch.randn(4, 3).double()

    def all_of_them() -> list[torch.Tensor]:
        return [learned.weigh(m, forecast, last, t) for m in "ab" for t in (9.0, 8.0, 5.0)]

    before = all_of_them()
    assert not torch.equal(before[0], before[1])
    for a, b in zip(before, learned.settled() and all_of_them(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert len(list(learned.learned.parameters())) == 3
    assert learned.units is None


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_gradient_is_that_of_full_back_propagation(order: int) -> None:
    """In float64 through loop, guidance and cache; of shares and quantized weights at once, and of shares alone."""
    tape, weights = setting()
    network, reference, levels = tape.pipeline.transformer, states_of(tape), levels_of(tape)
    config = Cache(schedule=STEPS, estimation="taylor" if order else "reuse", order=order)
    with cached(network, config) as controller:
        modules = controller.modules
    skipped = [i for i in range(12) if i not in STEPS]
    learned = Fitted(learned_timesteps=[levels[i] for i in skipped], learned_modules=modules)
    learned.double()
    generator = torch.Generator().manual_seed(0)
    for share in learned.learned:
        share.data += 0.2 * torch.randn(share.shape, generator=generator).double()
        share.requires_grad_(True)
    for everything in (True, False):
        shares = list[torch.Tensor](learned.learned)
        for weight in weights:
            weight.requires_grad_(everything)
        with cached(network, replace(CachePlan.of(config), learned=True), learned) as controller:
            steps = CachedSteps(tape, controller, levels, STEPS)
            ours = group_gradient(steps, reference, 0, 12, "exact")
            found = taken(shares), taken(weights)
            theirs = full_gradient(steps, reference, 0, 12)
            expected = taken(shares), taken(weights)
        assert ours == pytest.approx(theirs, rel=1e-12)
        for mine, full in zip(found, expected, strict=True):
            assert (mine - full).norm() <= 1e-10 * full.norm()
        assert expected[0].norm() > 0
        assert (expected[1].norm() > 0) == everything


# ---- calibration


@pytest.mark.parametrize("learn", [["forecast"], ["weight", "weight_scale", "forecast"]])
def test_learning_lowers_the_error_on_noise_it_has_not_seen(
    model_folder: Path, tmp_path: Path, learn: list[str]
) -> None:
    objective = OBJECTIVE | {"cached_iterations": 100, "batch_size": 4, "cached_learn": learn}
    recipe = make_recipe(model_folder, tmp_path / "out", objective=objective)
    session, kept = open_session(recipe, QUIET), KeptFiles(tmp_path, QUIET)
    alone, _ = calibrate_alone(session, recipe.objective, kept, QUIET)
    cache = CachePlan.of(Cache(estimation="taylor", order=1, schedule=(0, 1, 3)))

    def error(plan: CachePlan, fitted: Fitted | None = None) -> float:
        tapes = session.validation.tapes
        with cached(session.network, plan, fitted):
            return float(relative_l2(finals(tapes), recorded_finals(tapes)).mean())

    before, weights, least = error(cache), session.snapshot(), validation_error(session)
    loop = calibrate_cached(session, recipe.objective, cache, Fitted(), alone, kept, QUIET)
    assert loop is not None and isinstance(loop.source, CachedTrajectory)
    tuner = loop.source
    assert tuner.learned is not None
    assert error(tuner.cache, tuner.learned) - least < 0.6 * (before - least), "what the cache adds to quantization"
    after = session.snapshot()
    same = all(torch.equal(t, after[name][key]) for name, kept in weights.items() for key, t in kept.items())
    assert same == (learn == ["forecast"])
    assert all(entry["steps_per_group"] == 6 for entry in loop.history), "through the whole trajectory"
    correction = fit_correction(session, replace(tuner.cache, corrected=True), QUIET, tuner.learned)
    assert correction.learned_timesteps == tuner.learned.learned_timesteps
    assert all(torch.equal(a, b) for a, b in zip(correction.learned, tuner.learned.learned, strict=True))


def test_an_interrupted_run_learns_the_same(
    model_folder: Path, tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out")
    assert_same_weights(export, interrupted_and_resumed(recipe, monkeypatch, 5))


# ---- the export


def test_the_export_carries_the_shares(export: Path) -> None:
    tensors = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    shares = [t for key, t in tensors.items() if key.startswith("cache_correction.learned.")]
    assert [tuple(t.shape) for t in shares] == [(4, 2)] * 3  # skipped steps; attention and MLP of two blocks
    assert all(not torch.equal(t, torch.ones(4, 2)) for t in shares)
    cache = json.loads((export / "transformer" / "config.json").read_text())["quantization_config"]["cache"]
    assert len(cache["learned_timesteps"]) == 3
    assert len(cache["learned_modules"]) == 4


def test_the_report_shows_them(export: Path) -> None:
    cache = json.loads((export / "metrics.json").read_text())["cache"]
    assert [len(side) for side in cache["shares"]] == [3, 3]
    assert all(low <= mean <= high for side in cache["shares"] for low, mean, high in side)
    page = (export / "report.html").read_text()
    assert "how much of the last output and of its forecast change" in page
    assert "Updates with the cache on come last" in page


def test_loading_puts_them_on(export: Path) -> None:
    """Against the forecast with each share made one again, and without learned_timesteps in the config."""
    recipe = recipe_of(export)

    def final(change: str = "") -> torch.Tensor:
        pipeline = load_export(export, recipe)
        denoiser = pipeline.transformer
        controller = controller_of(denoiser)
        assert controller is not None
        if change == "ones":
            for share in denoiser.cache_correction.learned:
                share.data.fill_(1.0)
        if change == "plain":
            controller.weigh = None
        return sampled(pipeline, (1, 2), 3, recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale)

    learned, ones, plain = final(), final("ones"), final("plain")
    torch.testing.assert_close(ones, plain, rtol=1e-4, atol=1e-4)
    assert (learned - plain).norm() > 1e-4 * plain.norm()
    assert torch.equal(learned, final())


def test_saving_again_keeps_them(export: Path, tmp_path: Path) -> None:
    first = DiTPipeline.from_pretrained(export)
    first.save_pretrained(tmp_path / "again")
    second = DiTPipeline.from_pretrained(tmp_path / "again")
    found = [
        p(
            [1], num_inference_steps=6, guidance_scale=1.5, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for p in (first, second)
    ]
    assert (found[0] == found[1]).all()


def test_half_precision_keeps_them_as_they_are(export: Path, tmp_path: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(export, dtype=torch.bfloat16)
    stored = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    shares = pipeline.transformer.cache_correction.learned
    for k, share in enumerate(shares):
        assert torch.equal(share, stored[f"cache_correction.learned.{k}"])
    pipeline.transformer.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert again["cache_correction.learned.0"].dtype == torch.float32
    with torch.no_grad():
        pipeline([1], num_inference_steps=6, guidance_scale=1.5, output_type="latent")


def test_a_missing_share_is_an_error(export: Path, tmp_path: Path) -> None:
    DiTPipeline.from_pretrained(export).save_pretrained(tmp_path / "broken")
    path = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["cache_correction.learned.1"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"missing from the checkpoint: cache_correction\.learned\.1"):
        DiTPipeline.from_pretrained(tmp_path / "broken")


def test_shares_of_another_model_are_asked_for(export: Path) -> None:
    plain = load_export(export, recipe_of(export, ["cache=null"]))
    denoiser = plain.transformer
    del denoiser.cache_correction
    plan = CachePlan.from_dict({**CACHE, "learned_timesteps": [1.0], "learned_modules": ["x"]})
    with pytest.raises(CacheError, match="learned_timesteps: nothing was learned for this model"):
        attach_cache(denoiser, plan)


# ---- the recipe


@pytest.mark.parametrize(
    ("objective", "cache", "message"),
    [
        ({"learn": ["forecast"]}, CACHE, r"objective\.learn\.0: must be 'weight'.* \(found 'forecast'\)"),
        ({"cached_learn": ["forecast"]}, CACHE, "cached_learn: needs cached_iterations"),
        (OBJECTIVE | {"cached_learn": ["weight", "rounding"]}, CACHE, "cached_learn: 'rounding'.*needs fixed weights"),
        (OBJECTIVE | {"learn": ["rounding"], "cached_learn": ["weight"]}, CACHE, "cached_learn: 'rounding'"),
        (OBJECTIVE, {"tau": 0.5}, r"objective\.cached_learn: 'forecast'.*use cache\.interval or cache\.target_nfc"),
        (OBJECTIVE | {"cached_learn": ["forcast"]}, CACHE, "did you mean 'forecast'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, objective: Any, cache: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(tmp_path, tmp_path / "out", objective=objective, cache=cache)


def test_where_no_step_is_skipped_there_is_nothing_to_learn(model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out", cache={"interval": 1})
    with pytest.raises(RecipeError, match=r"objective\.cached_learn: 'forecast' is learned at skipped steps, and all"):
        calibrate(recipe, QUIET)


def test_an_interrupt_in_the_middle_of_a_step_saves_nothing_half(
    model_folder: Path, tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.Adam.step, [0]

    def interrupted(self: torch.optim.Adam, *args: Any) -> Any:
        calls[0] += 1
        found = step(self, *args)
        if calls[0] == 7:  # of two and eight
            raise KeyboardInterrupt
        return found

    recipe = make_recipe(model_folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(recipe, QUIET)
    folder = calibrate(recipe, QUIET, resume=True)
    assert_same_weights(export, folder)
