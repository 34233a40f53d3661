"""Exports in torchao's format: what they hold, and that a process without accuquant computes the same from them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import as_allocated, recipe_tree
from pipelines import make_pipeline, make_pixart
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from accuquant.calibration.layers import DYNAMIC_CLIP, trainable_layers
from accuquant.calibration.session import open_session
from accuquant.cli.generate import generate
from accuquant.errors import RecipeError
from accuquant.export.load import load_export, recipe_of
from accuquant.export.native import harden_model
from accuquant.export.torchao import convert_model, input_dimensions, torchao_installed, torchao_layers
from accuquant.pipeline.data import load_split
from accuquant.programs.calibrate import calibrate
from accuquant.programs.describe import describe
from accuquant.programs.evaluate import evaluate
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.arithmetic import set_arithmetic
from accuquant.runtime.layer import QuantizedLayer, quantized_layers

REASON = "needs accuquant[torchao]"
needs_torchao = pytest.mark.skipif(not torchao_installed(), reason=REASON)

QUIET = Reporter(quiet=True)
ATTENTION, MLP, NORM = (rf"transformer_blocks\.\d+\.{m}" for m in (r"attn1\..*", r"ff\..*", r"norm1\.linear"))
STATIC = {"modules": ATTENTION, "weight": "int8", "activation": "int8"}
DYNAMIC = {"modules": MLP, "weight": "int8", "activation": "int8", "activation_scale": "dynamic"}
WEIGHT_ONLY = {"modules": NORM, "weight": "int8", "tune": False}
RULES = [STATIC, DYNAMIC, WEIGHT_ONLY]
LEARN = ["weight", "weight_scale", "bias"]

# What a user without accuquant runs; the finder makes sure that there is none, however this one was installed.
STRANGER = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])

class NoAccuquant:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "accuquant":
            raise ImportError("accuquant is not installed")

sys.meta_path.insert(0, NoAccuquant())
import torch
torch.set_num_threads(1)
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file

folder, given, result = sys.argv[2:]
pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
given = load_file(given)
found = {}
with torch.no_grad():
    for t in (900, 300):
        labels, times = torch.tensor([1, 2]), torch.tensor([t, t])
        found[f"output {t}"] = pipeline.transformer(given["x"], timestep=times, class_labels=labels).sample
for name, module in pipeline.transformer.named_modules():
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Tensor":
        for part in ("qdata", "scale", "act_quant_scale", "act_quant_zero_point"):
            if getattr(weight, part) is not None:
                found[f"{name} {part}"] = getattr(weight, part).contiguous()
classes = given["classes"].tolist()
generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(len(classes))]
images = pipeline(
    classes, guidance_scale=1.5, num_inference_steps=6, generator=generators, output_type="np"
).images
found["images"] = torch.tensor(images)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, result)
assert not [name for name in sys.modules if name.split(".")[0] == "accuquant"]
"""


def stranger(folder: Path, workplace: Path, classes: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Tensors, outputs and images of an export, found by a process that cannot import accuquant."""
    from safetensors.torch import save_file

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    save_file({"x": x, "classes": torch.tensor(classes or [1, 2])}, workplace / "given.safetensors")
    paths = [p for p in sys.path if (Path(p) / "torchao").is_dir()]  # -I passes over PYTHONPATH
    command = [
        sys.executable,
        "-I",
        "-c",
        STRANGER,
        json.dumps(paths),
        str(folder),
        str(workplace / "given.safetensors"),
    ]
    done = subprocess.run([*command, str(workplace / "found")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return load_file(workplace / "found") | {"x": x}


def tree(model: Path, output: Path, rules: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    given = {
        "quantization": {"timestep_groups": 1, "rules": rules},
        "objective": {"iterations": 3, "batch_size": 2, "learn": LEARN},
        "export": {"output": str(output), "format": "torchao"},
    }
    return recipe_tree(model, output, **(given | changes))


def make_recipe(model: Path, output: Path, rules: list[dict[str, Any]], **changes: Any) -> Recipe:
    return parse_recipe(tree(model, output, rules, **changes), "test")


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torchao_installed():
        pytest.skip(REASON)
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("exports") / "w8a8", RULES), QUIET)


@needs_torchao
@pytest.mark.parametrize(
    ("rules", "tolerance"),
    [
        ([{**STATIC, "activation_symmetric": True}, {**STATIC, "modules": MLP}, WEIGHT_ONLY], 1e-5),
        # half of all tokens have their extreme at -127.5 steps, which torchao and we round as float32 happens to
        ([{**STATIC, "activation_symmetric": False}, DYNAMIC, WEIGHT_ONLY], 1e-2),
    ],
    ids=["static", "dynamic"],
)
def test_a_stranger_gets_calibrations_integers_and_our_arithmetic(
    rules: list[dict[str, Any]], tolerance: float, model_folder: Path, tmp_path: Path
) -> None:
    """Integers and scales are equal, outputs but for rounding, of static, dynamic and weight-only modules."""
    recipe = make_recipe(model_folder, tmp_path / "out", rules)
    session = open_session(recipe, QUIET)
    session.loop(recipe.objective, 1).run()
    denoiser = session.network
    twin = copy.deepcopy(denoiser)
    harden_model(twin, twin.step_clock)
    set_arithmetic(twin, "reference")
    convert_model(denoiser, dict.fromkeys(trainable_layers(denoiser), 3), torch.float32)
    session.model.recorder.pipeline.save_pretrained(tmp_path / "saved")

    found = stranger(tmp_path / "saved", tmp_path)
    layers = quantized_layers(twin)
    assert {n.split()[0] for n in found if n.endswith("qdata")} == set(layers) and len(layers) == 2 * 7
    for name, layer in layers.items():
        assert torch.equal(found[f"{name} qdata"], layer.integer_weight())
        assert torch.equal(found[f"{name} scale"], layer.weight_scale)
        assert found[f"{name} scale"].dtype == torch.float32
        assert (f"{name} act_quant_scale" in found) == layer.spec.static
        if layer.spec.static:
            assert torch.equal(found[f"{name} act_quant_scale"].view(1), layer.activation_scale)
            assert (f"{name} act_quant_zero_point" in found) != layer.spec.activation_symmetric
        if layer.activation_zero_point is not None:
            assert torch.equal(found[f"{name} act_quant_zero_point"].view(1), layer.activation_zero_point)
    for t in (900, 300):
        with torch.no_grad():
            expected = twin(found["x"], timestep=torch.tensor([t, t]), class_labels=torch.tensor([1, 2])).sample
        assert float((found[f"output {t}"] - expected).norm() / expected.norm()) < tolerance


@needs_torchao
@pytest.mark.parametrize("rule", [STATIC, {**STATIC, "activation_symmetric": True}, {**STATIC, **DYNAMIC}, WEIGHT_ONLY])
@pytest.mark.parametrize("shape", [(6, 48), (2, 5, 48)])
def test_one_layer_equals_ours(rule: dict[str, Any], shape: tuple[int, ...]) -> None:
    """To float rounding. A token's extreme is at 127.5 steps of a dynamic scale: if positive, both clamp it to 127."""
    from accuquant.calibration.layers import adopt_dynamic_scales, quantize_model
    from accuquant.calibration.plan import plan_modules
    from accuquant.recipe import Rule
    from accuquant.runtime.clock import StepClock

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(48, 32)

        def forward(self, x: torch.Tensor, timestep: int = 0) -> torch.Tensor:
            return self.inner(x)

        def register_to_config(self, **given: Any) -> None:
            self.given = given

    torch.manual_seed(0)
    model, (plan,) = Alone(), plan_modules(Alone(), (Rule(**{**rule, "modules": "inner"}),))
    layers = quantize_model(model, {"inner": plan.spec}, StepClock([]), search=True)
    adopt_dynamic_scales(layers.values())
    x = torch.randn(shape)
    x[..., 0] = 4.0
    if plan.spec.static:
        layers["inner"].set_activation_scale([x.flatten()], search=False)
    with torch.no_grad():
        ours = layers["inner"].harden()
        ours.arithmetic = "reference"
        expected = ours(x)
        convert_model(model, {"inner": len(shape)}, torch.float32)
        found = model(x, timestep=0)
    assert list(torchao_layers(model)) == ["inner"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_torchao
def test_same_calibration_in_both_formats(model_folder: Path, tmp_path: Path) -> None:
    """The whole program twice, static scales: integers, scales and figures of one format are those of the other."""
    folders = {}
    for name in ("accuquant", "torchao"):
        changes = {"export": {"output": str(tmp_path / name), "format": name}}
        folders[name] = calibrate(make_recipe(model_folder, tmp_path / name, [STATIC, WEIGHT_ONLY], **changes), QUIET)
    ours = load_file(folders["accuquant"] / "transformer" / "diffusion_pytorch_model.safetensors")
    path = folders["torchao"] / "transformer" / "diffusion_pytorch_model.safetensors"
    theirs = load_file(path)
    names = {"_weight_qdata": "weight", "_weight_scale": "weight_scale", "_weight_act_quant_scale": "activation_scale"}
    names |= {"_weight_act_quant_zero_point": "activation_zero_point"}
    assert len(ours) == len(theirs)
    for key, value in theirs.items():
        module, _, leaf = key.rpartition(".")
        expected = ours[f"{module}.{names.get(leaf, leaf)}"]
        assert torch.equal(value.view(expected.shape), expected) and value.dtype == expected.dtype, key
    with safe_open(path, framework="pt") as file:
        assert "Int8Tensor" in file.metadata()["transformer_blocks.0.attn1.to_q.weight"]
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders.values()]
    assert metrics[0]["size"] == metrics[1]["size"] and metrics[0]["bit_operations"] == metrics[1]["bit_operations"]
    assert metrics[1]["latent_psnr"] == pytest.approx(metrics[0]["latent_psnr"], abs=0.3)
    errors = [{m["name"]: m["relative_error"] for m in each["modules"] if m["weight"] == "int8"} for each in metrics]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_folder_holds_no_pickle_and_says_what_it_is(export: Path) -> None:
    endings = {p.suffix for p in export.rglob("*") if p.is_file()}
    assert endings <= {".safetensors", ".json", ".yaml", ".html", ".md"}
    config = json.loads((export / "transformer" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["quant_method"] == "torchao"
    kinds = {m["_type"] for m in config["quant_type"]["default"]["_data"]["fqn_to_config"].values()}
    expected = {"Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8StaticActivationInt8WeightConfig"}
    assert kinds == expected
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "import accuquant" not in card and "dtype=torch.float32" in card


def test_figures_are_those_a_stranger_finds(export: Path, model_folder: Path, tmp_path: Path) -> None:
    metrics = json.loads((export / "metrics.json").read_text())
    pipeline = DiTPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    held_out = load_split(recipe_of(export).data, pipeline).held_out
    classes = [held_out[i % len(held_out)]["class_id"] for i in range(3)]
    found = stranger(export, tmp_path, classes)["images"].double()
    noise = [torch.Generator().manual_seed(1_000_000 + i) for i in range(3)]
    full = pipeline(classes, guidance_scale=1.5, num_inference_steps=6, generator=noise, output_type="np").images
    error = (found - torch.tensor(full, dtype=torch.float64)).square().mean()
    assert metrics["psnr"] == pytest.approx(float(-10 * torch.log10(error)), abs=0.01)


def test_size_is_that_of_the_tensors(export: Path) -> None:
    tensors = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    metrics = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["size"]["quantized_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_evaluating_again_gives_the_same_figures(export: Path) -> None:
    before = json.loads((export / "metrics.json").read_text(encoding="utf-8"))
    evaluate(export, recipe_of(export), QUIET)
    assert json.loads((export / "metrics.json").read_text(encoding="utf-8")) == before


def test_inspect_and_generate(export: Path, tmp_path: Path) -> None:
    from accuquant.cli.inspect import contents

    table, lines = contents(export)
    cells = {row[0]: row[1:] for row in zip(*(column._cells for column in table.columns), strict=True)}
    assert len(cells) == 2 * 7
    kinds = {name: cells[f"transformer_blocks.0.{name}"][3] for name in ("attn1.to_q", "ff.net.2", "norm1.linear")}
    assert kinds == {"attn1.to_q": "int8 static", "ff.net.2": "int8 dynamic", "norm1.linear": "float"}
    assert lines[-1].startswith("format: torchao")
    generate(export, ["3"], 0, tmp_path / "one.png", False, QUIET)
    assert (tmp_path / "one.png").is_file()
    with pytest.raises(RecipeError, match="--reference"):
        generate(export, ["3"], 0, tmp_path / "two.png", True, QUIET)
    assert not (tmp_path / "two.png").exists()


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_scales_stay_float32_in_shards_and_in_other_types(
    dtype: torch.dtype | None, export: Path, tmp_path: Path
) -> None:
    """Without a dtype, diffusers makes the denoiser bfloat16 and leaves the autoencoder float32: no image then."""
    pipeline = load_export(export, recipe_of(export))
    pipeline.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again" / "transformer").glob("*.safetensors"))) > 2
    loaded = DiTPipeline.from_pretrained(tmp_path / "again", dtype=dtype)
    before, after = torchao_layers(pipeline.transformer), torchao_layers(loaded.transformer)
    assert before.keys() == after.keys() and loaded.transformer.dtype == (dtype or torch.bfloat16)
    for name, layer in before.items():
        weight, again = layer.weight, after[name].weight
        assert torch.equal(weight.qdata, again.qdata) and torch.equal(weight.scale, again.scale)
        assert again.scale.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    latent = loaded.transformer(
        torch.randn(1, 4, 8, 8, dtype=loaded.transformer.dtype), torch.tensor([5]), class_labels=torch.tensor([1])
    )
    assert bool(latent.sample.isfinite().all())
    if dtype is not None:
        assert bool(loaded([1], num_inference_steps=2, output_type="pt").images.isfinite().all())


@needs_torchao
def test_tensors_at_the_models_root(tmp_path: Path) -> None:
    """PixArt has a table beside its modules, and inputs of two and of three dimensions."""
    from diffusers import PixArtTransformer2DModel

    from accuquant.calibration.layers import quantize_model
    from accuquant.runtime.clock import StepClock
    from accuquant.runtime.spec import LayerSpec

    model = make_pixart().transformer
    spec = LayerSpec("int8", "int8", activation_symmetric=True)
    names = ["transformer_blocks.0.attn1.to_q", "adaln_single.linear", "proj_out"]
    x, states = torch.randn(1, 4, 32, 32), torch.randn(1, 5, 16)
    none = {"resolution": None, "aspect_ratio": None}

    def call(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(x, states, timestep=torch.tensor([5]), added_cond_kwargs=none).sample

    dimensions = input_dimensions(model, names, lambda: call(model))
    assert dimensions == {names[0]: 3, names[1]: 2, names[2]: 3}
    layers = quantize_model(model, dict.fromkeys(names, spec), StepClock([]), search=False)
    for layer in layers.values():
        layer.set_activation_scale([torch.linspace(-3, 3, 100)], search=False)
    convert_model(model, dimensions, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = as_allocated(PixArtTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32))
    assert torch.equal(call(loaded), call(model))


def test_a_module_that_is_called_with_unlike_inputs() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer})
    with pytest.raises(ValueError, match="a has inputs of 1 and 2 dimensions"):
        input_dimensions(model, ["a"], lambda: (layer(torch.zeros(4)), layer(torch.zeros(1, 4))))
    with pytest.raises(ValueError, match="a is not called"):
        input_dimensions(model, ["a"], lambda: None)


@needs_torchao
def test_convolutions_are_refused_before_anything_is_computed(model_folder: Path, tmp_path: Path) -> None:
    rules = [*RULES, {"modules": r"pos_embed\.proj", "weight": "int8"}]
    recipe = make_recipe(model_folder, tmp_path / "out", rules)
    for program in (lambda: calibrate(recipe, QUIET), lambda: describe(recipe)):
        with pytest.raises(RecipeError, match=r"quantize pos_embed\.proj, a Conv2d; give it weight: float"):
            program()
    assert list(tmp_path.iterdir()) == []


def test_without_torchao(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("accuquant.export.formats.torchao_installed", lambda: False)
    with pytest.raises(RecipeError, match=r"pip install 'accuquant\[torchao\]'"):
        calibrate(make_recipe(model_folder, tmp_path / "out", RULES), QUIET)
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr("accuquant.export.load.torchao_installed", lambda: False)
    with pytest.raises(RecipeError, match=r"is in torchao's format, .*: pip install 'accuquant\[torchao\]'"):
        load_export(tmp_path, make_recipe(model_folder, tmp_path / "out", RULES))


@needs_torchao
def test_layers_that_torchao_cannot_hold_are_not_written() -> None:
    from accuquant.calibration.layers import quantize_model
    from accuquant.runtime.clock import StepClock
    from accuquant.runtime.spec import LayerSpec

    for spec in (LayerSpec("int4"), LayerSpec("int8", symmetric=False), LayerSpec("int8", group_size=16)):
        model = make_pipeline().transformer
        quantize_model(model, {"proj_out_1": spec}, StepClock([]), search=False)
        with pytest.raises(ValueError, match="proj_out_1: torchao's Int8Tensor cannot hold"):
            convert_model(model, {}, torch.float32)
    model = make_pipeline().transformer
    spec = LayerSpec("int8", "int8", activation_scale="dynamic", activation_symmetric=True)
    layers = quantize_model(model, {"proj_out_1": spec}, StepClock([]), search=False)
    assert isinstance(layers["proj_out_1"].harden(), QuantizedLayer) and DYNAMIC_CLIP < 1
    with pytest.raises(ValueError, match=r"no clip ratio, this one is 1\.0000"):
        convert_model(model, {}, torch.float32)
