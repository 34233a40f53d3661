"""Tables, plot and summary of run.py."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure

import accuquant
from tools.benchmarks.inference.gemm import BARE, BFLOAT16, INT_MM, ONEDNN, OURS, SCALED_MM

BASE = "bfloat16 compiled"
BARE_OF_PATH = {"onednn": ONEDNN, "int_mm": INT_MM, "cublas": INT_MM, "triton": INT_MM, "scaled_mm": SCALED_MM}


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "machine": name,
        "threads": threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accuquant": accuquant.__version__,
    }


def median(row: dict[str, Any]) -> float | None:
    return statistics.median(row["seconds"]) if row.get("seconds") and "failed" not in row else None


def medians(results: dict[str, Any], wave: int | None = None) -> dict[str, float]:
    """Of the variants that were measured; of one wave, or each of its first."""
    found: dict[str, float] = {}
    for row in results["steps"]:
        seconds = median(row)
        if seconds is not None and wave in (None, row["wave"]):
            found.setdefault(row["name"], seconds)
    return found


def speed(results: dict[str, Any], name: str) -> float | None:
    """How many times faster than compiled bfloat16 in the same wave."""
    for row in results["steps"]:
        seconds, base = median(row), medians(results, row["wave"]).get(BASE)
        if row["name"] == name and seconds and base:
            return base / seconds
    return None


def best(results: dict[str, Any], ours: bool) -> str | None:
    """The fastest compiled variant of ours, or the fastest of others' int8 in any mode."""
    speeds: dict[str, float] = {}
    for row in results["steps"]:
        own = row["host"].startswith("ours")
        if (
            own == ours
            and not row["host"].startswith(("float32", "bfloat16"))
            and (not ours or row["mode"] == "compiled")
        ):
            found = speed(results, row["name"])
            if found is not None:
                speeds[row["name"]] = found
    return max(speeds, key=lambda name: speeds[name]) if speeds else None


def summary(results: dict[str, Any]) -> str:
    """What the table comes to, in its last line."""
    ours, other = best(results, True), best(results, False)
    lines, found = [f"ours is {ours}"] if ours else [], medians(results)
    eager, eager_base = found.get("ours static eager"), found.get("bfloat16 eager")
    if eager and eager_base:
        lines.append(f"ours static eager vs bf16 eager: {eager_base / eager:.2f}x")
    for name in OURS:
        beyond = mean_overhead(results, name)
        if beyond is not None:
            lines.append(f"quantize and rescale, {name.removeprefix('ours ')}: {100 * beyond:.0f} % of the product")
    frozen, own = speed(results, "bfloat16 frozen compiled"), speed(results, ours) if ours else None
    if own and frozen:
        lines.append(f"vs bf16 compiled and frozen: {own / frozen:.2f}x")
    against = "not measured"
    if own and other:
        against = (
            f"{own / (speed(results, other) or 1):.2f}x ({other.removesuffix(' compiled').removesuffix(' eager')})"
        )
    lines.append(f"vs bf16 compiled: {f'{own:.2f}x' if own else 'not measured'}, vs best other int8: {against}")
    return "\n".join(lines)


def write_report(results: dict[str, Any], out: Path) -> str:
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    size = f", {results['layers']} blocks only" if results["layers"] else ""
    size += ", our adaLN float" if results["float_modulation"] else ""
    text = (
        f"# {results['model']}{size}: {results['machine']}, {results['threads']} threads\n\n"
        f"torch {results['torch']}, diffusers {results['diffusers']}, accuquant {results['accuquant']}; medians of "
        f"{results['repeats']} alternating runs (least to most).\n\n"
    )
    text += steps_table(results) + trajectories_table(results) + gemm_table(results)
    (out / "results.md").write_text(text, encoding="utf-8")
    _plot(results, out / "results.png")
    return text


def spread(row: dict[str, Any]) -> str:
    seconds = median(row)
    if seconds is None:
        return "failed"
    unit, digits = (1e3, 1) if seconds < 10 else (1, 2)
    low, high = min(row["seconds"]) * unit, max(row["seconds"]) * unit
    return f"{seconds * unit:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) {'ms' if unit == 1e3 else 's'}"


def steps_table(results: dict[str, Any]) -> str:
    text = "## One step\n\n| variant | latency | vs bf16 compiled | peak memory | checkpoint | error | paths |\n"
    text += "|---|---|---|---|---|---|---|\n"
    waves = len(results["waves"])
    for row in results["steps"]:
        name, number = row["name"], f", wave {row['wave'] + 1}" if waves > 1 else ""
        label = name + (f" ({row['version']})" if row.get("version") else "") + number
        if "missing" in row or median(row) is None:
            text += f"| {label} | {row.get('missing') or 'failed: ' + row.get('failed', '')} | | | | | |\n"
            continue
        base = medians(results, row["wave"]).get(BASE)
        faster = f"{base / (median(row) or 1):.2f}x" if base else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f} MB" if row["peak_bytes"] is not None else "not measured"
        paths = ", ".join(f"{path} {count}" for path, count in row["paths"].items())
        size = f"{row['checkpoint_bytes'] / 1e6:.1f} MB"
        text += f"| {label} | {spread(row)} | {faster} | {peak} | {size} | {row['error']:.2e} | {paths} |\n"
    kind = "resident memory beyond the imported packages" if results["device"] == "cpu" else "torch.cuda's allocations"
    return text + (
        f"\nPeak memory is of a step with the model in it: {kind}. Checkpoint: the file, or for other packages "
        "the bytes of their tensors. Error: of the prediction, relative to float32 with the same weights.\n\n"
    )


def trajectories_table(results: dict[str, Any]) -> str:
    rows = results["trajectories"]
    if not rows:
        return "## Trajectory\n\nnot measured\n\n"
    base = next((median(r) for r in rows if r["host"] == "bfloat16" and r["interval"] is None), None)
    text = f"## Trajectory of {rows[0]['steps']} steps with RFC, medians of {results['turns']}\n\n"
    text += "| variant | NFC | seconds | vs bf16, no cache | error |\n"
    text += "|---|---|---|---|---|\n"
    for row in rows:
        name, seconds = f"{row['host']} {row['mode']}{' + RFC' if row['interval'] else ''}", median(row)
        if seconds is None:
            text += f"| {name} | | failed: {row.get('failed', '')} | | |\n"
            continue
        times = f"{seconds:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})"
        faster = f"{base / seconds:.2f}x" if base else ""
        text += f"| {name} | {row['nfc']} | {times} | {faster} | {row['error']:.2e} |\n"
    random = "" if results["model"] == "bundled" else " Random weights: it says nothing about a trained model."
    return text + f"\nError: of the final latent, relative to float32 without cache.{random}\n\n"


def gemm_table(results: dict[str, Any]) -> str:
    """Rates in TFLOP/s (two operations a multiply-add), and what our layers take beyond the bare product."""
    rows = results["gemm"]
    text = "## Against the bare product\n\n| M, K, N | times | what | ms | TFLOP/s | path | beyond its bare product |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for row in rows:
        seconds, shape = median(row), ", ".join(map(str, row["shape"]))
        if seconds is None:
            text += f"| {shape} | {row['count']} | {row['name']} | failed: {row.get('failed', '')} | | | |\n"
            continue
        m, k, n = row["shape"]
        times = row["count"] or "Q, K, V as one"
        beyond, path = overhead(results, row), row.get("path", "")
        extra = "" if beyond is None else f"{100 * beyond:+.0f} %"
        rate = 2 * m * k * n / seconds / 1e12
        text += f"| {shape} | {times} | {row['name']} | {1e3 * seconds:.3f} | {rate:.2f} | {path} | {extra} |\n"
    limit, found = bound(results), medians(results)
    if limit is not None:
        text += f"\nAll eight-bit products of a step at the rate of the best bare one: {1e3 * limit:.1f} ms"
        named = [(n, s) for n, s in found.items() if n.startswith("ours")]
        text += "".join(f"; {100 * limit / s:.0f} % of {n}'s step" for n, s in named) + ".\n"
    return text


def overhead(results: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Of a layer of ours, beyond the bare product of its own path."""
    name = BARE_OF_PATH.get(row.get("path", ""))
    seconds = median(row)
    bare = next((median(r) for r in results["gemm"] if r["name"] == name and r["shape"] == row["shape"]), None)
    return seconds / bare - 1 if seconds and bare else None


def mean_overhead(results: dict[str, Any], name: str) -> float | None:
    """Of all layers of the model that have a bare product, by the time they take."""
    layers = bare = 0.0
    for row in results["gemm"]:
        seconds, beyond = median(row), overhead(results, row)
        if row["name"] == name and seconds and beyond is not None:
            layers += row["count"] * seconds
            bare += row["count"] * seconds / (1 + beyond)
    return layers / bare - 1 if bare else None


def bound(results: dict[str, Any]) -> float | None:
    """Seconds of all eight-bit products of one step, if each ran as fast as the fastest bare one."""
    total = 0.0
    for shape in {tuple(r["shape"]) for r in results["gemm"]}:
        rows = [
            r for r in results["gemm"] if tuple(r["shape"]) == shape and r["name"] in BARE and r["name"] != BFLOAT16
        ]
        times = [t for t in map(median, rows) if t]
        if not times:
            return None
        total += rows[0]["count"] * min(times)
    return total or None


def _plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results["steps"] if median(row)]
    names = [row["name"] + (f" ({row['wave'] + 1})" if len(results["waves"]) > 1 else "") for row in rows]
    times = [1e3 * (median(row) or 0) for row in rows]
    errors = [
        [t - 1e3 * min(row["seconds"]) for t, row in zip(times, rows, strict=True)],
        [1e3 * max(row["seconds"]) - t for t, row in zip(times, rows, strict=True)],
    ]
    colours = [
        "C0" if name.startswith("ours") else "C7" if name.startswith(("float", "bf")) else "C1" for name in names
    ]
    left.barh(names, times, xerr=errors, color=colours)
    left.invert_yaxis()
    left.set(xlabel="one step (ms), median, least to most", title=f"{results['model']}, {results['threads']} threads")
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in results["gemm"]))
    for number, name in enumerate(dict.fromkeys(row["name"] for row in results["gemm"])):
        found = {tuple(r["shape"]): median(r) for r in results["gemm"] if r["name"] == name}
        rates = [2 * m * k * n / (found.get((m, k, n)) or float("inf")) / 1e12 for m, k, n in shapes]
        right.bar([i + 0.1 * number for i in range(len(shapes))], rates, 0.1, label=name)
    right.set_xticks([i + 0.3 for i in range(len(shapes))], [" x ".join(map(str, shape)) for shape in shapes])
    right.set(ylabel="TFLOP/s", title="products of the model's shapes")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
