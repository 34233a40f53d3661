"""What this CPU is, as far as the speed of products hangs on it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch

Tier = Literal["amx", "vnni", "avx512", "avx2", "other"]
TIERS: tuple[Tier, ...] = ("other", "avx2", "avx512", "vnni", "amx")  # a later one has the instructions of those before
# what the environment lets oneDNN use; newer names than these take nothing away
LIMITS: dict[str, Tier] = {
    "SSE41": "other",
    "AVX": "other",
    "AVX2": "avx2",
    "AVX2_VNNI": "vnni",
    "AVX2_VNNI_2": "vnni",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "vnni",
    "AVX512_CORE_BF16": "vnni",
    "AVX512_CORE_FP16": "vnni",
    "AVX10_1_512": "vnni",
}


def tier() -> Tier:
    """The widest instructions for integer products that the CPU has and oneDNN may use."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return min(widest(), LIMITS.get(limit.upper(), TIERS[-1]), key=TIERS.index)


@functools.cache
def widest() -> Tier:
    """The widest that the CPU has, whatever the environment lets oneDNN use."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _flags()
    if found.get("amx_int8"):
        return "amx"
    if found.get("avx512_vnni") or found.get("avx_vnni"):
        return "vnni"
    if found.get("avx512_f") or found.get("avx512f"):
        return "avx512"
    return "avx2" if found.get("avx2") else "other"


def _flags() -> dict[str, Any]:
    """As Linux names them; elsewhere only what torch has noticed."""
    line = _cpuinfo("flags")
    known = torch.backends.cpu.get_cpu_capability().lower()
    return dict.fromkeys(line.split(), True) | {"avx2": known in ("avx2", "avx512"), "avx512_f": known == "avx512"}


@functools.cache
def model() -> str:
    """The CPU's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
