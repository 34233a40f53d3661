"""From which layers on a path pays: measured once, and shipped.

Measured by ``tools/benchmarks/inference/measure_paths.py`` on an Intel Xeon (model 207: AMX, AVX-512 VNNI), torch 2.13,
one thread, 128 rows of float32 and 512 of bfloat16; `vnni`, `avx512` and `avx2` there under ONEDNN_MAX_CPU_ISA
(AVX512_CORE_VNNI, AVX512_CORE, and AVX2 with ATEN_CPU_CAPABILITY=avx2). On an AMD EPYC (Zen 5, VNNI) bare products of
`onednn` and `int_mm` are equally fast at all of a DiT's shapes, and twice as fast as bfloat16's.

Seen: integers with one scale a row beat floats from 128 x 512 weights on, `onednn`'s earlier. Groups of 32 cost
a product each and lose by three to seven times, groups of 128 break even. Without VNNI eight bits saturate, so that
`int_mm` computes them in floats (see `integers`), and fewer bits still win. A CPU's fp8 product never does.

On an NVIDIA H200 (torch 2.11, Triton 3.6, 1024 and 4096 rows of bfloat16, weights of 128 x 512 to 12288 x 3072)
`triton` beats floats by 1.1 to 4 times with one scale a row, and is within 18 % of `cublas` where that is ahead. With
groups of 128 it is ahead but once (1.1 times slower). Groups of 32 win on small layers and lose on large ones, by 1.3
to 2.7 times from 3072 x 3072 on.
"""

from __future__ import annotations

from typing import NamedTuple

from accuquant.kernels import cpu
from accuquant.kernels.backend import Facts

SMALL = 1 << 14  # weights; such a layer is a matter of microseconds, and the first path of the table does


class Least(NamedTuple):
    """What a layer needs for a path to pay."""

    size: int  # inputs times outputs
    group: int = 1  # inputs that share a scale of the weights
    bits: int = 8  # of the weights, at most


# A CPU that is not named (tier `other`, without AVX2: nothing was measured) computes in floats.
LEAST: dict[str, dict[cpu.Tier, Least]] = {
    "onednn": {"amx": Least(SMALL), "vnni": Least(SMALL)},
    "int_mm": {
        "amx": Least(1 << 16, group=256),
        "vnni": Least(1 << 16, group=256),
        "avx512": Least(1 << 16, group=256, bits=7),
        "avx2": Least(1 << 16, group=256, bits=7),
    },
    "scaled_mm": {},
}

CUDA_GROUP = 128  # a group below it costs `triton` more additions than its integers save,
CUDA_SMALL = 1 << 22  # unless the layer has fewer weights than this, whose launches are all it costs


def pays(path: str, facts: Facts) -> bool:
    """Whether a layer on this CPU is computed faster by ``path`` than by those after it in the table of `select`."""
    size = facts.inputs * facts.outputs
    if size < SMALL:
        return True
    least, group = LEAST[path].get(cpu.tier()), facts.inputs // facts.groups
    if least is None or size < least.size or facts.weight.bits > least.bits:
        return False
    return facts.groups == 1 or group >= least.group


def triton_pays(facts: Facts) -> bool:
    """Whether `triton` computes a layer on a CUDA device faster than floats."""
    return facts.groups == 1 or facts.inputs // facts.groups >= CUDA_GROUP or facts.inputs * facts.outputs < CUDA_SMALL
