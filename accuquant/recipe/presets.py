"""Rules for a model that nobody has looked at: `quantization: {preset: w8a8}`.

What reads the latents, writes the output or embeds conditions decides every pixel and costs little: it stays float.
Modulation runs on one row per sample: its weights are worth packing, its products are not. All rules go by kind, and
a kind that a model lacks is no mistake.
"""

from __future__ import annotations

from typing import Any

from accuquant.errors import nearest
from accuquant.recipe.base import found

_ENDS = {"modules": ["first", "last", "embedding"], "weight": "float"}
_MODULATION = {"modules": "modulation", "weight": "int8", "tune": False}
_REST = ["linear", "conv"]
_GROUPS = {"granularity": "group", "group_size": "auto"}

PRESETS: dict[str, list[dict[str, Any]]] = {
    "w8a8": [_ENDS, _MODULATION, {"modules": _REST, "weight": "int8", "activation": "int8"}],
    "w4a8": [
        _ENDS,
        _MODULATION,
        {"modules": _REST, "weight": "int4", "activation": "int8"} | _GROUPS,
    ],
    "w8a16": [_ENDS, {"modules": _REST, "weight": "int8"}],
    "w4a16": [_ENDS, _MODULATION, {"modules": _REST, "weight": "int4"} | _GROUPS],
    "fp8": [
        _ENDS,
        {"modules": "modulation", "weight": "fp8", "tune": False},
        {"modules": _REST, "weight": "fp8", "activation": "fp8", "activation_scale": "dynamic"},
    ],
}


def with_preset(given: Any) -> Any:
    """The section `quantization` with its preset's rules written out, after those that it has itself.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(given, dict) or not isinstance(own := given.get("rules") or [], list | tuple):
        return given  # the schema says what is wrong with it
    name = given.get("preset")
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)} (found {found(name)}){nearest(name, PRESETS)}")
    rules = [*own, *(rule | {"optional": True} for rule in (PRESETS[name] if name is not None else []))]
    # a tuple: after this, strict mode no longer knows that it reads JSON
    split = {"split_inputs": "auto"} if name is not None else {}
    return split | given | {"preset": None} | ({"rules": tuple(rules)} if rules else {})
