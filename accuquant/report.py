"""One HTML file that says what quantization cost and what it saved: no scripts, no network, light, dark and print."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

TEMPLATES = Path(__file__).parent / "templates"
REQUIRED = ("model", "num_samples", "final_relative_l2", "relative_l2_per_step", "latent_psnr")
SPREAD = ("mean", "std", "min", "max")
WORST = 20  # modules drawn as bars
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200)
SMALL, LARGE = 192, 512  # pixels: smaller images are blown up to at least the first, larger ones reduced to the second
NBSP = "\u00a0"

# Okabe-Ito hues, told apart by colour-blind readers; lines also differ in dash and weight
THEMES = {
    "light": {"ink": "#3d444d", "grid": "#d9dee3", "main": "#0072b2", "other": "#c04f00", "soft": "#9cc4dd"},
    "dark": {"ink": "#b6bec8", "grid": "#363d46", "main": "#56b4e9", "other": "#e69f00", "soft": "#2f5f7d"},
}


def write_report(
    folder: Path, metrics: dict[str, Any], recipe_yaml: str, full: Tensor | None, quantized: Tensor | None
) -> Path:
    """Write ``report.html`` into ``folder`` (made if absent); the file is replaced when it is whole.

    Args:
        metrics: what `accuquant.evaluate.evaluate` measured. ``model``, ``num_samples``, ``final_relative_l2``,
            ``relative_l2_per_step`` and ``latent_psnr`` must be there; a section whose figures are absent is left out.
        recipe_yaml: text of the recipe, shown as it is.
        full: (K, C, H, W) images of full precision in [0, 1], C 1 or 3; None if nothing was decoded.
        quantized: images of the quantized model on the same noise, of the same shape.

    Returns:
        Path of the report.

    Raises:
        ValueError: a required key is missing (the message names it), or the images or curves do not fit each other.
    """
    _check(metrics)
    calibration = metrics.get("calibration") or {}
    if calibration.get("history") == []:  # nothing was tuned: before is after
        metrics = {k: v for k, v in metrics.items() if k != "initial"}
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, **options)
    environment.filters |= {f.__name__: f for f in (percent, decibel, size, si, duration, plain)}
    page = environment.get_template("report.html.j2").render(
        m={k: v for k, v in metrics.items() if v is not None},
        types=_types(metrics),
        smaller=_reduction(metrics.get("size"), "float_bytes", "quantized_bytes"),
        cheaper=_reduction(metrics.get("bit_operations"), "float", "quantized"),
        change=_change(metrics),
        images=_images(full, quantized),
        accumulation=_themed(lambda axes, theme: _accumulation(axes, theme, metrics)),
        decomposition=_decomposition_chart(metrics),
        calibration=calibration,
        loss=_loss_chart(calibration.get("history") or []),
        auto=_auto(calibration),
        modules=_modules(metrics.get("modules") or []),
        recipe_yaml=recipe_yaml,
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(folder / "report.html")


def percent(fraction: float | None, digits: int = 3) -> str:
    """0.01234 -> ``1.23 %``; never in exponents."""
    if fraction is None or not math.isfinite(fraction):
        return "n/a"
    value = 100 * fraction
    if 0 < abs(value) < 1e-3:
        return f"<{NBSP}0.001{NBSP}%"
    return f"{_digits(value, digits)}{NBSP}%"


def decibel(value: float | None) -> str:
    """41.26 -> ``41.3 dB``; an infinite ratio means that nothing differs."""
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.1f}{NBSP}dB" if math.isfinite(value) else "identical"


def size(count: float | None) -> str:
    """Bytes in decimal units: 31_400_000 -> ``31.4 MB``."""
    if count is None:
        return "n/a"
    return f"{count:.0f}{NBSP}B" if count < 1e3 else _scaled(count, {"GB": 1e9, "MB": 1e6, "kB": 1e3})


def si(value: float) -> str:
    """Counts: 12_800 -> ``12.8 k``."""
    return _scaled(value, {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3})


def _scaled(value: float, units: dict[str, float]) -> str:
    name, unit = next(((n, u) for n, u in units.items() if abs(value) >= u), ("", 1.0))
    return f"{_digits(value / unit)}{NBSP}{name}".rstrip(NBSP)


def duration(seconds: float) -> str:
    """95 -> ``1 min 35 s``."""
    if seconds < 60:
        return f"{_digits(seconds)}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {rest}{NBSP}s"


def plain(value: float | None) -> str:
    """A bare number with three significant digits."""
    return "n/a" if value is None or not math.isfinite(value) else _digits(value)


def _digits(value: float, digits: int = 3) -> str:
    """Significant digits without exponents, integers in full: 0.98765 -> 0.988, 12.0 -> 12, 1234.5 -> 1234."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.{places}f}"


def _check(metrics: dict[str, Any]) -> None:
    for key in REQUIRED:
        if metrics.get(key) is None:
            raise ValueError(f"metrics lacks the required key {key!r}")
    for where in (metrics, metrics.get("initial") or {}):
        spread = where.get("final_relative_l2") or dict.fromkeys(SPREAD)
        for key in SPREAD:
            if key not in spread:
                raise ValueError(f"metrics['final_relative_l2'] lacks the required key {key!r}")
    steps, band = len(metrics["relative_l2_per_step"]), metrics.get("relative_l2_per_step_std")
    before = (metrics.get("initial") or {}).get("relative_l2_per_step")
    for name, curve in (("relative_l2_per_step_std", band), ("initial.relative_l2_per_step", before)):
        if curve is not None and len(curve) != steps:
            raise ValueError(f"metrics {name!r} has {len(curve)} entries but 'relative_l2_per_step' has {steps}")


def _types(metrics: dict[str, Any]) -> str:
    """Weight/activation types that most of the quantized bytes were planned with, such as ``int4/int8``."""
    totals: Counter[str] = Counter()
    for module in metrics.get("modules") or []:
        if module["weight"] != "float":
            totals[f"{module['weight']}/{module['activation']}"] += module["float_bytes"]
    return totals.most_common(1)[0][0] + (" (mixed)" if len(totals) > 1 else "") if totals else "Quantized"


def _reduction(part: dict[str, Any] | None, before: str, after: str) -> float | None:
    """How many times smaller; above 1 is a saving."""
    return part[before] / part[after] if part and part.get(before) and part.get(after) else None


def _change(metrics: dict[str, Any]) -> dict[str, float] | None:
    """What calibration did to the final error; with a cache, to quantization's part of it."""
    before = ((metrics.get("initial") or {}).get("final_relative_l2") or {}).get("mean")
    after = metrics.get("E_q", metrics["final_relative_l2"]["mean"])
    return {"before": before, "after": after, "less": 1 - after / before} if before and after == after else None


def _images(full: Tensor | None, quantized: Tensor | None) -> dict[str, Any] | None:
    """Rows of data URIs: full precision, quantized, |difference| times one amplification for all rows."""
    if full is None and quantized is None:
        return None
    if full is None or quantized is None:
        raise ValueError("images of both full precision and the quantized model are needed, or of neither")
    if full.shape != quantized.shape or full.dim() != 4 or full.shape[1] not in (1, 3) or not len(full):
        found = f"{tuple(full.shape)} and {tuple(quantized.shape)}"
        raise ValueError(f"images must both be (K, C, H, W) with K > 0 and C 1 or 3, found {found}")
    a, b = (t.detach().cpu().double().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) for t in (full, quantized))
    broken = (~torch.isfinite(full) | ~torch.isfinite(quantized)).flatten(1).any(1).tolist()
    difference = (a - b).abs()
    high = float(difference.flatten().kthvalue(max(1, math.ceil(0.99 * difference.numel()))).values)
    factor = max([k for k in AMPLIFICATIONS if k * high <= 1.001], default=1)
    rows = []
    for x, y, d, bad in zip(a, b, difference, broken, strict=True):
        error = float(d.square().mean())
        psnr = math.nan if bad else -10 * math.log10(error) if error else math.inf
        rows.append({"psnr": psnr, "full": _picture(x), "quantized": _picture(y), "difference": _picture(d * factor)})
    height, width = full.shape[2:]
    return {"rows": rows, "factor": factor, "small": max(height, width) <= SMALL, "height": height, "width": width}


def _picture(image: Tensor) -> str:
    """(C, H, W) -> data URI, blown up by a whole factor (nearest neighbour) or reduced to `LARGE`."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = math.ceil(SMALL / max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return _uri(buffer)


def _uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _themed(draw: Callable[[Axes, dict[str, str]], None]) -> dict[str, str]:
    """The same chart for light and for dark pages, as data URIs."""
    drawn = {}
    for name, theme in THEMES.items():
        figure = Figure(figsize=(9.2, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, theme)
        axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(theme["ink"])
        axes.tick_params(which="both", colors=theme["ink"], labelsize=9, left=False)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme["ink"], fontsize=9.5)
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
        axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=9.5, **above)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=170, transparent=True, metadata={"Software": None})
        drawn[name] = _uri(buffer)
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


def _decomposition_chart(metrics: dict[str, Any]) -> dict[str, str] | None:
    return _themed(lambda axes, theme: _decomposition(axes, theme, metrics)) if metrics.get("decomposition") else None


def _decomposition(axes: Axes, theme: dict[str, str], metrics: dict[str, Any]) -> None:
    curves = {name: [100 * v for v in curve] for name, curve in metrics["decomposition"].items() if curve}
    steps = range(len(curves["E_qc"]))
    axes.plot(steps, curves["E_qc"], color=theme["main"], linewidth=2.2, label="both (E_qc)")
    axes.plot(steps, curves["E_q"], color=theme["other"], dashes=(5, 3), label="quantized only (E_q)")
    axes.plot(steps, curves["E_c"], color=theme["ink"], dashes=(1, 2), label="cached only (E_c)")
    if "E_naive" in curves and abs(curves["E_naive"][-1] - curves["E_qc"][-1]) > 1e-3 * curves["E_qc"][-1]:
        axes.plot(steps, curves["E_naive"], color=theme["soft"], label="calibrated without the cache, then cached")
    top = max(map(max, curves.values()))
    axes.vlines([i + 1 for i in metrics["cache"]["full_steps"]], -0.05 * top, 0, color=theme["main"], linewidth=1.5)
    axes.set(xlabel="denoising steps made; ticks below are full computations", ylabel="relative L2 error (%)")
    axes.set_xlim(0, len(steps) - 1)
    axes.set_ylim(bottom=-0.06 * top)


def _loss_chart(history: list[dict[str, Any]]) -> dict[str, str] | None:
    seen = [h for h in history if 0 < h["loss"] < math.inf]
    return _themed(lambda axes, theme: _loss(axes, theme, seen)) if seen else None


def _loss(axes: Axes, theme: dict[str, str], history: list[dict[str, Any]]) -> None:
    x, raw = [h["iteration"] + 1 for h in history], [h["loss"] for h in history]
    half = max(2, len(raw) // 40)
    smooth = [statistics.median(raw[max(0, i - half) : i + half + 1]) for i in range(len(raw))]
    axes.plot(x, raw, color=theme["soft"], linewidth=0.8, label="every update")
    axes.plot(x, smooth, color=theme["main"], linewidth=2.2, label=f"running median of {2 * half + 1} updates")
    sizes = [h.get("steps_per_group", 1) for h in history]
    warm = next((i for i, s in enumerate(sizes) if s != 1), 0)
    if warm > 1:  # a single shorter group at the start is no warm-up
        axes.axvline(x[warm], color=theme["other"], dashes=(5, 3), linewidth=1.2, label="warm-up with M = 1 ends")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    axes.set(xlabel="update", ylabel="loss / squared displacement of the group")
    axes.set_xlim(x[0], max(x[-1], x[0] + 1))


def _auto(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the trial of several M, smallest M first."""
    tried = sorted((int(m), error) for m, error in (calibration.get("auto") or {}).items())
    return [{"m": m, "error": error, "chosen": m == calibration.get("steps_per_group")} for m, error in tried]


def _modules(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The complete table, the worst as bars, and totals."""
    if not rows:
        return None
    measured = [r for r in rows if r.get("relative_error") is not None and math.isfinite(r["relative_error"])]
    worst = sorted(measured, key=lambda r: -r["relative_error"])[:WORST]
    return {
        "rows": rows,
        "worst": worst,
        "scale": (worst[0]["relative_error"] if worst else 0) or 1.0,
        "quantized": sum(r["weight"] != "float" for r in rows),
        "float_bytes": sum(r["float_bytes"] for r in rows),
        "quantized_bytes": sum(r["quantized_bytes"] for r in rows),
    }
