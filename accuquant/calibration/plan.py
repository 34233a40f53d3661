"""The plan: which module becomes what, what it weighs and what it computes; printed by `--dry-run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from accuquant.calibration.kinds import KINDS
from accuquant.calibration.products import Products, count_products
from accuquant.core.packing import packed_columns
from accuquant.errors import AccuQuantError, RecipeError, closest
from accuquant.kernels.select import fixed
from accuquant.recipe import Attention, Rule
from accuquant.recipe.rule import patterns_of
from accuquant.runtime.attention import PRODUCTS, AttentionSpec
from accuquant.runtime.spec import Conv, LayerSpec

FLOAT_BITS = 32
NO_SHAPE = (0, 0)
NOTHING: Mapping[str, tuple[int, ...]] = {}
GROUP_SIZES = (64, 32, 16, 8)  # that `group_size: auto` takes the largest of, as published settings do


@dataclass(frozen=True)
class PlannedModule:
    """One Linear or Conv2d of the denoiser, or the part of one that reads some of its input's channels; or the products
    of a module that attends, or whatever else multiplies, which have no shape and no weight.

    Attributes:
        spec: None where it stays float.
        split: channels of all parts of the module, see `SplitLayer`; empty if it is whole.
        attention: of products whose inputs are quantized.
        macs: multiply-adds per sample and denoising step.
        kinds: what it is for, where a rule goes by kind.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    spec: LayerSpec | None
    tune: bool
    macs: int = 0
    kinds: frozenset[str] = frozenset()
    split: tuple[int, ...] = ()
    attention: AttentionSpec | None = None

    @property
    def module(self) -> str:
        """Name of the denoiser's module: a part and quantized products have names below it."""
        return self.name.rpartition(".")[0] if self.split or self.attention else self.name

    @property
    def is_layer(self) -> bool:
        """Whether it has a weight."""
        return self.shape != NO_SHAPE

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of what is calibrated: the layer, or the inputs of the products."""
        return tuple(f"{self.name}.{name}" for name in self.attention.inputs()) if self.attention else (self.name,)

    @property
    def float_bytes(self) -> int:
        """Bytes in float32, bias included."""
        return 4 * (self.shape[0] * self.shape[1] + self.bias * self.shape[0])

    def quantized_bytes(self, timestep_groups: int) -> int:
        """Bytes in the export: packed weights, scales, zero points, bias."""
        if self.attention is not None:
            return len(self.attention.inputs()) * (4 + 1) * timestep_groups
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
        """Multiply-adds times weight bits times activation bits, per sample and denoising step."""
        if self.attention is not None:
            return self.attention.bit_operations(self.macs)
        if self.spec is None:
            return self.macs * FLOAT_BITS * FLOAT_BITS
        activation = self.spec.activation_type.bits if self.spec.activation_type else FLOAT_BITS
        return self.macs * self.spec.weight_type.bits * activation


def plan_modules(
    denoiser: nn.Module,
    rules: tuple[Rule, ...],
    prefixes: Sequence[str] = (),
    kinds: Callable[[], Mapping[str, frozenset[str]]] = dict,
    parts: Mapping[str, tuple[int, ...]] = NOTHING,
) -> list[PlannedModule]:
    """Apply the rules to every Linear and Conv2d; the first rule that names a module decides.

    Args:
        prefixes: that a pattern may leave out: names of several denoisers and a point.
        kinds: finds the kinds of modules by name; asked where a rule goes by kind.
        parts: channels of the parts of modules' inputs; those whose input is quantized are split into as many.

    Raises:
        RecipeError: a pattern is no regular expression, a rule decides nothing, or a group size does not fit.
        AccuQuantError: ACCUQUANT_PATH names no path; after hours it would be said too late.
    """
    fixed()
    for i, rule in enumerate(rules):
        for pattern in patterns_of(rule.modules):
            _check_pattern(f"quantization.rules.{i}.modules", pattern)
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    known = kinds() if go_by_kind(rules) else {}
    decided = [0] * len(rules)
    planned = list[PlannedModule]()
    for name, module in layers.items():
        own = known.get(name, frozenset())
        index = deciding(rules, name, own, prefixes)
        whole = _whole(name, module, own)
        if index is not None:
            decided[index] += 1
        if index is None or (rule := rules[index]).weight == "float":
            planned.append(whole)
            continue
        try:
            planned += _quantized(whole, module, rule, parts.get(name, ()))
        except AccuQuantError as error:
            hint = "; split_inputs: false keeps it whole" if name in parts and rule.activation != "float" else ""
            raise RecipeError(f"quantization.rules.{index}: {error}{hint}") from error
    for i, rule in enumerate(rules):
        for one in patterns_of(rule.modules) if not rule.optional else ():
            if not any(names(one, p.module, p.kinds, prefixes) for p in planned):
                raise RecipeError(f"quantization.rules.{i}.modules: {_nothing(one, layers, known)}")
        if not decided[i] and not rule.optional:
            named = " and ".join(map(repr, patterns_of(rule.modules)))
            raise RecipeError(
                f"quantization.rules.{i}.modules: {named} decides no module: an earlier rule takes all it names; move "
                "it up or drop it"
            )
    if all(p.spec is None for p in planned):
        raise RecipeError("quantization.rules: no module is quantized; accuquant new shows what this model is made of")
    return planned


def go_by_kind(rules: Iterable[Rule]) -> bool:
    """Whether one of the rules names a kind of modules, which has to be found."""
    return any(one in KINDS for rule in rules for one in patterns_of(rule.modules))


def deciding(
    rules: Sequence[Rule], name: str, kinds: frozenset[str] = frozenset(), prefixes: Sequence[str] = ()
) -> int | None:
    """Number of the rule that decides a module, the first that names it; None where none does."""
    return next((i for i, rule in enumerate(rules) if matches(rule, name, kinds, prefixes)), None)


def matches(rule: Rule, name: str, kinds: frozenset[str] = frozenset(), prefixes: Sequence[str] = ()) -> bool:
    """Whether a rule names this module, by its kind or by its name, with or without the denoiser's before it."""
    return any(names(one, name, kinds, prefixes) for one in patterns_of(rule.modules))


def names(pattern: str, name: str, kinds: frozenset[str], prefixes: Sequence[str]) -> bool:
    """Whether a kind, or a regular expression, is of this module."""
    if pattern in KINDS:
        return pattern in kinds
    return any(re.fullmatch(pattern, each) for each in (name, *(name.removeprefix(prefix) for prefix in prefixes)))


def plan_attention(section: Attention, attending: Iterable[str], prefixes: Sequence[str] = ()) -> list[PlannedModule]:
    """The products whose inputs are to be quantized.

    Args:
        attending: names of the modules that attend.

    Raises:
        RecipeError: the pattern names none of them.
    """
    pattern, known = section.modules, list(attending)
    _check_pattern("quantization.attention.modules", pattern)
    found = [name for name in known if names(pattern, name, frozenset(), prefixes)]
    if not found:
        close = f"; a similar name: {closest(pattern.replace(chr(92), ''), known, cutoff=0)}" if known else ""
        raise RecipeError(
            f"quantization.attention.modules: {pattern!r} matches none of the {len(known)} modules that call "
            f"scaled_dot_product_attention{close}"
        )
    spec = AttentionSpec(section.activation, section.softmax or section.activation)
    return [
        PlannedModule(f"{name}.{PRODUCTS}", "attention", NO_SHAPE, False, None, section.tune, attention=spec)
        for name in found
    ]


def counted(planned: list[PlannedModule], products: Products) -> list[PlannedModule]:
    """The planned modules with their multiply-adds, and after them all that multiplies in float beside them."""
    attention, found = dict(products.attention), list[PlannedModule]()
    for p in planned:
        macs = products.rows.get(p.module, 0) * p.shape[0] * p.shape[1]
        found.append(replace(p, macs=(attention.pop(p.module, 0) if p.attention else macs) // products.samples))
    for kind, beside in (("attention", attention), ("other", products.rest)):
        for name, macs in beside.items():
            found.append(PlannedModule(name, kind, NO_SHAPE, False, None, False, macs // products.samples))
    return found


def count_macs(
    denoiser: nn.Module, planned: list[PlannedModule], run: Callable[[], object], batch: int
) -> list[PlannedModule]:
    """Fill ``macs`` from one real step: ``run`` makes it for ``batch`` samples."""
    return counted(planned, count_products(denoiser, run, batch))


def _whole(name: str, module: nn.Linear | nn.Conv2d, kinds: frozenset[str]) -> PlannedModule:
    """A module that stays float."""
    rows, columns = module.weight.flatten(1).shape
    bias = module.bias is not None
    return PlannedModule(name, type(module).__name__, (rows, columns), bias, None, tune=False, kinds=kinds)


def _quantized(
    whole: PlannedModule, module: nn.Linear | nn.Conv2d, rule: Rule, split: tuple[int, ...]
) -> Iterator[PlannedModule]:
    """What the rule makes of a module: the module, or each part that it is split into.

    Raises:
        AccuQuantError: it cannot be quantized so.
    """
    Conv.of(module, whole.name)
    split = () if rule.activation == "float" else split
    (rows, columns), channels = whole.shape, sum(split)
    names = {f"{whole.name}.{k}": columns * size // channels for k, size in enumerate(split)} or {whole.name: columns}
    for k, (name, own) in enumerate(names.items()):
        spec = _spec(rule, own)
        spec.num_groups(own, name)
        bias = whole.bias and k == 0
        yield replace(whole, name=name, shape=(rows, own), bias=bias, spec=spec, tune=rule.tune, split=split)


def _spec(rule: Rule, columns: int) -> LayerSpec:
    size = None if rule.group_size == "auto" else rule.group_size
    if rule.group_size == "auto":
        size = next((fits for fits in GROUP_SIZES if columns % fits == 0 and columns > fits), None)
    return LayerSpec(
        weight=rule.weight,
        activation=rule.activation,
        group_size=size,
        symmetric=rule.symmetric,
        activation_scale=rule.activation_scale,
        activation_symmetric=rule.activation_symmetric
        or rule.activation_scale == "dynamic"
        or rule.activation == "fp8",
    )


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{key}: {pattern!r} is no regular expression ({error})") from error


def _nothing(pattern: str, layers: Iterable[str], kinds: Mapping[str, frozenset[str]]) -> str:
    """What to do about a pattern that names no module."""
    layers = list(layers)
    if pattern in KINDS:
        there = sorted(set().union(*kinds.values()))
        return f"{pattern!r} is a kind that this model has none of; it has {', '.join(there)}"
    if inside := [name for name in layers if re.search(pattern, name)]:
        return (
            f"{pattern!r} matches no module in full; it is found inside {inside[0]!r}: add .* where the rest may follow"
        )
    kind = closest(pattern, KINDS, cutoff=0.75)
    close = f"kind: {kind}" if kind else f"name: {closest(pattern.replace(chr(92), ''), layers, cutoff=0) or 'none'}"
    return f"{pattern!r} matches no Linear or Conv2d of this model; a similar {close}"
