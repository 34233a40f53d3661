"""How a quantized model computes on this machine: fixed by a person, asked for, measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accuquant.errors import nearest
from accuquant.kernels import cpu, measured, select
from accuquant.kernels.backend import Backend, Facts
from accuquant.runtime.layer import ARITHMETICS, QuantizedLayer, quantized_layers

WORDS = {"rule": "by rule", "measured": "as measured", "fixed": "fixed"}
MARGIN = 1.1  # a path has to be this much faster than one that stands before it in the table


def set_arithmetic(model: nn.Module, arithmetic: str) -> None:
    """Choose how a quantized model computes.

    Args:
        arithmetic: ``integer`` (default), where each layer has the path of `kernels.select.choose`; ``reference``,
            float32 on dequantized values; or the name of a path, such as ``int_mm`` or ``float``, for all layers. Where
            it multiplies integers, layers whose inputs are not quantized keep theirs. On another device the path holds
            for the layers that it can compute there.

    Raises:
        ValueError: unknown name, the model has no quantized layer, or a layer cannot be computed by that path.
    """
    layers = quantized_layers(model)
    names = [*ARITHMETICS, *(backend.name for backend in select.BACKENDS)]
    if arithmetic not in names:
        words = ", ".join(map(repr, names))
        raise ValueError(f"arithmetic must be one of {words}, found {arithmetic!r}{nearest(arithmetic, names)}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer quantized by accuquant")
    if arithmetic not in ARITHMETICS:
        layers = _taken(layers, select.named(arithmetic))
    for layer in layers.values():
        relays = {layer.arithmetic, arithmetic} - {*ARITHMETICS}
        layer.arithmetic = arithmetic
        if relays:
            layer.prepare()


def _taken(layers: dict[str, QuantizedLayer], backend: Backend) -> dict[str, QuantizedLayer]:
    """Those that the backend is to compute."""
    taken = {name: layer for name, layer in layers.items() if backend.takes(layer.facts)}
    left = {name: layer for name, layer in layers.items() if name not in taken}
    if left and taken:  # an integer product says nothing of layers that have no integers
        left = {name: layer for name, layer in left.items() if layer.facts.activation is not None}
    if left:
        shown = [f"{name} has {backend.refusal(layer.facts)}" for name, layer in list(left.items())[:3]]
        more = f", and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"{backend.name} cannot compute {len(left)} of {len(layers)} layers: {'; '.join(shown)}{more}. "
            f"Set {select.VARIABLE}={backend.name} to have it compute those that it can"
        )
    return taken


def arithmetic_used(model: nn.Module) -> dict[str, Any]:
    """How the quantized layers of a model are computed here, as metrics.json has it.

    Returns:
        ``paths``: for each path the number of its layers, by why it was chosen; ``cpu``, its ``instructions``,
        ``threads`` and the version of ``torch``; on a CUDA device also ``device``.
    """
    counts: dict[str, Counter[str]] = {}
    layers = quantized_layers(model).values()
    for layer in layers:
        reference = layer.arithmetic == "reference"
        path, why = ("reference", "fixed") if reference else (layer.path, layer.why or "fixed")
        counts.setdefault(path, Counter())[why] += 1
    found: dict[str, Any] = {
        "paths": {path: dict(why) for path, why in sorted(counts.items())},
        "cpu": cpu.model(),
        "instructions": cpu.tier(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    device = next((layer.facts.device for layer in layers if layer.facts.device.type == "cuda"), None)
    return found if device is None else found | {"device": torch.cuda.get_device_name(device)}


def measure_paths(model: nn.Module) -> tuple[dict[Facts, dict[str, float]], Path | None]:
    """Time each path of each distinct layer, keep the fastest for this machine, and take them at once.

    Returns:
        Seconds by path for each kind of layer that has several, and the file in the user's cache folder that keeps the
        choices; None where there is nothing to choose.

    Raises:
        OSError: the cache folder cannot be written to.
    """
    layers = quantized_layers(model).values()
    found = {facts: select.paths(facts) for facts in dict.fromkeys(layer.current_facts() for layer in layers)}
    found = {facts: paths for facts, paths in found.items() if len(paths) > 1 and facts.device.type in measured.ROWS}
    if not found:
        return {}, None
    seconds = {facts: measured.measure(facts, paths) for facts, paths in found.items()}
    file = measured.keep({facts: _fastest(times) for facts, times in seconds.items()}, next(iter(found)).device)
    for layer in layers:
        layer.prepare()
    return seconds, file


def _fastest(seconds: dict[str, float]) -> str:
    best = next(iter(seconds))
    for path, taken in seconds.items():
        best = path if taken * MARGIN < seconds[best] else best
    return best


def describe_arithmetic(used: dict[str, Any]) -> str:
    """What `arithmetic_used` gives, in a line: ``36 onednn, 6 float (by rule); Xeon (amx), 2 threads, torch 2.13``."""
    counts = {path: sum(whys.values()) for path, whys in used["paths"].items()}
    whys = Counter[str]()
    for found in used["paths"].values():
        whys.update(found)
    by = WORDS[next(iter(whys))] if len(whys) == 1 else ", ".join(f"{n} {WORDS[why]}" for why, n in whys.items())
    paths = ", ".join(f"{n} {path}" for path, n in sorted(counts.items(), key=lambda item: -item[1]))
    threads = f"{used['threads']} thread{'s' * (used['threads'] != 1)}"
    device = f"{used['device']}, " if "device" in used else ""
    return f"{paths} ({by}); {device}{used['cpu']} ({used['instructions']}), {threads}, torch {used['torch']}"
