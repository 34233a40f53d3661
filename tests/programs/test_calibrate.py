"""The main job on a small random model: everything real, only small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiTPipeline
from helpers import as_allocated, assert_same_weights, finals, importable, recipe_tree, recorded_finals
from typer.testing import CliRunner

from accuquant.calibration.opened import open_model
from accuquant.calibration.session import open_session
from accuquant.cli.main import app
from accuquant.errors import RecipeError
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.arithmetic import set_arithmetic
from accuquant.runtime.layer import quantized_layers

QUIET = Reporter(quiet=True)


def make_recipe(model: Path, output: Path, **changes: object) -> Recipe:
    return parse_recipe(recipe_tree(model, output, **changes), "test")


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "w4a8"
    return calibrate(make_recipe(model_folder, output), QUIET)


def test_folder_is_whole(export: Path) -> None:
    names = {p.name for p in export.iterdir()}
    assert {
        "model_index.json",
        "transformer",
        "vae",
        "scheduler",
        "recipe.yaml",
        "README.md",
        "metrics.json",
        "report.html",
    } <= names
    assert not export.with_name("w4a8.partial").exists()
    config = json.loads((export / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "accuquant" and len(config["timestep_edges"]) == 2
    metrics = json.loads((export / "metrics.json").read_text())
    assert len(metrics["relative_l2_per_step"]) == 7 and metrics["relative_l2_per_step"][0] == 0
    assert metrics["final_relative_l2"]["mean"] > 0
    assert len(metrics["calibration"]["history"]) == 4
    assert metrics["calibration"]["network_evaluations"] == 4 * 3  # 2 M - 1 for each update


def test_loads_with_plain_diffusers_and_generates(export: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline([1], 1.5, generator=torch.manual_seed(0), num_inference_steps=6, output_type="pt").images
    assert image.shape == (1, 1, 16, 16) and bool(image.isfinite().all())


def test_loaded_model_equals_the_one_before_saving(model_folder: Path, tmp_path: Path) -> None:
    """Latents of the calibrated model, of the hardened one and of the loaded one: torch.equal with the reference."""
    # each from the same calls, with the same shapes, of values at addresses of the same kind
    from accuquant.export.native import harden_model

    recipe = make_recipe(model_folder, tmp_path / "out")
    session = open_session(recipe, QUIET)
    network, tapes = session.network, session.validation.tapes
    as_allocated(network)
    session.loop(recipe.objective, 2).run()
    calibrated = finals(tapes)
    harden_model(network, session.clocks[0])
    set_arithmetic(network, "reference")
    hardened = finals(tapes)
    session.model.recorder.pipeline.save_pretrained(tmp_path / "saved")
    loaded_network = DiTPipeline.from_pretrained(tmp_path / "saved").transformer
    as_allocated(loaded_network)
    integers = finals(tapes, {"transformer": loaded_network})
    set_arithmetic(loaded_network, "reference")
    loaded = finals(tapes, {"transformer": loaded_network})
    assert torch.equal(calibrated, hardened)
    assert torch.equal(hardened, loaded)
    # integers round at other places than float32 does, and a value on the edge may fall to the next step
    assert float((integers - loaded).norm() / loaded.norm()) < 2e-2
    assert not torch.equal(integers, loaded)


def test_existing_output_is_not_touched(export: Path, model_folder: Path) -> None:
    before = (export / "metrics.json").read_bytes()
    with pytest.raises(RecipeError, match="--overwrite"):
        calibrate(make_recipe(model_folder, export), QUIET)
    assert (export / "metrics.json").read_bytes() == before


def test_tuning_lowers_the_group_loss(model_folder: Path, tmp_path: Path) -> None:
    """The claim, not the shape: the error of whole trajectories falls on noise that calibration never saw."""
    from accuquant.calibration.session import validation_error

    recipe = make_recipe(
        model_folder, tmp_path / "out", objective={"iterations": 60, "batch_size": 4, "steps_per_group": 1}
    )
    session = open_session(recipe, QUIET)
    before = validation_error(session)
    session.loop(recipe.objective, 1).run()
    assert validation_error(session) < 0.97 * before


@pytest.mark.parametrize(
    "objective",
    [
        {"steps_per_group": 2, "gradient": "exact", "loss": "dense"},
        {"steps_per_group": 3, "gradient": "variance", "warmup_fraction": 0.5},
        {"inputs": "quantized"},
        {"learn": ["rounding", "activation_scale", "bias"]},
        {"steps_per_group": "auto"},
    ],
)
def test_every_objective_runs(model_folder: Path, tmp_path: Path, objective: dict[str, object]) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out", objective={"iterations": 8, "batch_size": 2, **objective})
    metrics = json.loads((calibrate(recipe, QUIET) / "metrics.json").read_text())
    assert metrics["final_relative_l2"]["mean"] < 1
    if objective.get("steps_per_group") == "auto":
        assert metrics["calibration"]["auto"] is None, "eight evaluations pay for no trial"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_calibrated_too(model_folder: Path, tmp_path: Path, dtype: str) -> None:
    """Also where the first module, from which diffusers reads a model's type, is quantized."""
    tree = recipe_tree(model_folder, tmp_path / "out")
    tree["model"]["dtype"] = dtype
    tree["quantization"]["rules"].append({"modules": r"pos_embed\.proj", "weight": "int8", "activation": "int8"})
    folder = calibrate(parse_recipe(tree, "test"), QUIET)
    assert json.loads((folder / "metrics.json").read_text())["final_relative_l2"]["mean"] < 0.5
    pipeline = DiTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    pipeline([1], guidance_scale=1.5, num_inference_steps=6)


LONG = {"iterations": 40, "batch_size": 2, "steps_per_group": 2}
SLOWLY = """
import os, sys, time
import accuquant.calibration.loop as loop
import accuquant.programs.calibrate  # for the children; nothing is computed here, so no thread is missing in them
from accuquant.cli.main import main

def slow(*given, update=loop.UpdateLoop.update):
    time.sleep(0.1)  # there has to be time for an interruption
    return update(*given)

loop.SAVE_EVERY_SECONDS, loop.UpdateLoop.update = 0.3, slow
for recipe in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv[1:] = ["calibrate", recipe]
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of a run that nothing has interrupted."""
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("whole") / "out", objective=LONG), QUIET)


def test_interrupted_runs_resume_to_the_same_result(model_folder: Path, whole: Path, tmp_path: Path) -> None:
    """One by Ctrl-C, and one by a kill."""
    exits = {"interrupted": (signal.SIGINT, 130), "killed": (signal.SIGKILL, -signal.SIGKILL)}
    for name in exits:
        tree = recipe_tree(model_folder, tmp_path / name, objective=LONG)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *(str(tmp_path / f"{name}.yaml") for name in exits)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=importable(Path.cwd()),
            # shells start background jobs with Ctrl-C ignored, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        assert process.stdout is not None
        for name, (how, code) in exits.items():
            child, state = int(process.stdout.readline()), tmp_path / f"{name}.partial" / "state.safetensors"
            deadline = time.monotonic() + 60
            while not state.is_file() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(child, how)
            assert int(process.stdout.readline()) == code, (tmp_path / "errors").read_text()
            assert not (tmp_path / name).exists(), "it finished before it could be interrupted"
    for name in exits:
        done = CliRunner().invoke(app, ["calibrate", str(tmp_path / f"{name}.yaml"), "--resume"])
        assert done.exit_code == 0, done.stderr
        assert "resuming at update" in done.stderr
        assert_same_weights(whole, tmp_path / name)


def test_resume_of_a_changed_recipe_is_refused(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "recipe.yaml").write_text("model: {}\n")
    with pytest.raises(RecipeError, match="has changed"):
        calibrate(make_recipe(model_folder, output), QUIET, resume=True)
    with pytest.raises(RecipeError, match="--resume continues it"):
        calibrate(make_recipe(model_folder, output), QUIET)


def test_sizes_are_what_the_types_promise(export: Path) -> None:
    """The dry run's prediction is the size of the exported tensors, to the byte."""
    layers = quantized_layers(DiTPipeline.from_pretrained(export).transformer)
    metrics = json.loads((export / "metrics.json").read_text())
    predicted = {m["name"]: m["quantized_bytes"] for m in metrics["modules"] if m["weight"] != "float"}
    found = {n: sum(p.numel() * p.element_size() for p in layer.parameters()) for n, layer in layers.items()}
    assert predicted == found


def test_full_precision_is_the_original_model_also_after_calibration(model_folder: Path, tmp_path: Path) -> None:
    """Corrections and noise are measured against it; the weights that calibration moves are not it.

    Bit by bit with the same call of a model that was never touched; nearly with the reference, which was sampled in
    other batches.
    """
    learn = ["weight", "weight_scale", "bias"]
    objective = {"iterations": 3, "batch_size": 2, "learn": learn, "learning_rates": {"weight": 0.1, "bias": 0.1}}
    recipe = parse_recipe(recipe_tree(model_folder, tmp_path / "out", objective=objective), "test")
    original, session = open_model(recipe), open_session(recipe, Reporter(quiet=True))
    for network in (original.network, session.network):
        as_allocated(network)
    tapes = session.validation.tapes
    expected, before = finals(tapes, {"transformer": original.network}), finals(tapes)
    session.loop(recipe.objective, 1).run()
    assert not torch.equal(before, finals(tapes))
    with session.full_precision():
        found = finals(tapes)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, recorded_finals(tapes), rtol=1e-3, atol=1e-4)
