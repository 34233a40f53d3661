"""What only a CUDA device can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dit_tapes, finals, recipe_tree
from layers import oracle, relative
from test_triton import needs_triton, run_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accuquant.calibration.layers import TrainableLayer
from accuquant.export.load import load_export
from accuquant.kernels import cuda, select
from accuquant.kernels.integers import integer_product
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.arithmetic import set_arithmetic
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import GRID, QuantizedLayer
from accuquant.runtime.spec import LayerSpec, share_grids

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
    tapes = dit_tapes(pipeline, recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale or 1.0)
    integers = finals(tapes)
    set_arithmetic(pipeline.transformer, "reference")
    reference = finals(tapes)
    assert integers.is_cuda and float((integers - reference).norm() / reference.norm()) < 2e-2


class Devices(TorchDispatchMode):
    """Where every result lies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


LAYERS = [
    (LayerSpec("int8", "int8"), 128, 96),
    (LayerSpec("int8", "int8", activation_symmetric=True), 128, 96),
    (LayerSpec("int8", "int8", activation_scale="dynamic"), 128, 96),
    (LayerSpec("int8", "int8", activation_scale="dynamic"), 37, 19),  # nothing is a multiple of anything
    (LayerSpec("int8", "int8", 16, symmetric=False), 128, 96),
    (LayerSpec("int8"), 128, 96),
    (LayerSpec("int4", "int8", 32), 128, 96),
    (LayerSpec("int4", "int8", 128, symmetric=False, activation_scale="dynamic"), 256, 96),
    (LayerSpec("int4", group_size=16, symmetric=False), 128, 96),
    (LayerSpec("int4"), 37, 19),
    (LayerSpec("int4", group_size=8), 128, 96),
    (LayerSpec("int6", "int8"), 128, 96),
    (LayerSpec("int3"), 128, 96),
    (LayerSpec("fp8", "fp8", activation_symmetric=True), 128, 96),
    (LayerSpec("fp8", "fp8", activation_scale="dynamic", activation_symmetric=True), 128, 96),
    (LayerSpec("fp8", "fp8", activation_symmetric=True), 37, 19),
    (LayerSpec("fp8"), 128, 96),
]


def layer_and_module(spec: LayerSpec, columns: int, outputs: int) -> tuple[QuantizedLayer, nn.Module]:
    torch.manual_seed(0)
    module = nn.Linear(columns, outputs)
    trainable = TrainableLayer(module, spec, StepClock([]), "x", search=False)
    if spec.static:
        trainable.set_activation_scale([torch.randn(1000) + 0.3], search=False)
    return trainable.harden(), module


@pytest.mark.parametrize(("spec", "columns", "outputs"), LAYERS)
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@torch.no_grad()
def test_every_path_of_a_layer_is_right_and_stays_on_the_device(
    spec: LayerSpec, columns: int, outputs: int, rows: int
) -> None:
    """In the half types up to their rounding: float computes in them, the other paths round their result."""
    layer, module = layer_and_module(spec, columns, outputs)
    x = torch.randn(rows, columns)
    layer.clock.set(torch.zeros(1, device="cuda"))
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        layer.cpu()
        expected = oracle(layer, module, x.to(dtype).float())
        layer.cuda()
        for path in layer.paths():
            layer.take(select.named(path))
            with Devices() as devices:
                found = layer(x.to("cuda", dtype))
            if spec.activation_scale == "dynamic" and path not in ("triton", "cublas"):
                limit = max(
                    limit, 2e-3
                )  # torch divides by a number on a device in another way: a tie may fall otherwise
            if path == "scaled_mm":  # gives bfloat16
                limit = max(limit, 2e-2)
            assert found.dtype == dtype and relative(found.cpu(), expected) < limit, path
            assert devices.seen == {"cuda"}, path


@torch.no_grad()
def test_preparing_chooses_on_the_device() -> None:
    for spec in (LayerSpec("int8", "int8"), LayerSpec("int4", group_size=32), LayerSpec("int3", "int8")):
        layer, _ = layer_and_module(spec, 512, 512)
        layer.prepare()
        before = layer.path
        layer.cuda()
        assert layer.path in layer.paths() and layer.path != "onednn"
        layer.cpu()
        assert layer.path == before


def test_layers_that_share_scales_share_them_on_the_device() -> None:
    layers = [layer_and_module(LayerSpec("int8", "int8"), 128, 96)[0] for _ in range(2)]
    share_grids(layers, *GRID)
    nn.ModuleList(layers).cuda()
    scale = layers[0].activation_scale
    assert scale is not None and scale.is_cuda and scale is layers[1].activation_scale


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_are_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    layers = [layer_and_module(*row)[0].cuda() for row in LAYERS]
    for layer in layers:
        layer.prepare()
    inputs = [torch.randn(40, layer.in_features, device="cuda", dtype=torch.bfloat16) for layer in layers]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    with torch.no_grad():
        found, expected = torch.compile(run, backend=backend, fullgraph=True)(inputs), run(inputs)
    assert max(relative(a.cpu(), b.double().cpu()) for a, b in zip(found, expected, strict=True)) < 2e-2


@needs_triton
@pytest.mark.timeout(1800)  # each case compiles kernels of its own
def test_kernels_on_the_device() -> None:
    """Against float64 and `numerics`, as in the interpreter; and nothing has switched them off."""
    assert cuda.triton_works(torch.device("cuda:0")) and cuda.cublas_works(torch.device("cuda:0"))
    run_file("triton_checks.py")
