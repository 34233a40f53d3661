"""The command line, used well and used badly: exit codes, one readable message, and nothing written by mistakes."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import importable, recipe_tree
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from accuquant import __version__
from accuquant.cli.main import app
from accuquant.progress import Reporter
from accuquant.recipe.file import list_shipped
from accuquant.runtime.arithmetic import describe_arithmetic

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(*arguments: str | Path, code: int = 0) -> Result:
    """One command; an exception that reaches the user would be a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str | Path) -> str:
    """Exit code 2 and one message on standard error, nothing else."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return str(result.stderr).removeprefix("error: ").rstrip("\n")


def tree_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def workplace(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipe.yaml in it, where the commands run."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(model_folder, "out/w4a8")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """An export and what its run said, in parents that did not exist; its data lie beside the recipe."""
    folder = tmp_path_factory.mktemp("finished")
    tree = recipe_tree(model_folder, folder / "new" / "parents" / "out")
    tree["data"]["path"] = "mine.jsonl"
    (folder / "mine.jsonl").write_text("".join(f'{{"class_id": {c}}}\n' for c in range(20, 30)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "new" / "parents" / "out", run("calibrate", folder / "recipe.yaml")


@pytest.fixture(scope="module")
def export(finished: tuple[Path, Result]) -> Path:
    return finished[0]


def test_calibrate_says_what_it_does_and_what_came_of_it(finished: tuple[Path, Result]) -> None:
    export, result = finished
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert f"{metrics['final_relative_l2']['mean']:.4f}" in result.stdout
    assert f"export: {export}\nreport: {export / 'report.html'}\n" in result.stdout
    assert "calibrating, M = 2 (4 steps)" in result.stderr
    assert not export.with_name("out.partial").exists()


def test_dry_run_predicts_the_run_and_writes_nothing(workplace: Path, export: Path) -> None:
    before = tree_of(workplace)
    lines = run("calibrate", "recipe.yaml", "--dry-run").stdout.splitlines()
    assert tree_of(workplace) == before
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : lines.index("")]}
    summary = {line[:26].strip(): line[27:] for line in lines[lines.index("") + 1 : -2]}

    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert set(rows) == {m["name"] for m in metrics["modules"]}
    for module in metrics["modules"]:
        kind, _, weight, activation, *_, size = rows[module["name"]]
        assert (kind, weight.split("/")[0], activation) == (module["kind"], module["weight"], module["activation"])
        assert float(size) == pytest.approx(module["quantized_bytes"] / 1e3, abs=0.06)
    assert summary["network evaluations"].startswith(f"{metrics['calibration']['network_evaluations']} tuning + ")
    assert summary["bit-operations"] == f"{metrics['bit_operations']['ratio']:.3f} of float32"
    assert summary["size of these modules"].endswith(
        f"(quantized ones {metrics['size']['layers_ratio']:.3f} of float32)"
    )
    assert summary["modules"] == "14 quantized, 7 stay float"
    assert set(summary) >= {"memory beside the model", "estimated time", "output"}
    assert lines[-1] == "dry run: nothing was written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dit_w8a9"], "no file 'dit_w8a9' (did you mean 'dit_w8a8'?)"),
        (["recipe.yaml", "--set", "objective.steps_per_group=atuo"], "or auto (found 'atuo') (did you mean 'auto'?)"),
        (["recipe.yaml", "--set", "objctive.loss=dense"], "unknown key objctive (did you mean 'objective'?)"),
        (["recipe.yaml", "--set", "objective.loss"], "--set objective.loss: write it as section.key=value"),
        (["recipe.yaml", "--set", "quantization.rules.0.modules=("], "quantization.rules.0.modules: '(' is no regular"),
        (
            ["recipe.yaml", "--set", "quantization.rules.0.modules=attn1"],
            "it is found inside 'transformer_blocks.0.attn1",
        ),
        (["recipe.yaml", "--set", "quantization.rules.0.group_size=24"], "group_size 24 does not divide the 32 inputs"),
        (["recipe.yaml", "--set", "sampling.scheduler=DDIMSchedular"], "(did you mean 'DDIMScheduler'?)"),
        (
            ["recipe.yaml", "--set", "data.path=digit.jsonl"],
            "data.path: no file 'digit.jsonl' (did you mean 'digits.jsonl'?)",
        ),
        (["recipe.yaml", "--set", "data.path=prompts.jsonl"], "DiTPipeline takes no 'prompt'"),
        (
            ["recipe.yaml", "--set", "data.path=high.jsonl"],
            "class_id must be one of this model's classes, 0 to 999 (found 1000)",
        ),
        (["recipe.yaml", "--set", "model.device=meta"], "model.device: 'meta' is not available here"),
        (["recipe.yaml", "--set", "model.id=./nowhere"], "model.id: './nowhere' is not a diffusers pipeline folder"),
        (["recipe.yaml", "--set", "model.id=bundled:nothing"], "model.id: no bundled model 'nothing'"),
        (["recipe.yaml", "--set", "model.device=gpu"], "model.device: 'gpu' is not available here"),
        (["recipe.yaml", "-o", ""], "export.output: must name a folder that can be created"),
        (["recipe.yaml", "-o", "/"], "export.output: must name a folder that can be created"),
        (["recipe.yaml", "-o", "recipe.yaml"], "export.output: recipe.yaml exists; --overwrite"),
        (["recipe.yaml", "-o", "recipe.yaml/a/b"], "cannot be created, {here}/recipe.yaml is a file"),
        (["recipe.yaml", "-o", "mine", "--overwrite"], "mine is no export of accuquant, so --overwrite spares it"),
        (["recipe.yaml", "--resume"], "--resume: there is no interrupted run in out/w4a8.partial"),
    ],
)
def test_mistake_gives_one_message_and_writes_nothing(workplace: Path, arguments: list[str], message: str) -> None:
    (workplace / "high.jsonl").write_text('{"class_id": 1000}\n{"class_id": 3}\n')
    (workplace / "mine").mkdir()
    (workplace / "mine" / "thesis.txt").write_text("years of work")
    before = tree_of(workplace)
    assert message.format(here=workplace) in refused("calibrate", *arguments)
    assert tree_of(workplace) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(workplace: Path, export: Path) -> None:
    message = "model.device: 'cuda' is not available here"
    assert message in refused("calibrate", "recipe.yaml", "--set", "model.device=cuda")
    assert message in refused("generate", export, "--set", "model.device=cuda")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_where_one_may_not_write(workplace: Path) -> None:
    (workplace / "locked").mkdir(mode=0o500)
    assert "locked cannot be written to" in refused("calibrate", "recipe.yaml", "-o", "locked/out")


def test_hub_that_cannot_be_reached_is_no_traceback(workplace: Path) -> None:
    """And `python -m accuquant` is the same program."""
    command = [sys.executable, "-m", "accuquant", "calibrate", "recipe.yaml", "--set", "model.id=acme/no-such-model"]
    environment = importable(Path(__file__).parents[2]) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.id: ") and "acme/no-such-model" in done.stderr
    assert "no local folder" in done.stderr and "the model hub cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_overwriting_replaces_the_export_and_nothing_else(workplace: Path) -> None:
    quick = ["recipe.yaml", "-q", "--set", "objective.iterations=0", "--set", "evaluation.reconstruct=false"]
    odd = workplace / "a [b] ü:x"  # neither markup nor YAML
    result = run("calibrate", *quick, "-o", odd)
    assert f"export: {odd}\n" in result.stdout and result.stderr == ""
    backup = odd.with_name(odd.name + ".old")
    (odd / "README.md").rename(odd / "README")
    backup.mkdir()
    (backup / "mine.txt").write_text("not yours")
    run("calibrate", *quick, "-o", odd, "--overwrite")
    assert (odd / "README.md").is_file() and not (odd / "README").exists()
    assert (backup / "mine.txt").read_text() == "not yours"
    assert sorted(p.name for p in workplace.iterdir()) == [odd.name, backup.name, "recipe.yaml"]


def test_mistake_with_overwrite_keeps_the_interrupted_run(workplace: Path) -> None:
    partial = workplace / "out" / "w4a8.partial"
    partial.mkdir(parents=True)
    (partial / "state.safetensors").write_text("hours of work")
    assert "in the way" in refused("calibrate", "recipe.yaml", "--overwrite")  # without our recipe it may be anybody's
    shutil.copyfile("recipe.yaml", partial / "recipe.yaml")
    assert "no regular" in refused("calibrate", "recipe.yaml", "--overwrite", "--set", "quantization.rules.0.modules=(")
    assert (partial / "state.safetensors").read_text() == "hours of work"


@pytest.mark.parametrize(
    "rule",
    [
        "{modules: transformer_blocks.*, weight: int4}",  # no activation scales, though `learn` names them
        "{modules: transformer_blocks.*, weight: int4, tune: false}",
        r"{modules: pos_embed\.proj, weight: int8, activation: int8, activation_scale: dynamic}",  # a convolution
    ],
)
def test_rules_without_updates(workplace: Path, rule: str) -> None:
    run("calibrate", "recipe.yaml", "-q", "--set", f"quantization.rules=[{rule}]", "--set", "objective.iterations=0")
    run("generate", "out/w4a8", "-q", "--class", "3", "--class", "4")


def test_half_precision_and_class_names_survive_the_export(model_folder: Path, workplace: Path) -> None:
    shutil.copytree(model_folder, "model")
    index = json.loads(Path("model/model_index.json").read_text())
    index["id2label"] = {"3": "cock", "4": "hen, biddy"}
    Path("model/model_index.json").write_text(json.dumps(index))
    run("calibrate", "recipe.yaml", "-q", "--set", "model.id=./model", "--set", "model.dtype=bfloat16")
    assert {t.dtype for n, t in load_file(f"out/w4a8/{WEIGHTS}").items() if "proj_out" in n} == {torch.bfloat16}
    run("generate", "out/w4a8", "-q", "--class", "biddy", "-o", "by_name.png")
    run("generate", "out/w4a8", "-q", "--class", "4", "-o", "by_number.png")
    assert Path("by_name.png").read_bytes() == Path("by_number.png").read_bytes()
    assert "has the classes 3 to 4 (did you mean 'biddy'?)" in refused("generate", "out/w4a8", "--class", "bidy")
    assert "has the classes 3 to 4" in refused("generate", "out/w4a8", "--class", "5")


def test_evaluate_finds_its_data_from_anywhere(export: Path, workplace: Path) -> None:
    before = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert "latent PSNR" in run("evaluate", export, "-q", "--set", "evaluation.num_samples=2").stdout
    fewer = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert (fewer["num_samples"], fewer["size"]) == (2, before["size"])
    assert set(fewer["held_out"]) < set(range(20, 30))
    run("evaluate", export, "-q")
    assert json.loads((export / "metrics.json").read_text(encoding="utf-8")) == before


@pytest.mark.parametrize("override", ["quantization.rules.0.weight=int8", "data.seed=1", "objective.loss=dense"])
def test_evaluate_cannot_change_what_calibration_has_fixed(export: Path, override: str) -> None:
    before = tree_of(export)
    assert f"--set {override}: fixed by calibration" in refused("evaluate", export, "--set", override)
    assert tree_of(export) == before


def test_inspect_prints_every_quantized_module(export: Path) -> None:
    lines = run("inspect", export).stdout.splitlines()
    rows = {line.split()[0]: line for line in lines[1 : lines.index("")]}
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    expected = {m["name"]: m for m in metrics["modules"] if m["weight"] != "float"}
    assert set(rows) == set(expected)
    tensors = load_file(export / WEIGHTS)
    paths = ("triton", "cublas", "int_mm", "float") if torch.cuda.is_available() else ("onednn", "int_mm", "float")
    for name, row in rows.items():
        scales, module = tensors[f"{name}.weight_scale"], expected[name]
        assert f" {module['weight']} " in row and f" {module['group_size'] or 'row'} " in row
        assert f"{float(scales.min()):.3g} .. {float(scales.max()):.3g}" in row
        path, why, kilobytes = row.split()[-3:]
        assert path in paths and why == "rule" and kilobytes == f"{module['quantized_bytes'] / 1e3:.1f}"
    assert lines[-2:] == ["timestep groups: 3, edges at timesteps 581, 249", "cache: none"]
    assert re.fullmatch(rf"computed by .*\d+ ({'|'.join(paths)}).* \(by rule\); .*, 1 thread, torch .*", lines[-3])


def test_inspect_measures_where_asked(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is kept in the cache folder, and from then on every load takes it."""
    monkeypatch.setenv("ACCUQUANT_CACHE", str(tmp_path / "new" / "cache"))
    assert "measured" not in run("inspect", export).stdout and not (tmp_path / "new").exists()
    lines = run("inspect", export, "--measure").stdout.splitlines()
    kept = next(line for line in lines if line.startswith("kept for this machine in "))
    file = Path(kept.removeprefix("kept for this machine in "))
    assert file.parent == tmp_path / "new" / "cache" / "paths" and list(file.parent.iterdir()) == [file]
    content = json.loads(file.read_text(encoding="utf-8"))
    threads = 0 if torch.cuda.is_available() else 1
    assert content["machine"]["threads"] == threads and content["machine"]["torch"] == torch.__version__
    rows = [line.split() for line in run("inspect", export).stdout.splitlines()]
    found = {row[-3] for row in rows if row[-2:-1] == ["measured"]}
    assert content["paths"] and found == set(content["paths"].values())


def test_a_path_that_is_not_there_is_said_at_once(
    workplace: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCUQUANT_PATH", "onednm")
    for command in (("calibrate", "recipe.yaml"), ("inspect", export)):
        assert "ACCUQUANT_PATH: no path is named 'onednm' (did you mean 'onednn'?)" in refused(*command)


def test_what_was_measured_names_the_paths(export: Path) -> None:
    """metrics.json, model card and report: how many layers by which path, and on what."""
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    used, quantized = metrics["arithmetic"], [m for m in metrics["modules"] if m["weight"] != "float"]
    assert sum(sum(whys.values()) for whys in used["paths"].values()) == len(quantized)
    assert {why for whys in used["paths"].values() for why in whys} == {"rule"} and used["threads"] == 1
    line = describe_arithmetic(used)
    assert f"Layers were computed by {line}. Calibrated" in (export / "README.md").read_text(encoding="utf-8")
    report = html.unescape((export / "report.html").read_text(encoding="utf-8"))
    assert f"The quantized layers were computed by {line}." in report


def read_png(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as image:
        return image.copy()


@pytest.mark.filterwarnings("ignore:.* is called with 3 steps")  # the export was calibrated for six
def test_generate_draws_what_was_asked(export: Path, workplace: Path) -> None:
    arguments = ("generate", export, "-q", "--class", "3", "--class", "3", "--set", "sampling.num_inference_steps=3")
    assert run(*arguments, "-o", "bilder/ü.png").stdout == "images: bilder/ü.png\n"
    run(*arguments, "-o", "again.png")
    run(*arguments, "-o", "shifted.png", "--seed", "1")
    sheet, again, shifted = (read_png(Path(name)) for name in ("bilder/ü.png", "again.png", "shifted.png"))
    assert sheet.size == (196, 96)  # two images of 16 pixels, enlarged
    first, second = (sheet.crop((x, 0, x + 96, 96)).tobytes() for x in (0, 100))
    assert first != second, "each image has noise of its own"
    assert again.tobytes() == sheet.tobytes()
    assert shifted.crop((0, 0, 96, 96)).tobytes() == second, "seeds count up"


def test_generate_without_classes_takes_the_recipe_s_own(export: Path, workplace: Path) -> None:
    run("generate", export, "-q")
    assert read_png(export / "samples.png").size == (496, 196)  # ten classes, five in a row
    (export / "samples.png").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "10000"], "--class '10000': this model has the classes 0 to 999"),
        (["--class", "3", "--class", "abc"], "--class 'abc': this model has the classes 0 to 999"),
        (["--class", "-1"], "--class '-1': this model"),
        (["--class", "²"], "--class '²': this model"),
        (["--class", ""], "--class '': this model"),
        (["--class", "9" * 5000], "this model has the classes 0 to 999"),
        (["-o", "x.jpg"], "--output x.jpg: the grid is a PNG; give a file name that ends in .png"),
        (["-o", "."], "--output .: the grid is a PNG"),
        (["--set", "objective.iterations=3"], "fixed by calibration"),
    ],
)
def test_generate_refuses(export: Path, workplace: Path, arguments: list[str], message: str) -> None:
    before = tree_of(export), tree_of(workplace)
    assert message in refused("generate", export, *arguments)
    assert (tree_of(export), tree_of(workplace)) == before


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_folder_that_is_no_export(model_folder: Path, workplace: Path, command: str) -> None:
    assert "is no export: it has no recipe.yaml" in refused(command, model_folder)
    assert "does not exist" in run(command, "nowhere", code=2).stderr
    assert "is a file" in run(command, "recipe.yaml", code=2).stderr
    (workplace / "recipe.yaml").write_text("model: [")
    assert "recipe.yaml, line 1, column 9: not readable as YAML" in refused(command, ".")


def damage(export: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the export whose transformer/config.json was edited."""
    for path in export.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".safetensors"):
            target = copy / path.relative_to(export)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    config = json.loads((copy / "transformer" / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    return copy


def test_damaged_export_is_refused(export: Path, tmp_path: Path) -> None:
    newer = damage(export, tmp_path / "newer", lambda config: config.update(version=99))
    assert "format version 99; this accuquant reads version 1" in refused("inspect", newer)
    torn = damage(export, tmp_path / "torn", lambda config: None)
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:1000])
    assert "torn cannot be loaded" in refused("generate", torn, "--class", "3")


@pytest.mark.parametrize("command", [[], ["calibrate"], ["evaluate"], ["generate"], ["inspect"], ["recipes"]])
def test_help_names_every_option_and_gives_examples(command: list[str]) -> None:
    text = run(*command, "--help").stdout
    wanted = {
        "": ["calibrate", "evaluate", "generate", "inspect", "recipes", "accuquant calibrate dit_w8a8"],
        "calibrate": [
            "--set",
            "--output",
            "--dry-run",
            "--resume",
            "--overwrite",
            "--quiet",
            "--verbose",
            "Exit codes",
        ],
        "evaluate": ["--set", "--quiet", "--verbose", "accuquant evaluate out/dit_w8a8"],
        "generate": ["--class", "--seed", "--output", "--reference", "accuquant generate out/dit_w8a8 --class 3"],
    }
    assert all(word in text for word in wanted.get("".join(command), []))
    assert "Usage:" in text


def test_usage_errors_suggest_the_right_word() -> None:
    assert "Did you mean 'calibrate'?" in run("calibrat", code=2).stderr
    assert "--set" in run("calibrate", "recipe.yaml", "--ste", "a=b", code=2).stderr
    assert "Missing argument" in run("calibrate", code=2).stderr
    assert run("--version").stdout.strip() == __version__


def test_recipes_lists_each_with_what_it_is_for() -> None:
    lines = run("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list_shipped("recipes")
    assert all(len(line.split()) > 5 for line in lines)


def test_progress_shows_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(reporter: Reporter) -> str:
        with reporter.bar("tuning", 4, done=1) as advance:
            for _ in range(3):
                advance("loss 1e-3")
        reporter.detail("a detail")
        return capsys.readouterr().err

    assert work(Reporter()) == "tuning (4 steps)\n"
    assert work(Reporter(verbose=True)) == "tuning (4 steps)\na detail\n"
    assert work(Reporter(quiet=True, verbose=True)) == ""
    monkeypatch.setattr("accuquant.progress.LOG_EVERY_SECONDS", -1.0)
    assert work(Reporter()).splitlines()[1] == "tuning: 2 of 4, 0 s left loss 1e-3"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    bar = work(Reporter())
    assert "4/4" in bar and "left" in bar and "loss 1e-3" in bar
