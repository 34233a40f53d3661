"""Wish, plan and what is fitted: what is asked becomes a plan, and both are stored as they always were."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from helpers import recipe_tree
from pipelines import make_pipeline

from accuquant.errors import CacheError, CheckpointError
from accuquant.recipe import Cache
from accuquant.recipe.file import dump_recipe, parse_recipe
from accuquant.runtime.cache.attach import attach_cache, detach_cache
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan, ModuleForecast
from accuquant.runtime.checkpoint import AccuQuantConfig

# what exports held before plans had a type of their own
USUAL: dict[str, Any] = {"trials": 60, "warmup": 2, "norm": "sample", "differences": "taylor", "noise_aware": False}
USUAL |= {"corrected": False, "corrected_quantization": False, "measured_on": "quantized", "feature": "modules"}
LAYERS = {"a": {"weight": "int8"}}
SEARCHED: dict[str, Any] = USUAL | {
    "estimation": "rfe",
    "order": 1,
    "target_nfc": 3.0,
    "full_timesteps": [999.0, 600.0, 200.0],
}
SEARCHED |= {"measured_nfc": [3.0, 0.0], "schedule": "best", "max_gap": 5, "noise_aware": True}
SEARCHED |= {"noise": {"a": [0.25, 0.5], "b": [0.125, 1.0]}, "corrected": True}
SEARCHED |= {"correction_timesteps": [800.0, 400.0], "correction_full_timesteps": []}
SEARCHED |= {"correction_channels": {"a": 4, "b": 8}, "learned_timesteps": [800.0, 400.0], "learned_modules": ["a"]}


@pytest.mark.parametrize(
    "wish",
    [
        {"interval": 3},
        {"interval": 3, "warmup": 1, "estimation": "reuse"},
        {"schedule": (0, 1, 4), "order": 1, "differences": "newton"},
        {"full_timesteps": (900.0, 500.0), "estimation": "taylor", "order": 1, "corrected": True},
        {"tau": 0.3, "schedule": "rcs", "max_gap": 4, "warmup": 1, "norm": "token"},
        {"interval": 2, "feature": "blocks", "blocks": (1, 2), "estimation": "reuse", "measured_on": "full_precision"},
        {"interval": 2, "modules": ".*ff", "factors_dtype": "bfloat16", "factors_device": "cpu"},
        {"interval": 2, "order": 1, "num_inference_steps": 6, "noise_aware": True},
    ],
)
def test_a_plan_goes_into_json_and_back_and_a_recipe_can_ask_for_it(wish: dict[str, Any]) -> None:
    plan = CachePlan.of(Cache(**wish))
    assert CachePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert CachePlan.of(plan.as_recipe()) == plan
    tree = recipe_tree("m", "o", cache=json.loads(json.dumps(plan.to_dict())))
    assert parse_recipe(tree, "test").cache == plan.as_recipe()


def test_a_module_may_have_a_forecast_of_its_own() -> None:
    """It gives what it gives where all have it; and is stored, with what it has to know."""
    model, name = make_pipeline().transformer, "transformer_blocks.0.ff"
    plan = CachePlan.of(Cache(interval=2, warmup=1, estimation="taylor", order=1))
    mixed = replace(plan, forecasts={name: ModuleForecast("reuse", 0)})
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 16, 32, generator=generator)
    reused = CachePlan.of(Cache(interval=2, warmup=1, estimation="reuse"))
    for module, same, other in ((name, reused, plan), ("transformer_blocks.1.ff", plan, reused)):
        found, expected, different = (predicted(attached(model, one), module, x, y) for one in (mixed, same, other))
        assert torch.equal(found, expected) and not torch.equal(found, different)
    assert mixed.highest_order == 1 and replace(mixed, order=0, estimation="reuse").highest_order == 0
    assert CachePlan.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    aware = replace(mixed, forecasts={name: ModuleForecast("rfe", 1, noise_aware=True)})
    assert aware.uses_fitted and not aware.unfitted.uses_noise
    with pytest.raises(CacheError, match=f"no noise was measured for {name};"):
        attach_cache(model, aware)
    with pytest.raises(CacheError, match="which no recipe can say"):
        mixed.as_recipe()
    for wrong in ({"estimation": "rfe", "order": 0}, {"estimation": "x"}, {"order": 1, "interval": 2}):
        with pytest.raises(ValueError, match=r"order 1 or more|must be 'rfe'|unknown keys: interval"):
            CachePlan.from_dict(plan.to_dict() | {"forecasts": {name: wrong}})


def attached(model: Any, plan: CachePlan) -> Controller:
    controller = attach_cache(model, plan)
    detach_cache(model)
    return controller


def predicted(controller: Controller, module: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A module's forecast after two outputs."""
    forecast, memory = controller.forecasts[module], None
    for step, output in ((0, first), (2, second)):
        memory = forecast.update(memory, step, output, output)
    assert memory is not None
    return forecast.predict(memory, 3, second)


def test_of_what_is_asked_only_what_decides_stays() -> None:
    wish = Cache(target_nfc=3, max_gap=5, warmup=3, trials=4, corrected=True)
    with pytest.raises(CacheError, match="need a search"):
        CachePlan.of(wish)
    found = CachePlan.of(wish, full_timesteps=(900.0, 500.0, 20.0), measured_nfc=(3.0, 0.0))
    assert (found.full_timesteps, found.order, found.corrected) == ((900.0, 500.0, 20.0), 2, True)
    assert (found.interval, found.tau, found.max_gap, found.warmup) == (None, None, None, 3)
    assert CachePlan.of(Cache(interval=2), full_steps=(0, 1)).interval is None
    rcs = CachePlan.of(Cache(schedule="rcs", target_nfc=3.5, max_gap=5), tau=0.5)
    assert (rcs.tau, rcs.max_gap) == (0.5, 5)


def test_what_older_versions_stored_is_read_and_says_the_same_again() -> None:
    plan, fitted = CachePlan.from_dict(SEARCHED), Fitted.from_dict(SEARCHED)
    assert (plan.full_timesteps, plan.measured_nfc) == ((999.0, 600.0, 200.0), (3.0, 0.0))
    assert plan.learned and plan.noise_aware and plan.corrected
    assert fitted.noise == {"a": (0.25, 0.5), "b": (0.125, 1.0)}
    assert [tuple(fitted(name).shape) for name in "ab"] == [(2, 2, 4), (2, 2, 8)]
    assert [tuple(share.shape) for share in fitted.learned] == [(1, 2)] * 2
    again = plan.to_dict() | fitted.to_dict(plan)
    gone = {"trials", "target_nfc", "schedule", "max_gap"}  # of the search
    assert again == {key: value for key, value in SEARCHED.items() if key not in gone}
    config = AccuQuantConfig(LAYERS, [], cache=SEARCHED)
    assert config.to_dict()["cache"] == again
    assert AccuQuantConfig(LAYERS, [], cache=again).to_dict()["cache"] == again
    assert config.fitted("a").device == torch.device("meta")


def test_only_what_the_plan_uses_is_stored() -> None:
    fitted = Fitted.from_dict(SEARCHED)
    assert fitted.to_dict(CachePlan.of(Cache(interval=2))) == {}
    assert set(fitted.to_dict(CachePlan.of(Cache(interval=2, order=1, noise_aware=True)))) == {"noise"}
    plan = CachePlan.from_dict(SEARCHED)
    assert not (plan.unfitted.fits or plan.unfitted.learned or plan.unfitted.noise_aware)
    assert plan.uncorrected.learned and plan.uncorrected.full_timesteps == plan.full_timesteps


def test_recipes_of_older_versions_are_read() -> None:
    """They name every key, and what calibration once wrote there."""
    tree = yaml.safe_load(dump_recipe(parse_recipe(recipe_tree("m", "o", cache={"interval": 2, "order": 1}), "test")))
    keys = ("correction_timesteps", "correction_full_timesteps", "correction_channels", "learned_timesteps")
    tree["cache"] |= dict.fromkeys((*keys, "learned_modules", "measured_nfc"))
    assert parse_recipe(tree, "test").cache == Cache(interval=2, order=1)
    tree["cache"] |= {"measured_nfc": [3.0, 0.0]}
    assert parse_recipe(tree, "test").cache == Cache(interval=2, order=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_timesteps": None}, ": target_nfc, target_seconds, dps and auto need a search"),
        ({"interval": "often"}, ".interval: Input should be a valid integer"),
        ({"colour": 1}, ".colour: no such setting"),
        ({"estimation": "tailor"}, r".estimation: must be .* \(did you mean 'taylor'\?\)"),
        ({"correction_timesteps": 3}, r".correction_timesteps must be a list of numbers \(found 3\)"),
        ({"learned_modules": [1]}, r".learned_modules must be a list of names \(found a list of 1\)"),
        ({"correction_channels": {"a": "x"}}, ".correction_channels.a must be a count"),
        ({"noise": {"a": [1.0]}}, ".noise.a must be two energies"),
    ],
)
def test_what_cannot_have_been_stored_is_one_readable_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: quantization_config.cache{message}") as caught:
        AccuQuantConfig(LAYERS, [], cache=SEARCHED | change)
    assert "\n" not in str(caught.value)
