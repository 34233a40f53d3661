"""Times every path of a quantized layer, over types and shapes, beside the rule's choice: for `kernels.thresholds`.

    python -m tools.benchmarks.inference.measure_paths --threads 2
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m tools.benchmarks.inference.measure_paths     # as a CPU without AMX
    python -m tools.benchmarks.inference.measure_paths --device cuda                           # bfloat16, wider layers

One product with the quantization of its input, in milliseconds, beside torch's own of the input's type; weights stay
in the cache as far as they fit. The last lines say where the rule is slower than the fastest path, and by how much.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from accuquant.core.numerics import QTYPES
from accuquant.kernels import measured, select
from accuquant.kernels.backend import Facts

# weight, group size, asymmetric, activation scale; without one the input stays float
KINDS: dict[str, tuple[str, int | None, bool, str]] = {
    "int8 static": ("int8", None, False, "static"),
    "int8 dynamic": ("int8", None, False, "dynamic"),
    "int8 asymmetric": ("int8", None, True, "static"),
    "int6": ("int6", None, False, "static"),
    "int4": ("int4", None, False, "static"),
    "int4 asymmetric": ("int4", None, True, "static"),
    "int4 / 384": ("int4", 384, False, "static"),
    "int4 / 128": ("int4", 128, False, "static"),
    "int4 / 32": ("int4", 32, False, "static"),
    "int8 / 32": ("int8", 32, False, "static"),
    "fp8": ("fp8", None, False, "static"),
    "int8 alone": ("int8", None, False, ""),
    "int4 alone": ("int4", None, False, ""),
    "int4 / 32 alone": ("int4", 32, False, ""),
}
SHAPES = (
    (64, 64),
    (128, 128),
    (128, 512),
    (512, 128),
    (384, 384),
    (384, 1536),
    (1536, 384),
    (1152, 1152),
    (1152, 4608),
)
CUDA_SHAPES = ((128, 512), (1152, 1152), (1152, 4608), (3072, 3072), (3072, 12288), (12288, 3072))
ROWS = {"cpu": [128, 512], "cuda": [1024, 4096]}


def facts_of(kind: str, inputs: int, outputs: int, device: torch.device) -> Facts:
    weight, group, asymmetric, scale = KINDS[kind]
    activation = QTYPES["fp8" if weight == "fp8" else "int8"] if scale else None
    shifted = scale == "static" and weight != "fp8"
    groups = 1 if group is None else inputs // group
    return Facts(
        QTYPES[weight], activation, inputs, outputs, groups, not asymmetric, scale == "dynamic", shifted, device
    )


@torch.no_grad()
def plain_seconds(inputs: int, outputs: int, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of a layer that nobody quantized, timed as the paths are."""
    x, weight = (torch.randn(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
    bias, best = torch.zeros(outputs, dtype=dtype, device=device), math.inf
    for _ in range(measured.ROUNDS * (1 + measured.RUNS)):
        start = time.perf_counter()
        F.linear(x, weight, bias)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every path of a quantized layer beside the rule's choice.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=tuple(ROWS), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the input; bfloat16 on CUDA, else float32")
    parser.add_argument("--rows", type=int, nargs="+", help="of the input; 128 and 512, or 1024 and 4096 on CUDA")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    print(json.dumps(measured.machine(device) | {"dtype": dtype}))
    for kind in options.kinds:
        for inputs, outputs in CUDA_SHAPES if device.type == "cuda" else SHAPES:
            if inputs < 2 * (KINDS[kind][1] or 1):
                continue
            facts = facts_of(kind, inputs, outputs, device)
            paths = select.paths(facts)
            for count in options.rows or ROWS[device.type]:
                seconds = measured.measure(facts, paths, count, getattr(torch, dtype))
                chosen, best = select.choose(facts).backend.name, min(seconds, key=lambda path: seconds[path])
                slower = seconds[chosen] / seconds[best]
                plain = plain_seconds(inputs, outputs, count, getattr(torch, dtype), device)
                rows.append(
                    {
                        "kind": kind,
                        "shape": [count, inputs, outputs],
                        "chosen": chosen,
                        "slower": slower,
                        "seconds": seconds,
                        "plain": plain,
                    }
                )
                times = "  ".join(f"{path} {1e3 * s:9.3f}" for path, s in seconds.items())
                mark = "" if chosen == best else f"  rule: {chosen}, {slower:.2f}x of {best}"
                shape = f"{count:5} x {inputs:5} -> {outputs:5}"
                print(f"{kind:16} {shape}  {dtype} {1e3 * plain:9.3f}  {times}{mark}", flush=True)
    worst = max(rows, key=lambda row: float(row["slower"]))
    mean = math.exp(sum(math.log(row["slower"]) for row in rows) / len(rows))
    others = sum(row["slower"] > 1 for row in rows)
    print(
        f"the rule takes another path than the fastest in {others} of {len(rows)} cases; {mean:.3f}x of it on average,"
    )
    print(f"at most {worst['slower']:.2f}x ({worst['kind']}, {worst['shape']})")
    if options.out:
        found = {"machine": measured.machine(device) | {"dtype": dtype}, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
