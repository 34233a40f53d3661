"""What several modules read is quantized once, and never taken for something else."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import as_allocated, recipe_tree
from pipelines import make_pipeline
from torch import Tensor, nn

from accuquant.calibration.layers import quantize_model
from accuquant.errors import RecipeError
from accuquant.export.native import harden_model
from accuquant.kernels import select
from accuquant.kernels.backend import Backend
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe.file import parse_recipe
from accuquant.runtime import layer as quantized
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer, quantized_layers
from accuquant.runtime.spec import LayerSpec

QUIET = Reporter(quiet=True)
READS = {"to_q": 0, "to_k": 0, "to_v": 0, "to_out.0": 1, "ff.net.0.proj": 2, "ff.net.2": 3}  # tensors of one block
STATIC = LayerSpec("int8", "int8")
DYNAMIC = LayerSpec("int8", "int8", activation_scale="dynamic", activation_symmetric=True)
each_spec = pytest.mark.parametrize("spec", [STATIC, DYNAMIC], ids=["static", "dynamic"])


def make_model(spec: LayerSpec) -> Any:
    """Two blocks; static scales of two timestep groups, the same for modules that read the same tensor."""
    model, clock = make_pipeline().transformer, StepClock([500.0])
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".", 2)[-1].endswith((*READS,))
    ]
    names = [n for n in names if n.startswith("transformer_blocks") and "norm" not in n]
    for name, layer in quantize_model(model, dict.fromkeys(names, spec), clock, search=False).items():
        if spec.static:
            tensor = next(k for end, k in READS.items() if name.endswith(end)) + 10 * int(name.split(".")[1])
            generator = torch.Generator().manual_seed(tensor)
            layer.set_activation_scale([3 * torch.randn(100, generator=generator) for _ in range(2)], search=False)
    harden_model(model, clock)
    assert len(quantized_layers(model)) == 12
    return model


def call(model: Any, timestep: float, seed: int = 0) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    sample: Tensor = model(x, timestep=torch.full((2,), timestep), class_labels=torch.tensor([1, 2])).sample
    return sample


def separate(model: Any) -> Any:
    """A copy in which no two layers have a tensor in common."""
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        for name in quantized.GRID:
            if (found := getattr(layer, name)) is not None:
                setattr(layer, name, nn.Parameter(found.clone(), requires_grad=False))
    return twin


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that quantized their input."""
    made, original = list[str](), QuantizedLayer.make_operand

    def counted(self: QuantizedLayer, backend: Backend, tokens: Tensor) -> Any:
        made.append(self.name)
        return original(self, backend, tokens)

    monkeypatch.setattr(QuantizedLayer, "make_operand", counted)
    return made


@each_spec
@pytest.mark.parametrize("path", ["onednn", "int_mm"])
@torch.no_grad()
def test_one_tensor_is_quantized_once(spec: LayerSpec, path: Any, count: list[str]) -> None:
    model = make_model(spec)
    twin = separate(model)
    for layer in (*quantized_layers(model).values(), *quantized_layers(twin).values()):
        if path not in layer.paths():
            pytest.skip("this CPU's oneDNN product is not exact")
        layer.take(select.named(path))
    for timestep in (900.0, 900.0, 100.0):
        expected, apart = call(twin, timestep), len(count)
        count.clear()
        assert torch.equal(call(model, timestep), expected)
        assert (apart, len(count)) == (12, 8) and not any(name.endswith(("to_k", "to_v")) for name in count)
        count.clear()
    if spec.static:
        assert not torch.equal(call(model, 900.0), call(model, 100.0))


def qkv(model: Any) -> list[QuantizedLayer]:
    attention = model.transformer_blocks[0].attn1
    return [attention.to_q, attention.to_k, attention.to_v]


@each_spec
@torch.no_grad()
def test_what_has_changed_is_quantized_again(spec: LayerSpec, count: list[str]) -> None:
    """The input in place, also by a view; the timestep group; the scale; another tensor at the same address."""
    model, x = make_model(spec), torch.randn(3, 32)
    to_q, to_k, _ = qkv(model)
    fresh = separate(model).transformer_blocks[0].attn1.to_k
    clock, other = to_q.clock, fresh.clock

    def assert_made(made: int) -> None:
        count.clear()
        assert torch.equal(to_k(x), fresh(x))
        assert count.count(to_k.name) == made + 1  # fresh is the copy's to_k, of the same name

    to_q(x)
    assert_made(0)
    x.view(-1)[:4].mul_(2)
    assert_made(1)
    clock.set(100.0)
    other.set(100.0)
    assert_made(1)
    to_k.activation_scale.mul_(2)
    fresh.activation_scale.mul_(2)
    assert_made(1)
    to_q(x)
    del x
    gc.collect()
    x = torch.randn(3, 32)
    assert_made(1)
    with torch.inference_mode():
        x = torch.randn(3, 32)
        to_q(x)
        x.mul_(2)
        assert torch.equal(to_k(x), fresh(x))


@each_spec
@torch.no_grad()
def test_integers_go_with_their_input(spec: LayerSpec) -> None:
    to_q, x = qkv(make_model(spec))[0], torch.randn(3, 32)
    to_q(x)
    integers = to_q.clock.last_input.kept[3][0]
    assert torch.equal(integers, to_q.make_operand(to_q.backend, x).q)
    integers = weakref.ref(integers)
    assert integers() is not None
    del x
    assert integers() is None and to_q.clock.last_input.kept is None


def test_a_gradient_keeps_its_own_graph(count: list[str]) -> None:
    model, x = make_model(DYNAMIC), torch.randn(3, 32, requires_grad=True)
    for layer in qkv(model)[:2]:
        layer(x)
    assert len(count) == 2


@each_spec
@torch.no_grad()
def test_files_copies_and_loading_are_as_without(spec: LayerSpec, tmp_path: Path, count: list[str]) -> None:
    model = make_model(spec)
    expected, twin = call(model, 900.0), separate(model)
    assert qkv(model)[1].activation_scale is qkv(model)[0].activation_scale
    assert qkv(twin)[1].activation_scale is not qkv(twin)[0].activation_scale
    model.save_pretrained(tmp_path / "shared")
    twin.save_pretrained(tmp_path / "apart")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()
    for other in (
        as_allocated(type(model).from_pretrained(tmp_path / "apart")),
        copy.deepcopy(model),
        copy.deepcopy(model).to("cpu"),
    ):
        count.clear()
        assert torch.equal(call(other, 900.0), expected) and len(count) == 8

    values = model.state_dict()
    for k, layer in enumerate(qkv(model)):
        values[f"{layer.name}.activation_scale"] = values[f"{layer.name}.activation_scale"] * (1 + k)
    model.load_state_dict(values)
    twin.load_state_dict(values)
    assert [float(a.activation_scale[0] / qkv(model)[0].activation_scale[0]) for a in qkv(model)] == pytest.approx(
        [1, 2, 3]
    )
    assert torch.equal(call(model, 900.0), call(twin, 900.0))


@each_spec
@pytest.mark.parametrize("half", [nn.Module.bfloat16, nn.Module.half])
@torch.no_grad()
def test_a_model_that_is_cast_is_as_one_loaded_in_that_type(
    spec: LayerSpec, half: Any, tmp_path: Path, count: list[str]
) -> None:
    """Scales, zero points and biases keep the types of the file, and what layers share stays shared."""
    model = make_model(spec)
    model.save_pretrained(tmp_path)
    found = half(model)
    loaded, x = type(model).from_pretrained(tmp_path, torch_dtype=found.dtype), torch.randn(2, 4, 8, 8).to(found.dtype)
    values = loaded.state_dict()
    assert all(v.dtype == values[k].dtype and torch.equal(v, values[k]) for k, v in found.state_dict().items())
    calls = [m(x, timestep=torch.tensor([900, 900]), class_labels=torch.tensor([1, 2])).sample for m in (loaded, found)]
    assert float((calls[0] - calls[1]).norm() / calls[0].norm()) < 0.05  # diffusers' position table was cast too
    assert len(count) == 16


def make_tree(model: Path, output: Path, shared: bool, rule: dict[str, Any]) -> dict[str, Any]:
    rules = [{"modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*", "weight": "int8", **rule}]
    quantization = {"timestep_groups": 2, "rules": rules, "share_activation_scales": shared}
    return recipe_tree(model, output, quantization=quantization)


def test_shared_scales_are_learned_as_one(model_folder: Path, tmp_path: Path) -> None:
    found = {}
    for shared in (False, True):
        tree = make_tree(model_folder, tmp_path / str(shared), shared, {"activation": "int8"})
        folder = calibrate(parse_recipe(tree, "test"), QUIET)
        found[shared] = DiTPipeline.from_pretrained(folder).transformer
    apart, together = ([layer.activation_scale for layer in qkv(found[shared])] for shared in (False, True))
    assert not any(torch.equal(apart[0], other) for other in apart[1:])  # it was learned
    assert all(other is together[0] for other in together[1:])
    layers = quantized_layers(found[True])
    assert len({id(layer.activation_scale) for layer in layers.values()}) == 8  # and nothing else is shared
    first, second = (layers[f"transformer_blocks.{k}.ff.net.2"].integer_weight() for k in (0, 1))
    assert not torch.equal(first, second)


def test_nothing_to_share_is_said(model_folder: Path, tmp_path: Path) -> None:
    tree = make_tree(model_folder, tmp_path / "x", True, {"activation": "int8", "activation_scale": "dynamic"})
    with pytest.raises(RecipeError, match="no rule has static scales"):
        parse_recipe(tree, "test")
    tree = make_tree(model_folder, tmp_path / "x", True, {"activation": "int8"})
    tree["quantization"]["rules"][0]["modules"] = r".*ff\..*"
    with pytest.raises(RecipeError, match="no two quantized modules read the same tensor"):
        calibrate(parse_recipe(tree, "test"), QUIET)
