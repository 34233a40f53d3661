"""What an export holds, as `accuquant inspect` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from accuquant.errors import RecipeError
from accuquant.export.load import exported_layers, exported_networks, load_export, recipe_of
from accuquant.export.torchao import stored_tensors
from accuquant.pipeline.denoisers import joined
from accuquant.runtime.arithmetic import arithmetic_used, describe_arithmetic, measure_paths
from accuquant.runtime.attention import quantized_attention
from accuquant.runtime.cache.attach import controller_of
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer, quantized_layers
from accuquant.runtime.split import split_layers

COLUMNS = (
    "module",
    "shape",
    "weight",
    "group",
    "activation",
    "weight scale",
    "activation scale",
    "path",
    "chosen",
    "kB",
)


def contents(folder: Path, measure: bool = False) -> tuple[Table, list[str]]:
    """A row for each quantized module, and lines about the whole.

    Args:
        measure: time the paths of each kind of layer first, and keep the fastest for this machine.

    Raises:
        RecipeError: the folder is no export, or there is nothing to measure in it.
        OSError: the user's cache folder cannot be written to.
    """
    networks = exported_networks(load_export(folder, recipe_of(folder, ["model.device=auto"])))
    denoiser = joined(networks)
    timed = _measure(denoiser, folder) if measure else []
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column)
    total = 0
    for name, layer in exported_layers(denoiser).items():
        size = _bytes(layer)
        total += size
        cells = _ours(layer) if isinstance(layer, QuantizedLayer) else _torchao(layer)
        table.add_row(name, f"{layer.out_features}x{layer.in_features}", *cells, f"{size / 1e3:.1f}")
    rest = _bytes(denoiser) - total
    lines = [*timed, f"quantized layers {total / 1e6:.3f} MB, float rest {rest / 1e6:.3f} MB"]
    if not quantized_layers(denoiser):
        return table, [*lines, "format: torchao; diffusers and torchao load it without accuquant"]
    lines.append(f"computed by {describe_arithmetic(arithmetic_used(denoiser))}")
    for name, network in networks.items():
        where, clock = f"{name}: " if len(networks) > 1 else "", getattr(network, "step_clock", None)
        assert isinstance(clock, StepClock)
        edges = ", ".join(f"{e:g}" for e in clock.edges)
        lines.append(f"{where}timestep groups: {clock.num_groups}, edges at timesteps {edges or 'none'}")
        if products := quantized_attention(network):
            types = sorted({f"{of.spec.activation}, softmax {of.spec.softmax}" for of in products.values()})
            lines.append(f"{where}products of attention: {len(products)} modules, {' and '.join(types)}")
        if split := split_layers(network):
            lines.append(f"{where}split: {len(split)} modules, each part of whose input has scales of its own")
        controller = controller_of(network)
        given = controller.plan.to_dict() if controller else {}
        lines.append(f"{where}cache: {', '.join(f'{k} {v}' for k, v in given.items()) or 'none'}")
    return table, lines


def _measure(denoiser: nn.Module, folder: Path) -> list[str]:
    seconds, file = measure_paths(denoiser)
    if file is None:
        raise RecipeError(f"--measure: no layer of {folder} has more than one path here")
    lines = ["milliseconds of one product, quantization of the input included:"]
    for facts, times in seconds.items():
        lines.append(f"  {facts}: " + ", ".join(f"{path} {1e3 * taken:.3f}" for path, taken in times.items()))
    return [*lines, f"kept for this machine in {file}", ""]


def _ours(layer: QuantizedLayer) -> tuple[str, ...]:
    spec = layer.spec
    scales = layer.activation_scale if spec.activation != "float" else None
    return (
        spec.weight + ("" if spec.symmetric else " asym"),
        str(spec.group_size or "row"),
        f"{spec.activation} {spec.activation_scale}" if spec.activation != "float" else "float",
        _span(layer.weight_scale),
        "" if scales is None else ("clip " if not spec.static else f"{len(scales)}: ") + _span(scales),
        layer.path,
        layer.why or "",
    )


def _torchao(layer: Any) -> tuple[str, ...]:
    weight = layer.weight
    static = weight.act_quant_scale is not None
    activation = "float" if weight.act_quant_kwargs is None else f"int8 {'static' if static else 'dynamic'}"
    scale = "1: " + _span(weight.act_quant_scale) if static else ""
    return "int8", "row", activation, _span(weight.scale), scale, "torchao", ""


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in stored_tensors(module))


def _span(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
