"""The table of metrics: a new one is one file and one line, and is then measured, written and shown everywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import importable, recipe_tree

import accuquant
from accuquant.evaluation.metrics import METRICS, Metric, Sides, measured

ROOT = Path(accuquant.__file__).parent
NEW = '''"""How far pixels are off on average."""

from accuquant.evaluation.metrics.base import Metric, Sides


def _mean_absolute(sides: Sides) -> float:
    return float((sides.quantized - sides.full).abs().mean())


MEAN_ABSOLUTE = Metric(
    "mean_absolute_error", "Mean absolute error", "images", _mean_absolute, unit="fraction", higher_is_better=False
)
'''


def test_a_new_metric_is_one_file_and_one_line(model_folder: Path, tmp_path: Path) -> None:
    """In a copy of the package: file, line (and its import), recipe; metrics.json, report and card have it."""
    package = shutil.copytree(ROOT, tmp_path / "copy" / "accuquant", ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "evaluation" / "metrics"
    (folder / "mean_absolute.py").write_text(NEW, encoding="utf-8")
    table = (folder / "__init__.py").read_text(encoding="utf-8")
    line = "    classifier.AGREEMENT,\n"
    assert table.count(line) == 1
    table = table.replace(line, f"{line}    mean_absolute.MEAN_ABSOLUTE,\n")
    table = table.replace("import classifier, images, latents\n", "import classifier, images, latents, mean_absolute\n")
    (folder / "__init__.py").write_text(table, encoding="utf-8")
    output = tmp_path / "export"
    data = {"path": str(ROOT.parent / "calib_data" / "digits.jsonl"), "num_samples": 4}
    tree = recipe_tree(model_folder, output, data=data, objective={"iterations": 0})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "accuquant", "calibrate", str(tmp_path / "recipe.yaml"), "--quiet"]
    where = {"cwd": tmp_path, "env": importable(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **where)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    error = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["mean_absolute_error"]
    assert 0 < error < 1
    report = (output / "report.html").read_text(encoding="utf-8")
    assert "<dt>Mean absolute error</dt>" in report and "Lower is nearer to full precision." in report
    row = f"| Mean absolute error | {error:.4f} |"
    assert row in (output / "README.md").read_text(encoding="utf-8")
    assert "Mean absolute error" in done.stdout  # the table on the terminal


def test_names_are_told_apart() -> None:
    assert len({metric.name for metric in METRICS}) == len({metric.title for metric in METRICS}) == len(METRICS)
    assert [metric.name for metric in METRICS] == [
        "final_relative_l2", "latent_psnr", "psnr", "ssim", "frechet_distance", "agreement",
    ]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_nearer_is_better(metric: Metric) -> None:
    """Its figure moves the way that it says when one side comes nearer to the other."""
    from accuquant.evaluation.digit_classifier import DigitClassifier
    from accuquant.pipeline.loading import resolve

    generator = torch.Generator().manual_seed(0)
    full = torch.nn.functional.interpolate(torch.rand(24, 1, 4, 4, generator=generator), 32, mode="bilinear")
    noise = torch.randn(full.shape, generator=generator)
    classifier = None
    if metric.name in ("frechet_distance", "agreement"):
        classifier = DigitClassifier.from_folder(Path(resolve("bundled:digits-dit")) / "classifier")
    with torch.no_grad():
        near, far = (
            metric.numbers(value)[metric.main]
            for amount in (0.01, 0.5)
            if (value := metric.measure(Sides((full + amount * noise).clamp(0, 1), full, [0] * 24, classifier)))
            is not None
        )
    assert (near > far) == metric.higher_is_better and near != far


def test_what_needs_a_classifier_is_left_out_without_one() -> None:
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    found = measured("images", Sides(images, images.flip(0), [1, 2]))
    assert set(found) == {"psnr", "ssim"}
