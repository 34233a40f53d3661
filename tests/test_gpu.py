"""What only a CUDA device can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import recipe_tree

from accuquant.calibrate import calibrate
from accuquant.console import Reporter
from accuquant.core.kernels import integer_product
from accuquant.evaluate import load_export
from accuquant.model.layers import set_arithmetic
from accuquant.model.rollout import Rollout
from accuquant.recipe.file import parse_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("shape", [(1, 8, 8), (17, 64, 24), (5, 30, 7), (512, 128, 384)])
def test_integer_product_is_exact(shape: tuple[int, int, int]) -> None:
    """Shapes the kernel refuses are padded, not sent to the CPU."""
    m, k, n = shape
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8, device="cuda") for s in ((m, k), (n, k)))
    found = integer_product(a, b)
    assert found.is_cuda and torch.equal(found.double(), a.double() @ b.double().t())


def test_calibration_and_loading_on_the_device(model_folder: Path, tmp_path: Path) -> None:
    tree = recipe_tree(model_folder, tmp_path / "out")
    tree["model"]["device"] = "cuda"
    recipe = parse_recipe(tree, "test")
    pipeline = load_export(calibrate(recipe, Reporter(quiet=True)), recipe)
    rollout = Rollout(pipeline, recipe.sampling)
    conditions = rollout.conditions([1, 2], [3, 4])
    integers = rollout.trajectory(conditions)[0]
    set_arithmetic(pipeline.transformer, "reference")
    reference = rollout.trajectory(conditions)[0]
    assert integers.is_cuda and float((integers - reference).norm() / reference.norm()) < 2e-2
