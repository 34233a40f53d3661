"""Draws what run.py measured, and why: errors over NFC, changes over time, the ratio s, modules.

python -m tools.benchmarks.cache.plot    # writes cache.png beside the results
"""

from __future__ import annotations

import statistics

import matplotlib.pyplot as plt
import torch
import typer

from accuquant.caching.search import record_grams
from accuquant.core.schedule import ForecastErrors, interval_steps
from accuquant.recipe import Cache
from accuquant.runtime.cache.features import cached_modules
from tools.benchmarks.cache.run import DEFAULT_OUT, INTERVALS, Bench, Out
from tools.benchmarks.rows import read_rows


def main(out: Out = DEFAULT_OUT) -> None:
    """Draw errors over NFC, and from one full trajectory the changes over time, the ratio s and the modules' errors."""
    interval = 4
    bench, rows = Bench(0), [r for r in read_rows(out) if r["part"] == "table"]
    inputs, outputs = record_grams(bench.runs, Cache(interval=4))
    names = [n.removeprefix("transformer_blocks.") for n in cached_modules(bench.denoiser)[0]]
    figure, axes = plt.subplots(4, 2, figsize=(13, 17), constrained_layout=True)

    for axis, order in zip(axes[0], (1, 2), strict=True):
        for name in dict.fromkeys(r["method"] for r in rows if r["order"] == order):
            points = []
            for nfc in sorted(INTERVALS):
                found = [r["relative_l2"] for r in rows if (r["method"], r["nfc"], r["order"]) == (name, nfc, order)]
                points += [(nfc, statistics.mean(found), min(found), max(found))] if found else []
            x, mean, low, high = zip(*points, strict=True)
            axis.plot(x, mean, marker="o", label=name)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set(title=f"order {order}", xlabel="NFC of 50 steps", ylabel="relative L2 of final latent", yscale="log")
        axis.legend(fontsize=8)

    own_in, own_out = (gram.diagonal(dim1=-2, dim2=-1) for gram in (inputs, outputs))
    moved = [
        (own[..., 1:] + own[..., :-1] - 2 * gram.diagonal(offset=1, dim1=-2, dim2=-1)).clamp_min(0).sqrt()
        for own, gram in ((own_in, inputs), (own_out, outputs))
    ]
    for change, own, label in zip(moved, (own_in, own_out), ("input", "output"), strict=True):
        relative = (change / own[..., 1:].sqrt()).mean(1)
        axes[1, 0].plot(relative.mean(0), label=f"{label}, mean of modules")
        axes[1, 0].fill_between(range(49), relative.amin(0), relative.amax(0), alpha=0.15)
    axes[1, 0].set(title="change from step to step, of the modules", xlabel="step", ylabel="relative", yscale="log")
    axes[1, 0].legend()
    ratio = (moved[1] / moved[0]).mean(1)
    for row, name in zip(ratio, names, strict=True):
        axes[1, 1].plot(row / row.mean(), linewidth=0.9, label=name)
    axes[1, 1].set(title="ratio s of each module, over its mean", xlabel="step", ylabel="s / mean", yscale="log")
    axes[1, 1].legend(fontsize=6, ncols=2)

    # the direction of the last change, against that of the change k steps on; and s of the two guidance halves
    gap, half = interval, outputs.shape[1] // 2
    for k in (1, 2, 4):
        cosine = []
        for i in range(gap, 50 - k):
            last = own_out[..., i] + own_out[..., i - gap] - 2 * outputs[..., i, i - gap]
            ahead = own_out[..., i + k] + own_out[..., i] - 2 * outputs[..., i + k, i]
            both = outputs[..., i + k, i] - outputs[..., i + k, i - gap] - own_out[..., i] + outputs[..., i, i - gap]
            cosine.append((both / (last * ahead).sqrt()).mean())
        axes[3, 0].plot(range(gap, 50 - k), cosine, label=f"k = {k}")
    axes[3, 0].set(title=f"cosine of the change over the last {gap} steps with that of the next k", xlabel="step")
    for part, label in ((slice(0, half), "conditional"), (slice(half, None), "unconditional")):
        axes[3, 1].plot((moved[1] / moved[0])[:, part].mean((0, 1)), label=label)
    axes[3, 1].set(title="ratio s of the guidance halves, mean of modules", xlabel="step")

    steps = interval_steps(50, interval, 2)
    for label, order, relational in (("reuse", 0, False), ("Taylor 1", 1, False), ("RFE 1", 1, True)):
        per_module, per_step = [], torch.zeros(50)
        for k in range(len(names)):
            errors = ForecastErrors(inputs[k : k + 1], outputs[k : k + 1], order, relational, 0.0)
            total = 0.0
            for before, full, after in zip((0, *steps[:-1]), steps, (*steps[1:], 50), strict=True):
                skipped = errors.at(before, full)[full + 1 : after]
                total += float(skipped.sum())
                per_step[full + 1 : after] += skipped.float() / len(names)
            per_module.append((total / (50 - len(steps))) ** 0.5)
        axes[2, 0].plot(names, per_module, marker="o", label=label)
        axes[2, 1].plot(per_step.sqrt(), label=label)
    axes[2, 0].set(title=f"forecast error of the modules, interval {interval}", ylabel="relative", yscale="log")
    axes[2, 0].tick_params(axis="x", rotation=60)
    axes[2, 1].set(title="forecast error over time, all modules", xlabel="step", ylabel="relative")
    for axis in (*axes[2], *axes[3]):
        axis.legend()
    figure.savefig(out / "cache.png", dpi=90)
    print(f"wrote {out / 'cache.png'}")


if __name__ == "__main__":
    typer.run(main)
