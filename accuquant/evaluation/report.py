"""One HTML file that says what quantization cost and what it saved: no scripts, no network, light, dark and print."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from accuquant.errors import AccuQuantError
from accuquant.evaluation import charts
from accuquant.evaluation.metrics import METRICS, Metric
from accuquant.files import write_text
from accuquant.runtime.arithmetic import describe_arithmetic

TEMPLATES = Path(__file__).parent / "templates"
REQUIRED = ("model", "num_samples", "final_relative_l2", "relative_l2_per_step", "latent_psnr")
SPREAD = ("mean", "std", "min", "max")
WORST = 20  # modules drawn as bars
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200)
SMALL, LARGE = 192, 512  # pixels: smaller images are blown up to at least the first, larger ones reduced to the second
NBSP = "\u00a0"


def write_report(
    folder: Path,
    metrics: dict[str, Any],
    recipe_yaml: str,
    full: Tensor | None,
    quantized: Tensor | None,
    others: dict[str, Tensor] | None = None,
) -> Path:
    """Write ``report.html`` into ``folder`` (made if absent); the file is replaced when it is whole.

    Args:
        metrics: what `programs.evaluate` measured. ``model``, ``num_samples``, ``final_relative_l2``,
            ``relative_l2_per_step`` and ``latent_psnr`` must be there; a section whose figures are absent is left out.
        recipe_yaml: text of the recipe, shown as it is.
        full: (K, C, H, W) images of full precision in [0, 1], C 1 or 3; None if nothing was decoded.
        quantized: images of the export on the same noise, of the same shape.
        others: further columns by name, of the same shape, in the order they are shown between these two.

    Returns:
        Path of the report.

    Raises:
        AccuQuantError: a required key is missing (the message names it), or the images or curves do not fit each other.
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
        figures=_figures(metrics),
        images=comparison(full, quantized, others or {}, _name(metrics)),
        accumulation=charts.accumulation(metrics),
        decomposition=charts.decomposition(metrics),
        schedule=charts.schedule(metrics.get("cache") or {}),
        shares=charts.shares(metrics.get("cache") or {}),
        tuning=_tuning(metrics.get("tuning") or {}),
        calibration=calibration,
        loss=charts.loss(calibration.get("history") or []),
        auto=_auto(calibration),
        modules=_modules(metrics.get("modules") or []),
        arithmetic=describe_arithmetic(metrics["arithmetic"]) if metrics.get("arithmetic") else None,
        recipe_yaml=recipe_yaml,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", page)
    return folder / "report.html"


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
            raise AccuQuantError(f"metrics lacks the required key {key!r}")
    for where in (metrics, metrics.get("initial") or {}):
        spread = where.get("final_relative_l2") or dict.fromkeys(SPREAD)
        for key in SPREAD:
            if key not in spread:
                raise AccuQuantError(f"metrics['final_relative_l2'] lacks the required key {key!r}")
    steps, band = len(metrics["relative_l2_per_step"]), metrics.get("relative_l2_per_step_std")
    before = (metrics.get("initial") or {}).get("relative_l2_per_step")
    for name, curve in (("relative_l2_per_step_std", band), ("initial.relative_l2_per_step", before)):
        if curve is not None and len(curve) != steps:
            raise AccuQuantError(f"metrics {name!r} has {len(curve)} entries but 'relative_l2_per_step' has {steps}")
    cache = metrics.get("cache") or {}
    errors = cache.get("input_errors") or ()
    if errors and len(errors) > cache["num_steps"]:
        raise AccuQuantError(f"metrics 'cache.input_errors' has {len(errors)} entries for {cache['num_steps']} steps")


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


def _figures(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A card of each metric that was measured; without a cache, with its figure before calibration."""
    initial = {} if metrics.get("decomposition") else metrics.get("initial") or {}
    found = []
    for metric in METRICS:
        if shown := _shown(metric, metrics):
            before = _shown(metric, initial).get(metric.main)
            text = metric.sentence.format(**shown)
            found.append({"title": metric.title, "value": shown[metric.main], "text": text, "before": before})
    return found


def _shown(metric: Metric, metrics: dict[str, Any]) -> dict[str, str]:
    """Its numbers as text, by name; none where it was not measured."""
    write: dict[str, Callable[[float], str]] = {"": plain, "dB": decibel, "fraction": percent}
    numbers = {} if metrics.get(metric.name) is None else metric.numbers(metrics[metric.name])
    return {name: write[metric.unit](number) for name, number in numbers.items()}


def _name(metrics: dict[str, Any]) -> str:
    """What the export's images are called."""
    if metrics.get("tuning"):
        return "tuned"
    return "quantized and cached" if metrics.get("cache") else "quantized"


def comparison(
    full: Tensor | None, quantized: Tensor | None, others: dict[str, Tensor], name: str
) -> dict[str, Any] | None:
    """Rows of cells: full precision, others, the export, and its |difference| times one amplification for all rows."""
    if full is None and quantized is None and not others:
        return None
    if full is None or quantized is None:
        raise AccuQuantError("images of both full precision and the quantized model are needed, or of neither")
    if full.shape != quantized.shape or full.dim() != 4 or full.shape[1] not in (1, 3) or not len(full):
        found = f"{tuple(full.shape)} and {tuple(quantized.shape)}"
        raise AccuQuantError(f"images must both be (K, C, H, W) with K > 0 and C 1 or 3, found {found}")
    for other, images in others.items():
        if images.shape != full.shape:
            found = f"{tuple(full.shape)}, found {tuple(images.shape)}"
            raise AccuQuantError(f"images of {other!r} must have the shape of full precision, {found}")
    columns = [(title, images.detach().cpu()) for title, images in (*others.items(), (name, quantized))]
    reference = full.detach().cpu()
    difference = (_unit(reference) - _unit(columns[-1][1])).abs()
    high = float(difference.flatten().kthvalue(max(1, math.ceil(0.99 * difference.numel()))).values)
    factor = max([k for k in AMPLIFICATIONS if k * high <= 1.001], default=1)
    rows = []
    for i, x in enumerate(reference):
        cells: list[dict[str, Any]] = [{"title": "full precision", "picture": picture_uri(x), "psnr": None}]
        cells += [{"title": t, "picture": picture_uri(y[i]), "psnr": _psnr(x, y[i])} for t, y in columns]
        rows.append({"cells": cells, "psnr": cells[-1]["psnr"], "difference": picture_uri(factor * difference[i])})
    height, width = full.shape[2:]
    small = max(height, width) <= SMALL
    return {
        "rows": rows,
        "factor": factor,
        "small": small,
        "height": height,
        "width": width,
        "name": name,
        "others": len(others),
    }


def _unit(images: Tensor) -> Tensor:
    """In double precision and in [0, 1], also what is not finite."""
    return images.double().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def _psnr(full: Tensor, image: Tensor) -> float:
    """PSNR in dB of one (C, H, W) image; nan if anything in either is not finite."""
    if not (torch.isfinite(full).all() and torch.isfinite(image).all()):
        return math.nan
    error = float((_unit(full) - _unit(image)).square().mean())
    return -10 * math.log10(error) if error else math.inf


def picture_uri(image: Tensor) -> str:
    """(C, H, W) -> data URI, blown up by a whole factor (nearest neighbour) or reduced to `LARGE`."""
    pixels = (_unit(image) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = math.ceil(SMALL / max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return charts.data_uri(buffer)


def _auto(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the trials of several objectives, in their order; of an export of before, of several M and no more."""
    tried, m = calibration.get("auto") or [], calibration.get("steps_per_group")
    target = calibration.get("target", "trajectory")
    if isinstance(tried, dict):
        unknown = dict.fromkeys(("rate", "budget", "updates", "evaluations", "standard_error"))
        errors = sorted((int(steps), error) for steps, error in tried.items())
        tried = [unknown | {"target": target, "steps_per_group": steps, "error": error} for steps, error in errors]
    same = [row for row in tried if row["target"] == target and (target != "trajectory" or row["steps_per_group"] == m)]
    best = min(same, key=lambda row: (-(row["budget"] or 0), row["error"] or math.inf), default=None)
    return [row | {"chosen": row is best} for row in tried]


def _tuning(tuning: dict[str, Any]) -> dict[str, Any] | None:
    """What was tried, and drawn over each cost.

    Args:
        tuning: ``budget`` (a limit or None for each of `charts.COSTS`), ``seconds`` of the search, ``tried``: rows of
            ``types``, ``cache``, ``nfc``, ``bit_operations`` (fraction of float32 without a cache), ``seconds`` (or
            None), ``E_qc``, ``calibrated``, ``elapsed`` (seconds it took to try), ``front``, ``chosen`` and ``rival``
            (name or None); and, but in older exports, ``ratio``: ``mean`` over both errors of the log ratio to naive
            stacking, its ``standard_error`` and ``samples``, and ``equal``: to the best, within it.
    """
    tried = tuning.get("tried")
    if not tried:
        return None
    chosen = next((row for row in tried if row.get("chosen")), None)
    return {
        "tried": tried,
        "chosen": chosen,
        "rivals": _rivals(tried, chosen) if chosen else [],
        "budget": tuning.get("budget") or {},
        "seconds": tuning.get("seconds"),
        "ratio": _factor(chosen["ratio"]) if chosen and chosen.get("ratio") else None,
        "equal": sum(bool(row.get("equal")) for row in tried),
        "leaders_samples": tuning.get("leaders_samples"),
        "compared": all(row.get("ratio") for row in tried),
        "timed": any(row.get("seconds") is not None for row in tried),
        "charts": {cost: chart for cost in charts.COSTS if (chart := charts.pareto(tuning, cost))},
    }


def _factor(ratio: dict[str, Any]) -> dict[str, Any]:
    """The log ratio as a factor, with one standard error to both sides."""
    mean, error = ratio["mean"], ratio["standard_error"]
    return {
        "factor": round(math.exp(mean), 3),
        "low": round(math.exp(mean - error), 3),
        "high": round(math.exp(mean + error), 3),
        "samples": ratio["samples"],
    }


def _rivals(tried: list[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rival's best at the types and full computations of the chosen one, and how much less that one errs.

    ``asked_nfc`` of a row, where it differs from ``nfc``, is what its schedule was to come near to.
    """

    def cost(row: dict[str, Any]) -> tuple[str, float]:
        return row["types"], row.get("asked_nfc", row["nfc"])

    best: dict[str, dict[str, Any]] = {}
    for row in tried:
        rival, error = row.get("rival"), float(row.get("E_qc") or math.nan)
        if rival and rival != chosen.get("rival") and cost(row) == cost(chosen) and 0 < error < math.inf:
            best[rival] = min(row, best.get(rival, row), key=lambda r: float(r["E_qc"]))
    return [
        row | {"less": 1 - chosen["E_qc"] / row["E_qc"], "same": row["nfc"] == chosen["nfc"]} for row in best.values()
    ]


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
