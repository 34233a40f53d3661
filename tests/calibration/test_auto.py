"""`target: auto`: what is tried with how much, what is kept, and that the export is the choice's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_weights, recipe_tree

from accuquant.calibration.choice import (
    LEAST_UPDATES,
    RUNGS,
    Candidate,
    Trial,
    candidates,
    choose_objective,
    halve,
    search_cost,
    trial_budgets,
)
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives import OBJECTIVES
from accuquant.calibration.session import Session, open_session, validation_errors
from accuquant.errors import RecipeError
from accuquant.files import KeptFiles
from accuquant.programs.calibrate import calibrate
from accuquant.programs.describe import describe
from accuquant.progress import Reporter
from accuquant.recipe import Objective, Recipe
from accuquant.recipe.file import parse_recipe

QUIET = Reporter(quiet=True)
BUDGET = 160


def auto_recipe(model: Path, output: Path, **objective: Any) -> Recipe:
    tree = recipe_tree(model, output, objective={"target": "auto", "iterations": BUDGET, "batch_size": 2} | objective)
    tree["evaluation"]["reconstruct"] = False
    return parse_recipe(tree, "test")


def prepared(recipe: Recipe) -> Session:
    return open_session(recipe, QUIET)


@pytest.fixture(scope="module")
def searched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = auto_recipe(model_folder, tmp_path_factory.mktemp("auto") / "out")
    return recipe, calibrate(recipe, QUIET)


def calibration(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["calibration"]
    return found


# ---- halving


def trial(candidate: Candidate, budget: int, error: float | None) -> Trial:
    return Trial(candidate.target, candidate.steps_per_group, candidate.rate, budget, 9, budget, error, 0.001)


def test_the_better_half_goes_on_and_the_last_rung_decides() -> None:
    """D is best with little, C with more; B diverges; A is out after the first rung, though best with most."""
    a, b, c, d = (Candidate("trajectory", m, 1.0) for m in (1, 2, 5, 10))
    errors = {(a, 0): 0.5, (b, 0): None, (c, 0): 0.4, (d, 0): 0.3, (c, 1): 0.1, (d, 1): 0.2, (a, 1): 0.0}
    budgets = [int(share * 800) for share in RUNGS]
    choice, trials = halve(
        dict.fromkeys((a, b, c, d), 800),
        lambda one, budget: trial(one, budget, errors[one, budgets.index(budget)]),
    )
    assert choice == c
    assert [(t.candidate, t.budget) for t in trials] == [(k, budgets[0]) for k in (a, b, c, d)] + [
        (k, budgets[1]) for k in (d, c)
    ]


def test_what_has_too_few_updates_joins_at_the_next_rung_or_not_at_all() -> None:
    a, b, c = (Candidate("trajectory", m, 1.0) for m in (1, 5, 10))
    updates = {a: 800, b: 4 * LEAST_UPDATES, c: 4 * LEAST_UPDATES - 1}
    choice, trials = halve(updates, lambda one, count: trial(one, count, 1 / one.steps_per_group))
    assert [(t.candidate, t.budget) for t in trials] == [(a, 100), (a, 200), (b, LEAST_UPDATES)]
    assert choice == b


def test_every_candidate_makes_the_same_part_of_its_updates(model_folder: Path, tmp_path: Path) -> None:
    """Of evaluations the same share would leave blocks, which sample their inputs first, a smaller part of them."""
    recipe = auto_recipe(model_folder, tmp_path / "out")
    job = prepared(recipe).job(recipe.objective)
    made: dict[Candidate, list[int]] = {}

    def attempt(one: Candidate, count: int) -> Trial:
        made.setdefault(one, []).append(count)
        return trial(one, one.cost(job, count).evaluations, 0.1)

    found = candidates(job.objective, 6)
    whole = {one: one.updates(job, 4000) for one in found}
    halve(whole, attempt)
    assert {one: counts[0] for one, counts in made.items()} == {one: int(RUNGS[0] * whole[one]) for one in found}
    blocks = next(one for one in found if one.target == "blocks")
    assert blocks.updates(job, int(RUNGS[0] * 4000)) < made[blocks][0]


def test_without_any_trial_the_first_candidate_is_taken() -> None:
    found = candidates(Objective(target="auto"), 50)
    assert (
        halve(dict.fromkeys(found, 0), lambda *_: pytest.fail("tried"))[0] == found[0] == Candidate("trajectory", 1, 1)
    )


def test_each_objective_is_tried_where_it_fits_the_number_of_steps() -> None:
    def names(num_steps: int, **objective: Any) -> list[tuple[str, float]]:
        return [(c.name, c.rate) for c in candidates(Objective(**objective), num_steps)]

    trajectories = [("M = 1", 1.0), ("M = 2", 2.0), ("M = 5", 3.0), ("M = 10", 5.0)]
    assert names(20, target="auto") == [*trajectories, ("blocks", 1.0), ("blocks", 2.0)]
    assert names(20, steps_per_group="auto") == trajectories
    assert names(6, steps_per_group="auto") == trajectories[:3]


def test_updates_are_the_most_that_the_budget_pays_for(model_folder: Path, tmp_path: Path) -> None:
    recipe = auto_recipe(model_folder, tmp_path / "out")
    session = prepared(recipe)
    job = session.job(recipe.objective)
    for candidate in candidates(job.objective, 6):
        for budget in (0, 20, 40, 160, 1000):
            updates = candidate.updates(job, budget)
            costs = []
            for count in (updates, updates + 1):
                objective = candidate.applied(job.objective, count)
                costs.append(OBJECTIVES[candidate.target].cost(session.job(objective)).evaluations)
            assert (costs[0] <= budget or not updates) and costs[1] > budget


# ---- the real thing


def test_trials_are_told_and_the_dry_run_has_counted_them(searched: tuple[Recipe, Path]) -> None:
    recipe, folder = searched
    found = calibration(folder)
    trials = found["auto"]
    job = prepared(recipe).job(recipe.objective)
    fitting = [one for one in candidates(recipe.objective, 6) if int(RUNGS[0] * one.updates(job, BUDGET)) >= 3]
    expected = [one.cost(job, int(RUNGS[0] * one.updates(job, BUDGET))).evaluations for one in fitting]
    assert [t["budget"] for t in trials[: len(fitting)]] == expected and len(fitting) == 5
    assert len(trials) == 5 + 3  # all that fit six steps, and the better half
    assert {(t["target"], t["steps_per_group"]) for t in trials} == {
        ("trajectory", 1), ("trajectory", 2), ("trajectory", 5), ("blocks", 1),
    }  # fmt: skip
    assert all(t["updates"] >= LEAST_UPDATES and 0.5 * t["budget"] <= t["evaluations"] <= t["budget"] for t in trials)
    assert all(0 < t["error"] < 1 and 0 < t["standard_error"] < t["error"] for t in trials)
    best = min(trials[5:], key=lambda t: t["error"])
    assert (found["target"], found["steps_per_group"]) == (best["target"], best["steps_per_group"])
    assert 0.8 * BUDGET <= found["network_evaluations"] <= BUDGET
    counted = describe(recipe)[1]["network_evaluations"]["tuning"]
    assert counted == BUDGET + sum(trial_budgets(job))
    assert counted >= BUDGET + sum(t["budget"] for t in trials)  # the plan has the dearest of them go on
    assert 0.7 * counted <= found["network_evaluations"] + sum(t["evaluations"] for t in trials) <= counted


def test_the_report_shows_them(searched: tuple[Recipe, Path]) -> None:
    page = (searched[1] / "report.html").read_text(encoding="utf-8")
    assert "Objectives tried" in page and page.count('<tr class="chosen"><td>') == 1


def test_the_export_is_that_of_a_recipe_which_names_the_choice(searched: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = searched
    found = calibration(folder)
    named = {"target": found["target"], "steps_per_group": found["steps_per_group"], "batch_size": 2}
    named["learning_rates"] = found["learning_rates"]
    blocks = 2 if found["target"] == "blocks" else 1
    named["iterations"] = len(found["history"]) // blocks
    tree = recipe.model_dump(mode="json") | {"objective": named, "export": {"output": str(tmp_path / "named")}}
    assert_same_weights(folder, calibrate(parse_recipe(tree, "test"), QUIET))


def test_an_interrupted_search_goes_on_where_it_was(
    searched: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = searched
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"output": str(tmp_path / "out")})})
    update, made = UpdateLoop.update, 0

    def interrupted(self: UpdateLoop, number: int) -> dict[str, Any]:
        nonlocal made
        made += 1
        if made == 30:  # in the third trial, of M = 5; the first two made 20 and 6
            raise KeyboardInterrupt
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(UpdateLoop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(recipe, QUIET)
    partial = tmp_path / "out.partial"
    assert len(json.loads((partial / "auto.json").read_text(encoding="utf-8"))) >= 1
    assert len(list(partial.glob("trial-*.safetensors"))) == 1
    again = calibrate(recipe, QUIET, resume=True)
    assert_same_weights(folder, again)
    assert calibration(again)["auto"] == calibration(folder)["auto"]


def test_the_search_leaves_the_model_as_it_was(model_folder: Path, tmp_path: Path) -> None:
    recipe = auto_recipe(model_folder, tmp_path / "out", steps_per_group="auto", target="trajectory", iterations=48)
    session = prepared(recipe)
    before = validation_errors(session)
    objective, trials = choose_objective(session, recipe.objective, KeptFiles(tmp_path, QUIET), QUIET)
    assert validation_errors(session).equal(before)
    assert objective.target == "trajectory" and objective.steps_per_group in (1, 2, 5)
    assert [t.budget for t in trials] == trial_budgets(session.job(recipe.objective)) == [6, 12, 12]
    assert search_cost(session.job(recipe.objective)).evaluations == 48 + 6 + 2 * 12


@pytest.mark.parametrize(
    "objective, message",
    [
        ({"steps_per_group": 5}, "target: auto finds M itself, .* leave steps_per_group out, or write target: trajec"),
        ({"inputs": "quantized"}, "leave inputs out, or write target: trajectory"),
        ({"steps_per_group": 2, "inputs": "quantized"}, "leave steps_per_group and inputs out"),
    ],
)
def test_what_auto_decides_cannot_be_given(tmp_path: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        auto_recipe(tmp_path / "model", tmp_path / "out", **objective)
