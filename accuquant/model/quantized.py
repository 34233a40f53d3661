"""The quantized layer that is exported and loaded: packed integers and scales, and the ways it can compute.

`onednn` is the integer product on weights laid out for it, `int_mm` the one of plain torch, `scaled_mm` torch's product
of fp8, `float` a float product on dequantized weights. `QuantizedLayer.prepare` takes the fastest on this machine.
A CUDA device has `triton`, products of integers or floats with weights that stay packed, and `cublas`, that library's
integer product between Triton's quantization and rescaling; what no kernel takes is computed by `float` there, never on
the CPU.

All give the same up to float32 rounding, except `float` with inputs in half precision, on a CUDA device or of few rows:
it computes in the input's type, as the layer did that was replaced.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.core import cuda, kernels
from accuquant.core.numerics import dequantize, dynamic_scale, quantize
from accuquant.core.packing import packed_columns, unpack
from accuquant.model.clock import StepClock
from accuquant.model.spec import Conv, Layer, LayerSpec, at_least_float32, share_grids

Arithmetic = Literal["integer", "reference"]
Path = Literal["onednn", "int_mm", "scaled_mm", "triton", "cublas", "float"]

GRID = ("activation_scale", "activation_zero_point")
PROBE_ROWS = 128
PROBE_OUTPUTS = 512
PROBE_RUNS = 3
PROBE_ROUNDS = 2
PROBE_MARGIN = 1.1  # a path has to be this much faster than one that stands before it
PROBE_ROWS_CUDA = 2048  # fewer leave most of a device idle
PROBE_SIZE = 1 << 14  # smaller weights are not worth a measurement


class Packed(nn.Parameter):
    """A weight in oneDNN's layout, which no other device knows: offloading takes the file's away and brings it back."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        return super().__new__(cls if data.is_mkldnn else nn.Parameter, data, requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return kernels.unpack(self).to(*args, **kwargs)


class QuantizedLayer(Layer):
    """Packed integers with their scales; computes in integers, or in float on the dequantized values.

    Tensors, as they stand in the safetensors file: ``weight`` (O, packed columns), ``weight_scale`` (O, G) float32,
    ``weight_zero_point`` (O, G) int8 where asymmetric, ``activation_scale`` (timestep groups,) or (1,) float32,
    ``activation_zero_point`` (timestep groups,) int8 where static and asymmetric, ``bias`` (O,).

    Integers have no NaN: with static scales one in the input becomes finite numbers on their paths; dynamic scales
    carry it to the whole row.

    On the path ``onednn`` the parameter ``weight`` is in oneDNN's layout, (I, O); state_dict, copies and other devices
    get the one above.
    """

    def __init__(
        self, spec: LayerSpec, columns: int, rows: int, conv: Conv | None, clock: StepClock, name: str, bias: bool
    ) -> None:
        super().__init__(spec, columns, rows, conv, clock, name)
        storage = spec.weight_type.storage
        num_scales = clock.num_groups if spec.static else 1
        asymmetric = spec.static and not spec.activation_symmetric
        self.weight = _fixed(rows, packed_columns(columns, spec.weight_type), dtype=storage)
        self.weight_scale = _fixed(rows, self.groups)
        self.weight_zero_point = None if spec.symmetric else _fixed(rows, self.groups, dtype=torch.int8)
        self.activation_scale = _fixed(num_scales) if spec.activation != "float" else None
        self.activation_zero_point = _fixed(num_scales, dtype=torch.int8) if asymmetric else None
        self.bias = _fixed(rows) if bias else None
        self.arithmetic: Arithmetic = "integer"
        self.prepared = False
        kernels.product_is_exact()  # nothing that is compiled can find out
        self.path = self._unmeasured()
        self.register_buffer("weight_sums", None, persistent=False)
        self.weight_sums: Tensor | None

    # ---- the function

    def forward(self, x: Tensor) -> Tensor:
        """Integers are made from a half type without a copy in float32: the scales make the quotient one."""
        tokens = self.conv.unfold(x) if self.conv else x
        path = "float" if self.arithmetic == "reference" else self._path_of(tokens)
        if path == "float" and self.arithmetic == "integer" and self._weight_only(tokens):
            rows = tokens.reshape(-1, self.in_features)
            y = kernels.weight_only_linear(rows, self.weight, self.weight_scale.view(-1), self.bias)
            y = y.view(*tokens.shape[:-1], self.out_features)
        elif path == "float":
            host = self.arithmetic == "integer" and tokens.is_cuda
            y = self._float(at_least_float32(tokens), x.dtype if host else None)
        else:
            compute = self._triton if path in cuda.TRITON else self._integer
            y = compute(tokens).view(*tokens.shape[:-1], self.out_features)
        y = y.to(x.dtype)
        return self.conv.fold(y, x) if self.conv else y

    def _path_of(self, tokens: Tensor) -> Path:
        """Of this input: the layer's, where its kernels take it."""
        if self.path in cuda.TRITON:
            wide = torch.float64 if self.activation_scale is not None else torch.float32
            return "float" if tokens.dtype.itemsize >= wide.itemsize else self.path
        if self.path == "scaled_mm":  # a CUDA device gives bfloat16, which is too little for wider inputs
            return "float" if tokens.is_cuda and tokens.dtype.itemsize > 2 else self.path
        few = self.path == "int_mm" and tokens.is_cuda and tokens.numel() <= kernels.SMALL_ROWS * self.in_features
        return "float" if few else self.path

    def _weight_only(self, tokens: Tensor) -> bool:
        """Whether a few rows of floats meet int8 weights with a scale a row: adaLN, which sees one row a sample."""
        few = tokens.numel() <= kernels.FEW_ROWS * self.in_features and tokens.dtype in (torch.float32, torch.bfloat16)
        return few and self.rows_weigh and not (torch.is_grad_enabled() and tokens.requires_grad)

    @property
    def rows_weigh(self) -> bool:
        """Whether weights alone are integers, of a CPU, with a scale a row."""
        plain = self.activation_scale is None and self.spec.symmetric and self.groups == 1
        return plain and self.weight.dtype == torch.int8 and self.weight.device.type == "cpu"

    def _float(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In ``dtype``, or the one of the tokens."""
        weight, bias, dtype = self.dequantized_weight(), self.bias, dtype or tokens.dtype
        if self.spec.activation_type is not None:
            scale, zero = self._input_grid(tokens)
            q = quantize(tokens, scale, 0 if zero is None else zero, self.spec.activation_type)
            tokens = dequantize(q, scale, 0 if zero is None else zero)
        return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def _triton(self, tokens: Tensor) -> Tensor:
        """(..., I) -> (M, O). Few rows are one tile; weights are then read once and never written out as floats."""
        operators, dtype, scale, zero = torch.ops.accuquant, tokens.dtype, None, None
        if self.activation_scale is None:
            tokens = tokens.reshape(-1, self.in_features)
        else:
            tokens, scale, zero = self._operand(tokens)
        if self.path == "cublas" and tokens.shape[0] > kernels.SMALL_ROWS:
            y: Tensor = kernels.integer_product(tokens, self.weight)
            y = operators.rescale(y, self.weight_scale, self.weight_sums, scale, zero, self.bias, dtype)
            return y
        weight = (self.weight, self.spec.weight_type.bits, self.weight_scale, self.weight_zero_point, self.weight_sums)
        y = operators.stored_linear(tokens, *weight, scale, zero, self.bias, dtype)
        return y

    def _integer(self, tokens: Tensor) -> Tensor:
        """(..., I) -> (M, O)."""
        if self.path == "onednn" and not (isinstance(self.weight, Packed) and tokens.device.type == "cpu"):
            self._lay_out("int_mm")  # somebody carried the weight or the input elsewhere
            self.weight = nn.Parameter(self.weight.to(tokens.device), requires_grad=False)
        q, scale, zero = self._operand(tokens)
        if self.path == "scaled_mm":
            return kernels.scaled_product(q, scale, self.weight, self.weight_scale, self.bias)
        if self.path == "onednn":
            out = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
            return kernels.packed_linear(q, scale, zero, self.weight, self.weight_scale.view(-1), self.bias, out)
        weight = self.integer_weight()
        y = kernels.integer_linear(q, scale, zero, weight, self.weight_scale, self.weight_zero_point, self.weight_sums)
        return y if self.bias is None else y + self.bias

    def _operand(self, tokens: Tensor) -> tuple[Tensor, Tensor, Any]:
        """(M, I) integers as the path takes them, their scale and zero point; made once for layers that share them."""
        if torch.compiler.is_compiling() or tokens.is_inference() or (tokens.requires_grad and torch.is_grad_enabled()):
            return self._integers(tokens)  # a compiler finds by itself what is the same
        how = (self.path, self.activation_scale, self.activation_zero_point, self.clock.index)
        found: tuple[Tensor, Tensor, Any] | None = self.clock.last_input.find(tokens, how)
        if found is None:
            found = self._integers(tokens)
            self.clock.last_input.keep(tokens, how, found)
        return found

    def _integers(self, tokens: Tensor) -> tuple[Tensor, Tensor, Any]:
        qtype, tokens = self.spec.activation_type, tokens.reshape(-1, self.in_features)
        assert qtype is not None
        if self.path in cuda.TRITON and not self.spec.static:
            q, scale = torch.ops.accuquant.quantize_dynamic(tokens, self.activation_scale, qtype.qmin, qtype.qmax)
            return q, scale, None
        scale, zero = self._input_grid(tokens)
        if self.path in cuda.TRITON:
            q = torch.ops.accuquant.quantize_static(tokens, scale, zero, qtype.qmin, qtype.qmax)
            return q, scale, zero
        q = quantize(tokens, scale, 0 if zero is None else zero, qtype)
        if self.path != "onednn":
            return q.to(qtype.floating or torch.int8), scale, zero
        shift = torch.full((1,), 128, dtype=torch.int32, device=tokens.device)
        return kernels.unsigned(q), scale.float(), shift if zero is None else shift + zero

    def _input_grid(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, (1,) or one a token, and zero point, (1,) or None for zero."""
        assert self.activation_scale is not None and self.spec.activation_type is not None
        if not self.spec.static:
            return dynamic_scale(tokens, self.spec.activation_type, self.activation_scale), None
        group = self.clock.index.to(self.activation_scale.device)
        zero = self.activation_zero_point
        return self.activation_scale.index_select(0, group), None if zero is None else zero.index_select(0, group)

    def integer_weight(self, rows: slice = slice(None)) -> Tensor:
        """(O, I) int8, or only some rows of it."""
        if self.weight.is_mkldnn:
            return kernels.unpack(self.weight)[rows]
        return unpack(self.weight[rows], self.in_features, self.spec.weight_type)

    def dequantized_weight(self, rows: slice = slice(None)) -> Tensor:
        """(O, I) float32, or only some rows of it."""
        scale = self.weight_scale[rows].reshape(-1, 1)
        q = self.integer_weight(rows).reshape(len(scale), -1).float()
        if self.weight_zero_point is not None:
            q.sub_(self.weight_zero_point[rows].reshape(-1, 1))
        return q.mul_(scale).view(-1, self.in_features)

    # ---- the path

    def paths(self) -> list[Path]:
        """Those that can compute this layer where its weight is, the likely fastest first."""
        plain = self.spec.symmetric and self.groups == 1 and self.spec.weight_type.bits == 8
        if self.spec.weight_type.floating is not None:
            shaped = self.activation_scale is not None and self.in_features % 16 == self.out_features % 16 == 0
            return (
                ["scaled_mm", "float"] if plain and shaped and kernels.scaled_works(self.weight.device) else ["float"]
            )
        if self.weight.is_cuda:
            return self._cuda_paths(plain)
        if self.activation_scale is None:
            return ["float"]
        return ["onednn", "int_mm", "float"] if plain and kernels.packed_works() else ["int_mm", "float"]

    def _cuda_paths(self, plain: bool) -> list[Path]:
        """cuBLAS multiplies integers in multiples of eight; padded copies of the weights are no path."""
        integers = self.activation_scale is not None and self.groups == 1
        integers = (
            integers and self.in_features % 8 == self.out_features % 8 == 0 and cuda.cublas_works(self.weight.device)
        )
        found: list[Path] = []
        bits = self.spec.weight_type.bits
        if cuda.triton_takes(bits, self.in_features, self.groups) and cuda.triton_works(self.weight.device):
            found = ["triton", "cublas"] if plain and integers else ["triton"]
        return [*found, "float"] if not integers or "cublas" in found else [*found, "int_mm", "float"]

    def _unmeasured(self) -> Path:
        return "float" if self.activation_scale is None or self.spec.weight_type.floating else "int_mm"

    @property
    def repacks(self) -> bool:
        """Whether preparing may copy the weight into another layout."""
        return self.weight.device.type == "cpu" and ("onednn" in self.paths() or self.rows_weigh)

    @torch.no_grad()
    def prepare(self) -> None:
        """Take the fastest path, by a short measurement that the process remembers, and lay the weights out for it."""
        self.prepared = True
        device = self.weight.device
        if device.type not in ("cpu", "cuda"):
            return
        if self.rows_weigh and self.weight.data_ptr() % 64:  # as files are mapped; its product wants whole cache lines
            self.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        speed = torch.get_num_threads() if device.type == "cpu" else device
        key = (self.spec, self.out_features, self.in_features, speed)
        if key not in _fastest:
            with device:  # models are also built with another default device
                _fastest[key] = self._measured()
        self._lay_out(_fastest[key])

    def _measured(self) -> Path:
        """In rounds over all paths, of which the best counts: what else the machine does passes."""
        paths = self.paths()
        if len(paths) == 1 or self.in_features * self.out_features < PROBE_SIZE:
            return paths[0]
        on_cuda = self.weight.is_cuda
        outputs = self.out_features if on_cuda else min(self.out_features, PROBE_OUTPUTS)
        tokens = torch.linspace(-1, 1, (PROBE_ROWS_CUDA if on_cuda else PROBE_ROWS) * self.in_features)
        tokens = tokens.view(-1, self.in_features).to(torch.bfloat16 if on_cuda else torch.float32)
        twins, least = dict[Path, QuantizedLayer](), dict.fromkeys(paths, float("inf"))
        for path in paths:
            twins[path] = QuantizedLayer(self.spec, self.in_features, outputs, None, StepClock([]), "probe", bias=True)
            if (scale := twins[path].activation_scale) is not None:
                scale.fill_(1 / 64)
            twins[path]._lay_out(path)
        for _ in range(PROBE_ROUNDS):
            for path, twin in twins.items():
                seconds = _seconds(twin, tokens)  # a first run, which also makes what later ones reuse
                if seconds < 2 * min(least.values()):
                    seconds = min(_seconds(twin, tokens) for _ in range(PROBE_RUNS))
                least[path] = min(least[path], seconds)
        best = paths[0]
        for path in paths[1:]:
            best = path if least[path] * PROBE_MARGIN < least[best] else best
        return best

    @torch.no_grad()
    def _lay_out(self, path: Path) -> None:
        packs = path == "onednn"
        if self.weight.is_mkldnn != packs:
            self.weight = Packed(kernels.prepack(self.weight)) if packs else self._stored()
        self.path, self.weight_sums = path, None
        if self.activation_zero_point is None:
            return
        blocks = [slice(start, start + 256) for start in range(0, self.out_features, 256)]
        if path == "int_mm":  # of the integers, by group
            self.weight_sums = torch.cat([kernels.weight_sums(self.integer_weight(b), self.groups) for b in blocks])
        elif path in cuda.TRITON:  # of the dequantized row
            self.weight_sums = torch.cat([self.dequantized_weight(b).double().sum(1).float() for b in blocks])

    def _stored(self) -> nn.Parameter:
        """The weight as it stands in the file."""
        return nn.Parameter(kernels.unpack(self.weight), False) if self.weight.is_mkldnn else self.weight

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        self.weight, self.weight_sums, self.path = self._stored(), None, self._unmeasured()
        before = {name: parameter.data for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != data.dtype:  # the model's type is not theirs; in place, for layers share grids
                parameter.data = data.to(parameter.device)
        if self.prepared:
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in GRID:  # files do not hold one tensor twice
            if f"{prefix}{name}" in destination:
                destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].clone()
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self._stored().detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        path, self.weight = self.path, self._stored()
        for name in GRID:  # may be another layer's too, whose file says something else
            if (found := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(found.detach().clone(), requires_grad=False))
        super()._load_from_state_dict(*args, **kwargs)
        self._lay_out(path)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: oneDNN's layout cannot be copied."""
        return self.__dict__ | {"_parameters": self._parameters | {"weight": self._stored()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.path not in self.paths():  # another machine may have made the copy
            self.path = self._unmeasured()
        self._lay_out(self.path)


_fastest: dict[Any, Path] = {}


def _seconds(layer: QuantizedLayer, tokens: Tensor) -> float:
    tokens = tokens.clone()  # of what was just quantized the integers are kept
    start = time.perf_counter()
    layer(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return time.perf_counter() - start


def _fixed(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


def prepare_layers(model: nn.Module) -> None:
    """Take the fastest path of every quantized layer; those that quantize alike do so with the same tensors."""
    layers = quantized_layers(model).values()
    for layer in layers:
        layer.prepare()
    share_grids(layers, *GRID)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def set_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Choose how a quantized model computes: ``integer`` (default) or ``reference`` (float on dequantized values).

    Raises:
        ValueError: unknown name, or the model has no quantized layer.
    """
    if arithmetic not in ("integer", "reference"):
        raise ValueError(f"arithmetic must be 'integer' or 'reference', found {arithmetic!r}")
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer quantized by accuquant")
    for layer in layers.values():
        layer.arithmetic = arithmetic
