"""The report's charts: matplotlib onto PNG, each for light and for dark pages."""

from __future__ import annotations

import base64
import io
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

Chart = dict[str, str]  # theme -> data URI

# Okabe-Ito hues, told apart by colour-blind readers; lines also differ in dash and weight
THEMES = {
    "light": {"ink": "#3d444d", "grid": "#d9dee3", "main": "#0072b2", "other": "#c04f00", "soft": "#9cc4dd"},
    "dark": {"ink": "#b6bec8", "grid": "#363d46", "main": "#56b4e9", "other": "#e69f00", "soft": "#2f5f7d"},
}
# what a candidate costs: its scale and name on an axis
COSTS = {
    "bit_operations": (100, "bit operations of a trajectory (% of float32 without a cache)"),
    "nfc": (1, "full computations in a trajectory (NFC)"),
    "seconds": (1, "seconds of a trajectory"),
}


def accumulation(metrics: dict[str, Any]) -> Chart:
    """Error after each denoising step, with its spread over samples and, where known, before calibration."""
    return _themed(lambda axes, theme: _accumulation(axes, theme, metrics))


def decomposition(metrics: dict[str, Any]) -> Chart | None:
    """Error of quantization, cache and both after each step; None without a cache."""
    return _themed(lambda axes, theme: _decomposition(axes, theme, metrics)) if metrics.get("decomposition") else None


def loss(history: list[dict[str, Any]]) -> Chart | None:
    """Calibration loss of each update; None if none is positive and finite."""
    seen = [h for h in history if 0 < h["loss"] < math.inf]
    return _themed(lambda axes, theme: _loss(axes, theme, seen)) if seen else None


def schedule(cache: dict[str, Any]) -> Chart | None:
    """Full steps over time and, where measured, the input error that adds up between them; None without full steps."""
    if not cache.get("full_steps"):
        return None
    height = 2.8 if cache.get("input_errors") else 1.15
    return _themed(lambda axes, theme: draw_schedule(axes, theme, cache), height)


def shares(cache: dict[str, Any]) -> Chart | None:
    """What forecasts take of the last output and of its change at skipped steps; None where nothing was learned."""
    return _themed(lambda axes, theme: _shares(axes, theme, cache), 2.8) if cache.get("shares") else None


def pareto(tuning: dict[str, Any], cost: str) -> Chart | None:
    """E_qc over ``bit_operations``, ``nfc`` or ``seconds`` of what was tried; None if a candidate's cost is unknown."""
    tried = tuning["tried"]
    known = all(row.get(cost) is not None for row in tried)
    seen = [row for row in tried if known and 0 < (row.get("E_qc") or 0) < math.inf]
    budget = (tuning.get("budget") or {}).get(cost)
    return _themed(lambda axes, theme: draw_pareto(axes, theme, seen, cost, budget), 4.2) if seen else None


def data_uri(buffer: io.BytesIO) -> str:
    """A PNG as text that an img tag takes."""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _themed(draw: Callable[[Axes, dict[str, str]], None], height: float = 3.5) -> Chart:
    """The same chart for light and for dark pages, as data URIs."""
    drawn, place = {}, None
    for name, theme in THEMES.items():
        figure = Figure(figsize=(9.2, height), dpi=170, facecolor="none", layout=None if place else "constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.add_subplot(facecolor="none")
        if place:  # what takes as much room in both themes need not be laid out twice
            axes.set_position(place)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        draw(axes, theme)
        axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(theme["ink"])
        axes.tick_params(which="both", colors=theme["ink"], labelsize=9, left=False)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme["ink"], fontsize=9.5)
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
        legend = axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=9.5, **above)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold dollar signs
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})  # `savefig` would draw all of it twice
        drawn[name], place = data_uri(buffer), axes.get_position()
    return drawn


def _accumulation(axes: Axes, theme: dict[str, str], metrics: dict[str, Any]) -> None:
    mean = [100 * v for v in metrics["relative_l2_per_step"]]
    steps = range(len(mean))
    before = (metrics.get("initial") or {}).get("relative_l2_per_step")
    if before is not None:
        axes.plot(steps, [100 * v for v in before], color=theme["other"], dashes=(5, 3), label="before calibration")
    label = "quantized" if before is None else "after calibration"
    label += " and cached" if metrics.get("cache") else ""
    axes.plot(steps, mean, color=theme["main"], linewidth=2.2, label=label)
    if band := metrics.get("relative_l2_per_step_std"):
        low = [max(0.0, m - 100 * s) for m, s in zip(mean, band, strict=True)]
        high = [m + 100 * s for m, s in zip(mean, band, strict=True)]
        label = "± one standard deviation over samples"
        axes.fill_between(steps, low, high, color=theme["main"], alpha=0.2, linewidth=0, label=label)
    axes.set(xlabel="denoising steps made", ylabel="relative L2 error of the latents (%)")
    axes.set_xlim(0, max(1, len(mean) - 1))
    axes.set_ylim(bottom=0)


def _decomposition(axes: Axes, theme: dict[str, str], metrics: dict[str, Any]) -> None:
    curves = {name: [100 * v for v in curve] for name, curve in metrics["decomposition"].items() if curve}
    steps = range(len(curves["E_qc"]))
    axes.plot(steps, curves["E_qc"], color=theme["main"], linewidth=2.2, label="both (E_qc)")
    axes.plot(steps, curves["E_q"], color=theme["other"], dashes=(5, 3), label="quantized only (E_q)")
    axes.plot(steps, curves["E_c"], color=theme["ink"], dashes=(1, 2), label="cached only (E_c)")
    if "E_naive" in curves and abs(curves["E_naive"][-1] - curves["E_qc"][-1]) > 1e-3 * curves["E_qc"][-1]:
        axes.plot(steps, curves["E_naive"], color=theme["soft"], label="naive stacking (E_naive)")
    top = max(map(max, curves.values()))
    axes.vlines([i + 1 for i in metrics["cache"]["full_steps"]], -0.05 * top, 0, color=theme["main"], linewidth=1.5)
    axes.set(xlabel="denoising steps made; ticks below are full computations", ylabel="relative L2 error (%)")
    axes.set_xlim(0, len(steps) - 1)
    axes.set_ylim(bottom=-0.06 * top)


def _loss(axes: Axes, theme: dict[str, str], history: list[dict[str, Any]]) -> None:
    x, raw = [h["iteration"] + 1 for h in history], [h["loss"] for h in history]
    half = max(2, len(raw) // 40)
    smooth = [statistics.median(raw[max(0, i - half) : i + half + 1]) for i in range(len(raw))]
    axes.plot(x, raw, color=theme["soft"], linewidth=0.8, label="every update")
    axes.plot(x, smooth, color=theme["main"], linewidth=2.2, label=f"running median of {2 * half + 1} updates")
    sizes = [h.get("steps_per_group", 1) for h in history]
    joined = next((i for i, h in enumerate(history) if h.get("cached")), 0)
    warm = next((i for i, s in enumerate(sizes[:joined] if joined else sizes) if s != 1), 0)
    if joined:
        axes.axvline(x[joined], color=theme["ink"], dashes=(1, 2), linewidth=1.5, label="from here with the cache on")
    if warm > 1:  # a single shorter group at the start is no warm-up
        axes.axvline(x[warm], color=theme["other"], dashes=(5, 3), linewidth=1.2, label="warm-up with M = 1 ends")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    starts = [x[i] for i in range(1, len(x)) if history[i].get("block") != history[i - 1].get("block") and i != joined]
    for start in starts:
        axes.axvline(start, color=theme["other"], linewidth=0.6, label="the next block" if start == starts[0] else None)
    axes.set(
        xlabel="update", ylabel=f"loss / squared displacement of the {'block' if history[0].get('block') else 'group'}"
    )
    axes.set_xlim(x[0], max(x[-1], x[0] + 1))


def draw_schedule(axes: Axes, theme: dict[str, str], cache: dict[str, Any]) -> None:
    full, steps = cache["full_steps"], cache["num_steps"]
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set(xlabel="denoising step")
    if not cache.get("input_errors"):
        axes.vlines(full, 0, 1, color=theme["main"], linewidth=2, label="computed in full")
        axes.set_yticks([])
        axes.set_ylim(0, 1)
        return
    for i in full:
        axes.axvline(i, color=theme["soft"], linewidth=1.5, label="computed in full" if i == full[0] else None)
    errors = [e or 0.0 for e in cache["input_errors"]]
    total, line = 0.0, list[tuple[int, float]]()
    for i, error in enumerate([0.0] * (steps - len(errors)) + errors):  # the first steps may have none
        total += error
        line.append((i, total))
        if i in full:
            total = 0.0
            line.append((i, total))
    axes.plot(*zip(*line, strict=True), color=theme["main"], linewidth=2, label="input error since the last one")
    if cache.get("tau") is not None:
        axes.axhline(cache["tau"], color=theme["other"], dashes=(5, 3), linewidth=1.5, label=f"τ = {cache['tau']:.3g}")
    axes.set(ylabel="relative L1 error, added up")
    axes.set_ylim(bottom=0)


def _shares(axes: Axes, theme: dict[str, str], cache: dict[str, Any]) -> None:
    steps, where = [i for i in range(cache["num_steps"]) if i not in cache["full_steps"]], "denoising step"
    for rows, color, dashes, name in zip(
        cache["shares"], ("other", "main"), ((5, 3), ()), ("last output", "change"), strict=True
    ):
        if len(rows) != len(steps):  # another number of steps than it was learned at
            steps, where = list(range(len(rows))), "skipped step of those it was learned at"
        low, mean, high = zip(*rows, strict=True)
        axes.plot(steps, mean, color=theme[color], dashes=dashes, marker=".", label=f"of the {name}, mean over modules")
        axes.fill_between(steps, low, high, color=theme[color], alpha=0.2, linewidth=0)
    axes.axhline(1, color=theme["ink"], linewidth=0.8)
    axes.set(xlabel=where, ylabel="share that is taken")


def draw_pareto(axes: Axes, theme: dict[str, str], rows: list[dict[str, Any]], cost: str, budget: float | None) -> None:
    scale, label = COSTS[cost]

    def mark(some: list[dict[str, Any]], name: str, **style: Any) -> None:
        axes.plot([scale * r[cost] for r in some], [100 * r["E_qc"] for r in some], ls="", label=name, **style)

    mark([r for r in rows if not r.get("rival")], "tried", marker="o", markersize=5, color=theme["soft"])
    points = sorted((scale * r[cost], 100 * r["E_qc"]) for r in rows)
    costs, errors = [x for x, _ in points], [y for _, y in points]
    limit = [] if budget is None else [scale * budget]
    left, right = min(costs + limit), max(costs + limit)
    margin = 0.04 * (right - left) or 0.1 * right
    axes.set_xlim(left - margin, right + margin)
    least = list(itertools.accumulate(errors, min))
    line: dict[str, Any] = {"color": theme["main"], "drawstyle": "steps-post", "linewidth": 1.8}
    axes.plot([*costs, right + margin], [*least, least[-1]], label="least error at this cost or less", **line)
    rivals = dict.fromkeys(r["rival"] for r in rows if r.get("rival"))
    for name, (marker, color) in zip(rivals, itertools.cycle((("s", "other"), ("^", "ink"), ("D", "other")))):
        style = {"marker": marker, "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
        mark([r for r in rows if r.get("rival") == name], name, color=theme[color], **style)
    mark([r for r in rows if r.get("chosen")], "chosen", marker="*", markersize=17, color=theme["main"], zorder=5)
    for x in limit:
        axes.axvline(x, color=theme["ink"], dashes=(5, 3), linewidth=1.2, label="budget")
        axes.axvspan(x, right + margin, color=theme["ink"], alpha=0.07, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_log_ticks(max(errors) / min(errors)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if cost != "nfc":
        axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.set(xlabel=label, ylabel="relative L2 error, E_qc (%)")


def _log_ticks(ratio: float) -> Locator:
    """For a logarithmic axis over this ratio; over a small one, parts of powers of ten may give no tick at all."""
    if ratio < 3:
        return MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    return LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 30 else (1, 2, 5))
