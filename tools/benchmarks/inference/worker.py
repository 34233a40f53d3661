"""One process of run.py: holds one model, and times what it is told to.

Models live in processes of their own, so that compiler settings, packages and memory of one cannot touch another. Asked
by JSON lines on standard input, it answers by JSON lines on standard output; whatever packages print goes to its log.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

import accuquant
from accuquant.runtime.layer import quantized_layers
from tools.benchmarks.inference.gemm import Gemms
from tools.benchmarks.inference.hosts import RIVALS, Missing, load_base, nbytes, ours, prepare, rival
from tools.benchmarks.inference.memory import Memory
from tools.benchmarks.inference.models import Subject

LEAST_SECONDS = 0.2  # shorter steps are timed several at a time
LIMIT = 4096  # graphs of one function: every block of a model with hooks has its own


class Worker:
    """Answers to the names of its methods; ``setup`` comes from the command line."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.folder, self.host = Path(setup["folder"]), str(setup["host"])
        self.subject, self.device = (
            Subject(setup["model"], setup["layers"], setup["float_modulation"]),
            torch.device(setup["device"]),
        )
        self.dtype = torch.float32 if self.host == "float32" else torch.bfloat16
        self.modules: dict[str, Any] = {}
        self.inner: dict[str, int] = {}  # calls timed together
        self.gemms: Gemms | None = None
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = LIMIT

    # ---- what is asked

    def prepare(self, hosts: list[str], steps: int) -> dict[str, Any]:
        return prepare(self.subject, self.folder, hosts, steps, self.device)

    @torch.no_grad()
    def build(self, compiles: bool) -> dict[str, Any]:
        """Load or quantize the model."""
        version = RIVALS[self.host].version() if self.host in RIVALS else ""  # and imports it
        _warm_up(compiles)
        self.memory = Memory(self.device)
        if self.host in RIVALS:
            self.model, size = rival(self.host, self.subject, self.folder, self.device)
        elif self.host.startswith("ours"):
            self.model, size = ours(self.host, self.subject, self.folder, self.device)
        else:
            self.model = load_base(self.subject, self.folder, self.dtype, self.device)
            size = sum(nbytes(tensor) for tensor in self.model.state_dict().values())
        if self.host.endswith("frozen"):
            torch._inductor.config.freezing = True
        self.call = self.subject.step(self.model, self.device, self.dtype)
        self.modules["eager"] = self.model
        counts: dict[str, int] = {}
        for layer in quantized_layers(self.model).values():
            counts[layer.path] = counts.get(layer.path, 0) + 1
        return {"checkpoint_bytes": size, "version": version, "paths": counts}

    @torch.no_grad()
    def warm(self, mode: str) -> dict[str, Any]:
        """First calls: compile time, memory and error."""
        started = time.perf_counter()
        if mode == "compiled":
            self.modules[mode] = torch.compile(self.model, fullgraph=self.host.startswith(("bfloat16", "ours")))
        output = self.call(self.modules[mode])
        first = time.perf_counter() - started
        self._seconds(mode, 1)
        peak = self.memory.peak(lambda: self._seconds(mode, 1))
        expected = load_file(self.folder / "reference.safetensors")["step"]
        self.inner[mode] = max(1, math.ceil(LEAST_SECONDS / self._seconds(mode, 1)))
        return {"first_seconds": first, "peak_bytes": peak, "error": _error(output, expected)}

    @torch.no_grad()
    def step(self, mode: str) -> dict[str, Any]:
        """After one call that nobody times: another process had the caches."""
        self._seconds(mode, 1)
        return {"seconds": self._seconds(mode, self.inner[mode])}

    def trajectory(self, mode: str, interval: int | None, steps: int) -> dict[str, Any]:
        expected = load_file(self.folder / "reference.safetensors")["trajectory"]
        with self._cached(mode, interval) as module:
            started = time.perf_counter()
            final = self.subject.trajectory(module, self.model, steps, self.device, self.dtype)
            self._wait()
            seconds = time.perf_counter() - started
            nfc = accuquant.cache_stats(self.model).nfc if interval else steps
        return {"seconds": seconds, "nfc": nfc, "error": _error(final, expected)}

    def gemm(self, shape: list[int] | None = None, name: str | None = None) -> dict[str, Any]:
        """Without a shape: those that can be timed."""
        if shape is None or name is None:
            self.gemms = self.gemms or Gemms(self.device)
            return {"names": self.gemms.names}
        assert self.gemms is not None
        return self.gemms.measure(tuple(shape), name)

    # ---- how

    def _seconds(self, mode: str, calls: int) -> float:
        module = self.modules[mode]
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            self.call(module)
        self._wait()
        return (time.perf_counter() - started) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _cached(self, mode: str, interval: int | None) -> Iterator[Any]:
        """The module to call. With a cache, what it computes is compiled module by module, below its hooks."""
        if interval is None:
            yield self.modules[mode]
            return
        accuquant.enable_cache(self.model, accuquant.RFCConfig(interval=interval))
        if mode == "compiled":
            accuquant.compile_cached(self.model, fullgraph=True)
        try:
            yield self.model
        finally:
            accuquant.disable_cache(self.model)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


def _warm_up(compiles: bool) -> None:
    """What is imported and allocated at first use is no model's memory."""
    tiny = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4, norm_num_groups=1
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny.save_pretrained(folder)
        tiny = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    linear: nn.Module = nn.Linear(64, 64, dtype=torch.bfloat16)
    linear(torch.zeros(64, 64, dtype=torch.bfloat16))
    if compiles:
        torch.compile(linear)(torch.zeros(64, 64, dtype=torch.bfloat16))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not be taken for an answer
    setup = json.loads(sys.argv[1])
    torch.set_num_threads(setup["threads"])
    worker = Worker(setup)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(worker, asked.pop("do"))(**asked)
        except Missing as missing:
            answer = {"missing": str(missing)}
        except Exception as error:  # a package that fails is a row of the table
            sys.excepthook(*sys.exc_info())
            answer = {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
