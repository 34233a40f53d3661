"""What a quantized layer is, before it is trainable or fixed: types, groups, geometry.

A Conv2d is a Linear over its unfolded patches: weights are kept as (O, I) with I = in_channels * kh * kw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.core.numerics import (
    QTYPES,
    QType,
)
from accuquant.errors import AccuQuantError, CheckpointError, nearest
from accuquant.runtime.clock import StepClock


@dataclass(frozen=True)
class LayerSpec:
    """What one module is quantized to; stored per module in the export's config.json."""

    weight: str
    activation: str = "float"
    group_size: int | None = None
    symmetric: bool = True
    activation_scale: str = "static"
    activation_symmetric: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        for key, name, known in (
            ("weight", self.weight, [*QTYPES]),
            ("activation", self.activation, ["float", *QTYPES]),
        ):
            if name not in known:
                hint = nearest(name, known)
                raise AccuQuantError(f"{key}: unknown type {name!r}{hint}; known types: {', '.join(known)}")
        self._check_floats()
        if self.activation_scale not in ("static", "dynamic"):
            hint = nearest(self.activation_scale, ("static", "dynamic"))
            raise AccuQuantError(
                f"activation_scale: must be 'static' or 'dynamic' (found {self.activation_scale!r}){hint}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise AccuQuantError(f"group_size: must be positive (found {self.group_size})")

    def _check_types(self) -> None:
        """Exactly those of the fields: what comes from JSON may be anything, and true is an integer to Python."""
        words = {str: "text", bool: "true or false", int: "a whole number or null"}
        fields = (("weight", str), ("activation", str), ("activation_scale", str), ("symmetric", bool))
        for key, kind in (*fields, ("activation_symmetric", bool), ("group_size", int)):
            value: Any = getattr(self, key)
            if type(value) is not kind and not (key == "group_size" and value is None):
                raise AccuQuantError(f"{key}: must be {words[kind]} (found {type(value).__name__})")

    def _check_floats(self) -> None:
        """Small floats are multiplied with each other only, and have no zero point."""
        name = next((n for n in (self.weight, self.activation) if n in QTYPES and QTYPES[n].floating), None)
        if name is None:
            return
        if self.weight != name or self.activation not in (name, "float"):
            raise AccuQuantError(
                f"activation: {name} is multiplied with {name} or with float (found {self.weight} x {self.activation})"
            )
        if not self.symmetric or (self.activation == name and not self.activation_symmetric):
            key = "activation_symmetric" if self.symmetric else "symmetric"
            raise AccuQuantError(f"{key}: {name} has no zero point: it needs symmetric and activation_symmetric: true")

    @property
    def weight_type(self) -> QType:
        return QTYPES[self.weight]

    @property
    def activation_type(self) -> QType | None:
        return QTYPES.get(self.activation)

    @property
    def static(self) -> bool:
        return self.activation != "float" and self.activation_scale == "static"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def num_groups(self, columns: int, name: str = "module") -> int:
        """Weight scales per row.

        Raises:
            AccuQuantError: the group size does not divide the row.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            fits = [s for s in (128, 64, 32, 16, 8) if columns % s == 0]
            raise AccuQuantError(
                f"group_size {self.group_size} does not divide the {columns} inputs of {name}; would fit: {fits}"
            )
        return columns // self.group_size


@dataclass(frozen=True)
class Conv:
    """Geometry of a Conv2d."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def holds(module: nn.Conv2d) -> bool:
        """Whether it is the product of one matrix with unfolded patches that zeros surround."""
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Conv | None:
        """None of a Linear.

        Raises:
            AccuQuantError: the convolution is of a kind that cannot be quantized.
        """
        if not isinstance(module, nn.Conv2d):
            return None
        if not cls.holds(module) or isinstance(module.padding, str):
            raise AccuQuantError(
                f"{name}: grouped or specially padded convolutions stay float; give them weight: float"
            )
        pairs = (module.kernel_size, module.stride, module.padding, module.dilation)
        return cls(*((int(a), int(b)) for a, b in pairs))

    def unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, C * kh * kw), L output positions."""
        return F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride).transpose(1, 2)

    def fold(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, L, O) -> (B, O, H', W')."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        height, width = ((x.shape[2 + i] + 2 * self.padding[i] - reach[i]) // self.stride[i] + 1 for i in (0, 1))
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], height, width)


class Layer(nn.Module):
    """What both kinds share: the spec, the geometry and the clock."""

    def __init__(
        self, spec: LayerSpec, columns: int, rows: int, conv: Conv | None, clock: StepClock, name: str
    ) -> None:
        super().__init__()
        self.spec, self.conv, self.clock, self.name = spec, conv, clock, name
        self.in_features, self.out_features = columns, rows
        self.groups = spec.num_groups(columns, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for leaf, stored in self._parameters.items():
            value = state_dict.get(f"{prefix}{leaf}")
            if stored is None or not isinstance(value, Tensor) or value.dtype == stored.dtype:
                continue
            if not (wide_float(stored) and wide_float(value)):  # torch would round floats to integers, and say nothing
                raise CheckpointError(
                    f"{prefix}{leaf} is {value.dtype}, and this layer stores {stored.dtype}: weights of another kind "
                    "of model; load an export by from_pretrained, or make one of them by `accuquant calibrate`"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.spec.weight}, activation={self.spec.activation}"


def fixed(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A tensor that loading fills and nothing learns."""
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


@contextmanager
def types_kept(module: nn.Module) -> Iterator[None]:
    """Whatever the block makes of a module, its own parameters have the types that they had: the model's is not theirs.

    In place, for layers share grids.
    """
    before = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    yield
    for name, data in before.items():
        parameter = module.get_parameter(name)
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def share_grids(layers: Iterable[Any], scale: str, zero_point: str) -> int:
    """Layers whose inputs' scales and zero points are the same to the last bit get the same tensors.

    Those that read one tensor find the same scales; what is known to be the same is then computed once.

    Args:
        scale, zero_point: names of the attributes.

    Returns:
        How many layers have another's.
    """
    first, shared = dict[Any, Any](), 0
    for layer in layers:
        tensors = [getattr(layer, name) for name in (scale, zero_point)]
        if tensors[0] is None:
            continue
        spec = (layer.spec.activation, layer.spec.activation_scale, layer.spec.activation_symmetric)
        values = [None if t is None else (t.device, tuple(t.tolist())) for t in tensors]
        other = first.setdefault((*spec, *values), layer)
        shared += other is not layer
        for name in (scale, zero_point):
            setattr(layer, name, getattr(other, name))
    return shared


def wide_float(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize > 1


def keep_float32(model: Any, names: Iterable[str]) -> None:
    """Tell diffusers that these modules' float tensors do not speak for the model's dtype: scales stay float32."""
    model._keep_in_fp32_modules = [*(getattr(model, "_keep_in_fp32_modules", None) or []), *names]
