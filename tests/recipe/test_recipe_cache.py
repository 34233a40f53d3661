"""The recipe's cache section and the Python configs: what they take, and what they say to someone who got it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import recipe_tree

from accuquant import FORAConfig, RecipeError, RFCConfig, TaylorSeerConfig
from accuquant.core.schedule import interval_steps
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import dump_recipe, load_recipe, parse_recipe

STEPS = 6  # of recipe_tree
KEYS = ", ".join(Cache.model_fields)
ONE_OF = "give exactly one of interval, tau, target_nfc, target_seconds or a list of steps as schedule"
SCHEDULE = "must be interval, rcs, dps, best or a list of full steps"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A recipe without a cache section."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree("model", "out")), encoding="utf-8")
    return path


def read(section: Any) -> Recipe:
    return parse_recipe(recipe_tree("model", "out", cache=section), "test")


def cache_of(section: Any) -> Cache:
    cache = read(section).cache
    assert cache is not None
    return cache


def refusal(section: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(section)
    return str(caught.value).removeprefix("test: ")


@pytest.mark.parametrize(
    ("section", "estimation", "order", "searches"),
    [
        ({"interval": 2}, "rfe", 2, False),
        ({"interval": 2, "schedule": "interval"}, "rfe", 2, False),
        ({"interval": 2, "estimation": "taylor"}, "taylor", 2, False),
        ({"interval": 2, "estimation": "taylor", "order": 0}, "taylor", 0, False),
        ({"interval": 2, "estimation": "reuse"}, "reuse", 0, False),
        ({"interval": 2, "estimation": "reuse", "order": 0}, "reuse", 0, False),
        ({"interval": 1, "order": 4}, "rfe", 4, False),
        ({"interval": 9, "order": 1}, "rfe", 1, False),  # warmup alone supports it
        ({"interval": 2, "warmup": 9}, "rfe", 2, False),  # all steps are full
        ({"interval": 4, "estimation": "reuse", "warmup": 1}, "reuse", 0, False),
        ({"interval": 3, "offset": 1, "estimation": "taylor"}, "taylor", 2, False),
        ({"interval": 3, "offset": 0, "schedule": "interval"}, "rfe", 2, False),
        ({"interval": 2, "schedule": "dps", "dps_samples": 16, "order": 1}, "rfe", 1, True),
        ({"interval": 2, "corrected": True, "correction_ridge": 0}, "rfe", 2, False),
        ({"tau": 0.3}, "rfe", 2, False),
        ({"tau": "1e-1", "schedule": "rcs", "max_gap": 3}, "rfe", 2, False),
        ({"target_nfc": 3}, "rfe", 2, True),
        ({"target_nfc": 2, "order": 1}, "rfe", 1, True),
        ({"target_nfc": STEPS, "order": 4, "schedule": "best"}, "rfe", 4, True),
        ({"target_nfc": 3.5, "schedule": "rcs"}, "rfe", 2, True),
        ({"target_seconds": 2}, "rfe", 2, True),
        ({"target_seconds": 0.5, "schedule": "best"}, "rfe", 2, True),
        ({"target_seconds": 0.5, "schedule": "rcs"}, "rfe", 2, True),
        ({"schedule": [0, 1, 3]}, "rfe", 2, False),
        ({"schedule": [0], "estimation": "reuse"}, "reuse", 0, False),
        ({"schedule": list(range(STEPS))}, "rfe", 2, False),
        # as a search leaves them
        ({"target_nfc": 3, "full_timesteps": [900, 700.5, 300], "measured_nfc": [3, 0]}, "rfe", 2, False),
        ({"schedule": "rcs", "tau": 0.25, "measured_nfc": [3.5, 0.5]}, "rfe", 2, False),
    ],
)
def test_combination_that_says_where_is_taken(section: Any, estimation: str, order: int, searches: bool) -> None:
    recipe = read(section)
    cache = recipe.cache
    assert cache is not None
    assert (cache.estimation, cache.forecast_order, cache.searches) == (estimation, order, searches)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe
    assert Cache(**json.loads(cache.model_dump_json(exclude_none=True))) == cache  # the way into config.json and back


def test_scientific_notation_and_lists_are_read_as_meant() -> None:
    assert cache_of({"tau": "1e-1"}).tau == 0.1
    assert cache_of({"schedule": [0, 1, 3]}).full_steps == (0, 1, 3)
    assert cache_of({"schedule": "rcs", "tau": 1}).full_steps is None
    found = cache_of({"target_nfc": 3, "full_timesteps": [900, 700.5, 300], "measured_nfc": [3, 0]})
    assert found.full_timesteps == (900.0, 700.5, 300.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        # nothing or too much says where the full steps are
        ({}, f"cache: {ONE_OF} (found none)"),
        ({"order": 1}, f"cache: {ONE_OF} (found none)"),
        ({"schedule": "rcs"}, f"cache: {ONE_OF} (found none)"),
        ({"schedule": "best"}, f"cache: {ONE_OF} (found none)"),
        ({"schedule": "interval"}, f"cache: {ONE_OF} (found none)"),
        ({"interval": 4, "tau": 1}, f"cache: {ONE_OF} (found interval and tau)"),
        ({"interval": 4, "schedule": [0, 1, 2]}, f"cache: {ONE_OF} (found interval and schedule)"),
        ({"target_nfc": 4, "target_seconds": 1}, f"cache: {ONE_OF} (found target_nfc and target_seconds)"),
        ({"tau": 1, "target_nfc": 4, "schedule": "rcs"}, f"cache: {ONE_OF} (found tau and target_nfc)"),
        # keys
        ({"intervall": 4}, f"unknown key cache.intervall (did you mean 'interval'?); valid keys there: {KEYS}"),
        ({"interval": 4, "Order": 1}, f"unknown key cache.Order (did you mean 'order'?); valid keys there: {KEYS}"),
        (
            {"interval": 4, "scheduler": "DDIMScheduler"},
            f"unknown key cache.scheduler (did you mean 'sampling.scheduler'?); valid keys there: {KEYS}",
        ),
        (5, f"cache: must be a section with the keys {KEYS} (found 5)"),
        ([4], f"cache: must be a section with the keys {KEYS} (found [4])"),
        # words
        ({"schedule": "rsc", "tau": 1}, f"cache.schedule: {SCHEDULE} (found 'rsc') (did you mean 'rcs'?)"),
        ({"schedule": "intervall"}, f"cache.schedule: {SCHEDULE} (found 'intervall') (did you mean 'interval'?)"),
        ({"schedule": "Best", "target_nfc": 4}, f"cache.schedule: {SCHEDULE} (found 'Best') (did you mean 'best'?)"),
        ({"schedule": "qqq"}, f"cache.schedule: {SCHEDULE} (found 'qqq')"),
        ({"schedule": 3}, f"cache.schedule: {SCHEDULE} (found 3)"),
        ({"schedule": []}, f"cache.schedule: {SCHEDULE} (found [])"),
        ({"schedule": [0, 1.5]}, f"cache.schedule: {SCHEDULE} (found [0, 1.5])"),
        ({"schedule": [0, True, 2]}, f"cache.schedule: {SCHEDULE} (found [0, True, 2])"),
        (
            {"interval": 2, "estimation": "tailor"},
            "cache.estimation: must be 'rfe', 'taylor', 'reuse' or 'auto' (found 'tailor') (did you mean 'taylor'?)",
        ),
        (
            {"interval": 2, "norm": "tokens"},
            "cache.norm: must be 'sample', 'token', 'channel' or 'batch' (found 'tokens') (did you mean 'token'?)",
        ),
        # numbers
        ({"interval": 0}, "cache.interval: must be greater than or equal to 1 (found 0)"),
        ({"interval": 2.5}, "cache.interval: must be a whole number (found 2.5)"),
        ({"tau": 0}, "cache.tau: must be greater than 0 (found 0)"),
        ({"tau": "high"}, "cache.tau: must be a number (found 'high')"),
        ({"target_seconds": -1}, "cache.target_seconds: must be greater than 0 (found -1)"),
        (
            {"target_nfc": 0.5, "schedule": "rcs"},
            "cache.target_nfc: must be greater than or equal to 1 (found 0.5)",
        ),
        ({"interval": 1, "order": 5}, "cache.order: must be less than or equal to 4 (found 5)"),
        ({"interval": 2, "warmup": 0}, "cache.warmup: must be greater than or equal to 1 (found 0)"),
        ({"interval": 2, "modules": 3}, "cache.modules: must be text; put it in quotes (found 3)"),
        # schedules and what they need
        ({"schedule": "interval", "tau": 1}, "cache.schedule interval needs interval, for example interval: 4"),
        ({"schedule": "interval", "target_nfc": 4}, "cache.schedule interval needs interval, for example interval: 4"),
        ({"schedule": "rcs", "interval": 2}, "cache.schedule rcs needs tau or target_nfc, not interval"),
        ({"schedule": "best", "interval": 2}, "cache.schedule best needs target_nfc or target_seconds"),
        (
            {"schedule": "best", "tau": 1},
            "cache.schedule best knows no tau; use schedule: rcs, or leave schedule out",
        ),
        (
            {"interval": 2, "max_gap": 3},
            "cache.max_gap is for tau and targets; with interval or a list of steps the gaps are given",
        ),
        (
            {"schedule": [0, 2, 4], "warmup": 3},
            "cache.warmup: the list of steps in schedule says which are full; leave warmup out",
        ),
        ({"interval": 4, "offset": 4}, "cache.offset: must be below the interval of 4 (found 4)"),
        ({"interval": 4, "offset": -1}, "cache.offset: must be greater than or equal to 0 (found -1)"),
        (
            {"target_nfc": 4, "offset": 1},
            "cache.offset: belongs to a fixed interval, for example interval: 4 with offset: 1",
        ),
        (
            {"schedule": "dps", "interval": 2, "order": 1, "offset": 1},
            "cache.offset: belongs to a fixed interval, for example interval: 4 with offset: 1",
        ),
        ({"interval": 2, "dps_samples": 16}, "cache.dps_samples: only schedule: dps looks at it"),
        (
            {"interval": 2, "correction_ridge": 0},
            "cache.correction_ridge: nothing is corrected; add corrected or corrected_quantization",
        ),
        ({"interval": 2, "num_inference_steps": 9}, "cache.num_inference_steps is 9, sampling.num_inference_steps 6"),
        ({"target_nfc": 3.5}, "cache.target_nfc must be whole (found 3.5); schedule: rcs can meet a mean"),
        (
            {"target_nfc": 3.5, "schedule": "best"},
            "cache.target_nfc must be whole (found 3.5); schedule: rcs can meet a mean",
        ),
        ({"schedule": [1, 2, 3]}, "cache.schedule must rise from 0, which is always full (found [1, 2, 3])"),
        ({"schedule": [0, 2, 2]}, "cache.schedule must rise from 0, which is always full (found [0, 2, 2])"),
        ({"schedule": [0, 3, 1]}, "cache.schedule must rise from 0, which is always full (found [0, 3, 1])"),
        # orders
        (
            {"interval": 4, "estimation": "reuse", "order": 2},
            "cache.order: estimation reuse has order 0 (found 2); use estimation: taylor",
        ),
        (
            {"interval": 4, "estimation": "rfe", "order": 0},
            "cache.order: estimation rfe needs order 1 or more; use estimation: reuse",
        ),
        ({"schedule": [0, 2]}, "cache.order 2 needs 3 full steps, and there are 2; lower the order"),
        ({"target_nfc": 2}, "cache.order 2 needs 3 full steps, and there are 2; lower the order"),
        ({"interval": 9}, "cache.order 2 needs 3 full steps, and there are 2; lower the order"),
        ({"interval": 4, "order": 4}, "cache.order 4 needs 5 full steps, and there are 3; lower the order"),
        (
            {"interval": 9, "order": 1, "warmup": 1},
            "cache.order 1 needs 2 full steps, and there are 1; lower the order",
        ),
        # against the number of steps
        ({"schedule": [0, 3, 6]}, "cache.schedule: 6 is no step of 6, they count from 0"),
        (
            {"schedule": [0, 1, 2], "num_inference_steps": 2},
            "cache.schedule: 2 is no step of 2, they count from 0",
        ),
        ({"target_nfc": 7}, "cache.target_nfc: 7 is more than the 6 steps there are"),
        ({"target_nfc": 6.5, "schedule": "rcs"}, "cache.target_nfc: 6.5 is more than the 6 steps there are"),
        ({"target_nfc": 1}, "cache.target_nfc: 1 is less than the 2 full steps of warmup"),
        ({"target_nfc": 3, "warmup": 4}, "cache.target_nfc: 3 is less than the 4 full steps of warmup"),
    ],
)
def test_one_mistake_is_one_line_that_names_it(section: Any, message: str) -> None:
    assert refusal(section) == message


def test_several_mistakes_are_listed_one_per_line() -> None:
    lines = refusal({"interval": 0, "norm": "x", "taus": 1}).splitlines()
    assert [line.split(":")[0].split(" (")[0].strip() for line in lines[1:]] == [
        "unknown key cache.taus",
        "cache.interval",
        "cache.norm",
    ]


def test_order_check_counts_the_full_steps_that_are_run() -> None:
    """The count in the message is that of the schedule itself, for every interval, warmup and offset."""
    for interval in range(1, 8):
        for warmup in range(1, 5):
            for offset in (None, *range(interval)):
                full = len(interval_steps(STEPS, interval, warmup, offset))
                section = {"interval": interval, "warmup": warmup, "offset": offset, "estimation": "taylor"}
                assert cache_of(section | {"order": min(4, full - 1)}).forecast_order == min(4, full - 1)
                if full < 5 and full != STEPS:
                    assert f"order {full} needs {full + 1} full steps, and there are {full};" in refusal(
                        section | {"order": full}
                    )


@pytest.mark.parametrize(
    "contradiction",
    [
        {"measured_nfc": [4, 0]},  # a search that found nothing: no full step is known
        {"measured_nfc": [4, 0], "interval": 2, "tau": 1},
    ],
)
def test_measured_nfc_alone_says_no_full_steps(contradiction: Any) -> None:
    assert ONE_OF in refusal(contradiction)


def test_override_makes_the_section(file: Path) -> None:
    cache = load_recipe(file, ["cache.interval=4"]).cache
    assert cache == Cache(interval=4)
    file.write_text(yaml.safe_dump(recipe_tree("model", "out", cache=None)), encoding="utf-8")
    assert load_recipe(file).cache is None
    assert load_recipe(file, ["cache.interval=4"]).cache == cache
    assert load_recipe(file, ["cache.schedule=[0, 1, 3]"]).cache == Cache(schedule=(0, 1, 3))
    assert load_recipe(file, ["cache={tau: 0.5, order: 1}"]).cache == Cache(tau=0.5, order=1)


def test_override_takes_the_section_away_or_changes_a_key(file: Path) -> None:
    file.write_text(yaml.safe_dump(recipe_tree("model", "out", cache={"interval": 2, "order": 1})), encoding="utf-8")
    assert load_recipe(file).cache == Cache(interval=2, order=1)
    assert load_recipe(file, ["cache=null"]).cache is None
    assert load_recipe(file, ["cache=null", "cache.tau=0.5"]).cache == Cache(tau=0.5)
    assert load_recipe(file, ["cache.interval=null", "cache.target_nfc=3"]).cache == Cache(target_nfc=3, order=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.intervall=4", f"unknown key cache.intervall (did you mean 'interval'?); valid keys there: {KEYS}"),
        ("cahce.interval=4", "unknown key cahce (did you mean 'cache'?); valid keys there: model, sampling, data, "),
        ("interval=4", "unknown key interval (did you mean 'cache.interval'?); valid keys there: model, sampling, "),
        ("cache.target_nfc=7", "cache.target_nfc: 7 is more than the 6 steps there are"),
    ],
)
def test_override_that_is_wrong_is_quoted(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [override])
    assert str(caught.value).startswith(f"{file} --set {override}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_fewer_sampling_steps_are_checked_against_the_cache(file: Path) -> None:
    overrides = ["cache.schedule=[0, 1, 5]", "sampling.num_inference_steps=5", "quantization.timestep_groups=2"]
    with pytest.raises(RecipeError, match=r"cache\.schedule: 5 is no step of 5, they count from 0"):
        load_recipe(file, overrides)


@pytest.mark.parametrize(
    ("config", "estimation", "order"),
    [(FORAConfig, "reuse", 0), (TaylorSeerConfig, "taylor", 2), (RFCConfig, "rfe", 2)],
)
def test_named_configs_are_the_papers_methods(config: type[Cache], estimation: str, order: int) -> None:
    cache = config(interval=3)
    assert (cache.estimation, cache.forecast_order, cache.warmup) == (estimation, order, 2)
    assert cache.model_dump() == Cache(interval=3, estimation=estimation).model_dump()
    listed = config(schedule=[0, 1, 3])
    assert listed.full_steps == (0, 1, 3) and listed == config(schedule=(0, 1, 3))
    with pytest.raises(RecipeError, match="give exactly one of"):
        config()
    with pytest.raises(RecipeError, match="intervall"):
        config(intervall=3)


def test_named_configs_keep_their_method() -> None:
    with pytest.raises(RecipeError, match="estimation"):
        FORAConfig(interval=3, estimation="taylor")
    with pytest.raises(RecipeError, match="estimation"):
        TaylorSeerConfig(interval=3, estimation="rfe")
    with pytest.raises(RecipeError, match="reuse has order 0"):
        FORAConfig(interval=3, order=1)
    assert RFCConfig(schedule="rcs", target_nfc=4.5).searches and RFCConfig(target_nfc=4).searches


def test_configs_without_a_known_number_of_steps_are_checked_where_they_can_be() -> None:
    assert TaylorSeerConfig(interval=99).interval == 99  # perhaps of a thousand steps
    with pytest.raises(RecipeError, match="order 2 needs 3 full steps"):
        TaylorSeerConfig(interval=99, num_inference_steps=50)
    with pytest.raises(RecipeError, match="60 is more than the 50 steps"):
        RFCConfig(target_nfc=60, num_inference_steps=50)
