"""The physical limit of run.py: bare products of the shapes a model has, beside our layers on them.

A bare product has its operands ready: integers and laid-out weights. What our layer takes longer is what it costs to
make integers of its input and floats of the result. Weights stay in the cache here; in a model they come from memory.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer
from accuquant.export.torchao import torchao_installed
from accuquant.kernels import onednn, scaled_mm
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

Shape = tuple[int, ...]  # M, K, N
LEAST_SECONDS = 0.02
ONEDNN, INT_MM, SCALED_MM, BFLOAT16 = "onednn", "int_mm", "scaled_mm", "bfloat16 linear"
BARE = (ONEDNN, INT_MM, SCALED_MM, BFLOAT16)
OURS = tuple(f"ours {kind} {mode}" for kind in ("static", "dynamic", "fp8") for mode in ("eager", "compiled"))
TORCHAO = "torchao dynamic compiled"  # another package's layer, on a GPU


class Gemms:
    """Products of one shape at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        packed = device.type == "cpu" and onednn.packed_works()
        fp8 = device.type != "cpu" and scaled_mm.scaled_works(device)
        torchao = device.type != "cpu" and torchao_installed()
        left_out = {*([] if packed else [ONEDNN]), *([] if fp8 else [SCALED_MM, *(n for n in OURS if "fp8" in n)])}
        self.names = [name for name in (*BARE, *OURS, *([TORCHAO] if torchao else [])) if name not in left_out]
        self.made: dict[tuple[Shape, str], tuple[Callable[[], Tensor], str]] = {}
        self.calls: dict[tuple[Shape, str], int] = {}

    @torch.no_grad()
    def measure(self, shape: Shape, name: str) -> dict[str, Any]:
        """Seconds of one product, and the path of a layer of ours."""
        key = (shape, name)
        if key not in self.made:
            self.made[key] = self.make(shape, name)
            self._seconds(key, 3)
            self.calls[key] = max(1, int(LEAST_SECONDS / self._seconds(key, 3)))
        self._seconds(key, 1)
        return {"seconds": self._seconds(key, self.calls[key]), "path": self.made[key][1]}

    def _seconds(self, key: tuple[Shape, str], calls: int) -> float:
        run = self.made[key][0]
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        self._wait()
        return (time.perf_counter() - started) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def make(self, shape: Shape, name: str) -> tuple[Callable[[], Tensor], str]:
        m, k, n = shape
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator).to(self.device, torch.bfloat16)
        module = nn.Linear(k, n)
        if name == BFLOAT16:
            linear = module.to(self.device, torch.bfloat16)
            return lambda: F.linear(x, linear.weight, linear.bias), ""
        if name == TORCHAO:
            quantization = importlib.import_module("torchao.quantization")
            other = nn.Sequential(module).to(self.device, torch.bfloat16)
            quantization.quantize_(other, quantization.Int8DynamicActivationInt8WeightConfig())
            compiled: Callable[[Tensor], Tensor] = torch.compile(other)
            return lambda: compiled(x), ""
        q = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8).to(self.device)
        w = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8).to(self.device)
        if name == INT_MM:
            return lambda: torch._int_mm(q, w.t()), ""
        if name == ONEDNN:
            return _onednn(q, w), ""
        if name == SCALED_MM:
            a, b = (t.to(torch.bfloat16).to(torch.float8_e4m3fn) for t in (q, w))
            scales = torch.ones(m, 1, device=self.device), torch.ones(1, n, device=self.device)
            return lambda: torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16), ""
        layer = self._layer(module, x, "fp8" if "fp8" in name else "int8", dynamic="static" not in name)
        run: Callable[[Tensor], Tensor] = layer
        if name.endswith("compiled"):
            run = torch.compile(layer, fullgraph=True, dynamic=False)
            run(x)
        inputs = itertools.cycle([x, x.clone()])  # of one that has just been quantized the integers are kept
        return lambda: run(next(inputs)), layer.path

    def _layer(self, module: nn.Linear, x: Tensor, qtype: str, dynamic: bool) -> Any:
        kind = "dynamic" if dynamic else "static"
        spec = LayerSpec(qtype, qtype, activation_scale=kind, activation_symmetric=dynamic)
        trainable = TrainableLayer(module, spec, StepClock([]), "layer", search=False)
        if not dynamic:
            trainable.set_activation_scale([x.float().cpu().flatten()], search=False)
        layer = trainable.harden().to(self.device)
        layer.prepare()
        return layer


def _onednn(q: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """The one call, with the result in bfloat16 as our layer has it."""
    u, packed, columns = onednn.unsigned(q), onednn.prepack(w), w.shape[0]
    scale, zero = torch.ones(1), torch.full((1,), 128, dtype=torch.int32)
    w_scale, w_zero = torch.ones(columns), torch.zeros(columns, dtype=torch.int32)

    def run() -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
            u, scale, zero, packed, w_scale, w_zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return y

    return run
