"""Choices that a person had measured (`accuquant inspect DIR --measure`), kept for this machine.

A file for each CPU, number of threads and versions lies in the folder ``paths`` of ``$ACCUQUANT_CACHE``, or of
``accuquant`` in the user's cache folder. Nothing else is ever measured, and no load writes there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from accuquant.core.numerics import QType
from accuquant.core.packing import packed_columns
from accuquant.kernels import cpu
from accuquant.kernels.backend import Backend, Facts, Grid, Weights
from accuquant.version import __version__

ROWS = {"cpu": 512, "cuda": 2048}  # of the inputs; fewer leave most of a device idle
RUNS = 5
ROUNDS = 3


def machine(device: torch.device) -> dict[str, str | int]:
    """What a choice was measured on, and holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu.model()} ({cpu.tier()})"
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {"device": name, "threads": threads, "torch": str(torch.__version__), "accuquant": __version__}


def cache_folder() -> Path:
    """The user's, or the one that ACCUQUANT_CACHE names."""
    if given := os.environ.get("ACCUQUANT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accuquant"


def file_of(device: torch.device) -> Path:
    """Where the choices for this machine are kept."""
    text = json.dumps(machine(device), sort_keys=True)
    return cache_folder() / "paths" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def kept(facts: Facts) -> str | None:
    """The name of the backend that was the fastest for such a layer, if that was measured on this machine."""
    path = file_of(facts.device)
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path} cannot be read and is ignored: {error}", stacklevel=2)
        return None
    return _read(path, status.st_mtime_ns, status.st_size).get(str(facts))


@functools.lru_cache(8)
def _read(path: Path, changed: int, size: int) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["paths"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("'paths' is no mapping of layers to names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} cannot be read and is ignored: {error}", stacklevel=2)
        return {}
    return found


def keep(winners: dict[Facts, str], device: torch.device) -> Path:
    """Add them to the file, which is replaced when it is whole.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _read(path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else {}
    content = {"machine": machine(device), "paths": before | {str(facts): name for facts, name in winners.items()}}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(temporary, path)
    return path


@torch.no_grad()
def measure(
    facts: Facts, backends: Sequence[Backend], rows: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Seconds that each backend takes for one product of such a layer, quantization of the input included.

    In rounds over all of them, of which the best counts: what else the machine does passes.

    Args:
        rows: of the input; None takes 512 on a CPU and 2048 on a CUDA device.
        dtype: of the input; None takes float32 on a CPU and bfloat16 on a CUDA device.
    """
    on_cuda = facts.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # models are also built with another default device
        x = torch.randn(rows or ROWS[facts.device.type], facts.inputs, generator=generator)
        grid, weights = _tensors(facts, generator)
    x = x.to(facts.device, dtype or (torch.bfloat16 if on_cuda else torch.float32))
    made = [(backend, backend.lay_out(weights, facts)) for backend in backends]
    least = {backend.name: float("inf") for backend in backends}
    for _ in range(ROUNDS):
        for backend, laid in made:
            seconds = timed(backend, x, grid, laid, facts)  # a first run, which also makes what later ones reuse
            if seconds < 2 * min(least.values()):
                seconds = min(timed(backend, x, grid, laid, facts) for _ in range(RUNS))
            least[backend.name] = min(least[backend.name], seconds)
    return least


def _tensors(facts: Facts, generator: torch.Generator) -> tuple[Grid | None, Weights]:
    def draw(qtype: QType, *shape: int) -> Tensor:
        if qtype.floating:
            return torch.randn(*shape, generator=generator).to(qtype.storage)
        low, high = (0, 256) if qtype.storage == torch.uint8 else (-128, 128)
        return torch.randint(low, high, shape, generator=generator).to(qtype.storage)

    q = draw(facts.weight, facts.outputs, packed_columns(facts.inputs, facts.weight)).to(facts.device)
    scale = torch.full((facts.outputs, facts.groups), 1 / 64).to(facts.device)
    zero = None if facts.symmetric else torch.ones_like(scale, dtype=torch.int8)
    weights = Weights(q, scale, zero, None, torch.zeros(facts.outputs).to(facts.device))
    if facts.activation is None:
        return None, weights
    step = torch.full((1,), 1 / 64).to(facts.device)
    return Grid(step, torch.ones_like(step, dtype=torch.int8) if facts.shifted else None), weights


def timed(backend: Backend, x: Tensor, grid: Grid | None, weights: Weights, facts: Facts) -> float:
    """Seconds of one product, quantization of the input included."""
    start = time.perf_counter()
    backend.linear(backend.operand(x, grid, facts), weights, facts, x.dtype)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
