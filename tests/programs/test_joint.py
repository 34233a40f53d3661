"""Quantization and cache together: calibration with the cache on, and where the error comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_weights, decoder_input, finals, interrupted_and_resumed, recipe_tree

from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.opened import open_model
from accuquant.calibration.session import Session, open_session, validation_error
from accuquant.cli.main import app
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError
from accuquant.evaluation.measure import held_out_reference
from accuquant.evaluation.report import percent
from accuquant.export.load import load_export, recipe_of
from accuquant.programs.calibrate import calibrate
from accuquant.programs.evaluate import evaluate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import dump_recipe, parse_recipe
from accuquant.runtime.cache.attach import attach_cache, cached
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)
CACHE = {"schedule": [0, 1, 4], "order": 1}
OBJECTIVE = {"iterations": 4, "cached_iterations": 6, "batch_size": 2, "steps_per_group": 2, "gradient": "exact"}


def make_recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    return parse_recipe(recipe_tree(model, output, **({"cache": CACHE, "objective": OBJECTIVE} | changes)), "test")


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("joint") / "out"), QUIET)


@pytest.fixture(scope="module")
def metrics(export: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((export / "metrics.json").read_text())
    return found


def test_the_parts_of_the_error_are_measured_apart(export: Path, metrics: dict[str, Any]) -> None:
    """Each against the pipelines themselves: quantized alone, cached alone, both."""
    recipe = recipe_of(export)
    full, both = open_model(recipe), load_export(export, recipe)
    alone = load_export(export, recipe.model_copy(update={"cache": None}))
    held_out = held_out_reference(full, recipe, QUIET)
    classes = [row["class_id"] for row in held_out.samples.rows]

    def error(pipeline: Any) -> float:
        found = decoder_input(pipeline, classes, held_out.samples.seeds, recipe.sampling)
        return float(relative_l2(found.flatten(1), held_out.latents).mean())

    assert metrics["E_q"] == pytest.approx(error(alone), rel=1e-6)
    assert metrics["E_qc"] == pytest.approx(error(both), rel=1e-6)
    with cached(full.network, Cache(**CACHE)):  # type: ignore[arg-type]
        assert metrics["E_c"] == pytest.approx(error(full.recorder.pipeline), rel=1e-6)
    assert metrics["interaction"] == pytest.approx(metrics["E_qc"] - metrics["E_q"] - metrics["E_c"])
    assert len({metrics["E_q"], metrics["E_c"], metrics["E_qc"], metrics["E_naive"]}) == 4
    assert metrics["final_relative_l2"]["mean"] == pytest.approx(metrics["E_qc"], rel=1e-6)
    curves = metrics["decomposition"]
    assert set(curves) == {"E_q", "E_c", "E_qc", "E_naive", "interaction"}
    assert all(len(curve) == 7 and curve[-1] == pytest.approx(metrics[name]) for name, curve in curves.items())


def test_naive_stacking_is_the_model_before_it_was_calibrated_with_the_cache(
    model_folder: Path, tmp_path: Path, metrics: dict[str, Any]
) -> None:
    alone = make_recipe(model_folder, tmp_path / "alone", objective=OBJECTIVE | {"cached_iterations": 0})
    found = json.loads((calibrate(alone, QUIET) / "metrics.json").read_text())
    assert found["E_naive"] == pytest.approx(found["E_qc"], rel=1e-5)
    assert metrics["E_naive"] == pytest.approx(found["E_qc"], rel=1e-5)


def test_the_report_shows_them(export: Path, metrics: dict[str, Any]) -> None:
    page = (export / "report.html").read_text()
    section = page[page.index('<section id="cache">') :]
    section = section[: section.index("</section>")]
    assert "3 of 6 steps in full" in section
    for name in ("E_q", "E_c", "E_qc"):
        assert percent(metrics[name]) in section
    assert section.count("data:image/png;base64,") == 2  # for light and for dark pages


def test_another_cache_has_no_naive_figure(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(export, folder)
    found = evaluate(folder, recipe_of(folder, ["cache={interval: 2, order: 1}"]), QUIET)
    assert found["E_naive"] is None
    assert found["E_qc"] > 0


def test_rcs_shows_the_errors_that_it_decided_by(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, folder := tmp_path / "copy")
    found = evaluate(folder, recipe_of(folder, ["cache={tau: 0.4, order: 1}"]), QUIET)["cache"]
    total, expected = 0.0, list[int]()
    for step, error in enumerate(found["input_errors"]):
        total += error or 0.0
        if step < 2 or total > 0.4:
            total, expected = 0.0, [*expected, step]
    assert found["full_steps"] == expected
    assert 2 < len(expected) < 6


def test_the_record_counts_on(metrics: dict[str, Any]) -> None:
    history = metrics["calibration"]["history"]
    assert [entry["iteration"] for entry in history] == list(range(10))
    evaluations = [entry["network_evaluations"] for entry in history]
    assert evaluations == sorted(evaluations) and len(set(evaluations)) == 10
    assert metrics["calibration"]["network_evaluations"] == evaluations[-1]


@pytest.mark.parametrize("gradient", ["identity", "variance", "exact"])
def test_calibrating_with_the_cache_lowers_the_error_with_the_cache(
    model_folder: Path, tmp_path: Path, gradient: str
) -> None:
    """The claim: on validation noise, the cached quantized rollout gets nearer to full precision without a cache."""
    objective = {"iterations": 60, "batch_size": 4, "gradient": gradient}
    recipe = make_recipe(model_folder, tmp_path / "out", objective=objective)
    session = open_session(recipe, QUIET)
    cache = CachePlan.of(Cache(**CACHE))  # type: ignore[arg-type]

    def error() -> float:
        with cached(session.network, cache):
            return validation_error(session)

    before = error()
    session.loop(recipe.objective, 2, cache).run()
    assert error() < 0.97 * before


def test_rcs_is_calibrated_with_the_full_steps_it_takes(model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out", objective={"iterations": 2, "batch_size": 2})
    session = open_session(recipe, QUIET)
    tuner = session.loop(recipe.objective, 1, CachePlan.of(Cache(tau=0.5, order=1)))
    tuner.run()
    assert isinstance(tuner.source, CachedTrajectory)
    assert tuner.source.full_steps[:2] == (0, 1)
    assert 2 < len(tuner.source.full_steps) < 6
    assert len(tuner.history) == 2


def test_an_interruption_while_the_cache_is_on_resumes_to_the_same_result(
    model_folder: Path, tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out")
    assert_same_weights(export, interrupted_and_resumed(recipe, monkeypatch, 3))


def test_without_a_cache_section_there_is_nothing_to_calibrate_with(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"objective\.cached_iterations: needs a cache: section"):
        calibrate(make_recipe(model_folder, tmp_path / "out", cache=None), QUIET)


def test_an_export_keeps_its_cache_apart_from_its_weights(export: Path) -> None:
    pipeline = load_export(export, recipe_of(export, ["cache=null"]))
    attach_cache(pipeline.transformer, Cache(interval=2, order=1))


def test_the_session_is_left_without_a_cache(model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out", objective={"iterations": 1, "batch_size": 2})
    session: Session = open_session(recipe, QUIET)
    before = finals(session.validation.tapes)
    plan = CachePlan.of(Cache(**CACHE))  # type: ignore[arg-type]
    tuner = session.loop(recipe.objective.model_copy(update={"iterations": 0}), 1, plan)
    tuner.run()
    assert torch.equal(before, finals(session.validation.tapes))


def test_the_dry_run_names_the_cache(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(make_recipe(model_folder, tmp_path / "out")))
    app(["calibrate", str(file), "--dry-run"], standalone_mode=False)
    assert "rfe, order 1, schedule (0, 1, 4)" in capsys.readouterr().out


def test_other_samples_have_no_figures_from_before(export: Path, tmp_path: Path) -> None:
    """What was measured before calibration, and of naive stacking, was measured on the samples of the recipe."""
    folder = Path(shutil.copytree(export, tmp_path / "copy"))
    found = evaluate(folder, recipe_of(folder, ["evaluation.num_samples=2"]), QUIET)
    assert found["E_naive"] is None and "initial" not in found
    again = evaluate(folder, recipe_of(folder), QUIET)
    assert again["E_naive"] is not None and "initial" in again
