"""What an export promises, checked before anything is built on it: the keys of its config, the tensors of its files.

Every violation is a `CheckpointError` that names the file and the key. Of the files only headers are read, scales, zero
points, biases and what was fitted for a cache: little beside the weights, whichever device these go to.
"""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from accuquant.core.coordinate import Coordinate
from accuquant.core.numerics import QType
from accuquant.errors import AccuQuantError, CheckpointError, nearest
from accuquant.recipe import Cache
from accuquant.recipe.cache import cache_mistakes
from accuquant.runtime.attention import AttentionSpec, QuantizedInput
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.envelope import Calibrated
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.spec import LayerSpec

FORMAT_VERSION = 1
LARGEST = torch.finfo(torch.float32).max
DEPTH = 3  # cache.noise.<module>: a list
NUMBERS = ("tau", "target_nfc", "target_seconds")  # a recipe may write them as text, such as 1e-4
# what safetensors calls torch's types
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
STORED = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"} | FLOATS


def refuse(key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} {problem}")


def shown(value: Any) -> str:
    """A value of JSON, short enough for a message however large it is."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_plain(value: Any, key: str, depth: int = 0) -> None:
    """Numbers are finite and lists and objects no deeper than the format has them.

    Raises:
        CheckpointError: they are not.
    """
    if isinstance(value, dict | list | tuple):
        if depth > DEPTH:
            raise refuse(key, f"is nested deeper than this format goes (found {shown(value)})")
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(inner, f"{key}.{name}", depth + 1)
    elif isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:  # NaN is in no range
        raise refuse(key, f"must be a finite number (found {shown(value)})")


def checked_edges(edges: Any, key: str = "quantization_config.timestep_edges") -> list[float]:
    """Timestep values between groups: finite, strictly descending.

    Raises:
        CheckpointError: they are not.
    """
    if not isinstance(edges, list | tuple):
        raise refuse(key, f"must be a list of numbers (found {shown(edges)})")
    for i, edge in enumerate(edges):
        if type(edge) not in (int, float) or not -LARGEST <= edge <= LARGEST:  # NaN neither
            raise refuse(f"{key}.{i}", f"must be a finite number (found {shown(edge)})")
    if any(a <= b for a, b in itertools.pairwise(edges)):
        raise refuse(key, f"must descend strictly (found {', '.join(f'{e:g}' for e in edges[:8])})")
    return [float(edge) for edge in edges]


def checked_coordinate(argument: Any, falls: Any, key: str = "quantization_config.timestep") -> Coordinate:
    """The argument that says a denoiser's noise level, and whether it falls.

    Raises:
        CheckpointError: they are no name and no boolean.
    """
    if not (isinstance(argument, str) and argument.isidentifier()):
        raise refuse(f"{key}_argument", f"must be the name of an argument (found {shown(argument)})")
    if type(falls) is not bool:
        raise refuse(f"{key}_falls", f"must be true or false (found {shown(falls)})")
    return Coordinate(argument, falls)


def checked_layers(layers: Any, key: str = "quantization_config.layers") -> dict[str, LayerSpec]:
    """The spec of each quantized module.

    Raises:
        CheckpointError: a field is missing, unknown, of another type, or says what cannot be.
    """
    if not isinstance(layers, dict) or not layers:
        raise refuse(key, f"must be an object with a layer or more (found {shown(layers)})")
    return {name: _layer(fields, f"{key}.{name}") for name, fields in layers.items()}


def _layer(fields: Any, key: str) -> LayerSpec:
    if not isinstance(fields, dict):
        raise refuse(key, f"must be an object with the fields of a layer (found {shown(fields)})")
    valid = list(LayerSpec.__dataclass_fields__)
    for field in fields:
        if field not in valid:
            raise refuse(f"{key}.{field}", f"is unknown: no field {field!r}{nearest(field, valid)}; {', '.join(valid)}")
    if "weight" not in fields:
        raise refuse(f"{key}.weight", "is missing")
    try:
        return LayerSpec(**fields)
    except AccuQuantError as error:
        raise CheckpointError(f"config.json: {key}.{error}") from error


def checked_split(split: Any, layers: dict[str, Any], key: str = "quantization_config.split") -> dict[str, list[int]]:
    """The parts that modules are taken into, each of which is a layer.

    Raises:
        CheckpointError: they are no counts of channels, or a part is no layer.
    """
    if split is None:
        return {}
    if not isinstance(split, dict):
        raise refuse(key, f"must be an object (found {shown(split)})")
    for name, sizes in split.items():
        counts = isinstance(sizes, list | tuple) and all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
        if not counts or len(sizes) < 2:
            raise refuse(f"{key}.{name}", f"must be two counts of channels or more (found {shown(sizes)})")
        if missing := [part for k in range(len(sizes)) if (part := f"{name}.{k}") not in layers]:
            raise refuse(f"{key}.{name}", f"has a part that quantization_config.layers lacks, {missing[0]}")
    return {name: list(sizes) for name, sizes in split.items()}


def checked_settings(settings: Any, key: str = "quantization_config.calibrated_for") -> list[Calibrated]:
    """What a denoiser was calibrated for.

    Raises:
        CheckpointError: a field is missing, unknown, or no number.
    """
    if settings is None:
        return []
    if not isinstance(settings, list | tuple):
        raise refuse(key, f"must be a list (found {shown(settings)})")
    found, fields = list[Calibrated](), list(Calibrated.__dataclass_fields__)
    for i, given in enumerate(settings):
        if not isinstance(given, dict) or sorted(given) != sorted(fields):
            raise refuse(f"{key}.{i}", f"must be an object with {', '.join(fields)} (found {shown(given)})")
        check_plain(given, f"{key}.{i}", 2)
        steps, guidance, size = (given[field] for field in fields)
        if type(steps) is not int or steps < 1:
            raise refuse(f"{key}.{i}.num_inference_steps", f"must be a whole number from 1 on (found {shown(steps)})")
        if guidance is not None and type(guidance) not in (int, float):
            raise refuse(f"{key}.{i}.guidance_scale", f"must be a number or null (found {shown(guidance)})")
        if not isinstance(size, list | tuple) or not all(type(n) is int and n > 0 for n in size):
            raise refuse(f"{key}.{i}.size", f"must be a list of whole numbers (found {shown(size)})")
        found.append(Calibrated(steps, guidance, tuple(size)))
    return found


def checked_attention(attention: Any, key: str = "quantization_config.attention") -> dict[str, AttentionSpec]:
    """What the products of each attending module take.

    Raises:
        CheckpointError: a field is missing, unknown, or no integer type.
    """
    if attention is None:
        return {}
    if not isinstance(attention, dict):
        raise refuse(key, f"must be an object (found {shown(attention)})")
    found, fields = dict[str, AttentionSpec](), list(AttentionSpec.__dataclass_fields__)
    for name, given in attention.items():
        if not isinstance(given, dict) or sorted(given) != fields:
            raise refuse(f"{key}.{name}", f"must be an object with {' and '.join(fields)} (found {shown(given)})")
        try:
            found[name] = AttentionSpec(**given)
        except (AccuQuantError, TypeError) as error:
            raise CheckpointError(f"config.json: {key}.{name}.{error}") from error
    return found


def checked_cache(fields: Any, key: str = "quantization_config.cache") -> tuple[CachePlan | None, Fitted]:
    """The feature cache that loading puts on the model, and empty tensors of what was fitted for it.

    Raises:
        CheckpointError: a field is unknown, of another type, or does not go with another one.
    """
    if fields is None:
        return None, Fitted()
    if not isinstance(fields, dict):
        raise refuse(key, f"must be an object (found {shown(fields)})")
    check_plain(fields, key, 1)
    for name in NUMBERS:
        if isinstance(fields.get(name), str):
            raise refuse(f"{key}.{name}", f"must be a number (found {shown(fields[name])})")
    try:
        cache = Cache(**{name: value for name, value in fields.items() if name != "forecasts"})
    except ValidationError as error:
        raise CheckpointError(f"config.json: {key}.{cache_mistakes(error)}") from error
    if cache.full_timesteps == ():
        raise refuse(f"{key}.full_timesteps", "must have an entry or more, the first step is always full (found none)")
    for name, energies in (cache.noise or {}).items():
        if len(energies) != 2 or min(energies) < 0:
            raise refuse(f"{key}.noise.{name}", f"must be two energies of 0 or more (found {shown(list(energies))})")
    _check_fitted(fields, key)
    try:
        with torch.device("meta"):
            plan, fitted = CachePlan.from_dict(fields), Fitted.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {key}: {error}") from error
    if plan.fits and not fitted.channels:
        raise refuse(f"{key}.correction_channels", "is missing or empty, and the cache is corrected")
    for one, other in (("learned_timesteps", "learned_modules"), ("learned_modules", "learned_timesteps")):
        if getattr(fitted, one) and not getattr(fitted, other):
            raise refuse(f"{key}.{other}", f"is missing or empty, and {one} is not")
    return plan, fitted


def _check_fitted(fields: dict[str, Any], key: str) -> None:
    """What is stored of a cache beside a person's settings, by its exact types."""
    for name, of, words in (
        ("correction_timesteps", (int, float), "numbers"),
        ("correction_full_timesteps", (int, float), "numbers"),
        ("learned_timesteps", (int, float), "numbers"),
        ("measured_nfc", (int, float), "numbers"),
        ("learned_modules", (str,), "names"),
    ):
        values = fields.get(name)
        if values is not None and not (isinstance(values, list | tuple) and all(type(v) in of for v in values)):
            raise refuse(f"{key}.{name}", f"must be a list of {words} (found {shown(values)})")
    if (measured := fields.get("measured_nfc")) is not None and len(measured) != 2:
        raise refuse(f"{key}.measured_nfc", f"must be mean and deviation (found {shown(measured)})")
    channels = fields.get("correction_channels")
    if channels is not None and not isinstance(channels, dict):
        raise refuse(f"{key}.correction_channels", f"must be an object (found {shown(channels)})")
    for name, count in (channels or {}).items():
        if type(count) is not int or not 0 < count < 1 << 31:
            raise refuse(f"{key}.correction_channels.{name}", f"must be a count (found {shown(count)})")


def check_fits(plan: CachePlan, fitted: Fitted, modules: tuple[str, ...]) -> None:
    """A cache names what was fitted of each module that it caches.

    Raises:
        CheckpointError: it does not.
    """
    noisy = [module for module in modules if plan.knows_noise(module)]
    both = (("correction_channels", modules if plan.fits else (), fitted.channels), ("noise", noisy, fitted.noise))
    for name, needed, found in both:
        named = found or {}
        if missing := [m for m in needed if m not in named]:
            unknown = [n for n in named if n not in modules]
            hint = f"; it names {unknown[0]!r}, which is not cached" if unknown else ""
            raise refuse(f"quantization_config.cache.{name}", f"lacks the cached module {missing[0]!r}{hint}")


# ---- tensors


class Files:
    """The safetensors files of a checkpoint: which holds what, by their headers.

    Raises:
        CheckpointError: one cannot be read.
    """

    def __init__(self, paths: list[str]) -> None:
        self.where = ", ".join(map(str, paths[:1])) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        self.path: dict[str, str] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, str] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (no mapping)
                        part = file.get_slice(key)
                        self.path[key], self.dtype[key] = str(path), part.get_dtype()
                        self.shape[key] = tuple(part.get_shape())
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error

    def tensor(self, key: str) -> Tensor:
        """Read by a mapping of its own, which goes afterwards: pages that diffusers has mapped stay in memory."""
        with safe_open(self.path[key], framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found


def check_tensors(model: nn.Module, files: Files, fitted: str) -> None:
    """Each tensor has the shape and the type that the config promises, and small ones hold what can be.

    Args:
        fitted: name of the module that holds what calibration found for a cache.

    Raises:
        CheckpointError: one has not.
    """
    promised = model.state_dict()
    for key, expected in promised.items():
        if key in files.path and files.shape[key] != tuple(expected.shape):
            words = f"has shape {files.shape[key]}, its config promises {tuple(expected.shape)}"
            raise CheckpointError(f"{files.path[key]}: {key} {words}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer | QuantizedInput)}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in {*files.path.values()}}
        for key in sorted(promised.keys() & files.path.keys()):
            name, _, leaf = key.rpartition(".")
            layer, stored, found = layers.get(name), promised[key].dtype, files.dtype[key]
            if layer is None and not key.startswith(f"{fitted}."):
                wrong = stored.is_floating_point and found not in FLOATS.values()
                problem = f"is {found}, the model has floats there" if wrong else ""
            elif found != STORED[stored]:
                problem = f"is {found}, its config promises {stored}"
            elif isinstance(layer, QuantizedLayer) and leaf == "weight":
                problem = _padding(opened[files.path[key]], key, layer)
            else:
                problem = _small(leaf, opened[files.path[key]].get_tensor(key), layer)
            if problem:
                raise CheckpointError(f"{files.path[key]}: {key} {problem}")


def _small(leaf: str, value: Tensor, layer: QuantizedLayer | QuantizedInput | None) -> str:
    """What is wrong with a tensor other than a weight."""
    if leaf.endswith("_zero_point") and layer is not None:
        qtype = layer.spec.activation_type
        if leaf == "weight_zero_point" and isinstance(layer, QuantizedLayer):
            qtype = layer.spec.weight_type
        low, high = int(value.min()), int(value.max())
        return "" if qtype is None or (qtype.qmin <= low and high <= qtype.qmax) else _outside(low, high, qtype)
    bad = ~value.isfinite()
    if not bool(bad.any()) and leaf.endswith("_scale"):
        bad = value <= 0
    if not bool(bad.any()):
        return ""
    found = f"{float(value[bad][0]):g} at {bad.nonzero()[0].tolist()}"
    return f"must be finite{' and positive' if leaf.endswith('_scale') else ''} (found {found})"


def _outside(low: int, high: int, qtype: QType) -> str:
    return f"must lie in the range of {qtype.name}, {qtype.qmin} to {qtype.qmax} (found {low} to {high})"


def _padding(file: Any, key: str, layer: QuantizedLayer) -> str:
    """What is wrong with the last bytes of packed rows: where a row does not fill them, the rest is zero."""
    bits, rest = layer.spec.weight_type.bits, layer.in_features % 8
    if bits == 8 or not rest:
        return ""
    last = file.get_slice(key)[:, -bits:].to(torch.int64)
    word = (last << torch.arange(0, 8 * bits, 8, device=last.device)).sum(1)
    full = bool((word >> (rest * bits)).any())
    return "has bits set behind the last column of a row, where the format has zeros" if full else ""
