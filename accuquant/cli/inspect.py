"""What an export holds, as `accuquant inspect` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from accuquant.export.load import exported_layers, load_export, recipe_of
from accuquant.export.torchao import stored_tensors
from accuquant.model.families import denoiser_of
from accuquant.runtime.cache.hooks import controller_of
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import QuantizedLayer

COLUMNS = ("module", "shape", "weight", "group", "activation", "weight scale", "activation scale", "path", "kB")


def contents(folder: Path) -> tuple[Table, list[str]]:
    """A row for each quantized module, and lines about the whole.

    Raises:
        RecipeError: the folder is no export.
    """
    denoiser = denoiser_of(load_export(folder, recipe_of(folder, ["model.device=auto"])))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column)
    total = 0
    for name, layer in exported_layers(denoiser).items():
        size = _bytes(layer)
        total += size
        cells = _ours(layer) if isinstance(layer, QuantizedLayer) else _torchao(layer)
        table.add_row(name, f"{layer.out_features}x{layer.in_features}", *cells, f"{size / 1e3:.1f}")
    lines = [f"quantized layers {total / 1e6:.3f} MB, float rest {(_bytes(denoiser) - total) / 1e6:.3f} MB"]
    clock = getattr(denoiser, "step_clock", None)
    if isinstance(clock, StepClock):
        edges = ", ".join(f"{e:g}" for e in clock.edges)
        lines.append(f"timestep groups: {clock.num_groups}, edges at timesteps {edges or 'none'}")
        controller = controller_of(denoiser)
        given = controller.plan.to_dict() if controller else {}
        lines.append(f"cache: {', '.join(f'{k} {v}' for k, v in given.items()) or 'none'}")
    else:
        lines.append("format: torchao; diffusers and torchao load it without accuquant")
    return table, lines


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
    )


def _torchao(layer: Any) -> tuple[str, ...]:
    weight = layer.weight
    static = weight.act_quant_scale is not None
    activation = "float" if weight.act_quant_kwargs is None else f"int8 {'static' if static else 'dynamic'}"
    scale = "1: " + _span(weight.act_quant_scale) if static else ""
    return "int8", "row", activation, _span(weight.scale), scale, "torchao"


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in stored_tensors(module))


def _span(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
