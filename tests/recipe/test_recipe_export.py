"""What a recipe may not ask of the format of its export."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import recipe_tree

from accuquant.errors import RecipeError
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe

STATIC = {"modules": r".*attn1\..*", "weight": "int8", "activation": "int8"}
DYNAMIC = {"modules": r".*ff\..*", "weight": "int8", "activation": "int8", "activation_scale": "dynamic"}
WEIGHT_ONLY = {"modules": ".*", "weight": "int8", "tune": False}
RULES = [STATIC, DYNAMIC, WEIGHT_ONLY]


def make_recipe(rules: list[dict[str, Any]], **changes: Any) -> Recipe:
    given = {
        "quantization": {"timestep_groups": 1, "rules": rules},
        "objective": {"iterations": 3, "learn": ["weight", "weight_scale"]},
        "export": {"output": "out", "format": "torchao"},
    }
    return parse_recipe(recipe_tree("bundled:digits-dit", "out", **(given | changes)), "test")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            {"weight": "int6"},
            r"rules\.0\.weight: export\.format torchao holds int8 \(found 'int6'\); write",
        ),
        ({"weight": "int4"}, r"holds int8 \(found 'int4', and torchao's int4 tensors have no product on CPUs\)"),
        ({"activation": "int6"}, r"rules\.0\.activation: .* write activation: int8"),
        ({"granularity": "group", "group_size": 16}, r"rules\.0\.granularity: .* write granularity: channel"),
        ({"symmetric": False}, r"rules\.0\.symmetric: .* write symmetric: true"),
    ],
)
def test_rules_that_torchao_cannot_hold(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe([{**STATIC, **rule}])


def test_sections_that_torchao_cannot_hold() -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(RecipeError, match=words):
            make_recipe(RULES, **changes)

    groups = {"timestep_groups": 3, "rules": RULES}
    refused(
        r"quantization\.timestep_groups: .*found 3, and quantization\.rules\.0.*write timestep_groups: 1",
        quantization=groups,
    )
    refused(r"objective\.learn: 'activation_scale'.*rules\.1.*write learn", objective={"iterations": 3})
    refused(r"cache: export\.format torchao holds no feature cache", cache={"interval": 2})
    refused(r"tune: export\.format torchao", tune={"nfc": 4})
    refused(
        r"export\.format: must be 'accuquant' or 'torchao' \(found 'torchoa'\) \(did you mean 'torchao'\?\)",
        export={"output": "out", "format": "torchoa"},
    )
    # where no scale is static, groups are of no consequence; and scales that are never learned have no clip ratio
    dynamic = {"timestep_groups": 3, "rules": [DYNAMIC, WEIGHT_ONLY]}
    make_recipe([], quantization=dynamic, objective={"iterations": 0})
