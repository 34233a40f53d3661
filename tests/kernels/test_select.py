"""Which path computes a layer: a rule that nothing on the machine can move, what a person fixes, what was measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import busy_cores
from layers import MODULES, every_module, make_input, make_layer, oracle, relative
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from accuquant import set_arithmetic
from accuquant.calibration.layers import quantize_model
from accuquant.core.numerics import QTYPES
from accuquant.export.native import harden_model
from accuquant.kernels import cpu, measured, select
from accuquant.kernels.backend import Facts
from accuquant.runtime.arithmetic import arithmetic_used, describe_arithmetic, measure_paths
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import quantized_layers
from accuquant.runtime.spec import LayerSpec

CPU = torch.device("cpu")
W8A8 = Facts(QTYPES["int8"], QTYPES["int8"], 1152, 4608, 1, True, False, True, CPU)
W4A8 = dataclasses.replace(W8A8, weight=QTYPES["int4"], groups=9)
SPECS = [
    LayerSpec("int8", "int8"),
    LayerSpec("int8", "int8", activation_scale="dynamic", activation_symmetric=True),
    LayerSpec("int4", "int8", 16),
    LayerSpec("int8"),
]


def make_model() -> Any:
    """Layers of each kind; the same whenever it is called."""
    model, clock = make_pipeline().transformer, StepClock([500.0])
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer_blocks")]
    names = [n for n in names if ".emb." not in n]
    specs = {name: SPECS[3 if "norm" in name else k % 3] for k, name in enumerate(names)}
    samples = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for layer in quantize_model(model, specs, clock, search=False).values():
        if layer.spec.static:
            layer.set_activation_scale([3 * samples, samples], search=False)
    harden_model(model, clock)
    return model


@torch.no_grad()
def call(model: Any) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found: Tensor = model(x, timestep=torch.tensor([900, 900]), class_labels=torch.tensor([1, 2])).sample
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return type(make_pipeline().transformer).from_pretrained(folder)


# ---- the rule

LOAD = """
import json, sys, torch
import accuquant
from accuquant.runtime.layer import quantized_layers
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
torch.set_num_threads(int(sys.argv[3]))
model = DiTTransformer2DModel.from_pretrained(sys.argv[1])
x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    y = model(x, timestep=torch.tensor([900, 900]), class_labels=torch.tensor([1, 2])).sample
save_file({"y": y}, sys.argv[2])
print(json.dumps({name: layer.path for name, layer in quantized_layers(model).items()}))
"""


def test_two_loads_on_a_busy_machine_compute_the_same(folder: Path, tmp_path: Path) -> None:
    """In processes of their own, one of them alone, one beside others that take all cores, one of other threads."""

    def run(name: str, threads: int = 1) -> tuple[dict[str, str], Tensor]:
        file = tmp_path / name
        command = [sys.executable, "-c", LOAD, str(folder), str(file), str(threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(out.splitlines()[-1]), load_file(file)["y"]

    first = run("alone")
    with busy_cores():
        second = run("busy")
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert run("threads", 2)[0] == first[0]


def test_nothing_is_timed_by_a_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "measure", lambda *_, **__: pytest.fail("a load measures"))
    monkeypatch.setattr(measured, "keep", lambda *_, **__: pytest.fail("a load writes"))
    layers = quantized_layers(load(folder))
    assert {layer.why for layer in layers.values()} == {"rule"}
    assert all(layer.path == select.choose(layer.facts).backend.name for layer in layers.values())


@pytest.mark.parametrize("tier", cpu.TIERS)
def test_every_cpu_has_a_rule(tier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every kind of layer a path that can compute it; weights alone have no integer product."""
    monkeypatch.setattr(cpu, "tier", lambda: tier)
    for weight in ("int8", "int6", "int4", "int3"):
        for facts in (W8A8, dataclasses.replace(W8A8, dynamic=True, shifted=False), W4A8):
            facts = dataclasses.replace(facts, weight=QTYPES[weight])
            choice = select.choose(facts)
            assert choice.why == "rule" and choice.backend.takes(facts)
            assert choice == select.choose(dataclasses.replace(facts))
            assert select.choose(dataclasses.replace(facts, activation=None, shifted=False)).backend is select.FLOAT


def test_small_groups_on_a_gpu_pay_only_in_small_layers() -> None:
    """The rule alone, which needs no device: groups of 32 lost by up to 2.7 times in large layers, and won in small."""
    rule = {b.name: b for b in select.BACKENDS}["triton"]
    large = dataclasses.replace(W4A8, device=torch.device("cuda"))
    assert large.inputs // large.groups == 128 and rule.pays(large) and rule.pays(dataclasses.replace(large, groups=1))
    small_groups = dataclasses.replace(large, groups=large.inputs // 32)
    assert not rule.pays(small_groups) and rule.pays(dataclasses.replace(small_groups, outputs=1152))


def test_environment_limits_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "widest", lambda: "amx")
    found = {}
    for limit in ("", "AVX2", "avx512_core", "AVX512_CORE_VNNI", "AVX512_CORE_AMX", "ALL"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        found[limit] = cpu.tier()
    assert list(found.values()) == ["amx", "avx2", "avx512", "vnni", "amx", "amx"]
    monkeypatch.setattr(cpu, "widest", lambda: "avx2")  # a limit gives no instructions
    assert cpu.tier() == "avx2"


def test_facts_are_told_apart_by_their_line() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"weight": QTYPES["int4"]},
        {"activation": QTYPES["int4"]},
        {"inputs": 384},
        {"outputs": 384},
        {"groups": 9},
        {"symmetric": False},
        {"dynamic": True},
        {"shifted": False},
        {"device": torch.device("cuda")},
    ]
    assert len({str(dataclasses.replace(W8A8, **change)) for change in changes}) == len(changes)


# ---- what a person fixes


@pytest.mark.parametrize("path", ["int_mm", "float"])
def test_environment_fixes_a_path(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the layers that it can compute; the others keep the rule's."""
    expected = call(load(folder))
    monkeypatch.setenv(select.VARIABLE, path)
    model = load(folder)
    for layer in quantized_layers(model).values():
        fixed = path == "float" or layer.spec.activation != "float"
        assert (layer.path, layer.why) == ((path, "fixed") if fixed else ("float", "rule"))
    assert relative(call(model), expected.double()) < 2e-2
    monkeypatch.setenv(select.VARIABLE, "int-mm")
    with pytest.raises(ValueError, match=r"ACCUQUANT_PATH: no path is named 'int-mm' \(did you mean 'int_mm'"):
        load(folder)


def test_set_arithmetic_fixes_a_path_and_gives_it_back(folder: Path) -> None:
    model = load(folder)
    expected, before = call(model), {n: layer.path for n, layer in quantized_layers(model).items()}
    for path in ("int_mm", "float"):
        set_arithmetic(model, path)
        for layer in quantized_layers(model).values():
            kept = path == "int_mm" and layer.spec.activation == "float"  # no integers to multiply
            assert (layer.path, layer.why) == (("float", "rule") if kept else (path, "fixed"))
        assert relative(call(model), expected.double()) < 2e-2
    set_arithmetic(model, "integer")
    assert {n: layer.path for n, layer in quantized_layers(model).items()} == before
    assert torch.equal(call(model), expected)


def test_set_arithmetic_says_which_layers_cannot(folder: Path) -> None:
    model = load(folder)
    before = arithmetic_used(model)
    with pytest.raises(
        ValueError, match=r"scaled_mm cannot compute (\d+) of \1 layers: .* has no small floats.*and \d+ more"
    ):
        set_arithmetic(model, "scaled_mm")
    if select.named("onednn").takes(W8A8):
        with pytest.raises(ValueError, match=r"of 14 layers: transformer_blocks\S+ has weights that are not int8"):
            set_arithmetic(model, "onednn")
    assert arithmetic_used(model) == before


def test_what_was_used_is_said(folder: Path) -> None:
    model = load(folder)
    set_arithmetic(model, "float")
    used = arithmetic_used(model)
    assert used["paths"] == {"float": {"fixed": 14}} and used["instructions"] in cpu.TIERS
    line = describe_arithmetic(used)
    assert line.startswith("14 float (fixed); ") and line.endswith(f"1 thread, torch {torch.__version__}")
    set_arithmetic(model, "reference")
    assert arithmetic_used(model)["paths"] == {"reference": {"fixed": 14}}
    json.dumps(used)


# ---- what was measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCUQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_choices_are_kept_for_this_machine(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"onednn": 2.0, "int_mm": 3.0, "float": 1.0}
    monkeypatch.setattr(measured, "timed", lambda backend, *_: times[backend.name])
    model = load(folder)
    seconds, file = measure_paths(model)
    assert file == measured.file_of(CPU) and file is not None and file.is_relative_to(cache)
    assert all(facts.activation for facts in seconds)  # weights alone have one path
    for other in (model, load(folder)):
        layers = quantized_layers(other).values()
        assert {(layer.path, layer.why) for layer in layers if layer.facts in seconds} == {("float", "measured")}
    times["float"] = 1.9  # not enough to leave the one before it
    measure_paths(model)
    paths = {facts: select.choose(facts).backend.name for facts in seconds}
    assert paths == {facts: "onednn" if "onednn" in taken else "float" for facts, taken in seconds.items()}
    monkeypatch.setenv(select.VARIABLE, "int_mm")
    assert {select.choose(facts).why for facts in seconds} == {"fixed"}
    monkeypatch.delenv(select.VARIABLE)
    monkeypatch.setattr(cpu, "model", lambda: "another")
    assert {select.choose(facts).why for facts in seconds} == {"rule"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"paths": []}', '{"paths": {"a": 1}}', "\xff\xfe"])
def test_unreadable_choices_are_said_and_ignored(text: str, cache: Path) -> None:
    file = measured.file_of(CPU)
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=f"{file.name} cannot be read and is ignored"):
        assert select.choose(W8A8).why == "rule"
        measured.keep({W8A8: "float"}, CPU)
    assert select.choose(W8A8) == (select.FLOAT, "measured")
    measured.keep({W4A8: "int_mm"}, CPU)
    assert select.choose(W8A8).why == "measured"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_choice_that_is_no_longer_there_is_ignored(cache: Path) -> None:
    measured.keep({W8A8: "gone", W4A8: "onednn"}, CPU)
    assert {select.choose(facts).why for facts in (W8A8, W4A8)} == {"rule"}


@pytest.mark.parametrize("spec", [*SPECS, LayerSpec("int3", "int8", symmetric=False)], ids=str)
def test_every_path_of_a_layer_can_be_timed(spec: LayerSpec) -> None:
    facts = make_layer("linear", spec if spec.group_size is None else LayerSpec("int4", "int8", 8)).harden().facts
    paths = select.paths(facts)
    seconds = measured.measure(facts, paths, rows=4)
    assert list(seconds) == [path.name for path in paths] and all(0 < s < 10 for s in seconds.values())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCUQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert measured.cache_folder() == Path("/x/accuquant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measured.cache_folder() == Path.home() / ".cache" / "accuquant"


# ---- a new backend

NEW = '''
import torch

from accuquant.kernels.backend import Backend, Operand, dequantized, quantized


class Doubles(Backend):
    """All layers of integers, in float64."""

    name = "doubles"

    def refusal(self, facts):
        return "" if facts.integers else "no integers to multiply"

    def lay_out(self, weights, facts):
        return weights._replace(q=weights.q.flip(0))

    def stored(self, q):
        return q.flip(0)

    def operand(self, x, grid, facts):
        q, scale, zero = quantized(x.reshape(-1, facts.inputs), grid, facts)
        return Operand((q.double() - (0 if zero is None else zero.double())) * scale.double())

    def linear(self, x, weights, facts, dtype):
        y = x.q @ dequantized(weights._replace(q=self.stored(weights.q)), facts).double().t()
        return (y if weights.bias is None else y + weights.bias).to(dtype)
'''


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file, and the line in the table."""
    file = tmp_path / "doubles.py"
    file.write_text(NEW)
    spec = importlib.util.spec_from_file_location("doubles", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = module.Doubles()
    monkeypatch.setattr(select, "BACKENDS", (backend, *select.BACKENDS))
    return backend


def test_a_new_backend_is_a_file_and_a_line(folder: Path, doubles: Any, tmp_path: Path) -> None:
    """With a layout of its own, which no file sees; it is chosen, fixed, given up and named as the others are."""
    model = load(folder)
    layers = quantized_layers(model)
    assert {layer.path for layer in layers.values() if layer.facts.integers} == {"doubles"}
    found = call(model)
    set_arithmetic(model, "reference")
    assert relative(found, call(model).double()) < 2e-2
    model.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    set_arithmetic(model, "float")
    assert relative(call(model), found.double()) < 2e-2
    set_arithmetic(model, "doubles")
    assert torch.equal(call(model), found) and arithmetic_used(model)["paths"]["doubles"] == {"fixed": 12}
    assert torch.equal(call(model.to("cpu")), found)


@every_module
def test_a_new_backend_computes_what_float64_does(kind: str, doubles: Any) -> None:
    for spec in SPECS[:2]:
        layer, x = make_layer(kind, spec).harden(), make_input(kind)
        layer.prepare()
        with torch.no_grad():
            assert layer.backend is doubles and relative(layer(x), oracle(layer, MODULES[kind](), x)) < 1e-6
