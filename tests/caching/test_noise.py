"""Forecasts that know the noise: the best multiple in least squares, plain RFC without it, reuse where all is noise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dit_tapes, finals, output_at, recipe_tree, recorded_finals, runs_of
from pipelines import make_pipeline
from torch import Tensor

from accuquant.caching.enable import cache_stats, enable_cache
from accuquant.caching.noise import measure_noise
from accuquant.caching.search import search_cache, searched
from accuquant.calibration.session import Session, open_session
from accuquant.core.forecasts import RFE, Forecast, Memory, NoiseAware, Reuse, Taylor, change_weights
from accuquant.core.metrics import relative_l2
from accuquant.errors import CacheError, RecipeError
from accuquant.export.load import load_export, recipe_of
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, RFCConfig
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import attach_cache, cached, controller_of
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)
STEPS = (0, 3, 5, 9)


def remembered(forecast: Forecast, outputs: list[Tensor], inputs: list[Tensor]) -> Memory:
    memory: Memory | None = None
    for step, output, input in zip(STEPS[: len(outputs)], outputs, inputs, strict=True):
        memory = forecast.update(memory, step, output, input)
    assert memory is not None
    return memory


def noise_aware(order: int, relational: bool, out: float, into: float, differences: str = "taylor") -> NoiseAware:
    return NoiseAware(order, differences, "sample", relational, out, into)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("differences", ["taylor", "newton"])
def test_without_noise_it_is_taylor_and_rfe(order: int, differences: str) -> None:
    torch.manual_seed(0)
    outputs, inputs = list(torch.randn(4, 2, 5, 3).double()), list(torch.randn(4, 2, 5, 3).double())
    later = torch.randn(2, 5, 3).double()
    for plain in (Taylor(order, differences), RFE(order, differences)):  # type: ignore[arg-type]
        aware = noise_aware(order, isinstance(plain, RFE), 0.0, 0.0, differences)
        expected = plain.predict(remembered(plain, outputs, inputs), 11, later)
        found = aware.predict(remembered(aware, outputs, inputs), 11, later)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("differences", ["taylor", "newton"])
def test_change_weights_write_the_change_as_a_sum_over_outputs(order: int, differences: str) -> None:
    torch.manual_seed(1)
    outputs = list(torch.randn(4, 2, 7).double())
    forecast = Taylor(order, differences)  # type: ignore[arg-type]
    memory = remembered(forecast, outputs, outputs)
    weights = change_weights(memory, 11, differences)  # type: ignore[arg-type]
    newest = [outputs[3 - i] for i in range(order + 1)]
    expected = memory.factors[0] + sum(c * o for c, o in zip(weights, newest, strict=True))
    torch.testing.assert_close(forecast.predict(memory, 11, outputs[0]), expected)
    assert sum(weights) == pytest.approx(0)


def test_order_one_takes_beta_of_the_derivation() -> None:
    """beta = ((k/N)(||dO||^2 - 2 sigma^2) - sigma^2) / ||dO||^2 in the place of k/N, and never below zero."""
    torch.manual_seed(2)
    outputs = list(torch.randn(2, 3, 6, 4).double())
    change = outputs[1] - outputs[0]
    for relative in (0.01, 0.1, 0.3, 3.0):
        forecast = noise_aware(1, False, relative, 0.0)
        memory = remembered(forecast, outputs, outputs)
        sigma2 = relative * outputs[1].flatten(1).square().sum(1)
        energy = change.flatten(1).square().sum(1)
        k_over_n = 2 / 3  # step 5, full at 0 and 3
        beta = ((k_over_n * (energy - 2 * sigma2).clamp_min(0) - sigma2) / energy).clamp_min(0)
        expected = outputs[1] + beta[:, None, None] * change
        torch.testing.assert_close(forecast.predict(memory, 5, outputs[0]), expected)
    assert torch.equal(forecast.predict(memory, 5, outputs[0]), Reuse().predict(memory, 5, outputs[0]))


@pytest.mark.parametrize("order", [1, 2])
def test_no_other_multiple_of_the_change_errs_less_on_noisy_outputs(order: int) -> None:
    """A straight path with noise of known energy, many channels: within a percent of the best multiple there is."""
    torch.manual_seed(3)
    channels, relative = 200_000, 0.02
    base, slope = torch.randn(1, channels).double(), 0.08 * torch.randn(1, channels).double()
    sigma = (relative * (base + 5 * slope).square().sum() / channels).sqrt()
    steps = STEPS[: order + 1]
    outputs = [base + step * slope + sigma * torch.randn(1, channels).double() for step in steps]
    target = steps[-1] + 4
    truth = base + target * slope
    forecast, taylor = noise_aware(order, False, relative, 0.0), Taylor(order)
    memory = remembered(forecast, outputs, outputs)
    change = taylor.predict(memory, target, base) - memory.factors[0]
    errors = {m: float((memory.factors[0] + m * change - truth).norm()) for m in torch.linspace(0, 1.2, 121).tolist()}
    ours = float((forecast.predict(memory, target, base) - truth).norm())
    assert ours < 1.01 * min(errors.values())
    assert ours < 0.9 * errors[min(errors, key=lambda m: abs(m - 1))]  # Taylor's own


# ---- measured on a model


@pytest.fixture(scope="module")
def session(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    tree = recipe_tree(model_folder, tmp_path_factory.mktemp("noise") / "out")
    tree["quantization"]["rules"][0] |= {"activation_scale": "dynamic", "activation": "int4"}
    recipe = parse_recipe(tree, "test")
    return open_session(recipe, Reporter(quiet=True))


def test_measured_noise_is_that_of_its_definition(session: Session) -> None:
    noise, name = measure_noise(session, 2, Reporter(quiet=True)), "transformer_blocks.1.ff"
    outputs: dict[bool, list[Tensor]] = {}
    for quantized in (False, True):
        for layer in session.layers.values():
            layer.quantized = quantized
        outputs[quantized] = [output_at(session, name, i).double() for i in range(session.num_steps)]
    errors = [a - b for a, b in zip(outputs[True], outputs[False], strict=True)]
    changed = torch.stack([(a - b).square().sum() / 2 for a, b in zip(errors[:-2], errors[2:], strict=True)]).mean()
    energy = torch.stack([o.square().sum() for o in outputs[False]]).mean()
    assert noise[name][0] == pytest.approx(float(changed / energy), rel=1e-4)
    assert 0 < noise[name][0] < 1


def test_an_error_that_stays_is_no_noise(model_folder: Path, tmp_path: Path) -> None:
    """Weights alone err alike at neighbouring steps; activations do not."""

    def noise_share(weight: str, activation: str) -> float:
        """Noise over one step, over that of five: near 1 where errors are fresh at every step."""
        rule = {"modules": r".*(attn1|ff)\..*", "weight": weight, "activation": activation}
        rule |= {"activation_scale": "dynamic"} if activation != "float" else {}
        tree = recipe_tree(model_folder, tmp_path / "out")
        tree["quantization"]["rules"] = [rule]
        tree["objective"]["learn"] = ["weight", "weight_scale"]
        recipe = parse_recipe(tree, "test")
        session = open_session(recipe, Reporter(quiet=True))
        near, far = (measure_noise(session, gap, Reporter(quiet=True)) for gap in (1, 5))
        return sum(out for out, _ in near.values()) / sum(out for out, _ in far.values())

    assert noise_share("int4", "float") < 0.5 * noise_share("int8", "int4")


def test_a_recipe_measures_it_and_the_export_carries_it(model_folder: Path, tmp_path: Path) -> None:
    cache = {"interval": 2, "order": 1, "noise_aware": True}
    recipe = parse_recipe(recipe_tree(model_folder, tmp_path / "out", cache=cache), "test")
    folder = calibrate(recipe, Reporter(quiet=True))
    pipeline: Any = load_export(folder, recipe_of(folder))
    controller = controller_of(pipeline.transformer)
    assert controller is not None and controller.fitted is not None and controller.fitted.noise is not None
    for name in controller.modules:
        found = controller.forecasts[name]
        assert isinstance(found, NoiseAware)
        assert (found.output_noise, found.input_noise) == controller.fitted.noise[name]
        assert found.output_noise > 0


def test_without_a_measurement_it_is_refused(session: Session) -> None:
    with pytest.raises(CacheError, match="no noise was measured"):
        attach_cache(session.network, Cache(interval=2, order=1, noise_aware=True))


# ---- the choice between forecasts


def test_auto_takes_the_forecast_that_is_nearest(session: Session) -> None:
    """So it falls back to reuse, Taylor or RFE by itself, and is never worse than any of them on its samples,
    those of calibration and those for validation.

    One that knows the noise is taken where it is nearer by more than chance, two standard errors, and only there.
    """
    tapes = [*session.reference.tapes, *session.validation.tapes]
    asked = Cache(estimation="auto", order=2, noise_aware=True, interval=3)
    chosen, fitted = searched(asked, session, QUIET)
    noise = measure_noise(session, 3, QUIET)

    def errors(config: Cache | CachePlan) -> Tensor:
        with cached(session.network, config, fitted):
            final = finals(tapes)
        return relative_l2(final, recorded_finals(tapes))

    kinds: Any = [("reuse", 0), *itertools.product(("taylor", "rfe"), (1, 2))]
    plain = [errors(Cache(estimation=kind, order=order, interval=3)) for kind, order in kinds]
    aware = [
        errors(Cache(estimation=kind, order=order, interval=3, noise_aware=True, noise=noise))
        for kind, order in kinds[1:]
    ]
    best = min(plain, key=lambda error: float(error.mean()))
    gains = [best - error for error in aware]
    nearer = [float(gain.mean()) > 2 * float(gain.std()) / len(gain) ** 0.5 for gain in gains]
    assert chosen.estimation != "auto"
    assert chosen.noise_aware == any(nearer)
    assert fitted.noise == noise and ("noise" in fitted.to_dict(chosen)) == chosen.noise_aware
    if not chosen.noise_aware:
        assert torch.equal(errors(chosen), best)


def test_auto_compares_with_samples_made_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of each forecast, against the definition, where nothing was sampled before it asks for it."""
    pipeline, reporter, said = make_pipeline(), Reporter(quiet=True), list[str]()
    monkeypatch.setattr(reporter, "say", said.append)
    search_cache(runs_of(pipeline, 6, labels=[1, 2]), Cache(estimation="auto", order=1, interval=2), reporter)
    tapes, kinds = dit_tapes(pipeline, 6, labels=[1, 2]), (("reuse", 0), ("taylor", 1), ("rfe", 1))
    for kind, order in kinds:
        with cached(pipeline.transformer, Cache(estimation=kind, order=order, interval=2)):
            error = float(relative_l2(finals(tapes), recorded_finals(tapes)).mean())
        assert f"{kind} {order} {error:.4f}" in said[-1]


def test_auto_in_a_recipe_is_exported_as_what_was_chosen(model_folder: Path, tmp_path: Path) -> None:
    cache = {"estimation": "auto", "order": 1, "noise_aware": True, "target_nfc": 3, "trials": 1, "corrected": True}
    folder = calibrate(parse_recipe(recipe_tree(model_folder, tmp_path / "out", cache=cache), "test"), QUIET)
    stored = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]["cache"]
    assert stored["estimation"] in ("reuse", "taylor", "rfe")
    assert stored["corrected"]
    assert len(stored["full_timesteps"]) == 3
    assert json.loads((folder / "metrics.json").read_text())["cache"]["estimation"] == stored["estimation"]


def test_auto_needs_the_same_full_steps_and_a_search(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cache\.estimation: auto compares forecasts at the same full steps"):
        parse_recipe(recipe_tree("m", tmp_path, cache={"estimation": "auto", "tau": 0.1, "order": 1}), "test")
    with pytest.raises(CacheError, match="auto"):
        attach_cache(make_pipeline().transformer, Cache(estimation="auto", interval=2, order=1))


def test_auto_serves_a_pipeline_too() -> None:
    pipeline = make_pipeline()
    found = enable_cache(
        pipeline,
        RFCConfig(estimation="auto", order=1, interval=2),
        num_inference_steps=6,
        guidance_scale=1.5,
        progress=False,
    )
    assert found.estimation in ("reuse", "taylor", "rfe")
    pipeline([1], num_inference_steps=6, guidance_scale=1.5)
    assert cache_stats(pipeline).full_steps == (0, 1, 3, 5)
