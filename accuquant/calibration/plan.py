"""The plan: which module becomes what, what it weighs and what it computes; printed by `--dry-run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from accuquant.core.packing import packed_columns
from accuquant.errors import AccuQuantError, RecipeError, closest
from accuquant.kernels.select import fixed
from accuquant.recipe import Rule
from accuquant.runtime.observe import Call, observed
from accuquant.runtime.spec import Conv, LayerSpec

FLOAT_BITS = 32


@dataclass(frozen=True)
class PlannedModule:
    """One Linear or Conv2d of the denoiser. ``spec`` is None where it stays float; ``macs`` are per sample and call."""

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    spec: LayerSpec | None
    tune: bool
    macs: int = 0

    @property
    def float_bytes(self) -> int:
        """Bytes in float32, bias included."""
        return 4 * (self.shape[0] * self.shape[1] + self.bias * self.shape[0])

    def quantized_bytes(self, timestep_groups: int) -> int:
        """Bytes in the export: packed weights, scales, zero points, bias."""
        if self.spec is None:
            return self.float_bytes
        rows, columns = self.shape
        scales = rows * self.spec.num_groups(columns, self.name)
        total = rows * packed_columns(columns, self.spec.weight_type) + 4 * scales + 4 * self.bias * rows
        if not self.spec.symmetric:
            total += scales
        if self.spec.activation != "float":
            per_scale = 4 + (self.spec.static and not self.spec.activation_symmetric)
            total += per_scale * (timestep_groups if self.spec.static else 1)
        return total

    @property
    def bit_operations(self) -> int:
        """Multiply-adds times weight bits times activation bits, per sample and call."""
        if self.spec is None:
            return self.macs * FLOAT_BITS * FLOAT_BITS
        activation = self.spec.activation_type.bits if self.spec.activation_type else FLOAT_BITS
        return self.macs * self.spec.weight_type.bits * activation


def plan_modules(denoiser: nn.Module, rules: tuple[Rule, ...], prefixes: Sequence[str] = ()) -> list[PlannedModule]:
    """Apply the rules to every Linear and Conv2d; the first rule whose pattern matches a name in full decides.

    Args:
        prefixes: that a pattern may leave out: names of several denoisers and a point.

    Raises:
        RecipeError: a pattern is no regular expression, a rule decides nothing, or a group size does not fit.
        AccuQuantError: ACCUQUANT_PATH names no path; after hours it would be said too late.
    """
    fixed()
    patterns = [_compile(i, rule.modules) for i, rule in enumerate(rules)]
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    decided = [0] * len(rules)
    planned = []
    for name, module in layers.items():
        index = next((i for i, pattern in enumerate(patterns) if matches(pattern, name, prefixes)), None)
        spec, tune = None, False
        if index is not None:
            rule = rules[index]
            decided[index] += 1
            if rule.weight != "float":
                spec, tune = _spec(rule), rule.tune
                try:
                    Conv.of(module, name)
                    spec.num_groups(module.weight.flatten(1).shape[1], name)
                except AccuQuantError as error:
                    raise RecipeError(f"quantization.rules.{index}: {error}") from error
        rows, columns = module.weight.flatten(1).shape
        planned.append(PlannedModule(name, type(module).__name__, (rows, columns), module.bias is not None, spec, tune))
    for i, count in enumerate(decided):
        if not count:
            raise RecipeError(_unused(i, rules[i].modules, patterns[i], list(layers)))
    return planned


def matches(pattern: str | re.Pattern[str], name: str, prefixes: Sequence[str] = ()) -> bool:
    """Whether a rule's pattern is of this module, with or without the denoiser's name before it."""
    names = [name, *(name.removeprefix(prefix) for prefix in prefixes)]
    return any(re.fullmatch(pattern, one) for one in names)


def count_macs(
    denoiser: nn.Module, planned: list[PlannedModule], run: Callable[[], object], batch: int
) -> list[PlannedModule]:
    """Fill ``macs`` from one real step: ``run`` makes it for ``batch`` samples."""
    rows: dict[str, int] = {}
    outputs = {p.name: p.shape[0] for p in planned}

    def count(name: str, call: Call) -> None:
        rows[name] = rows.get(name, 0) + call.output.numel() // outputs[name]

    with torch.no_grad(), observed(denoiser, outputs, count):
        run()
    return [replace(p, macs=rows.get(p.name, 0) * p.shape[0] * p.shape[1] // batch) for p in planned]


def _spec(rule: Rule) -> LayerSpec:
    return LayerSpec(
        weight=rule.weight,
        activation=rule.activation,
        group_size=rule.group_size,
        symmetric=rule.symmetric,
        activation_scale=rule.activation_scale,
        activation_symmetric=rule.activation_symmetric
        or rule.activation_scale == "dynamic"
        or rule.activation == "fp8",
    )


def _compile(index: int, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"quantization.rules.{index}.modules: {pattern!r} is no regular expression ({error})"
        ) from error


def _unused(index: int, text: str, pattern: re.Pattern[str], names: list[str]) -> str:
    where = f"quantization.rules.{index}.modules: {text!r} "
    if any(pattern.fullmatch(n) for n in names):
        return where + "decides no module: an earlier rule matches everything it does; move it up or drop it"
    inside = [n for n in names if pattern.search(n)]
    if inside:
        return where + f"matches no module in full; it is found inside {inside[0]!r}: add .* where the rest may follow"
    close = closest(text.replace("\\", ""), names, cutoff=0)
    return where + f"matches no Linear or Conv2d of this model; a similar name: {close or 'none'}"
