"""What a budget of `accuquant tune` pays for, of which types, and in which order they are tried."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from helpers import INT8, tune_recipe

from accuquant.errors import RecipeError
from accuquant.files import KeptFiles
from accuquant.programs.tune import tune
from accuquant.progress import Reporter
from accuquant.recipe.file import load_recipe
from accuquant.tuning.budget import LEADERS, LEAST_NFC, describe_tuning, error_tables, ordered, type_combinations

QUIET = Reporter(quiet=True)


def test_every_combination_has_its_rules_and_costs(model_folder: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "o")
    found = type_combinations(recipe)
    assert [c.picks for c in found] == list(itertools.product((0, 1), (0, 1)))
    # the recipe's own rule for both classes decides nothing any more; that for adaLN still does
    assert [len(c.recipe.quantization.rules) for c in found] == [3] * 4
    assert found[1].recipe.quantization.rules[1].weight == "int4"
    # int4 weights halve the operations of a class, and both classes are all that is skipped but attention's products
    both, attention, mlp = found[0].inside, found[0].inside - found[2].inside, found[0].inside - found[1].inside
    products = sum(found[0].operations[f"transformer_blocks.{i}.attn1"] for i in range(2))
    assert attention + mlp == pytest.approx((both - products) / 2) and products > 0
    assert found[0].outside == pytest.approx(found[3].outside)


def test_the_most_full_steps_that_the_budgets_pay_for(model_folder: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "o")
    assert recipe.tune is not None
    for combination in type_combinations(recipe):
        nfc = combination.full_steps(recipe.tune)
        assert combination.bit_operations(nfc) <= 0.16
        assert nfc == 8 or combination.bit_operations(nfc + 1) > 0.16
        assert combination.full_steps(recipe.tune.model_copy(update={"nfc": 3})) == 3
        timed = recipe.tune.model_copy(update={"seconds": 1.0, "bit_operations": None})
        assert combination.full_steps(timed, (0.2, 0.05)) == 4  # 4 * 0.2 + 4 * 0.05


def test_a_budget_that_pays_for_nothing_says_what_would(model_folder: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "o", bit_operations=0.001)
    combinations = type_combinations(recipe)
    least = f"{min(c.bit_operations(LEAST_NFC) for c in combinations):.4f}"
    with pytest.raises(
        RecipeError, match=rf"tune\.bit_operations: 0\.001 pays for fewer.*int4/int8.*{re.escape(least)}"
    ):
        tune(recipe, QUIET)


def test_types_that_nothing_can_be_learned_of_are_calibrated_all_the_same(model_folder: Path, tmp_path: Path) -> None:
    """Of activations that stay float no scale is learned; what learns the others' would stop at that combination."""
    types = [{"modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*", "choose": [INT8, {"weight": "int4"}]}]
    found = type_combinations(tune_recipe(model_folder, tmp_path / "o", types=types))
    assert [c.recipe.objective.learn for c in found] == [
        ("weight", "weight_scale", "activation_scale"),
        ("weight", "weight_scale"),
    ]


def test_different_types_have_different_names(model_folder: Path, tmp_path: Path) -> None:
    """What was tried is found again by the name."""
    others = [
        {},
        {"symmetric": False},
        {"activation_symmetric": True},
        {"activation_scale": "dynamic"},
        {"tune": False},
    ]
    types = [{"modules": r"transformer_blocks\.\d+\.ff\..*", "choose": [INT8 | more for more in others]}]
    found = type_combinations(tune_recipe(model_folder, tmp_path / "o", types=types))
    assert len({c.name for c in found}) == 5


def test_tables_order_by_error_and_by_what_is_left_for_the_cache(model_folder: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "o", bit_operations=None, nfc=6)
    combinations = type_combinations(recipe)
    assert recipe.tune is not None
    kept = KeptFiles(tmp_path, QUIET)
    tables = error_tables(recipe.tune, combinations, kept, QUIET)
    for int8, int4 in tables["types"]:
        assert 0 < int8 < int4
    # at equal numbers of full steps fewer bits are only worse
    found = ordered(recipe.tune, combinations, kept, QUIET)
    assert (found[0].picks, found[-1].picks) == ((0, 0), (1, 1))
    # with free quantization the cheaper types win, for they leave more full steps
    (tmp_path / "tables.json").write_text(json.dumps(tables | {"types": [[1e-9, 1e-9]] * 2}))
    cheap = tune_recipe(model_folder, tmp_path / "o", bit_operations=combinations[0].bit_operations(4))
    assert cheap.tune is not None
    assert ordered(cheap.tune, combinations, kept, QUIET)[0].picks == (1, 1)


def test_the_dry_run_counts_the_further_samples_of_leaders(model_folder: Path, tmp_path: Path) -> None:
    costs = [
        describe_tuning(tune_recipe(model_folder, tmp_path / "o", more_samples=times))[1]["rollouts"]
        for times in (1, 4)
    ]
    assert costs[1] - costs[0] == pytest.approx(2 * 3 * LEADERS)  # two combinations


def test_the_shipped_recipe_is_a_real_choice() -> None:
    rows, costs = describe_tuning(load_recipe("dit_tune"))
    assert len(rows) == 4
    assert all(nfc >= LEAST_NFC and operations <= 0.037 for _, nfc, operations in rows)
    assert costs["combinations"] == 2
