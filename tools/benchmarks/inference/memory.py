"""What a model takes of the memory, seen from outside the allocator: by the process's resident pages, or by CUDA."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Counts from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._now("VmRSS")

    def peak(self, run: Callable[[], object]) -> int | None:
        """The most that is held while ``run`` runs, what lay there before included; None where nobody can tell."""
        _trim()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                CLEAR.write_text("5")  # the high-water mark starts again
            except OSError:
                return None
        run()
        most = self._now("VmHWM")
        return None if most is None or self.before is None else most - self.before

    def _now(self, key: str) -> int | None:
        _trim()
        if self.device.type == "cuda":
            current = torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated
            return int(current(self.device))
        if not STATUS.exists():
            return None
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))


def _trim() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
