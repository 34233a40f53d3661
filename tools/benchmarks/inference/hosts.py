"""How each model of run.py is made: ours from a saved export, other packages' by their documentation.

All int8 models start from the same weights in bfloat16, and have int8 weights and activations in the same modules. Ours
also has int8 weights elsewhere, where its recipe says so. Nothing is calibrated beyond ranges.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor

from accuquant.calibration.layers import quantize_model
from accuquant.export.native import harden_model
from accuquant.runtime.clock import StepClock
from tools.benchmarks.inference.models import Subject

GROUPS = 10  # of timesteps, as the recipes have
SAMPLE = 4096  # values kept of an activation; its extremes are among them
HOSTS: dict[str, tuple[str, ...]] = {
    "float32": ("eager",),
    "bfloat16": ("eager", "compiled"),
    "ours static": ("eager", "compiled"),
    "ours dynamic": ("eager", "compiled"),
    "ours fp8": ("eager", "compiled"),  # dynamic, where the device multiplies fp8
    "torchao": ("eager", "compiled"),
    "quanto": ("eager", "compiled"),
    "sdnq": ("eager", "compiled"),
    "bfloat16 frozen": ("compiled",),  # the weights twice: last, so that they are what waits for a second wave
    "torchao frozen": ("compiled",),
}


class Missing(Exception):
    """A package is not installed."""


@dataclass(frozen=True)
class Rival:
    """A package: ``quantize(model, names, call)`` makes the named modules int8 in place."""

    module: str
    distribution: str
    quantize: Callable[[Any, list[str], Callable[[Any], Tensor]], Any]
    helper: str = ""  # a package that it computes with where it is installed

    def version(self) -> str:
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            raise Missing("not installed")
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise Missing(f"not installed ({error})") from error
        if not self.helper:
            return version(self.distribution)
        there = importlib.util.find_spec(self.helper) is not None
        beside = f"with {self.helper} {version(self.helper)}" if there else f"without {self.helper}"
        return f"{version(self.distribution)} {beside}"


def _torchao(model: Any, names: list[str], call: Callable[[Any], Tensor]) -> Any:
    quantization = importlib.import_module("torchao.quantization")
    config, chosen = quantization.Int8DynamicActivationInt8WeightConfig(), set(names)
    quantization.quantize_(model, config, filter_fn=lambda module, name: name in chosen)
    return model


def _quanto(model: Any, names: list[str], call: Callable[[Any], Tensor]) -> Any:
    """Static scales for a whole tensor, from one observed step."""
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8, include=names)
    with quanto.Calibration():
        call(model)
    quanto.freeze(model)
    return model


def _sdnq(model: Any, names: list[str], call: Callable[[Any], Tensor]) -> Any:
    """Its integer product on per-token activations; it compiles its own functions also where nobody asks it to."""
    sdnq, chosen = importlib.import_module("sdnq"), set(names)
    others = [f"{name}.weight" for name, _ in model.named_modules() if name and name not in chosen]
    return sdnq.sdnq_post_load_quant(
        model,
        weights_dtype="int8",
        use_quantized_matmul=True,
        add_skip_keys=False,
        minimum_allowed_numel=0,
        modules_to_not_convert=others,
        torch_dtype=torch.bfloat16,
    )


TORCHAO = Rival("torchao", "torchao", _torchao)
RIVALS = {
    "torchao": TORCHAO,
    "torchao frozen": TORCHAO,
    "quanto": Rival("optimum.quanto", "optimum-quanto", _quanto),
    "sdnq": Rival("sdnq", "sdnq", _sdnq, helper="openvino"),
}


def load_base(subject: Subject, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    return _load(subject, folder / "base", dtype, device)


def _load(subject: Subject, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    return subject.kind.from_pretrained(folder, torch_dtype=dtype).to(device).eval()


@torch.no_grad()
def rival(host: str, subject: Subject, folder: Path, device: torch.device) -> tuple[Any, int]:
    """The model, and the bytes that its tensors would take in a file."""
    model = load_base(subject, folder, torch.bfloat16, device)
    call = subject.step(model, device, torch.bfloat16)
    model = RIVALS[host].quantize(model, subject.integer_modules(model), call)
    return model, sum(nbytes(t) for t in model.state_dict().values() if isinstance(t, Tensor))


def ours(host: str, subject: Subject, folder: Path, device: torch.device) -> tuple[Any, int]:
    """The model as diffusers loads it, and the size of its file."""
    export = folder / host.replace(" ", "-")
    return _load(subject, export, torch.bfloat16, device), sum(
        path.stat().st_size for path in export.glob("*.safetensors")
    )


def nbytes(tensor: Any) -> int:
    """Of a tensor, or of those that one of a package's own kinds is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


@torch.no_grad()
def prepare(subject: Subject, folder: Path, hosts: list[str], steps: int, device: torch.device) -> dict[str, Any]:
    """Save the float32 weights, what they give, and our exports; say what the int8 products are."""
    folder.mkdir(parents=True, exist_ok=True)
    model = subject.build()
    model.save_pretrained(folder / "base")
    names, total = subject.integer_modules(model), sum(p.numel() for p in model.parameters())
    integers = sum(model.get_submodule(name).weight.numel() for name in names)
    model.to(device)
    tokens: dict[str, int] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda module, args, n=n: tokens.update({n: args[0].numel() // args[0].shape[-1]})
        )
        for n in names
    ]
    reference = {"step": subject.step(model, device, torch.float32)(model).cpu().contiguous()}
    for handle in handles:
        handle.remove()
    counts: dict[tuple[int, int, int], int] = {}
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        shape = (tokens[name], columns, rows)
        counts[shape] = counts.get(shape, 0) + 1
        if name.endswith("to_q"):  # no model has it: Q, K and V as one product
            counts.setdefault((tokens[name], columns, 3 * rows), 0)
    if subject.sampled and steps:
        final = subject.trajectory(model, model, steps, device, torch.float32)
        reference["trajectory"] = final.cpu().contiguous()
    save_file(reference, folder / "reference.safetensors")
    del model
    for host in hosts:
        if host.startswith("ours"):
            _export(subject, folder, host, device)
    shapes = [[*shape, count] for shape, count in counts.items()]
    return {"shapes": shapes, "parameters": total, "integers": integers}


def _export(subject: Subject, folder: Path, host: str, device: torch.device) -> None:
    model, static = load_base(subject, folder, torch.bfloat16, device), host == "ours static"
    clock = StepClock([])
    if subject.sampled:
        scheduler = DDIMScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(5 * GROUPS)
        clock = StepClock.from_timesteps(scheduler.timesteps, GROUPS)
    specs = subject.specs(model, static)
    if host == "ours fp8":
        for name, spec in specs.items():
            if spec.activation != "float":
                specs[name] = replace(spec, weight="fp8", activation="fp8")
    layers = quantize_model(model, specs, clock, search=False)
    if static:
        _observe(subject, model, list(layers.values()), clock, device)
    harden_model(model, clock)
    model.save_pretrained(folder / host.replace(" ", "-"))


def _observe(subject: Subject, model: Any, layers: list[Any], clock: StepClock, device: torch.device) -> None:
    """Ranges of the float model's activations: one step of each timestep group on the way, or the one step there is."""
    layers = [layer for layer in layers if layer.spec.static]
    seen: dict[str, list[list[Tensor]]] = {layer.name: [[] for _ in range(clock.num_groups)] for layer in layers}

    def observe(layer: Any, tokens: Tensor) -> None:
        values = tokens.flatten()
        few = values[:: max(1, len(values) // SAMPLE)]
        seen[layer.name][clock.group].append(torch.cat([few, values.amin()[None], values.amax()[None]]))

    for layer in layers:
        layer.quantized, layer.observer = False, observe
    if subject.sampled:
        subject.trajectory(model, model, GROUPS, device, torch.bfloat16)
    else:
        subject.step(model, device, torch.bfloat16)(model)
    for layer in layers:
        layer.quantized, layer.observer = True, None
        layer.set_activation_scale([torch.cat(values) for values in seen[layer.name]], search=False)
