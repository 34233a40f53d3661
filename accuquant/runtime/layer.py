"""The quantized layer that is exported and loaded: packed integers and scales, and a backend that computes it.

`kernels.select` chooses the backend, by a rule; all give the same up to float32 rounding, except `float` with inputs in
half precision, on a CUDA device or of few rows: it computes in the input's type, as the layer did that was replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.packing import packed_columns
from accuquant.kernels import select
from accuquant.kernels.backend import Backend, Facts, Grid, Operand, Weights, dequantized, integer_weight
from accuquant.kernels.floating import REFERENCE
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import Conv, Layer, LayerSpec, fixed, share_grids, types_kept

ARITHMETICS = ("integer", "reference")

GRID = ("activation_scale", "activation_zero_point")


class QuantizedLayer(Layer):
    """Packed integers with their scales; computes in integers, or in float on the dequantized values.

    Tensors, as they stand in the safetensors file: ``weight`` (O, packed columns), ``weight_scale`` (O, G) float32,
    ``weight_zero_point`` (O, G) int8 where asymmetric, ``activation_scale`` (timestep groups,) or (1,) float32,
    ``activation_zero_point`` (timestep groups,) int8 where static and asymmetric, ``bias`` (O,).

    Integers have no NaN: with static scales one in the input becomes finite numbers on their paths; dynamic scales
    carry it to the whole row.

    A backend may hold the parameter ``weight`` in a layout of its own; state_dict, copies and other devices get the one
    above.
    """

    def __init__(
        self, spec: LayerSpec, columns: int, rows: int, conv: Conv | None, clock: StepClock, name: str, bias: bool
    ) -> None:
        super().__init__(spec, columns, rows, conv, clock, name)
        storage = spec.weight_type.storage
        num_scales = clock.num_groups if spec.static else 1
        asymmetric = spec.static and not spec.activation_symmetric
        self.bias = fixed(rows) if bias else None  # before the weight: some ask a model's first parameter for its type
        self.weight_scale = fixed(rows, self.groups)
        self.weight_zero_point = None if spec.symmetric else fixed(rows, self.groups, dtype=torch.int8)
        self.activation_scale = fixed(num_scales) if spec.activation != "float" else None
        self.activation_zero_point = fixed(num_scales, dtype=torch.int8) if asymmetric else None
        self.weight = fixed(rows, packed_columns(columns, spec.weight_type), dtype=storage)
        self.arithmetic = "integer"  # or "reference", or the name of a path that is fixed
        self.prepared = False
        self.facts = self.current_facts()
        self.backend = select.unprepared(self.facts)
        self.why: select.Why | None = None
        self.register_buffer("weight_sums", None, persistent=False)
        self.weight_sums: Tensor | None

    @property
    def path(self) -> str:
        """Name of the backend."""
        return self.backend.name

    def paths(self) -> list[str]:
        """Names of those that can compute this layer where its weight is."""
        return [backend.name for backend in select.paths(self.current_facts())]

    def current_facts(self) -> Facts:
        """With the device where the weight is now."""
        spec, zero = self.spec, self.activation_zero_point
        types, shape = (spec.weight_type, spec.activation_type), (self.in_features, self.out_features, self.groups)
        dynamic = spec.activation != "float" and not spec.static
        return Facts(*types, *shape, spec.symmetric, dynamic, zero is not None, self.weight.device)

    # ---- the function

    def forward(self, x: Tensor) -> Tensor:
        """Integers are made from a half type without a copy in float32: the scales make the quotient one."""
        tokens = self.conv.unfold(x) if self.conv else x
        backend = self._backend_of(tokens)
        y = backend.linear(self._operand(backend, tokens), self._weights(backend), self.facts, x.dtype)
        y = y.view(*tokens.shape[:-1], self.out_features).to(x.dtype)
        return self.conv.fold(y, x) if self.conv else y

    def _backend_of(self, tokens: Tensor) -> Backend:
        """Of this input: the layer's, where it has a product for it."""
        if self.arithmetic == "reference":
            return REFERENCE
        if not self.backend.holds(self.weight, tokens):  # somebody carried the weight or the input elsewhere
            self.take(select.unprepared(self.facts))
            self.weight = nn.Parameter(self.weight.to(tokens.device), requires_grad=False)
        return self.backend if self.backend.takes_input(tokens, self.facts) else select.FLOAT

    def _weights(self, backend: Backend) -> Weights:
        weight = self.weight if backend is self.backend else self.backend.stored(self.weight)
        return Weights(weight, self.weight_scale, self.weight_zero_point, self.weight_sums, self.bias)

    def _operand(self, backend: Backend, tokens: Tensor) -> Operand:
        """What the backend makes of the input; made once for layers that read one tensor with the same scales."""
        if torch.compiler.is_compiling() or self.activation_scale is None or not backend.shares:
            return self.make_operand(backend, tokens)  # a compiler finds by itself what is the same
        if tokens.is_inference() or (tokens.requires_grad and torch.is_grad_enabled()):
            return self.make_operand(backend, tokens)
        how = (backend.name, self.activation_scale, self.activation_zero_point, self.clock.index)
        found: Operand | None = self.clock.last_input.find(tokens, how)
        if found is None:
            found = self.make_operand(backend, tokens)
            self.clock.last_input.keep(tokens, how, found)
        return found

    def make_operand(self, backend: Backend, tokens: Tensor) -> Operand:
        """(..., I) -> what the backend multiplies."""
        return backend.operand(tokens, self._grid(), self.facts)

    def _grid(self) -> Grid | None:
        """Of the current group of timesteps."""
        if self.activation_scale is None or not self.spec.static:
            return None if self.activation_scale is None else Grid(self.activation_scale, None)
        zero = self.activation_zero_point
        return Grid(self.clock.own(self.activation_scale), None if zero is None else self.clock.own(zero))

    def integer_weight(self) -> Tensor:
        """(O, I) int8."""
        return integer_weight(self._weights(REFERENCE), self.facts)

    def dequantized_weight(self) -> Tensor:
        """(O, I) float32."""
        return dequantized(self._weights(REFERENCE), self.facts)

    # ---- the backend

    @property
    def repacks(self) -> bool:
        """Whether preparing may copy the weight into another layout."""
        facts = self.current_facts()
        return facts.device.type == "cpu" and self._choose(facts).backend.copies(facts)

    def _choose(self, facts: Facts) -> select.Choice:
        if self.arithmetic not in ARITHMETICS and (backend := select.named(self.arithmetic)).takes(facts):
            return select.Choice(backend, "fixed")
        return select.choose(facts)

    def prepare(self) -> None:
        """Take the backend that is fixed, or the one of `select.choose`."""
        self.prepared = True
        if self.weight.device.type in ("cpu", "cuda"):
            choice = self._choose(self.current_facts())
            self.take(choice.backend)
            self.why = choice.why

    @torch.no_grad()
    def take(self, backend: Backend) -> None:
        """Lay the weights out for ``backend``, which is not asked whether it takes the layer."""
        stored = self.backend.stored(self.weight)
        self.backend, self.facts, self.why = backend, self.current_facts(), None
        laid = backend.lay_out(Weights(stored, self.weight_scale, self.weight_zero_point, None, self.bias), self.facts)
        if laid.q is not self.weight:
            self.weight = laid.q if isinstance(laid.q, nn.Parameter) else nn.Parameter(laid.q, requires_grad=False)
        self.weight_sums = laid.sums

    def _stored(self) -> nn.Parameter:
        """The weight as it stands in the file."""
        stored = self.backend.stored(self.weight)
        return stored if isinstance(stored, nn.Parameter) else nn.Parameter(stored, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        self.weight, self.weight_sums, self.backend = self._stored(), None, select.unprepared(self.facts)
        with types_kept(self):
            super()._apply(fn, recurse)
        self.facts = self.current_facts()
        if self.prepared:
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in GRID:  # files do not hold one tensor twice
            if f"{prefix}{name}" in destination:
                destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].clone()
        destination[f"{prefix}weight"] = self._stored() if keep_vars else self._stored().detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        backend, why, self.weight = self.backend, self.why, self._stored()
        for name in GRID:  # may be another layer's too, whose file says something else
            if (found := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(found.detach().clone(), requires_grad=False))
        super()._load_from_state_dict(*args, **kwargs)
        self.take(backend)
        self.why = why

    def __getstate__(self) -> dict[str, Any]:
        """For copies: not every layout can be copied."""
        return self.__dict__ | {"_parameters": self._parameters | {"weight": self._stored()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        why = self.why
        takes = self.backend.takes(self.current_facts())  # another machine may have made the copy
        self.take(self.backend if takes else select.unprepared(self.facts))
        self.why = why if takes else None


def prepare_layers(model: nn.Module) -> None:
    """Choose the backend of every quantized layer; those that quantize alike do so with the same tensors."""
    layers = quantized_layers(model).values()
    for layer in layers:
        layer.prepare()
    share_grids(layers, *GRID)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
