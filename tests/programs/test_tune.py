"""Joint tuning: what is tried, what comes out, and that it can be made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from diffusers import DiTPipeline
from helpers import TYPES, assert_same_weights, tune_recipe
from typer.testing import CliRunner

from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.opened import open_model
from accuquant.calibration.session import open_session
from accuquant.cli.main import app
from accuquant.core.schedule import DIFFUSERS_OFFSET, filled_interval_steps
from accuquant.errors import RecipeError
from accuquant.export.run_folder import RunFolder
from accuquant.files import KeptFiles
from accuquant.programs import calibrate as calibrating
from accuquant.programs import tune as tuning
from accuquant.programs.calibrate import calibrate
from accuquant.programs.tune import chosen_recipe, hand_over, kept_in, tune
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import dump_recipe, load_recipe
from accuquant.runtime.cache.attach import controller_of
from accuquant.tuning.budget import LEADERS, describe_tuning, type_combinations
from accuquant.tuning.candidates import Place
from accuquant.tuning.choice import choose
from accuquant.tuning.tried import LEARNED, Candidate, Tried

QUIET = Reporter(quiet=True)
QUICK: dict[str, Any] = {
    "bit_operations": None,
    "types": [],
    "estimations": ["taylor"],
    "corrections": ["none", "both"],
    "learning": ["forecast"],
    "more_samples": 2,
}


Search = tuple[Recipe, Path, Path]


@pytest.fixture(scope="module")
def search(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A recipe, what the search made of it, and a copy of the search's folder when all was tried."""
    place = tmp_path_factory.mktemp("tune")
    recipe = tune_recipe(model_folder, place / "out")

    def copy_and_calibrate(*given: Any) -> Path:
        shutil.copytree(place / "out.tuning", place / "kept")
        return calibrate(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "calibrate", copy_and_calibrate)
        return recipe, tune(recipe, QUIET), place / "kept"


@pytest.fixture(scope="module")
def tuned(search: Search) -> Path:
    return search[1]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tuning.json").read_text())
    return found


# ---- the section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"bit_operations": None}, r"tune\.?:? ?.*give at least one budget: nfc, bit_operations or seconds"),
        ({"orders": [0]}, "orders: must be from 1 to 4"),
        ({"nfc": 2}, r"tune\.nfc: .*greater than or equal to 3"),
        ({"levels": [0.5]}, "levels: must be shares of the budget"),
        ({"types": [TYPES[0], TYPES[0]]}, "types: two classes have the same modules"),
        ({"estimation": ["rfe"]}, r"unknown key tune\.estimation \(did you mean '.*estimation"),
        (
            {"types": [{"modules": "x", "choose": [{"weight": "int5"}]}]},
            r"tune\.types\.0\.choose\.0\.weight.*did you mean 'int4'",
        ),
        ({"schedules": ["intervall"]}, r"tune\.schedules\.0.*did you mean 'interval'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tune_recipe("m", tmp_path / "o", **section)


def test_the_section_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = tune_recipe("m", tmp_path / "o")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml").tune == recipe.tune
    assert recipe.tune is not None
    assert recipe.tune.types[1].choose[1].modules == TYPES[1]["modules"]


def test_calibrate_does_not_pass_over_it(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tune: is for `accuquant tune`"):
        calibrate(tune_recipe(model_folder, tmp_path / "o"), QUIET)
    with pytest.raises(RecipeError, match="the recipe has no such section"):
        tune(tune_recipe(model_folder, tmp_path / "o").model_copy(update={"tune": None}), QUIET)
    assert not list(tmp_path.iterdir())


# ---- what comes out


def test_the_chosen_point_keeps_to_the_budget_and_is_the_best(tuned: Path) -> None:
    """The cheapest of those that are equal to the least log ratio, where all of these have the same samples."""
    found = record(tuned)
    rows = [row for row in found["tried"] if row["nfc"] <= row["asked_nfc"]]
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["bit_operations"] <= 0.16
    assert len({row["types"] for row in rows}) == 2
    equal = [row for row in found["tried"] if row["equal"]]
    assert chosen in equal and {row["samples"] for row in equal} == {found["leaders_samples"]}
    assert chosen["bit_operations"] == pytest.approx(min(row["bit_operations"] for row in equal))
    # two combinations of types: what leads has all samples, and nothing else has more than the first
    assert found["samples"] == 8 and found["leaders_samples"] == 32
    assert 0 < sum(row["samples"] > 8 for row in rows) <= 2 * LEADERS
    naives = {row["types"]: row for row in rows if row["rival"] == "naive stacking"}
    naive = naives[chosen["types"]]
    assert (naive["ratio"]["mean"], naive["ratio"]["standard_error"]) == (0, 0)
    assert chosen["ratio"]["mean"] <= 2 * chosen["ratio"]["standard_error"]
    recipe = load_recipe(tuned / "recipe.yaml")
    levels = open_model(recipe).levels
    offset = DIFFUSERS_OFFSET if "offset" in naive["cache"] else None
    full_steps = filled_interval_steps(8, chosen["asked_nfc"], 2, offset)
    assert found["naive"]["full_timesteps"] == [levels[i] for i in full_steps]
    for words in ("interval", "offset-1 interval"):  # the better of both
        same = [row for row in rows if row["cache"] == f"taylor 2, {words} steps" and row["types"] == chosen["types"]]
        assert same and all(row["ratio"]["mean"] >= 0 for row in same)
    rivals = {row["rival"] for row in rows if row["types"] == chosen["types"]}
    assert rivals == {None, "naive stacking", "CacheQuant", "CacheQuant, one feature"}


def test_everything_that_may_be_chosen_was_tried(tuned: Path) -> None:
    rows = record(tuned)["tried"]
    assert len({row["types"] for row in rows}) == 2
    words = {row["cache"] for row in rows if not row["rival"]}
    for forecast in ("reuse", "taylor 1", "taylor 1 noise-aware", "rfe 1", "rfe 1 noise-aware"):
        assert {f"{forecast}, interval steps", f"{forecast}, best steps"} <= words
    assert any("refined" in w for w in words)
    assert {w.partition(" steps")[2] for w in words} == {
        "",
        ", forecasts corrected",
        ", full steps corrected",
        ", all corrected",
    }
    assert {row["calibrated"] for row in rows} == {"alone", *LEARNED.values()} - {LEARNED["weights"]}
    assert all(row["elapsed"] > 0 and row["seconds"] > 0 for row in rows)


def test_the_front_has_nothing_cheaper_and_better(tuned: Path) -> None:
    rows = [row for row in record(tuned)["tried"] if not row["rival"]]
    front = [row for row in rows if row["front"]]
    assert front
    for row in rows:
        dominated = any(r["bit_operations"] <= row["bit_operations"] and r["E_qc"] < row["E_qc"] for r in rows)
        assert row["front"] != dominated or any(
            r is not row and (r["bit_operations"], r["E_qc"]) == (row["bit_operations"], row["E_qc"]) for r in rows
        )


def test_the_export_loads_with_its_cache_and_says_what_was_promised(tuned: Path) -> None:
    (chosen,) = [row for row in record(tuned)["tried"] if row["chosen"]]
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["cache"]["nfc"]["mean"] == chosen["nfc"]
    assert metrics["cache"]["bit_operations_ratio"] == pytest.approx(chosen["bit_operations"])
    assert metrics["tuning"]["tried"] == record(tuned)["tried"]
    assert {"E_q", "E_c", "E_qc", "E_naive", "interaction"} <= set(metrics)
    controller = controller_of(DiTPipeline.from_pretrained(tuned).transformer)
    assert controller is not None
    assert controller.plan.estimation == chosen["cache"].split()[0].rstrip(",")
    page = (tuned / "report.html").read_text()
    assert "naive stacking" in page
    assert "CacheQuant" in page


def test_the_written_recipe_makes_the_same_export(tuned: Path, tmp_path: Path) -> None:
    again = load_recipe(tuned / "recipe.yaml", [f"export.output={tmp_path / 'again'}"])
    assert again.tune is None
    folder = calibrate(again, QUIET)
    assert_same_weights(tuned, folder)
    configs = [
        json.loads((f / "transformer" / "config.json").read_text())["quantization_config"] for f in (tuned, folder)
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("calibrated", ["alone", LEARNED["forecast"], LEARNED["both"]])
def test_what_the_search_has_calibrated_is_what_the_recipe_calibrates(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: str
) -> None:
    recipe, _, work = search
    ours = [c for c in Tried(work / "tried.jsonl").candidates if c.calibrated == calibrated and not c.rival]
    best = choose(c for c in ours if c.asked_nfc == max(other.asked_nfc for other in ours)).best
    combination = next(c for c in type_combinations(recipe) if c.name == best.types)
    final = chosen_recipe(combination.recipe, best)
    finals = [
        final.model_copy(update={"export": final.export.model_copy(update={"output": str(tmp_path / name)})})
        for name in ("afresh", "handed")
    ]
    kept = KeptFiles(work, QUIET)
    hand_over(finals[1], best, kept, kept_in(kept, combination), RunFolder(tmp_path / "handed", QUIET))
    monkeypatch.setattr(calibrating, "evaluate", Mock(side_effect=KeyboardInterrupt))  # all that counts is saved then
    with pytest.raises(KeyboardInterrupt):
        calibrate(finals[0], QUIET)
    monkeypatch.setattr(UpdateLoop, "update", Mock(side_effect=AssertionError("an update was made again")))
    with pytest.raises(KeyboardInterrupt):
        calibrate(finals[1], QUIET, resume=True)
    afresh, handed = (Path(f"{final.export.output}.partial") / "export" for final in finals)
    assert_same_weights(afresh, handed)
    counted = [json.loads((f / "calibration.json").read_text())["calibration"]["history"] for f in (afresh, handed)]
    assert [{k: v for k, v in entry.items() if k != "seconds"} for entry in counted[0]] == [
        {k: v for k, v in entry.items() if k != "seconds"} for entry in counted[1]
    ]
    assert len(counted[0]) == (4 if calibrated == "alone" else 6)


# ---- what it is given


@pytest.mark.parametrize("cache", [{"warmup": 1}, {"warmup": 3}, {"feature": "blocks", "blocks": (0, 1)}])
def test_what_the_recipes_cache_says_holds_for_all_candidates(
    model_folder: Path, tmp_path: Path, cache: dict[str, Any]
) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "o", nfc=4, **QUICK)
    recipe = recipe.model_copy(update={"cache": Cache(interval=2, **cache)})
    folder = tune(recipe, QUIET)
    chosen = load_recipe(folder / "recipe.yaml").cache
    assert chosen is not None
    assert all(getattr(chosen, key) == value for key, value in cache.items())


def test_a_budget_for_every_step_is_no_mistake(model_folder: Path, tmp_path: Path) -> None:
    folder = tune(tune_recipe(model_folder, tmp_path / "o", nfc=14, **QUICK), QUIET)
    assert json.loads((folder / "metrics.json").read_text())["cache"]["nfc"]["mean"] == 8


# ---- interruption


def test_an_interrupted_search_goes_on_and_repeats_nothing(
    tuned: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three leaders of the first types have got more samples; and once more after 39 candidates."""
    recipe, add = tune_recipe(model_folder, tmp_path / "out"), Tried.add
    made, more = list[str](), list[str]()  # candidates, and leaders
    stops = [lambda: len(more) == 3, lambda: len(made) == 39]

    def stop(self: Tried, candidate: Candidate) -> Candidate:
        if stops and stops[0]():
            raise KeyboardInterrupt
        (more if candidate.samples > 8 else made).append(f"{candidate.key}, {candidate.samples} samples")
        return add(self, candidate)

    monkeypatch.setattr(Tried, "add", stop)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, QUIET, resume=resume)
        stops.pop(0)
        assert not (tmp_path / "out").exists()
        with (tmp_path / "out.tuning" / "tried.jsonl").open("a") as file:
            file.write('{"key": "cut o')  # as a kill in the middle of a line leaves it
        with pytest.raises(RecipeError, match="holds an interrupted search; --resume continues it"):
            tune(recipe, QUIET)
        changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 1})})
        with pytest.raises(RecipeError, match="the recipe has changed"):
            tune(changed, QUIET, resume=True)

    folder = tune(recipe, QUIET, resume=True)
    ours, theirs = record(folder)["tried"], record(tuned)["tried"]
    assert len({*made, *more}) == len(made + more) and len(made) == len(theirs)
    timed = ("elapsed", "seconds")
    assert [{k: v for k, v in r.items() if k not in timed} for r in ours] == [
        {k: v for k, v in r.items() if k not in timed} for r in theirs
    ]
    assert not (tmp_path / "out.tuning").exists()


def test_an_interrupted_calibration_is_in_the_way_before_the_search_and_not_after(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "recipe.yaml").write_text("model: {}\n")
    with pytest.raises(RecipeError, match=r"out\.partial holds an interrupted calibration"):
        tune(tune_recipe(model_folder, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out.tuning").exists()


def test_one_list_serves_all_orders_of_an_estimation_after_an_interruption_too(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"orders": [1, 2], "estimations": ["taylor"], "schedules": ["best"], "noise_aware": [False]}
    recipe = tune_recipe(model_folder, tmp_path / "o", types=[], bit_operations=None, nfc=4, **only)
    combination = type_combinations(recipe)[0]
    session, section = open_session(combination.recipe, QUIET, KeptFiles(tmp_path, QUIET)), recipe.tune
    assert section is not None
    searched = list[Any]()

    def place() -> Place:
        made = Place(combination, section, session, (1.0, 0.5), Tried(tmp_path / "tried.jsonl"), QUIET)
        monkeypatch.setattr(
            made, "searched", lambda config: (searched.append(config.order), Place.searched(made, config))[1]
        )
        return made

    place().try_forecasts(4)
    lines = (tmp_path / "tried.jsonl").read_text().splitlines()
    (tmp_path / "tried.jsonl").write_text(lines[0] + "\n")  # stopped after the first order
    searched.clear()
    place().try_forecasts(4)
    again = (tmp_path / "tried.jsonl").read_text().splitlines()
    assert [json.loads(line)["plan"] for line in again] == [json.loads(line)["plan"] for line in lines]
    assert searched == [2]  # the list is known


def test_nothing_to_resume_and_nothing_overwritten(tuned: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no interrupted search"):
        tune(tune_recipe(model_folder, tmp_path / "out"), QUIET, resume=True)
    with pytest.raises(RecipeError, match="exists; --overwrite"):
        tune(tune_recipe(model_folder, tuned), QUIET)


# ---- the command


def test_the_command_prints_plan_and_front(model_folder: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(model_folder, tmp_path / "out", nfc=3, noise_aware=[False], **QUICK)
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe))
    plan = CliRunner().invoke(app, ["tune", str(path), "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "int4/int8 in groups of 16" in plan.output
    assert "nfc 3" in plan.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]
    rows, costs = describe_tuning(recipe)
    assert rows[0][1] == 3
    assert costs["rollouts"] > 10

    done = CliRunner().invoke(app, ["tune", str(path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "chosen" in done.output
    assert "CacheQuant" in done.output
    assert f"export: {tmp_path / 'out'}" in done.output
    refused = CliRunner().invoke(app, ["calibrate", str(path)])
    assert refused.exit_code == 2
    none = CliRunner().invoke(app, ["tune", "dit_w8a8", "--dry-run"])
    assert none.exit_code == 2
    assert "--set tune.nfc=14" in none.output + none.stderr


def test_tau_may_be_searched_too(model_folder: Path, tmp_path: Path) -> None:
    only = {"schedules": ["rcs"], "noise_aware": [False], "corrections": ["none", "cache", "quantization", "both"]}
    recipe = tune_recipe(model_folder, tmp_path / "out", nfc=4, **(QUICK | only))
    few = recipe.data.model_copy(update={"num_samples": 4})  # each is a trajectory of its own
    folder = tune(recipe.model_copy(update={"data": few}), QUIET)
    rows = record(folder)["tried"]
    found = [row for row in rows if row["cache"] == "taylor 1, rcs steps"]
    assert [abs(row["nfc"] - 4) <= 0.5 for row in found] == [True]
    assert not any("rcs" in row["cache"] and "corrected" in row["cache"] for row in rows)


def test_seconds_that_pay_for_nothing_are_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "step_times", lambda *_: (1.0, 0.5))
    recipe = tune_recipe(model_folder, tmp_path / "o", types=[], bit_operations=None, seconds=2.0)
    with pytest.raises(RecipeError, match=r"tune\.seconds: 2\.0 s pay for fewer than 3 full steps"):
        tune(recipe, QUIET)
