"""The measuring tools run, and what they print follows from what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import recipe_tree

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(model_folder, tmp_path / "out")))
    return path


def run(tool: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_is_flat_for_us_and_grows_for_plain_backpropagation(recipe: Path, tmp_path: Path) -> None:
    run("measure_memory.py", "--recipe", str(recipe), "--out", str(tmp_path / "memory"))
    rows = json.loads((tmp_path / "memory" / "memory.json").read_text())
    saved = {(r["mode"], r["steps_per_group"]): r["saved_bytes"] for r in rows}
    assert (tmp_path / "memory" / "memory.png").stat().st_size > 1000
    for mode in ("identity", "variance", "exact"):
        assert saved[mode, 5] <= 1.02 * saved[mode, 2]
    assert saved["full back-propagation", 5] > 2 * saved["full back-propagation", 2]


def test_accuracy_benchmark_resumes_and_tabulates(recipe: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "bench")
    small = ["--configs", "W8A8", "--seeds", "0", "--evaluations", "9", "--samples", "4", "--batch", "2"]
    arguments = ["run", "--recipe", str(recipe), "--out", out, *small]
    first = run("bench_accuracy.py", *arguments, "--methods", "MSE search,M=1")
    second = run("bench_accuracy.py", *arguments, "--methods", "MSE search,M=1,M=2 exact,M=1 AdaRound")
    assert first.count("W8A8 seed 0") == 2 and second.count("W8A8 seed 0") == 2
    table = run("bench_accuracy.py", "table", "--out", out)
    assert "| M=2 exact |" in table and "| 3 |" in table  # nine evaluations pay for three updates of M = 2


def test_joint_benchmark_tabulates_and_draws_what_it_has_kept(tmp_path: Path) -> None:
    figures = {"psnr": 40.0, "frechet_distance": 0.001}
    rows = [{"part": "run", "types": "W4A4", "seed": s, "nfc": 0, "method": "E_q", "relative_l2": 0.1} for s in (0, 1)]
    for seed, error in ((0, 0.2), (1, 0.3)):
        key = {"part": "run", "types": "W4A4", "seed": seed, "nfc": 14, "method": "(d) tuner"}
        rows.append(key | {"relative_l2": error})
    (tmp_path / "results-0-1.jsonl").write_text("".join(json.dumps(row | figures) + "\n" for row in rows))
    table = run("bench_joint.py", "table", "--out", tmp_path)
    assert "### W4A4: E_qc in %" in table
    assert "E_q 10.00 ± 0.00 %" in table
    assert "| (d) tuner | 25.00 ± 7.07 / 40.0 ± 0.0 / 1.0 ± 0.0 |" in table
    run("bench_joint.py", "plot", "--out", tmp_path)
    assert (tmp_path / "joint.png").read_bytes()[:4] == b"\x89PNG"
