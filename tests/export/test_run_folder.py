"""What a run writes is whole or not there: two at once, a kill at any moment, a full disk; the user's own is spared."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import assert_same_weights, importable, recipe_tree
from safetensors.torch import load_file
from typer.testing import CliRunner

import accuquant.programs.calibrate
from accuquant.cli.main import app
from accuquant.errors import RecipeError
from accuquant.export.run_folder import RunFolder
from accuquant.files import write_json, write_tensors, write_text
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe

QUIET = Reporter(quiet=True)
CACHE = {"target_nfc": 3, "order": 1, "trials": 1, "corrected": True}
OBJECTIVE = {"iterations": 24, "cached_iterations": 1, "batch_size": 2, "steps_per_group": "auto"}
DATA = {"path": "digits.jsonl", "num_samples": 4, "validation_samples": 4}
REFERENCE = tuple(f"reference/{of}/{k}.safetensors" for of in ("calibration", "validation") for k in range(2))
KEPT = (*REFERENCE, "initial.json", "auto.json", "state.safetensors")
KEPT_OF_CACHE = ("cache.json", "naive.safetensors", "naive.json", "state-cached.safetensors")


def make_tree(model: Path | str, output: Path) -> dict[str, Any]:
    """Everything that a run may keep: M is chosen, full steps are searched, both are learned with the cache on."""
    tree = recipe_tree(model, output, cache=CACHE, objective=OBJECTIVE, data=DATA)
    tree["quantization"]["initialization"] = "round_to_nearest"  # found anew by every run that goes on
    return tree


def make_recipe(model: Path | str, output: Path) -> Recipe:
    return parse_recipe(make_tree(model, output), "test")


def write_recipe(model: Path, output: Path) -> Path:
    path = output.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump(make_tree(model, output)), encoding="utf-8")
    return path


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A Python process of its own, which can be talked to."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = importable(Path(__file__).parents[2])
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes)


@contextmanager
def files_up_to(count: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of a run that nothing has disturbed."""
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("whole") / "out"), QUIET)


# ---- two at once

WAITING = """
import sys
import accuquant.programs.calibrate as programs

def when_told(*given, update=programs.calibrate_alone):
    print("waiting", flush=True)
    sys.stdin.readline()
    return update(*given)

programs.calibrate_alone = when_told
from accuquant.cli.main import main
main()
"""
HOLDING = """
import sys
from pathlib import Path
from accuquant.export.run_folder import RunFolder
from accuquant.progress import Reporter

with RunFolder(Path(sys.argv[1]), Reporter(quiet=True)).locked():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told_who_writes(model_folder: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = write_recipe(model_folder, output)
    first = start(WAITING, "calibrate", recipe, "-q")
    assert first.stdout is not None
    assert first.stdout.readline() == "waiting\n"
    message = f"error: export.output: another accuquant run, pid {first.pid}, is writing to {output}; "
    for more in ([], ["--resume"], ["--overwrite"]):  # this process is the second
        refused = CliRunner().invoke(app, ["calibrate", str(recipe), *more])
        assert (refused.exit_code, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1), refused.stderr
        assert refused.stderr.startswith(message)
    _, errors = first.communicate("go on\n", timeout=240)
    assert first.returncode == 0, errors
    assert_same_weights(whole, output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out", QUIET)
    holder = start(HOLDING, run.output)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RecipeError, match=f"another accuquant run, pid {holder.pid}, is writing to"), run.locked():
        pass
    holder.kill()
    holder.wait()
    assert run.lock_path.read_text() == str(holder.pid), "nobody has tidied up"
    with run.locked():
        assert run.lock_path.read_text() == str(os.getpid())
        with RunFolder(run.output, QUIET, ".tuning").locked():  # a search has its choice calibrated
            assert run.lock_path.is_file()
        assert run.lock_path.is_file()
    assert not list(tmp_path.iterdir())


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "new" / "parents" / "out", QUIET).locked():
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_users_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text("[[package]]\n")
    with pytest.raises(RecipeError, match=r"out\.lock is in the way"), RunFolder(tmp_path / "out", QUIET).locked():
        pass
    assert (tmp_path / "out.lock").read_text() == "[[package]]\n"


# ---- a kill at any moment

KILLED = """
import contextlib, json, os, signal, sys
import datasets, torchmetrics  # which children would import one by one
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from pathlib import Path
import accuquant.files as files
from accuquant.cli.main import app
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe.file import load_recipe

recipe, output = load_recipe(sys.argv[1]), Path(sys.argv[2])
known, write = [], files.whole

@contextlib.contextmanager
def killed_after(path):
    with write(path) as temporary:
        yield temporary
    if str(path) not in known:
        sys.stdout.write(str(path) + "\\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)

files.whole = killed_after
while not output.exists():
    read, end = os.pipe()
    child = os.fork()  # nothing was computed in this process so far, so no thread is missing in the other
    if child == 0:
        os.dup2(end, 1)
        calibrate(recipe, Reporter(quiet=True), resume=bool(known))
        os._exit(0)
    os.close(end)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as file:
        names = file.read().split()
    assert os.WIFSIGNALED(status) == bool(names), (status, names, known)
    known += names
print(json.dumps([os.path.relpath(name, output.parent) for name in known]))
"""


@pytest.mark.slow
def test_killed_after_every_file_a_run_goes_on_to_the_same_result(
    model_folder: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(KILLED, write_recipe(model_folder, output), output)
    names, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    exported = ("recipe.yaml", "calibration.json", "naive.safetensors", "metrics.json", "report.html", "README.md")
    assert {Path(name) for name in json.loads(names)} == {
        *(Path("out.partial") / name for name in ("recipe.yaml", *KEPT, *KEPT_OF_CACHE, "published.json")),
        *(Path("out.partial") / "export" / name for name in exported),
    }
    assert_same_weights(whole, output)
    naive = [load_file(folder / "naive.safetensors")["images"] for folder in (whole, output)]
    assert torch.equal(*naive)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.fixture
def interrupted(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Recipe]:
    """A run that is stopped when all is kept, where the evaluation begins."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupt() -> Recipe:
        recipe = make_recipe(model_folder, tmp_path / "out")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(accuquant.programs.calibrate, "evaluate", stop)
            calibrate(recipe, QUIET)
        return recipe

    return interrupt


def test_what_cannot_be_read_is_made_again_and_said(
    interrupted: Callable[[], Recipe], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = interrupted()
    for name in (*KEPT, *KEPT_OF_CACHE):
        path = tmp_path / "out.partial" / name
        path.write_bytes(path.read_bytes()[:-20])
    folder = calibrate(recipe, Reporter(), resume=True)
    said = capsys.readouterr().err.replace("\n", "")
    for name in (*KEPT, *KEPT_OF_CACHE):
        assert f"out.partial/{name} cannot be read and is made again (" in said
    assert_same_weights(whole, folder)


def test_what_can_be_read_is_not_made_again(
    interrupted: Callable[[], Recipe], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = interrupted()

    def again(*_: Any) -> None:
        raise AssertionError("it is kept")

    for made in ("measure_initial", "searched"):
        monkeypatch.setattr(accuquant.programs.calibrate, made, again)
    assert_same_weights(whole, calibrate(recipe, QUIET, resume=True))


# ---- what is the user's


@pytest.mark.parametrize("suffix", [".partial", ".tuning"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_users_is_spared(tmp_path: Path, suffix: str, overwrite: bool) -> None:
    theirs = tmp_path / f"out{suffix}"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    (theirs / "recipe.yaml").write_text("flour: 500 g\n")
    run = RunFolder(tmp_path / "out", QUIET, suffix)
    with (
        pytest.raises(RecipeError, match=rf"out\{suffix} is in the way; it holds no recipe\.yaml of accuquant"),
        run.opened(make_recipe("m", tmp_path / "out"), False, overwrite),
    ):
        pass
    run.drop()
    assert (theirs / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == [theirs.name]


def test_an_interrupted_run_is_dropped_where_that_is_said(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "out", QUIET), make_recipe("m", tmp_path / "out")
    run.begin(recipe, resume=False)
    run.kept.write_json("initial.json", {})
    with pytest.raises(RecipeError, match="--resume continues it"), run.opened(recipe, False, overwrite=False):
        pass
    with run.opened(recipe, resume=False, overwrite=True):
        assert run.kept.path("initial.json").is_file(), "not before the new run can begin"
        run.begin(recipe, resume=False)
    assert [p.name for p in run.work.iterdir()] == ["recipe.yaml"]


def test_a_folder_that_was_only_just_made_is_no_interrupted_run(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "out", QUIET), make_recipe("m", tmp_path / "out")
    run.work.mkdir()
    (run.work / "recipe.yaml.tmp").write_text("model: {id: ")  # killed in its first writing
    with pytest.raises(RecipeError, match="there is no interrupted run"), run.opened(recipe, True, False):
        pass
    with run.opened(recipe, resume=False, overwrite=False):
        run.begin(recipe, resume=False)
        assert run.says(recipe)


# ---- the exchange


@pytest.mark.parametrize("at_once", [True, False])
def test_an_export_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError("no such library")

    if not at_once:  # as on other systems
        monkeypatch.setattr("ctypes.CDLL", none)
    run = RunFolder(tmp_path / "out", QUIET)
    run.begin(make_recipe("m", tmp_path / "out"), resume=False)
    for folder, text in ((run.output, "old"), (run.staging, "new")):
        folder.mkdir()
        (folder / "model_index.json").write_text(text)
    (run.output / "of the old one").write_text("")
    run.publish()
    assert {p.name: p.read_text() for p in run.output.iterdir()} == {"model_index.json": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_killed_when_all_was_done_is_done(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "out", QUIET), make_recipe("m", tmp_path / "out")
    run.begin(recipe, resume=False)
    run.staging.mkdir()
    (run.staging / "model_index.json").write_text("new")
    assert not run.finish()
    left = {p.name: p.read_text() for p in run.work.iterdir() if p.is_file()}
    run.kept.write_json("published.json", run.staging.stat().st_ino)
    assert not run.finish(), "what is there is not it"
    left["published.json"] = run.kept.path("published.json").read_text()
    run.publish()
    run.work.mkdir()  # as it is before `publish` has dropped it
    for name, text in left.items():
        (run.work / name).write_text(text)
    with pytest.raises(RecipeError, match="exists"):
        calibrate(recipe, QUIET)
    assert calibrate(recipe, QUIET, resume=True) == run.output
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """A kill between two renames, where folders cannot be exchanged."""
    run = RunFolder(tmp_path / "out", QUIET)
    run.begin(make_recipe("m", tmp_path / "out"), resume=False)
    (run.work / "replaced").mkdir()
    (run.work / "replaced" / "model_index.json").write_text("old")
    run.drop()
    assert (run.output / "model_index.json").read_text() == "old"
    assert not run.work.exists()


# ---- a full disk


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    tensors, table = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tensors(tensors, {"x": torch.zeros(3)})
    write_json(table, [1])
    with files_up_to(10_000):
        with pytest.raises(OSError, match=r"a\.safetensors cannot be written: "):
            write_tensors(tensors, {"x": torch.zeros(10_000)})
        with pytest.raises(OSError, match=r"a\.json cannot be written: File too large"):
            write_json(table, [0] * 10_000)
    assert torch.equal(load_file(tensors)["x"], torch.zeros(3))
    assert json.loads(table.read_text()) == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


@pytest.mark.parametrize(
    ("room", "named"), [(20_000, "out.partial/reference/calibration/0.safetensors"), (200_000, "out.partial/export")]
)
def test_a_full_disk_is_one_line(model_folder: Path, tmp_path: Path, room: int, named: str) -> None:
    recipe = write_recipe(model_folder, tmp_path / "out")
    with files_up_to(room):
        result = CliRunner().invoke(
            app, ["calibrate", str(recipe), "-q", "--set", "objective.learn=[activation_scale]"]
        )
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result.stderr
    assert result.stderr.startswith("failed: ")
    assert f"{named} cannot be written: " in result.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.lock").exists()


def test_a_written_file_has_the_mode_that_any_has(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ü")
    (tmp_path / "b.txt").write_text("ü", encoding="utf-8")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
