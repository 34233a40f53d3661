"""Checkpoints: diffusers alone loads them, as they were, or says what is wrong with them; it never makes things up."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiTPipeline, DiTTransformer2DModel
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accuquant import CheckpointError, set_arithmetic
from accuquant.calibration.layers import quantize_model
from accuquant.export.native import harden_model
from accuquant.runtime.checkpoint import AccuQuantConfig
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import quantized_layers
from accuquant.runtime.spec import LayerSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.0"
SPECS = {
    "pos_embed.proj": LayerSpec("int8", "int8"),
    f"{BLOCK}.attn1.to_q": LayerSpec("int4", "int8", group_size=16),
    f"{BLOCK}.attn1.to_k": LayerSpec("int4", "int6", group_size=8, symmetric=False, activation_symmetric=True),
    f"{BLOCK}.attn1.to_v": LayerSpec("int3", "int8", activation_scale="dynamic"),
    f"{BLOCK}.ff.net.2": LayerSpec("int6", symmetric=False),
    f"{BLOCK}.norm1.linear": LayerSpec("int8", "int8", activation_scale="dynamic"),
}
EDGES = [700.0, 250.0]


def quantize(model: nn.Module, specs: dict[str, LayerSpec], edges: list[float]) -> None:
    """Exported form in place, static scales different in each timestep group."""
    clock = StepClock(edges)
    layers = quantize_model(model, specs, clock, search=True)
    samples = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    for layer in layers.values():
        if layer.spec.static:
            layer.set_activation_scale([samples * 3**-k for k in range(clock.num_groups)], search=True)
    harden_model(model, clock)


@torch.no_grad()
def predict(model: nn.Module, timestep: float = 500, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)).to(dtype)
    prediction: Tensor = model(x, timestep=torch.tensor([timestep]), class_labels=torch.tensor([3])).sample
    return prediction


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Loaded float tensors lie at other addresses, and torch then adds in another order: the last bit may differ.

    It may carry a value over the edge of a rounding, which is then a whole step off; another group's scales are 0.1.
    """
    assert float((found - expected).norm() / expected.norm()) < 2e-2


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [k for k in expected if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])]
    assert different == []


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    pipeline = make_pipeline(layers=1)
    quantize(pipeline.transformer, SPECS, EDGES)
    return pipeline


@pytest.fixture(scope="module")
def folder(pipeline: DiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "quantized"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A transformer folder to damage."""
    return shutil.copytree(folder / "transformer", tmp_path / "broken")


def load(folder: Path, **arguments: Any) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder, **arguments)


def edit_tensors(folder: Path, change: Any) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


# ---- loading what was saved


@pytest.mark.parametrize(
    "how",
    [
        lambda folder: DiTPipeline.from_pretrained(folder).transformer,
        lambda folder: DiTPipeline.from_pretrained(folder).to("cpu").transformer,
        lambda folder: AutoModel.from_pretrained(str(folder), subfolder="transformer"),
        lambda folder: DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer"),
        lambda folder: load(folder / "transformer", device_map="cpu"),
        lambda folder: AutoModel.from_pretrained(str(folder / "transformer"), device_map={"": "cpu"}),
        lambda folder: load(folder / "transformer", dtype=torch.float32),
    ],
    ids=["pipeline", "pipeline-to-cpu", "auto", "subfolder", "device-map", "auto-device-map", "dtype"],
)
def test_every_way_of_loading_gives_what_was_saved(pipeline: DiTPipeline, folder: Path, how: Any) -> None:
    """Tensors, and each quantized layer's output in every timestep group with both arithmetics, bit by bit."""
    model = how(folder)
    assert isinstance(model, DiTTransformer2DModel) and not model.training
    assert_same(tensors(model), tensors(pipeline.transformer))
    found, original = quantized_layers(model), quantized_layers(copy.deepcopy(pipeline.transformer))
    assert {name: layer.spec for name, layer in found.items()} == SPECS
    for timestep in (900, 500, 100):
        assert_near(predict(model, timestep), predict(pipeline.transformer, timestep))
        for name, layer in found.items():
            x = torch.randn((1, 4, 8, 8) if layer.conv else (2, 5, layer.in_features)) * 0.3
            original[name].clock.set(timestep)
            for arithmetic in ("integer", "reference"):
                layer.arithmetic = original[name].arithmetic = arithmetic  # type: ignore[assignment]
                assert torch.equal(layer(x), original[name](x)), name


def test_loaded_pipeline_samples_like_the_saved_one(pipeline: DiTPipeline, folder: Path) -> None:
    def sample(pipe: DiTPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images: Tensor = pipe(
            [2], num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="pt"
        ).images
        return torch.as_tensor(images)

    found = sample(DiTPipeline.from_pretrained(folder).to("cpu"))
    assert_near(found, sample(pipeline))
    assert float(found.std()) > 0.01


def test_shards(pipeline: DiTPipeline, tmp_path: Path) -> None:
    pipeline.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tensors(load(tmp_path)), tensors(pipeline.transformer))
    assert_same(tensors(load(tmp_path, device_map="cpu")), tensors(pipeline.transformer))


def test_half_type_keeps_scales_in_float32(pipeline: DiTPipeline, folder: Path) -> None:
    """What is quantized stays as it was, scales and biases in float32; only the float modules are cast."""
    model = load(folder / "transformer", dtype=torch.bfloat16)
    inside = {f"{n}.{k}" for n, layer in quantized_layers(model).items() for k in layer.state_dict()}
    found, expected = tensors(model), tensors(pipeline.transformer)
    for name, value in expected.items():
        cast = value if name in inside or not value.is_floating_point() else value.bfloat16()
        assert found[name].dtype == cast.dtype and torch.equal(found[name], cast), name
    assert {v.dtype for k, v in found.items() if k.endswith("_scale")} == {torch.float32}
    half, full = predict(model, dtype=torch.bfloat16), predict(pipeline.transformer)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - full).norm() / full.norm()) < 0.15


def test_half_type_pipeline_samples(folder: Path) -> None:
    """Also where the first module of the denoiser is quantized: pipelines ask the denoiser for its type."""
    pipe = DiTPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    images = pipe([2], num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert bool(torch.as_tensor(images).isfinite().all())


def test_saving_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Twice around: pipeline and bare model; with a half type too, scales come out whole."""
    DiTPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    load(tmp_path / "again" / "transformer").save_pretrained(tmp_path / "model")
    expected = load_file(folder / "transformer" / WEIGHTS)
    quantization = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    for place in (tmp_path / "again" / "transformer", tmp_path / "model"):
        assert_same(load_file(place / WEIGHTS), expected)
        assert json.loads((place / "config.json").read_text())["quantization_config"] == quantization
    load(folder / "transformer", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for name, value in tensors(load(tmp_path / "half")).items():
        if name.endswith(("_scale", "_zero_point")) or not value.is_floating_point():
            assert torch.equal(value, expected[name]), name


def test_config_says_what_is_inside(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "accuquant" and config["version"] == 1 and config["timestep_edges"] == EDGES
    assert {name: LayerSpec(**fields) for name, fields in config["layers"].items()} == SPECS


def test_model_and_config_can_be_printed(folder: Path) -> None:
    model = load(folder / "transformer")
    text = str(model)
    assert "to_q): QuantizedLayer(32, 32, weight=int4, activation=int8)" in text
    config = model.config.quantization_config
    assert "transformer_blocks.0.attn1.to_q" in repr(config) and "int4" in repr(config)
    assert "accuquant" in str(model.config) and "accuquant" in repr(model.hf_quantizer.quantization_config)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_deep_copy_has_a_clock_of_its_own(folder: Path) -> None:
    """Each follows its own calls, whatever the other one did last."""
    model = load(folder / "transformer")
    twin = copy.deepcopy(model)
    assert_same(tensors(twin), tensors(model))
    layers = [quantized_layers(m)[f"{BLOCK}.attn1.to_q"] for m in (model, twin)]
    for timestep, group in [(900, 0), (500, 1), (100, 2)]:
        expected = predict(model, timestep)
        predict(model, 1000 - timestep)
        assert_near(predict(twin, timestep), expected)
        assert [layer.clock.group for layer in layers] == [2 - group, group]
    assert all(len({id(layer.clock) for layer in quantized_layers(m).values()}) == 1 for m in (model, twin))


def test_two_loaded_models_do_not_share_a_clock(folder: Path) -> None:
    first, second = load(folder / "transformer"), load(folder / "transformer")
    layers = [quantized_layers(m)[f"{BLOCK}.attn1.to_q"] for m in (first, second)]
    predict(first, 900)
    predict(second, 100)
    assert [layer.clock.group for layer in layers] == [0, 2]
    predict(first, 500)
    assert [layer.clock.group for layer in layers] == [1, 2]


def test_arithmetic_is_integer_after_loading(folder: Path) -> None:
    model = load(folder / "transformer")
    assert {layer.arithmetic for layer in quantized_layers(model).values()} == {"integer"}
    integers = predict(model)
    set_arithmetic(model, "reference")
    error = (integers - predict(model)).norm() / integers.norm()
    assert 0 < float(error) < 2e-2


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        (LayerSpec("int8", "int8"), 0.27),
        (LayerSpec("int8", "int8", symmetric=False), 0.28),
        (LayerSpec("int4", "int8", group_size=64), 0.16),
        (LayerSpec("int4", group_size=32), 0.163),
        (LayerSpec("int3", "int8"), 0.12),
    ],
    ids=["int8", "int8-asymmetric", "int4-64", "int4-32", "int3"],
)
def test_size_of_quantized_layers_in_the_file(spec: LayerSpec, limit: float, tmp_path: Path) -> None:
    """Bytes in the file, scales and biases included, over the bytes of the same layers in float32."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".attn1." in n or ".ff." in n)]
    assert len(names) == 6
    inside = tuple(f"{n}." for n in names)
    model.save_pretrained(tmp_path / "float")
    quantize(model, dict.fromkeys(names, spec), [900.0 - 100 * k for k in range(9)])
    model.save_pretrained(tmp_path / "quantized")

    def size(place: Path) -> int:
        found = load_file(place / WEIGHTS)
        return sum(t.numel() * t.element_size() for n, t in found.items() if n.startswith(inside))

    ratio = size(tmp_path / "quantized") / size(tmp_path / "float")
    bits = {"int8": 8, "int4": 4, "int3": 3}[spec.weight]
    assert bits / 32 < ratio <= limit


# ---- what is wrong is named


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "activation_scale", "activation_zero_point", "bias"])
def test_missing_quantized_tensor_is_named(broken: Path, leaf: str) -> None:
    name = f"{BLOCK}.attn1.to_q.{leaf}"
    edit_tensors(broken, lambda found: found.pop(name))
    with pytest.raises(CheckpointError, match=f"1 tensors? (is|are) missing.*{name}"):
        load(broken)


def test_missing_float_tensors_are_named_too(broken: Path) -> None:
    names = [f"{BLOCK}.attn1.to_out.0.weight", "proj_out_2.bias"]
    edit_tensors(broken, lambda found: [found.pop(n) for n in names])
    with pytest.raises(CheckpointError, match=f"{names[1]}.*{names[0]}|{names[0]}.*{names[1]}"):
        AutoModel.from_pretrained(broken)


def test_tensor_missing_from_its_shard_is_an_error(pipeline: DiTPipeline, tmp_path: Path) -> None:
    """The index still promises it."""
    pipeline.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    name = f"{BLOCK}.attn1.to_q.weight"
    shard = tmp_path / json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"][name]
    found = load_file(shard)
    del found[name]
    save_file(found, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_missing_shard_is_an_error(pipeline: DiTPipeline, tmp_path: Path) -> None:
    pipeline.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "activation_scale"])
def test_misshapen_tensor_is_named_with_both_shapes(broken: Path, leaf: str) -> None:
    name = f"{BLOCK}.attn1.to_q.{leaf}"

    def cut(found: dict[str, Tensor]) -> None:
        found[name] = found[name][:-1].clone()

    whole = tuple(load_file(broken / WEIGHTS)[name].shape)
    edit_tensors(broken, cut)
    promise = rf"{name} has shape \({whole[0] - 1},.*promises \({whole[0]},"
    with pytest.raises(CheckpointError, match=promise):
        load(broken)


@pytest.mark.parametrize("change", [{"weight": "int8"}, {"weight": "int3"}, {"group_size": 8}])
def test_config_of_another_export_does_not_fit(broken: Path, change: dict[str, Any]) -> None:
    edit_config(broken, lambda config: config["layers"][f"{BLOCK}.attn1.to_q"].update(change))
    with pytest.raises(CheckpointError, match=rf"{BLOCK}\.attn1\.to_q\.weight"):
        load(broken)


@pytest.mark.parametrize(
    ("leaf", "dtype"), [("weight", torch.float32), ("weight", torch.int8), ("weight_scale", torch.float16)]
)
def test_tensor_of_another_type_is_named(broken: Path, leaf: str, dtype: torch.dtype) -> None:
    """int4 bytes are unsigned; a file whose floats were cast lost its scales' digits."""
    name = f"{BLOCK}.attn1.to_q.{leaf}"

    def cast(found: dict[str, Tensor]) -> None:
        found[name] = found[name].to(dtype)

    edit_tensors(broken, cast)
    with pytest.raises(CheckpointError, match=name):
        load(broken)


def test_tensor_the_config_does_not_promise_is_named(broken: Path) -> None:
    """An asymmetric export with a config that says symmetric would compute without its zero points."""
    edit_config(broken, lambda config: config["layers"][f"{BLOCK}.attn1.to_k"].update(symmetric=True))
    with pytest.raises(CheckpointError, match=rf"{BLOCK}\.attn1\.to_k\.weight_zero_point"):
        load(broken)


@pytest.mark.parametrize("version", [0, 2, "2"])
def test_other_format_version_names_both(broken: Path, version: Any) -> None:
    edit_config(broken, lambda config: config.update(version=version, novelty={"a": 1}))
    with pytest.raises(CheckpointError, match=rf"format version {version}; this accuquant reads version 1"):
        load(broken)


def test_unknown_keys_are_named(broken: Path) -> None:
    edit_config(broken, lambda config: config.update(zeta=1, alpha=2))
    with pytest.raises(CheckpointError, match="unknown keys: alpha, zeta"):
        load(broken)


def test_unknown_key_of_a_layer_is_named(broken: Path) -> None:
    edit_config(broken, lambda config: config["layers"][f"{BLOCK}.ff.net.2"].update(rank=4))
    with pytest.raises(CheckpointError, match=r"layers.*'rank'"):
        load(broken)


@pytest.mark.parametrize("key", ["layers", "timestep_edges"])
def test_missing_key_is_named(broken: Path, key: str) -> None:
    edit_config(broken, lambda config: config.pop(key))
    with pytest.raises(CheckpointError, match=key):
        load(broken)


@pytest.mark.parametrize(
    "fields", [{"weight": "int5"}, {"weight": "float"}, {"activation": "fp8"}, {"activation_scale": "dynamical"}]
)
def test_impossible_layer_is_named(broken: Path, fields: dict[str, Any]) -> None:
    edit_config(broken, lambda config: config["layers"][f"{BLOCK}.attn1.to_q"].update(fields))
    with pytest.raises(CheckpointError, match=next(iter(fields.values()))):
        load(broken)


@pytest.mark.parametrize(
    ("name", "found"), [("transformer_blocks.7.attn1.to_q", "nothing"), (f"{BLOCK}.ff", "FeedForward")]
)
def test_layer_that_the_model_lacks_is_named(broken: Path, name: str, found: str) -> None:
    edit_config(broken, lambda config: config["layers"].update({name: {"weight": "int8"}}))
    with pytest.raises(CheckpointError, match=f"names {name}, where DiTTransformer2DModel has {found}"):
        load(broken)


def test_group_size_that_does_not_divide_is_named(broken: Path) -> None:
    edit_config(broken, lambda config: config["layers"][f"{BLOCK}.attn1.to_q"].update(group_size=24))
    with pytest.raises(ValueError, match=rf"24 does not divide the 32 inputs of {BLOCK}\.attn1\.to_q"):
        load(broken)


def test_edges_that_do_not_descend_are_refused(broken: Path) -> None:
    edit_config(broken, lambda config: config.update(timestep_edges=[250.0, 700.0]))
    with pytest.raises(ValueError, match="descend"):
        load(broken)


@pytest.mark.parametrize("keep", [0, 4, 1000, 0.5, -1], ids=str)
def test_truncated_file_is_an_error(broken: Path, keep: float) -> None:
    """Cut to nothing, inside the header, in the middle, by one byte: never a model of zeros."""
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises((OSError, ValueError)):
        load(broken)


def test_config_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(CheckpointError, match="layers"):
        AccuQuantConfig({"a": {"weight": "int9"}}, [])


def test_needs_only_the_import(folder: Path, tmp_path: Path) -> None:
    """A fresh process: diffusers alone refuses by name, and understands once accuquant has been imported after it."""
    code = f"""
import torch
from diffusers import DiTPipeline
try:
    DiTPipeline.from_pretrained({str(folder)!r})
except ValueError as error:
    print(error)
else:
    raise SystemExit("it loaded without accuquant")
import accuquant
from safetensors.torch import save_file
model = DiTPipeline.from_pretrained({str(folder)!r}).transformer
save_file(model.state_dict(), {str(tmp_path / "found")!r})
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got accuquant" in done.stdout
    assert_same(load_file(tmp_path / "found"), load_file(folder / "transformer" / WEIGHTS))
