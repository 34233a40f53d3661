"""What run.py has measured, as a plot and as Markdown tables."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DRAWN = {
    "(a) naive: TaylorSeer": "o--",
    "(a') naive: TaylorSeer, its steps searched alone": "v--",
    "(b) CacheQuant": "s:",
    "(b) CacheQuant, one feature": "d:",
    "(c) calibrated with the cache of (a)": "^--",
    "(d) tuner": "*-",
}
CHOSEN_FROM = ("order 0", "order 1", "order 2", "RFE 1", "RFE 2")
FIGURES = (("relative_l2", 100, 2), ("psnr", 1, 1), ("frechet_distance", 1000, 1))


def draw_runs(rows: list[dict[str, Any]], path: Path) -> None:
    """Error over full computations for each pair of types, mean and range over seeds."""
    runs = [row for row in rows if row["part"] == "run" and row["nfc"]]
    ticks = sorted({row["nfc"] for row in runs})
    panels = list(dict.fromkeys(row["types"] for row in runs))
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, types in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method, style in DRAWN.items():
            known = dict[int, list[float]]()
            for row in runs:
                if (row["types"], row["method"]) == (types, method):
                    known.setdefault(row["nfc"], []).append(100 * row["relative_l2"])
            if known:
                nfcs = sorted(known)
                axes.plot(nfcs, [statistics.mean(known[n]) for n in nfcs], style, label=method, markersize=4)
                axes.fill_between(nfcs, [min(known[n]) for n in nfcs], [max(known[n]) for n in nfcs], alpha=0.12)
        alone = [100 * r["relative_l2"] for r in rows if (r["types"], r["method"]) == (types, "E_q")]
        if alone:
            axes.axhline(statistics.mean(alone), color="0.5", linewidth=1, label="without a cache (E_q)")
        axes.set(title=types, xlabel="full computations in 50 steps (NFC)", yscale="log")
        axes.set_ylabel("E_qc: relative L2 of the final latent, %")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(ticks, [str(n) for n in ticks])
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Markdown: E_qc in %, image PSNR and Fréchet distance, mean ± standard deviation over seeds."""
    for part in ("run", "ladder", "orders", "shares"):
        here = [row for row in rows if row["part"] == part]
        for types in dict.fromkeys(row["types"] for row in here):
            mine = [row for row in here if row["types"] == types]
            columns = sorted({row["nfc"] for row in mine} - {0}, reverse=True)
            alone = {r["seed"]: r["relative_l2"] if r["method"] == "E_q" else r["E_q"] for r in mine if _knows_e_q(r)}
            e_q = _spread([100 * e for e in alone.values()], 2)
            print(f"\n### {types}: E_qc in % / image PSNR in dB / Fréchet distance x 1000; E_q {e_q} %\n")
            print(f"| method | {' | '.join(f'NFC {c}' for c in columns)} |\n|---|{'---|' * len(columns)}")
            methods = dict.fromkeys(row["method"] for row in mine if row["nfc"])
            for method in sorted(methods) if part == "run" else methods:
                cells = []
                for nfc in columns:
                    found = [row for row in mine if row["method"] == method and row["nfc"] == nfc]
                    cell = " / ".join(_spread([k * row[name] for row in found], d) for name, k, d in FIGURES)
                    if found and part == "ladder":
                        chosen_by = [100 * row["validation"] for row in found]
                        cell += f" (validation {_spread(chosen_by, 2)})"
                    cells.append(cell if found else "")
                print(f"| {method} | {' | '.join(cells)} |")


def print_choice(rows: list[dict[str, Any]]) -> None:
    """Markdown: how far `auto`, as chosen and with learned shares, is behind the best forecast up to order 2.

    In points of E_qc for each seed, with the standard error of the difference over samples; below 0 it is ahead.
    """
    found = {(r["types"], r["nfc"], r["seed"], r["method"]): r for r in rows if r["part"] == "orders"}
    whole = [key[:3] for key in found if key[3] == "auto, learned"]  # the last that a run writes
    print(
        "\n### auto\n\n| types | NFC | taken, by seed | behind the best | with learned shares |\n|---|---|---|---|---|"
    )
    for types, nfc in dict.fromkeys(key[:2] for key in whole):
        cells: tuple[list[str], ...] = ([], [], [])
        for seed in sorted(key[2] for key in whole if key[:2] == (types, nfc)):
            best = min((found[types, nfc, seed, name] for name in CHOSEN_FROM), key=lambda row: row["relative_l2"])
            auto, learned = (found[types, nfc, seed, name] for name in ("auto", "auto, learned"))
            for cell, text in zip(cells, (auto["cache"], _behind(auto, best), _behind(learned, best)), strict=True):
                cell.append(text)
        print(f"| {types} | {nfc} | {' | '.join(', '.join(cell) for cell in cells)} |")


def print_latency(path: Path) -> None:
    """Markdown: median seconds of a trajectory and how many times faster than float32, for each pair of types."""
    times: dict[str, dict[str, list[float]]] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    print(f"\n### Seconds\n\n| method | {' | '.join(times)} |\n|---|{'---|' * len(times)}")
    for method in dict.fromkeys(method for found in times.values() for method in found):
        cells = []
        for found in times.values():
            median = statistics.median(found[method]) if method in found else None
            cells.append(f"{median:.2f} ({statistics.median(found['float32']) / median:.2f}x)" if median else "")
        print(f"| {method} | {' | '.join(cells)} |")


def _knows_e_q(row: dict[str, Any]) -> bool:
    return row["method"] == "E_q" or "E_q" in row


def _behind(row: dict[str, Any], best: dict[str, Any]) -> str:
    gaps = [100 * (a - b) for a, b in zip(row["each"], best["each"], strict=True)]
    return f"{statistics.mean(gaps):.2f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}"


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""
