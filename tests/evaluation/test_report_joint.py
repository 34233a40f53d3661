"""The report's part for caches and joint tuning: images in columns, the schedule over time, what was tried."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from test_report import BROWSER, HOSTILE, SECTIONS, bare, pictures, plausible, sections, shown

from accuquant.evaluation import charts, report

TYPES = {"int8/int8": (0.0718, 0.0061), "int4/int8": (0.0412, 0.0124), "int4/int4": (0.0238, 0.031)}
TAU = 0.15


def cached(steps: int = 50) -> dict[str, Any]:
    """Metrics of an export with RCS."""
    metrics, (full_steps, errors) = plausible(steps=steps), rcs(steps)
    parts = {"E_q": 0.56, "E_c": 0.71, "E_qc": 1.0, "interaction": -0.27, "E_naive": 1.7}
    curves = {name: [part * e for e in metrics["relative_l2_per_step"]] for name, part in parts.items()}
    metrics["cache"] = {
        "estimation": "taylor",
        "order": 2,
        "nfc": {"mean": float(len(full_steps)), "std": 0.0},
        "num_steps": steps,
        "full_steps": full_steps,
        "input_errors": errors,
        "tau": TAU,
        "nbytes": 37_749_888,
        "modules": 12,
        "seconds": {"full_step": 0.0417, "cached_step": 0.0121},
        "bit_operations_ratio": 0.0275,
    }
    return metrics | {name: curve[-1] for name, curve in curves.items()} | {"decomposition": curves}


def slim(**others: Any) -> dict[str, Any]:
    """What costs few charts."""
    return bare() | {"cache": cached()["cache"]} | others


def rcs(steps: int) -> tuple[list[int], list[float]]:
    """Full steps for made-up input errors, the first two as warm-up."""
    draw, total, full = random.Random(1), 0.0, list[int]()
    errors = [0.0] + [0.03 + 0.015 * draw.random() + 0.06 * (i / steps) ** 8 for i in range(1, steps)]
    for i, error in enumerate(errors):
        total += error
        if i < 2 or total > TAU:
            total, full = 0.0, [*full, i]
    return full, errors


def tuning(seconds: bool = True) -> dict[str, Any]:
    """A search over types, full computations and caches, its rivals, and its best calibrated further."""
    draw, tried = random.Random(2), list[dict[str, Any]]()

    def add(types: str, nfc: int, cache: str, factor: float, calibrated: str, rival: str | None = None) -> None:
        share, alone = TYPES[types]
        tried.append(
            {
                "types": types,
                "cache": cache,
                "nfc": nfc,
                "bit_operations": share * (0.12 + 0.88 * nfc / 50),
                "seconds": 0.2 + 0.03 * nfc if seconds else None,
                "E_qc": factor * (alone + 0.11 / nfc**1.1),
                "calibrated": calibrated,
                "elapsed": 9.1 + len(tried) % 4,
                "chosen": False,
                "rival": rival,
            }
        )

    costs = list(itertools.product(TYPES, (10, 14, 17)))
    for types, nfc in costs:
        add(types, nfc, "taylor 2, interval", 1.7, "alone", "naive stacking")
        add(types, nfc, "reuse, dps, corrected", 1.35, "alone", "CacheQuant")
    for cache, factor in (("taylor 2, interval", 1.3), ("rfe 2, rcs", 1.25), ("taylor 2, best list, corrected", 1.05)):
        for types, nfc in costs:
            add(types, nfc, cache, factor * (0.9 + 0.2 * draw.random()), "not yet")
    for nfc in (10, 14, 17):
        add("int8/int8", nfc, "taylor 2, best list, corrected", 0.85, "with the cache")
    tried[-2]["chosen"] = True
    for row in tried:
        row["front"] = all(r["E_qc"] >= row["E_qc"] or r["bit_operations"] > row["bit_operations"] for r in tried)
    return {"budget": {"nfc": 14, "bit_operations": 0.03, "seconds": None}, "tried": tried, "seconds": 512.0}


def columns(full: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images that differ from these by 0.01, 0.02 and 0.1: 40, 34 and 20 dB."""
    return {"quantized": full + 0.01, "cached": full + 0.02, "naive both": full + 0.1}


def half(count: int = 2) -> torch.Tensor:
    return 0.5 * pictures(count)[0] + 0.2


def written(folder: Path, metrics: dict[str, Any], *images: Any) -> str:
    path = report.write_report(folder, metrics, "", *(images or (None, None)))
    return path.read_text(encoding="utf-8").replace("\u00a0", " ")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    full = half()
    metrics = cached() | {"tuning": tuning()}
    return report.write_report(
        tmp_path_factory.mktemp("everything"), metrics, "model: x", full, full + 0.05, columns(full)
    )


def test_images_stand_in_the_order_given_each_with_its_psnr(everything: Path) -> None:
    page = everything.read_text(encoding="utf-8").replace("\u00a0", " ")
    found = re.findall(r'alt="Sample 2, ([^"]*)">([^<]*)(?:<b>([^<]*)</b>)?</div>', page)
    assert [(alt, title.strip(), psnr) for alt, title, psnr in found] == [
        ("full precision", "Full precision", ""),
        ("quantized", "Quantized", "PSNR 40.0 dB"),
        ("cached", "Cached", "PSNR 34.0 dB"),
        ("naive both", "Naive both", "PSNR 20.0 dB"),
        ("tuned", "Tuned", "PSNR 26.0 dB"),
        ("difference", "Difference × 20", ""),
    ]
    assert page.count('style="--columns: 6"') == 2 and "between “tuned” and full precision" in page
    assert "<span>PSNR" not in page  # it stands in the cells
    charts_drawn = 4 + 3  # accumulation, decomposition, schedule, loss; what was tried over three costs
    assert page.count("<img ") == 2 * 6 + 2 * charts_drawn


@pytest.mark.parametrize(
    ("parts", "name"),
    [({}, "quantized"), ({"cache": None}, "quantized"), (slim(), "quantized and cached")],
    ids=["plain", "none", "cached"],
)
def test_the_last_column_is_named_after_what_the_export_is(tmp_path: Path, parts: dict[str, Any], name: str) -> None:
    full = half()
    assert f'alt="Sample 1, {name}">' in written(tmp_path, bare() | parts, full, full + 0.1)


def test_without_others_psnr_stays_above_the_three_images(tmp_path: Path) -> None:
    full = half(1)
    page = written(tmp_path, slim(), full, full + 0.1, {})
    assert "<span>PSNR 20.0 dB</span>" in page and "<b>" not in page and 'style="--columns: 3"' in page


def test_others_of_another_shape_are_named(tmp_path: Path) -> None:
    full = half()
    for wrong in (full[:1], full[:, :1], full[..., :16]):
        with pytest.raises(ValueError, match=r"images of 'naive both'.*\(2, 3, 32, 32\), found"):
            written(tmp_path, slim(), full, full, {"cached": full, "naive both": wrong})
    with pytest.raises(ValueError, match="of both full precision and the quantized"):
        written(tmp_path, slim(), None, None, {"cached": full})
    assert not list(tmp_path.iterdir())


def test_others_may_hold_what_is_not_finite(tmp_path: Path) -> None:
    full = half(1)
    page = written(tmp_path, slim(), full, full, {"cached": full * math.nan})
    assert page.count("<b>holds values that are not finite</b>") == 1 and "<b>PSNR identical</b>" in page


def test_parts_of_an_export_without_them_are_left_out(tmp_path: Path) -> None:
    nothing = {"figures", "accumulation", "recipe", "reading"}
    assert sections(written(tmp_path, bare())) == nothing
    empty = {"budget": {}, "tried": [], "seconds": 1.0}
    assert sections(written(tmp_path, slim(tuning=empty))) == nothing | {"schedule"}
    without = {**slim()["cache"], "full_steps": []}
    assert sections(written(tmp_path, bare() | {"cache": without})) == nothing


def drawn(draw: Any, *args: Any) -> Any:
    axes = Figure().add_subplot()
    draw(axes, charts.THEMES["light"], *args)
    return axes


def labelled(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_schedule_shows_the_sum_pass_tau_at_full_steps_and_start_again() -> None:
    cache = cached()["cache"]
    axes = drawn(charts.draw_schedule, cache)
    lines = labelled(axes)
    assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == charts.THEMES["light"]["soft"]] == cache[
        "full_steps"
    ]
    x, y = lines["input error since the last one"].get_data()
    steps = list(zip(x, y, strict=True))
    assert {step for step, total in steps if total > TAU} == set(cache["full_steps"]) - {0, 1}
    assert {step for step, total in steps if total == 0} == set(cache["full_steps"])
    assert max(x) == 49 and lines["τ = 0.15"].get_ydata()[0] == TAU
    # the same where the first steps have no error rather than none of it
    shorter = drawn(charts.draw_schedule, cache | {"input_errors": cache["input_errors"][1:], "tau": None})
    assert labelled(shorter)["input error since the last one"].get_data()[1].tolist() == y.tolist()
    assert not any("τ" in label for label in labelled(shorter))


@pytest.mark.parametrize("errors", [[], None])
def test_schedule_without_input_errors_is_its_full_steps(tmp_path: Path, errors: list[float] | None) -> None:
    metrics = slim()
    metrics["cache"]["input_errors"] = errors
    if errors is None:
        del metrics["cache"]["input_errors"], metrics["cache"]["tau"]
    axes = drawn(charts.draw_schedule, metrics["cache"])
    assert not axes.lines and len(axes.collections[0].get_segments()) == len(metrics["cache"]["full_steps"])
    page = written(tmp_path, metrics)
    assert "14 of 50 steps are computed in full: 0, 1, 5," in page and "adds up" not in page
    assert page.count("<img ") == 2 * 2


def test_schedule_of_several_samples_says_whose_it_is(tmp_path: Path) -> None:
    metrics = slim()
    metrics["cache"]["nfc"] = {"mean": 14.6, "std": 0.8}
    assert "Samples differ (14.6 ± 0.800); this is the first of them." in written(tmp_path, metrics)
    metrics["cache"]["input_errors"] = [0.1] * 51
    with pytest.raises(ValueError, match=r"'cache\.input_errors' has 51 entries"):
        written(tmp_path, metrics)


def test_tuning_says_what_was_chosen_and_by_how_much_it_is_better(everything: Path) -> None:
    page = everything.read_text(encoding="utf-8").replace("\u00a0", " ")
    assert sections(page) == SECTIONS | {"cache", "schedule", "tuning"}
    assert (
        "<strong>int8/int8, taylor 2, best list, corrected</strong>. It takes 14 full computations and 2.63 %" in page
    )
    chosen = 0.85 * (0.0061 + 0.11 / 14**1.1)
    naive, rival = (f / 0.85 * chosen for f in (1.7, 1.35))
    assert f"and errs by {report.percent(chosen)}: 50 % less than naive stacking".replace("\u00a0", " ") in page
    for text in (f"naive stacking ({report.percent(naive)}) and 37 % less", f"CacheQuant ({report.percent(rival)})"):
        assert text.replace("\u00a0", " ") in page, text
    assert "14 full computations</dd>" in page and "3 % of float32's bit operations</dd>" in page
    assert "8 min 32 s" in page and "a trajectory</dd>" not in page
    table = page[page.index("All 48 candidates") : page.index('id="calibration"')]
    assert table.count("<tr") == 49 and table.count('class="chosen"') == 1
    assert table.count("<td>naive stacking</td>") == table.count("<td>CacheQuant</td>") == 9
    front = sum(row["front"] for row in tuning()["tried"])
    assert table.count("front</td>") == front > table.count('class="front"') == front - 1
    assert "<td>chosen, front</td>" in table and '<th class="number">Time</th>' in table


def test_tuning_says_by_what_candidates_are_compared_and_how_surely(tmp_path: Path) -> None:
    found = tuning() | {"leaders_samples": 32}
    for number, row in enumerate(found["tried"]):
        row |= {"equal": number in (44, 46), "ratio": {"mean": -0.01 * number, "standard_error": 0.05, "samples": 16}}
    page = written(tmp_path, bare() | {"tuning": found})
    number = next(k for k, row in enumerate(found["tried"]) if row["chosen"])
    assert number == 46
    low, middle, high = (report.plain(math.exp(-0.46 + error)) for error in (-0.05, 0, 0.05))
    assert f"here it is {middle} of naive stacking's (68 % interval {low} to {high}, 16 samples)" in page
    assert "2 candidates were equal to the best within the standard error on 32 samples; the cheapest" in page
    assert page.count("<td>equal") == 1 and '<td class="number">-0.460 ± 0.050</td>' in page
    for row in found["tried"]:
        row["equal"] = row["chosen"]
    assert "were equal to the best" not in written(tmp_path, bare() | {"tuning": found})
    older = written(tmp_path, bare() | {"tuning": tuning()})  # an export from before there was this measure
    assert "of naive stacking's" not in older and "Log ratio" not in older and "All 48 candidates" in older


def test_a_choice_that_is_worse_than_a_rival_is_not_sold_as_better(tmp_path: Path) -> None:
    found = tuning(seconds=False)
    for row in found["tried"]:
        row["E_qc"] = {"naive stacking": 0.04, "CacheQuant": 0.01}.get(row["rival"], 0.02)
    page = written(tmp_path, bare() | {"tuning": found})
    assert "and errs by 2 %: 50 % less than naive stacking (4 %) and 100 % more than CacheQuant (1 %)" in page
    assert "Error over full computations" in page and "Error over time" not in page and ">Time</th>" not in page
    for row in found["tried"]:
        row["asked_nfc"] = row["nfc"]
        row["nfc"] -= row["rival"] == "naive stacking"  # its intervals give one step less
    page = written(tmp_path, bare() | {"tuning": found})
    assert (
        "naive stacking (4 % with 13 full computations) and 100 % more than CacheQuant (1 %) at the same types." in page
    )
    for row in found["tried"]:
        del row["asked_nfc"]
    page = written(tmp_path, bare() | {"tuning": found})
    assert "and errs by 2 %: 100 % more than CacheQuant (1 %) at the same types and full computations." in page
    for row in found["tried"]:
        row["chosen"] = row["rival"] == "CacheQuant" and row["nfc"] == 17
    page = written(tmp_path, bare() | {"tuning": found})
    assert "and errs by 1 %. Errors here" in page and "at the same types" not in page
    for row in found["tried"]:
        row |= {"chosen": False, "E_qc": math.nan}
    page = written(tmp_path, bare() | {"tuning": found})
    assert "None of the 48 candidates was chosen." in page and "Error over" not in page


def test_nothing_lies_below_the_line_and_each_rival_has_its_mark() -> None:
    found = tuning()
    axes = drawn(charts.draw_pareto, found["tried"], "bit_operations", 0.03)
    lines = labelled(axes)
    x, y = lines["least error at this cost or less"].get_data()
    assert all(a >= b for a, b in itertools.pairwise(y)) and lines["least error at this cost or less"].get_drawstyle()
    for row in found["tried"]:
        bought = [e for c, e in zip(x, y, strict=True) if c <= 100 * row["bit_operations"]]
        assert bought[-1] <= 100 * row["E_qc"]
        assert row["front"] == (bought[-1] == 100 * row["E_qc"])
    rivals = [lines["naive stacking"], lines["CacheQuant"]]
    assert [len(line.get_xdata()) for line in rivals] == [9, 9]
    assert len({line.get_marker() for line in [*rivals, lines["tried"], lines["chosen"]]}) == 4
    assert lines["chosen"].get_xdata().tolist() == pytest.approx([100 * found["tried"][-2]["bit_operations"]])
    assert lines["budget"].get_xdata()[0] == pytest.approx(3)
    assert axes.get_yscale() == "log"
    assert "budget" not in labelled(drawn(charts.draw_pareto, found["tried"], "seconds", None))


@pytest.mark.parametrize("errors", [(0.011, 0.019), (0.0205, 0.0615), (0.001, 0.9), (0.02, 0.02)])
def test_a_pareto_plot_has_figures_on_its_axis(errors: tuple[float, float]) -> None:
    rows = [tuning()["tried"][i] | {"E_qc": error} for i, error in enumerate(errors)]
    axes = drawn(charts.draw_pareto, rows, "nfc", None)
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 12


def test_a_cost_that_is_not_known_of_all_is_not_drawn() -> None:
    found = tuning()
    found["tried"][3]["seconds"] = None
    assert charts.pareto(found, "seconds") is None and charts.pareto(found, "nfc") is not None


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    found, full = tuning(), half(1)
    chosen = next(row for row in found["tried"] if row["chosen"])
    for row in found["tried"][:2]:
        row |= {"rival": HOSTILE + "$\\bad$", "types": chosen["types"], "nfc": chosen["nfc"]}
    chosen |= {"cache": HOSTILE, "calibrated": HOSTILE}
    page = written(tmp_path, slim(tuning=found), full, full, {HOSTILE: full})
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;alert") == 2 + 2 + 1 + 1 + 2  # image, cache twice, calibration, rival, its rows


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", ["1366,900", "500,900"])
def test_a_browser_shows_everything_without_complaints(everything: Path, tmp_path: Path, size: str) -> None:
    assert shown(everything, tmp_path, f"--window-size={size}") == "26/26 wide false"
