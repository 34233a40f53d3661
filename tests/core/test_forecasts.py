"""A new forecast is one file and its line: here it is written while the test runs, and goes the whole way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe_tree, sampled

from accuquant.core.forecasts import FORECASTS, Forecast
from accuquant.errors import CheckpointError, RecipeError
from accuquant.export.load import load_export, recipe_of
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import ESTIMATIONS, Cache
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import cached, controller_of, detach_cache

FILE = '''
"""Half of Taylor's change."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from accuquant.core.forecasts.base import Forecast, Memory, Settings, change_at, difference


@final
@dataclass(frozen=True)
class Damped(Forecast):
    order: int

    @classmethod
    def of(cls, settings: Settings) -> Forecast:
        if settings.noise is not None:
            raise ValueError("knows no noise; leave noise_aware out")
        return cls(settings.order)

    def update(self, memory: Memory | None, step: int, output: Tensor, input: Tensor) -> Memory:
        return difference(memory, step, output, self.order, "taylor")

    def predict(self, memory: Memory, step: int, input: Tensor) -> Tensor:
        return memory.factors[0] + 0.5 * change_at(memory, step, "taylor")
'''
CACHE: dict[str, Any] = {"estimation": "damped", "interval": 2, "order": 1, "corrected": True}


@pytest.fixture
def damped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Forecast]:
    path = tmp_path / "damped.py"
    path.write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("damped", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "damped", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FORECASTS, "damped", module.Damped)
    monkeypatch.setitem(ESTIMATIONS, "damped", (1, 4))
    kind: type[Forecast] = module.Damped
    return kind


def test_every_word_has_its_forecast() -> None:
    assert set(ESTIMATIONS) == set(FORECASTS)


def test_a_new_forecast_goes_from_the_recipe_to_a_loaded_export(
    damped: type[Forecast], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = calibrate(
        parse_recipe(recipe_tree(model_folder, tmp_path / "out", cache=CACHE), "test"), Reporter(quiet=True)
    )
    stored = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]["cache"]
    assert (stored["estimation"], stored["order"]) == ("damped", 1)
    recipe = recipe_of(folder)
    pipeline = load_export(folder, recipe)
    controller = controller_of(pipeline.transformer)
    assert controller is not None
    assert all(isinstance(forecast, damped) for forecast in controller.forecasts.values())
    sampling, network = recipe.sampling, pipeline.transformer
    how = {"steps": sampling.num_inference_steps, "guidance": sampling.guidance_scale}
    loaded = sampled(pipeline, **how)
    detach_cache(network)
    with cached(network, Cache(**CACHE)):
        assert torch.equal(sampled(pipeline, **how), loaded)
    with cached(network, Cache(**CACHE | {"estimation": "taylor"})):
        assert not torch.equal(sampled(pipeline, **how), loaded)

    monkeypatch.delitem(FORECASTS, "damped")
    monkeypatch.delitem(ESTIMATIONS, "damped")
    with pytest.raises(RecipeError, match=r"cache\.estimation: must be 'rfe', .* \(found 'damped'\)"):
        recipe_of(folder)
    with pytest.raises(CheckpointError, match=r"quantization_config\.cache\.estimation: must be .* \(found 'damped'\)"):
        load_export(folder, recipe)


def test_what_it_does_not_know_is_said(damped: type[Forecast], model_folder: Path, tmp_path: Path) -> None:
    tree = recipe_tree(model_folder, tmp_path / "out", cache=CACHE | {"order": 0})
    with pytest.raises(RecipeError, match=r"cache\.order: estimation damped needs order 1 or more"):
        parse_recipe(tree, "test")
    with pytest.raises(RecipeError, match=r"did you mean 'damped'\?"):
        parse_recipe(recipe_tree("m", "o", cache=CACHE | {"estimation": "damp"}), "test")
