"""A cache through the programs: calibrate, evaluate, generate, inspect, and plain diffusers on what they wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiTPipeline
from helpers import recipe_tree
from typer.testing import CliRunner, Result

import accuquant.programs.calibrate
from accuquant import CheckpointError, cache_stats, disable_cache
from accuquant.calibration.opened import planned_model
from accuquant.calibration.plan import count_macs
from accuquant.cli.main import app
from accuquant.core.schedule import interval_steps
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import parse_recipe

QUIET = Reporter(quiet=True)
CONFIG = Path("transformer/config.json")
CACHED = r"transformer_blocks\.\d+\.(attn1|ff)\..*"  # what does not run at a skipped step
INTERVAL: dict[str, Any] = {"interval": 2, "order": 1}  # full at 0, 1, 3 and 5 of six steps
TARGET: dict[str, Any] = {"target_nfc": 3, "order": 1, "trials": 3}


def run(*arguments: str | Path, code: int = 0) -> Result:
    """One command; an exception that reaches the user would be a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str | Path) -> str:
    result = run(*arguments, code=2)
    assert result.stdout == "" and result.stderr.startswith("error: "), result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return str(result.stderr)


def make_recipe(model: Path, output: Path, cache: dict[str, Any] | None, **changes: Any) -> Recipe:
    changes = {"objective": {"iterations": 2, "batch_size": 2, "steps_per_group": 1}} | changes
    return parse_recipe(recipe_tree(model, output, cache=cache, **changes), "test")


def metrics_of(folder: Path) -> dict[str, Any]:
    """All of metrics.json but the times, which differ from run to run."""
    metrics = dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    if "cache" in metrics:
        assert metrics["cache"].pop("seconds")["full_step"] > 0
    return metrics


def stored_cache(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    return dict(config["cache"])


def loaded(folder: Path) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiTPipeline, steps: int = 6) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    found = pipeline([1, 2], num_inference_steps=steps, guidance_scale=1.5, generator=generators, output_type="pt")
    return torch.as_tensor(found.images)


def tree_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def fixed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """An export with a fixed interval, by the command line, and what was printed."""
    folder = tmp_path_factory.mktemp("fixed")
    tree = make_recipe(model_folder, folder / "out", INTERVAL).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "out", run("calibrate", folder / "recipe.yaml")


@pytest.fixture(scope="module")
def searched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a target of three full steps."""
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("searched") / "out", TARGET), QUIET)


@pytest.fixture
def copied(fixed: tuple[Path, Result], tmp_path: Path) -> Path:
    """The export with the fixed interval, to be changed."""
    return Path(shutil.copytree(fixed[0], tmp_path / "copy"))


def test_fixed_interval_is_stored_and_comes_back(fixed: tuple[Path, Result]) -> None:
    folder, _ = fixed
    assert Cache(**stored_cache(folder)) == Cache(**INTERVAL)
    pipeline = loaded(folder)
    with_cache = draw(pipeline)
    assert cache_stats(pipeline).full_steps == (0, 1, 3, 5) and cache_stats(pipeline).nfc == 4
    disable_cache(pipeline)
    assert not torch.equal(draw(pipeline), with_cache)


def test_found_full_steps_are_stored_and_come_back(searched: Path) -> None:
    stored = stored_cache(searched)
    assert len(stored["full_timesteps"]) == 3 and stored["measured_nfc"] == [3, 0]
    pipeline = loaded(searched)
    draw(pipeline)
    stats = cache_stats(pipeline)
    assert [float(pipeline.scheduler.timesteps[i]) for i in stats.full_steps] == stored["full_timesteps"]
    assert metrics_of(searched)["cache"]["full_steps"] == list(stats.full_steps)


def test_recipe_of_the_export_asks_for_the_same_target(searched: Path) -> None:
    """The copy of the recipe reproduces the run; what was found belongs to the model."""
    section = yaml.safe_load((searched / "recipe.yaml").read_text(encoding="utf-8"))["cache"]
    assert Cache(**section) == Cache(**TARGET)


def test_metrics_say_what_the_cache_does_and_saves(model_folder: Path, fixed: tuple[Path, Result]) -> None:
    metrics = metrics_of(fixed[0])
    cache = metrics["cache"]
    assert cache["nfc"] == {"mean": 4, "std": 0} and cache["num_steps"] == 6
    assert cache["full_steps"] == list(interval_steps(6, 2, 2)) == [0, 1, 3, 5]
    assert (cache["estimation"], cache["order"], cache["modules"]) == ("rfe", 1, 4)
    tokens = 2 * 3 * 16 * 32 * 4  # of three samples with guidance, float32, in one factor
    assert cache["nbytes"] == 4 * (3 * tokens + 4 * 2 * 3)  # output, difference and input, and a ratio for each sample

    model, planned = planned_model(make_recipe(model_folder, Path("unused"), INTERVAL))
    pipeline = loaded(model_folder)
    expected = model.counted(planned)
    planned = count_macs(pipeline.transformer, planned, lambda: draw(pipeline, 1), 2)  # of two samples
    assert planned == expected and sum(p.kind == "attention" for p in planned) == 2
    floats = sum(p.macs * 32 * 32 for p in planned)
    inside = [p for p in planned if re.match(CACHED, f"{p.name}.")]  # with attention's own products
    ratio = (sum(p.bit_operations for p in planned) - sum(p.bit_operations for p in inside) * 2 / 6) / floats
    assert cache["bit_operations_ratio"] == pytest.approx(ratio)
    assert metrics["bit_operations"]["ratio"] == pytest.approx(sum(p.bit_operations for p in planned) / floats)
    assert cache["bit_operations_ratio"] < metrics["bit_operations"]["ratio"]


def test_terminal_and_model_card_show_the_cache(fixed: tuple[Path, Result]) -> None:
    folder, result = fixed
    cache = metrics_of(folder)["cache"]
    rows = {
        "full computations (NFC)": "4.0 of 6 steps",
        "cache memory": f"{cache['nbytes'] / 1e6:.1f} MB",
        "bit-operations with the cache": f"{cache['bit_operations_ratio']:.3f} of float32",
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name, value in rows.items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)} *$", result.stdout, re.M)
        assert f"| {name} | {value} |" in card
    assert "held-out, quantized and cached" in result.stderr


def test_search_is_reported(model_folder: Path, tmp_path: Path) -> None:
    tree = make_recipe(model_folder, tmp_path / "out", TARGET).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    plan = run("calibrate", tmp_path / "recipe.yaml", "--dry-run").stdout
    without = run("calibrate", tmp_path / "recipe.yaml", "--dry-run", "--set", "cache=null").stdout
    sampling = [int(re.search(r"tuning \+ (\d+) sampling", text)[1]) for text in (plan, without)]  # type: ignore[index]
    assert sampling[0] > sampling[1] and not (tmp_path / "out").exists()
    result = run("calibrate", tmp_path / "recipe.yaml")
    assert re.search(r"cache: 3 full steps of 6, error 0\.\d+ on calibration samples", result.stderr)


def test_evaluate_takes_the_cache_away_or_changes_it(copied: Path) -> None:
    before = metrics_of(copied)
    output = run("evaluate", copied, "-q", "--set", "cache=null").stdout
    without = metrics_of(copied)
    assert "cache" not in without and "NFC" not in output
    assert without["final_relative_l2"] != before["final_relative_l2"]
    assert "6 steps" in run("evaluate", copied, "-q", "--set", "cache.interval=1").stdout
    every = metrics_of(copied)
    assert every["cache"]["full_steps"] == [0, 1, 2, 3, 4, 5]
    assert every["final_relative_l2"] == without["final_relative_l2"], "all steps full is no cache"
    assert every["cache"]["bit_operations_ratio"] == pytest.approx(without["bit_operations"]["ratio"])
    run("evaluate", copied, "-q", "--set", "cache.interval=4", "--set", "cache.estimation=taylor")
    cache = metrics_of(copied)["cache"]
    assert (cache["full_steps"], cache["estimation"]) == ([0, 1, 5], "taylor")
    assert stored_cache(copied)["interval"] == 2, "the export itself stays"
    run("evaluate", copied, "-q")
    assert metrics_of(copied) == before


def test_evaluate_searches_a_target(copied: Path) -> None:
    overrides = ["--set", "cache={target_nfc: 5, order: 1, trials: 2}"]
    assert "cache: 5 full steps of 6" in run("evaluate", copied, *overrides).stderr
    assert metrics_of(copied)["cache"]["nfc"] == {"mean": 5, "std": 0}
    run("evaluate", copied, "-q", "--set", "cache={target_nfc: 4, schedule: rcs, order: 1}")
    assert metrics_of(copied)["cache"]["num_steps"] == 6


@pytest.mark.filterwarnings("ignore:.* is called with .* steps")  # the export was calibrated for six
@pytest.mark.parametrize("steps", [4, 7, 12])
def test_other_numbers_of_steps_keep_to_the_noise_levels(searched: Path, steps: int) -> None:
    pipeline, listed = loaded(searched), stored_cache(searched)["full_timesteps"]
    draw(pipeline, steps)
    stats, timesteps = cache_stats(pipeline), [float(t) for t in pipeline.scheduler.timesteps]
    full, spacing = [timesteps[i] for i in stats.full_steps], timesteps[0] - timesteps[1]
    assert stats.num_steps == steps and stats.full_steps[0] == 0
    assert all(min(abs(t - u) for u in full) < spacing for t in listed[1:]), "each level has a full step beside it"
    assert all(min(abs(t - u) for u in listed) < spacing for t in full[1:]), "and no other step is full"


@pytest.mark.filterwarnings("ignore:.* is called with .* steps")  # the export was calibrated for six
@pytest.mark.parametrize("steps", [4, 12])
def test_evaluate_with_another_number_of_steps(searched: Path, tmp_path: Path, steps: int) -> None:
    folder = Path(shutil.copytree(searched, tmp_path / "copy"))
    run("evaluate", folder, "-q", "--set", f"sampling.num_inference_steps={steps}")
    metrics, pipeline = metrics_of(folder), loaded(folder)
    draw(pipeline, steps)
    assert len(metrics["relative_l2_per_step"]) == steps + 1 and metrics["cache"]["num_steps"] == steps
    assert metrics["cache"]["full_steps"] == list(cache_stats(pipeline).full_steps)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["cache.interval=2"], False),  # as it is
        (["cache=null"], True),
        (["cache.interval=4"], True),
        (["cache={target_nfc: 5, order: 1, trials: 0}"], True),
    ],
)
def test_generate_takes_another_cache(
    fixed: tuple[Path, Result], tmp_path: Path, overrides: list[str], changes: bool
) -> None:
    settings = [part for override in overrides for part in ("--set", override)]
    arguments = ("generate", fixed[0], "-q", "--class", "3", "--class", "4")
    run(*arguments, "-o", tmp_path / "own.png")
    run(*arguments, "-o", tmp_path / "other.png", *settings)
    assert ((tmp_path / "own.png").read_bytes() != (tmp_path / "other.png").read_bytes()) is changes


def test_inspect_prints_the_cache(fixed: tuple[Path, Result], searched: Path, copied: Path) -> None:
    line = run("inspect", fixed[0]).stdout.splitlines()[-1]
    assert line.startswith("cache: ") and {"estimation rfe", "order 1", "interval 2"} <= set(line[7:].split(", "))
    found = ", ".join(str(t) for t in stored_cache(searched)["full_timesteps"])
    assert f"full_timesteps [{found}]" in run("inspect", searched).stdout.splitlines()[-1]
    corrupt(copied, None)
    assert run("inspect", copied).stdout.splitlines()[-1] == "cache: none"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache={interval: 2, modules: attn9}", "no module of DiTTransformer2DModel matches 'attn9'"),
        ("cache={interval: 2, modules: (}", "cache.modules: "),
        ("cache={interval: 2, factors_device: gpu}", "cache.factors_device: "),
        ("cache={interval: 2, intervall: 2}", "unknown key cache.intervall (did you mean 'interval'?)"),
        ("cache={target_nfc: 7}", "cache.target_nfc: 7 is more than the 6 steps there are"),
    ],
)
def test_mistake_fails_before_anything_is_written(
    model_folder: Path, fixed: tuple[Path, Result], tmp_path: Path, override: str, message: str
) -> None:
    tree = make_recipe(model_folder, tmp_path / "out", None).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    before = tree_of(tmp_path), tree_of(fixed[0])
    assert message in refused("calibrate", tmp_path / "recipe.yaml", "--set", override)
    assert message in refused("calibrate", tmp_path / "recipe.yaml", "--dry-run", "--set", override)
    for program in ("evaluate", "generate"):
        assert message in refused(program, fixed[0], "--set", override)
    assert (tree_of(tmp_path), tree_of(fixed[0])) == before


@pytest.fixture
def interrupted(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Recipe]:
    """A run that is stopped after the search, where the evaluation begins."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupt() -> Recipe:
        recipe = make_recipe(model_folder, tmp_path / "out", TARGET)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(accuquant.programs.calibrate, "evaluate", stop)
            calibrate(recipe, QUIET)
        assert not (tmp_path / "out").exists()
        return recipe

    return interrupt


def test_resumed_run_does_not_search_again(interrupted: Callable[[], Recipe], searched: Path, tmp_path: Path) -> None:
    recipe = interrupted()
    kept = tmp_path / "out.partial" / "cache.json"
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert found["full_timesteps"] == stored_cache(searched)["full_timesteps"]
    kept.write_text(json.dumps(found | {"full_timesteps": [830.0, 664.0, 166.0]}), encoding="utf-8")  # a mark
    folder = calibrate(recipe, QUIET, resume=True)
    assert stored_cache(folder)["full_timesteps"] == [830.0, 664.0, 166.0]
    assert metrics_of(folder)["cache"]["full_steps"] == [0, 1, 4]
    assert not kept.parent.exists()


def test_run_begun_anew_searches_anew(interrupted: Callable[[], Recipe], searched: Path, tmp_path: Path) -> None:
    recipe = interrupted()
    (tmp_path / "out.partial" / "cache.json").write_text("{}", encoding="utf-8")
    folder = calibrate(recipe, QUIET, overwrite=True)
    assert stored_cache(folder) == stored_cache(searched)


@pytest.fixture
def unmet(model_folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A run whose target turned out, after tuning, to be out of reach: its recipe and the message."""
    cache = {"target_seconds": 1e-6, "order": 1, "trials": 1}
    tree = make_recipe(model_folder, tmp_path / "out", cache).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "recipe.yaml", refused("calibrate", tmp_path / "recipe.yaml", "-q")


def test_target_that_cannot_be_met_is_one_message(unmet: tuple[Path, str], tmp_path: Path) -> None:
    assert "target_seconds: 1e-06 s cannot be met" in unmet[1]
    assert (tmp_path / "out.partial" / "recipe.yaml").is_file() and not (tmp_path / "out").exists()


def test_target_that_cannot_be_met_does_not_cost_the_tuning(unmet: tuple[Path, str], tmp_path: Path) -> None:
    """The message asks to change the cache; the interrupted run goes on with another one."""
    run("calibrate", unmet[0], "-q", "--resume", "--set", "cache.target_seconds=60")
    assert stored_cache(tmp_path / "out")["measured_nfc"] == [6, 0]  # all steps pay


def test_saving_a_loaded_pipeline_again_keeps_the_cache(searched: Path, tmp_path: Path) -> None:
    pipeline = loaded(searched)
    before = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    assert stored_cache(tmp_path / "again") == stored_cache(searched)
    again = loaded(tmp_path / "again")
    assert torch.equal(draw(again), before) and cache_stats(again).nfc == 3


def corrupt(folder: Path, entry: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"]["cache"] = entry
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": 2, "nothing": 1}, "nothing"),
        ({"interval": 2, "estimation": "rfc"}, "estimation"),
        ({"estimation": "rfe"}, "give exactly one of"),
        ({"interval": 2, "modules": "attn9"}, "attn9"),
        ({"target_nfc": 3.0, "order": 1}, "target_nfc"),  # a target without what was found for it
        ([4], ""),
        ("reuse", ""),
    ],
)
def test_corrupted_entry_is_named(copied: Path, entry: Any, named: str) -> None:
    corrupt(copied, entry)
    with pytest.raises(CheckpointError, match=rf"(?s)quantization_config\.cache.*{named}"):
        DiTPipeline.from_pretrained(copied)


def test_corrupted_entry_is_one_line_of_the_command_line(copied: Path) -> None:
    corrupt(copied, {"interval": 0})
    message = refused("inspect", copied)
    assert "quantization_config.cache" in message and "interval" in message


def test_export_without_a_cache_loads_without(model_folder: Path, tmp_path: Path) -> None:
    folder = calibrate(make_recipe(model_folder, tmp_path / "out", None), QUIET)
    assert "cache" not in json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    assert "cache" not in metrics_of(folder) and "NFC" not in (folder / "README.md").read_text(encoding="utf-8")
    run("evaluate", folder, "-q", "--set", "cache.interval=2")
    assert metrics_of(folder)["cache"]["full_steps"] == [0, 1, 3, 5]
