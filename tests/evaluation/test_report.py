"""The report: complete in one file, safe against hostile names, and shown by a real browser."""

from __future__ import annotations

import base64
import io
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accuquant.evaluation import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
COUNT = (
    "<script>addEventListener('load', () => { const all = [...document.images];"
    "document.title = all.filter(i => i.complete && i.naturalWidth > 0).length + '/' + all.length +"
    "' wide ' + (document.documentElement.scrollWidth > innerWidth); });</script></body>"
)
SECTIONS = {"figures", "images", "accumulation", "calibration", "modules", "recipe", "reading"}


def plausible(modules: int = 43, updates: int = 400, steps: int = 50) -> dict[str, Any]:
    """Metrics as an evaluation with every option writes them."""
    draw = random.Random(0)
    curve = [0.0123 * (i / steps) ** 1.4 for i in range(steps + 1)]
    rows = []
    for i in range(modules):
        leaf = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "mlp.fc1", "mlp.fc2")[i % 6]
        kept = i == modules - 1
        rows.append(
            {
                "name": f"transformer_blocks.{i // 6}.{leaf}" if not kept else "proj_out",
                "kind": "Linear",
                "weight": "float" if kept else "int4" if i % 6 > 3 else "int8",
                "activation": "float" if kept else "int8",
                "group_size": 32 if i % 6 > 3 and not kept else None,
                "relative_error": None if kept else 0.002 + 0.05 * draw.random() ** 4,
                "float_bytes": 589_824,
                "quantized_bytes": 589_824 if kept else 150_000 if i % 6 <= 3 else 93_000,
            }
        )
    history = []
    for i in range(updates):
        m = 1 if i < updates // 5 else 5
        loss = (0.002 * math.exp(-i / 120) + 0.0002) * math.exp(draw.gauss(0, 0.6)) * (1.5 if m == 5 else 1)
        entry = {"iteration": i, "loss": loss, "steps_per_group": m, "network_evaluations": 5 * i, "seconds": i / 3}
        history.append(entry)
    return {
        "accuquant": "0.1.0",
        "model": "bundled:digits-dit",
        "recipe": "digits-int8",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": steps,
        "guidance_scale": 1.5,
        "num_samples": 60,
        "held_out": [2, 5, 7],
        "final_relative_l2": {"mean": 0.0123, "std": 0.0041, "min": 0.0051, "max": 0.0287},
        "relative_l2_per_step": curve,
        "relative_l2_per_step_std": [0.33 * v for v in curve],
        "latent_psnr": 41.26,
        "psnr": 38.4,
        "ssim": 0.9876,
        "frechet_distance": 0.0713,
        "agreement": {"full_precision": 0.967, "quantized": 0.95, "same_prediction": 0.983},
        "size": {"float_bytes": 25_600_000, "quantized_bytes": 6_740_000, "ratio": 0.263, "layers_ratio": 0.25},
        "bit_operations": {"float": 3.42e12, "quantized": 2.3e11, "ratio": 0.067},
        "modules": rows,
        "initial": {
            "final_relative_l2": {"mean": 0.031, "std": 0.011, "min": 0.012, "max": 0.071},
            "latent_psnr": 33.2,
            "relative_l2_per_step": [2.52 * v for v in curve],
        },
        "calibration": {
            "history": history,
            "network_evaluations": 12_800,
            "seconds": 134.2,
            "steps_per_group": 5,
            "gradient": "identity",
            "auto": {"1": 0.0171, "2": 0.0144, "5": 0.0123},
        },
    }


def bare() -> dict[str, Any]:
    keys = ("model", "num_samples", "final_relative_l2", "relative_l2_per_step", "latent_psnr")
    metrics = plausible()
    return {k: metrics[k] for k in keys}


def pictures(
    count: int = 6, channels: int = 3, side: int = 32, noise: float = 0.02
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth blobs and the same with a little noise, (count, channels, side, side) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    full = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return full, (full + noise * torch.randn(full.shape, generator=generator)).clamp(0, 1)


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section[^>]*\bid="(\w+)"', page))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "not" / "there"
    return report.write_report(folder, plausible(), "model:\n  id: bundled:digits-dit\n", *pictures())


def test_whole_report_says_what_was_measured(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8").replace("\u00a0", " ")
    assert whole.name == "report.html" and list(whole.parent.iterdir()) == [whole]
    assert sections(page) == SECTIONS
    assert "int8/int8 (mixed): 3.80\u00d7 smaller, final latents 1.2 % away" in page
    assert "from 3.10 % to 1.23 %" in page and "60 % less" in page
    for text in ("41.3 dB", "38.4 dB", "0.988", "0.0713", "98.3 %", "6.74 MB instead of 25.6 MB", "14.9\u00d7 fewer"):
        assert text in page, text
    assert "2 min 14 s" in page
    assert page.count("<li><span class=") == report.WORST
    assert page.count("<tr><td>transformer_blocks") + page.count("<tr><td>proj_out") == 43
    assert '<tr class="chosen"><td>M = 5</td>' in page
    assert "no-images" not in page and "no-calibration" not in page


def test_report_needs_nothing_but_itself(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    references = re.findall(r'(?:src|srcset|href)\s*=\s*"([^"]*)"', page)
    assert len(references) == 1 + 6 * 3 + 2 * 2
    assert all(r.startswith("data:") for r in references)
    assert not re.search(r"<script|@import|https?://|url\(", page, re.IGNORECASE)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    metrics = plausible() | {"model": HOSTILE, "recipe": HOSTILE, "scheduler": HOSTILE, "held_out": [HOSTILE]}
    metrics["modules"][0] |= {"name": HOSTILE, "kind": HOSTILE, "relative_error": 1.0}
    page = report.write_report(tmp_path, metrics, f"# {HOSTILE}</pre>", *pictures(1)).read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "&lt;/pre&gt;" in page
    assert page.count("&lt;script&gt;alert") == 9


def test_absent_parts_leave_their_sections_out(tmp_path: Path) -> None:
    page = report.write_report(tmp_path, bare(), "", None, None).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert sections(page) == SECTIONS - {"images", "calibration", "modules"}
    assert "Quantized: final latents 1.2 % away" in page
    assert 'id="no-images"' in page and 'id="no-calibration"' in page
    assert "Fréchet" not in page and "Bit operations" not in page and "before calibration" not in page


def test_a_model_without_classifier_says_so(tmp_path: Path) -> None:
    metrics = bare() | {"psnr": 30.0, "ssim": 0.9}
    page = report.write_report(tmp_path, metrics, "", *pictures(1)).read_text(encoding="utf-8")
    assert "No classifier comes with this model" in page


def test_calibration_that_harms_is_not_sold_as_a_success(tmp_path: Path) -> None:
    metrics = plausible()
    metrics["initial"]["final_relative_l2"]["mean"] = 0.01
    page = report.write_report(tmp_path, metrics, "", None, None).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "23 % more: it did not help here" in page


def test_without_updates_nothing_is_called_calibrated(tmp_path: Path) -> None:
    page = report.write_report(tmp_path, plausible(updates=0), "", None, None).read_text(encoding="utf-8")
    assert "before calibration" not in page and "Calibration took" not in page and 'id="no-calibration"' in page


def test_a_run_that_blew_up_still_gets_its_report(tmp_path: Path) -> None:
    metrics = plausible(updates=1)
    metrics["final_relative_l2"] = dict.fromkeys(("mean", "std", "min", "max"), math.nan)
    metrics["relative_l2_per_step"] = [0.0] + [math.nan] * 50
    metrics |= {"latent_psnr": math.nan, "psnr": math.inf}
    full, quantized = pictures(1)
    page = report.write_report(tmp_path, metrics, "", full, quantized * math.nan).read_text(encoding="utf-8")
    assert "final latents n/a away" in page and "holds values that are not finite" in page and "identical" in page
    assert "Calibration took" not in page


@pytest.mark.parametrize("key", ["model", "num_samples", "final_relative_l2", "relative_l2_per_step", "latent_psnr"])
def test_missing_key_is_named_and_nothing_is_written(tmp_path: Path, key: str) -> None:
    metrics = bare()
    del metrics[key]
    with pytest.raises(ValueError, match=f"required key '{key}'"):
        report.write_report(tmp_path, metrics, "", None, None)
    assert not list(tmp_path.iterdir())


def test_inner_key_and_lengths_are_checked(tmp_path: Path) -> None:
    metrics = bare()
    metrics["final_relative_l2"] = {"mean": 0.1, "min": 0.1, "max": 0.1}
    with pytest.raises(ValueError, match="'std'"):
        report.write_report(tmp_path, metrics, "", None, None)
    with pytest.raises(ValueError, match=r"relative_l2_per_step_std.* 2 entries"):
        report.write_report(tmp_path, bare() | {"relative_l2_per_step_std": [0.0, 0.1]}, "", None, None)


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    full, quantized = pictures()
    for a, b in (
        (full, None),
        (full, quantized[:2]),
        (full[0], quantized[0]),
        (full[:0], quantized[:0]),
        (full[:, :2], quantized[:, :2]),
    ):
        with pytest.raises(ValueError, match="images"):
            report.write_report(tmp_path, bare(), "", a, b)


def test_amplification_fits_the_difference_and_small_images_grow() -> None:
    full, quantized = pictures(2, channels=1, noise=0.0)
    same = report.comparison(full, quantized, {}, "quantized")
    assert same is not None and same["factor"] == report.AMPLIFICATIONS[-1] and same["rows"][0]["psnr"] == math.inf
    half = report.comparison(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1), {}, "quantized")
    assert half is not None and half["factor"] == 10
    assert report.comparison(full, quantized.where(quantized < 0.5, math.nan), {}, "quantized") is not None

    def shown(side: int) -> Image.Image:
        uri = report.picture_uri(torch.eye(side)[None])
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small = shown(32)
    assert small.size == (192, 192) and {small.getpixel((x, y)) for x in range(6) for y in range(6)} == {255}
    assert shown(1024).size == (512, 512)


def test_numbers_are_written_for_people() -> None:
    nbsp = report.NBSP
    for text, expected in (
        (report.percent(0.01234), "1.23 %"),
        (report.percent(1e-7), "< 0.001 %"),
        (report.percent(0.0), "0 %"),
        (report.percent(float("nan")), "n/a"),
        (report.percent(12.345), "1234 %"),
        (report.decibel(math.inf), "identical"),
        (report.size(31_400_000), "31.4 MB"),
        (report.size(12), "12 B"),
        (report.si(12_800), "12.8 k"),
        (report.duration(4000), "1 h 6 min"),
    ):
        assert text.replace(nbsp, " ") == expected


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.timeout(180)
def test_a_browser_shows_it_without_complaints(whole: Path, tmp_path: Path) -> None:
    assert shown(whole, tmp_path) == "22/22 wide false"
    # in the report itself a script is refused, out loud: so silence means something
    copy = tmp_path / "refused.html"
    copy.write_text(whole.read_text(encoding="utf-8").replace("</body>", COUNT), encoding="utf-8")
    dom, log = _open(copy, tmp_path / "profile")
    assert "<title>Quantization report" in dom and "CONSOLE" in log


def shown(report: Path, folder: Path, *flags: str) -> str:
    """Open a report; what a copy that allows a script counts: images decoded and there, and if the page is too wide."""
    dom, log = _open(report, folder / "profile", *flags)
    assert "How to read these numbers" in dom
    assert "CONSOLE" not in log, log
    page = report.read_text(encoding="utf-8")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(page)
    copy = folder / "counted.html"
    copy.write_text(policy.sub("", page).replace("</body>", COUNT), encoding="utf-8")
    dom, log = _open(copy, folder / "profile", *flags)
    assert "CONSOLE" not in log, log
    return dom.partition("<title>")[2].partition("</title>")[0]


def _open(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", *flags),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, done.stderr
