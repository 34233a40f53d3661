"""The measuring tools run, and what they print follows from what they measured."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import images, recipe_tree
from pipelines import make_pipeline

from accuquant.export.torchao import torchao_installed
from accuquant.kernels.scaled_mm import scaled_works
from tools.benchmarks.pipelines.caches import judged
from tools.pipelines_page import swept

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(model_folder, tmp_path / "out")))
    return path


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a benchmark as `python -m` does, but in this process, which has imported most of it; what it prints."""
    monkeypatch.syspath_prepend(str(ROOT))

    def run(tool: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"tools.benchmarks.{tool}", run_name="__main__")
        torch.set_num_threads(threads)
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def test_memory_is_flat_for_us_and_grows_for_plain_backpropagation(run: Run, recipe: Path, tmp_path: Path) -> None:
    run("memory.run", "--recipe", str(recipe), "--out", str(tmp_path / "memory"))
    rows = json.loads((tmp_path / "memory" / "memory.json").read_text())
    saved = {(r["mode"], r["steps_per_group"]): r["saved_bytes"] for r in rows}
    assert (tmp_path / "memory" / "memory.png").stat().st_size > 1000
    for mode in ("identity", "variance", "exact"):
        assert saved[mode, 5] <= 1.02 * saved[mode, 2]
    assert saved["full back-propagation", 5] > 2 * saved["full back-propagation", 2]


def test_accuracy_benchmark_resumes_and_tabulates(run: Run, recipe: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "bench")
    small = ["--configs", "W8A8", "--seeds", "0", "--evaluations", "40", "--samples", "4", "--batch", "2"]
    arguments = ["run", "--recipe", str(recipe), "--out", out, *small]
    first = run("accuracy.run", *arguments, "--methods", "MSE search,M=1")
    methods = "MSE search,M=1,M=2 exact,M=1 AdaRound at its rate,blocks"
    second = run("accuracy.run", *arguments, "--methods", methods)
    assert first.count("W8A8 seed 0") == 2 and second.count("W8A8 seed 0") == 3
    table = run("accuracy.run", "table", "--out", out)
    assert "| M=2 exact |" in table and "| 13 |" in table  # evaluations for 40 updates pay for 13 of M = 2
    row = json.loads((tmp_path / "bench" / "results-0-1.jsonl").read_text().splitlines()[-1])
    assert (row["method"], row["made"], row["updates"]) == ("blocks", 40, 4)  # the others pay for inputs and outputs


def test_joint_benchmark_tabulates_and_draws_what_it_has_kept(run: Run, tmp_path: Path) -> None:
    figures = {"psnr": 40.0, "frechet_distance": 0.001}
    rows = [{"part": "run", "types": "W4A4", "seed": s, "nfc": 0, "method": "E_q", "relative_l2": 0.1} for s in (0, 1)]
    for seed, error in ((0, 0.2), (1, 0.3)):
        key = {"part": "run", "types": "W4A4", "seed": seed, "nfc": 14, "method": "(d) tuner"}
        rows.append(key | {"relative_l2": error})
    methods = {
        "order 0": 0.3,
        "order 1": 0.2,
        "order 2": 0.1,
        "RFE 1": 0.4,
        "RFE 2": 0.5,
        "auto": 0.2,
        "auto, learned": 0.05,
    }
    for seed, begun in ((0, list(methods.items())), (1, list(methods.items())[:3])):  # the second is still running
        key = {"part": "orders", "types": "W8A8", "seed": seed, "nfc": 7, "E_q": 0.1, "cache": "taylor 1"}
        rows += [
            key | {"method": m, "relative_l2": e, "each": [e - 0.02, e + (0.02 if m == "auto" else 0)]}
            for m, e in begun
        ]
    (tmp_path / "results-0-1.jsonl").write_text("".join(json.dumps(row | figures) + "\n" for row in rows))
    times = {"float32": [2.0, 2.2, 1.9], "quantized": [1.0, 1.0, 3.0]}
    (tmp_path / "latency.json").write_text(json.dumps({"threads": 2, "seconds": {"W4A4": times}}))
    table = run("joint.run", "table", "--out", tmp_path)
    assert "| quantized | 1.00 (2.00x) |" in table
    assert "### W4A4: E_qc in %" in table
    assert "E_q 10.00 ± 0.00 %" in table
    assert "| (d) tuner | 25.00 ± 7.07 / 40.0 ± 0.0 / 1.0 ± 0.0 |" in table
    assert "| W8A8 | 7 | taylor 1 | 11.00 ± 1.00 | -5.00 ± 0.00 |" in table  # behind the best, with its standard error
    run("joint.run", "plot", "--out", tmp_path)
    assert (tmp_path / "joint.png").read_bytes()[:4] == b"\x89PNG"


def test_regret_of_a_choice_is_looked_up_on_held_out_samples(run: Run, tmp_path: Path) -> None:
    """One candidate is a little worse in images and much better in latents; another is cheaper and worse in both."""
    candidates = {"naive": (0.04, 0.02), "both": (0.0216, 0.0162), "images": (0.0275, 0.0145), "cheap": (0.05, 0.05)}
    rows = list[dict[str, Any]]()
    for name, (latent, image) in candidates.items():
        each = {"latents": [latent] * 8, "images": [image] * 8}
        row = {"point": "int8, NFC 7 of 25", "key": name, "cost": [0.01 if name == "cheap" else 0.02, 1.0, 0]}
        row["rival"] = "naive stacking" if name == "naive" else None
        rows.append(row | {"validation": each, "held_out": each})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = run("joint.choice_regret", "table", "--out", str(tmp_path), "--draws", "4", "--counts", "2")
    lines = [line.split(" | ") for line in table.splitlines() if " | 2 | " in line]
    found = {cells[0].strip("| "): cells for cells in lines}
    regret = 100 * ((0.0275 * 0.0145 / (0.0216 * 0.0162)) ** 0.5 - 1)
    assert found["worse of both"][-3:] == [f"{regret:.1f} (95 %: {regret:.1f})", f"**{regret:.1f}**", "2.75 / 1.45 |"]
    others = [cells[-3:] for name, cells in found.items() if name != "worse of both"]
    assert others == [["0.0 (95 %: 0.0)", "**0.0**", "2.16 / 1.62 |"]] * 4
    assert len(found) == 5 and "4 candidates" in table


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the inference benchmark."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"tools.benchmarks.inference.{name}")


def test_inference_benchmark_measures_and_tabulates(
    tools: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only, out = "ours static eager,quanto compiled", tmp_path / "inference"
    main = tools("run").main
    main("bundled", out, repeats=2, threads=1, steps=4, only=only, device="cpu", compiles=False)
    printed = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in found["steps"]}
    assert set(rows) == {"ours static eager"}  # the other was asked for compiled, and nothing is
    row = rows["ours static eager"]
    assert len(row["seconds"]) == 2 and 0 < row["error"] < 0.05
    assert row["checkpoint_bytes"] < 1.5 * found["parameters"]  # bfloat16 has twice as many
    assert sum(row["paths"].values()) == 6 * 7  # attention, MLP and adaLN of each block
    assert [row["nfc"] for row in found["trajectories"]] == [4, 2, 2]
    assert sum(count for *_, count in found["shapes"]) == 6 * 6 and all(
        len(row["seconds"]) == 2 for row in found["gemm"]
    )
    assert (out / "results.png").stat().st_size > 1000 and "| ours static eager |" in (out / "results.md").read_text()
    assert printed.splitlines()[-1] == "vs bf16 compiled: not measured, vs best other int8: not measured"
    assert not (out / "work").exists()


def test_inference_benchmark_splits_what_does_not_fit(tools: Callable[[str], Any]) -> None:
    """Every wave has bfloat16 in it, nothing is left out, and what fits runs together."""
    tool = tools("run")
    bench = object.__new__(tool.Bench)
    bench.variants, bench.results = tool.chosen("", True), {"parameters": 750_000_000, "integers": 450_000_000}
    first, *others = bench.waves(22e9)
    assert others and set(first) >= {"bfloat16", "float32", "ours static", "ours dynamic", "torchao", "quanto", "sdnq"}
    assert all(wave[0] == "bfloat16" for wave in (first, *others))
    assert sorted({host for wave in (first, *others) for host in wave}) == sorted(tool.chosen("", True))
    assert len(bench.waves(100e9)) == 1
    assert sorted({host for wave in bench.waves(1e9) for host in wave}) == sorted(tool.chosen("", True))
    assert tool.HOSTS.keys() - tool.chosen("", True) == {"ours fp8"} and "ours fp8" in tool.chosen("ours fp8", True)
    assert tool.chosen("", True, "cuda").keys() == tool.HOSTS.keys()


def test_inference_summary_compares_within_a_wave(tools: Callable[[str], Any]) -> None:
    """The second wave ran while the machine was half as fast."""
    report = tools("report")
    times = [
        ("bfloat16 compiled", 0, 2.0), ("ours static compiled", 0, 1.0), ("ours dynamic compiled", 0, 1.25),
        ("ours static eager", 0, 0.5),
        ("bfloat16 compiled", 1, 4.0), ("torchao compiled", 1, 2.5), ("sdnq eager", 1, 3),
    ]  # fmt: skip
    steps = [
        {"name": n, "host": n.rpartition(" ")[0], "mode": n.split()[-1], "wave": w, "seconds": [t, t, 9 * t, t / 9]}
        for n, w, t in times
    ]
    failed = {"name": "quanto eager", "host": "quanto", "mode": "eager", "wave": 1, "failed": "no"}
    lines = report.summary({"steps": [*steps, failed], "gemm": []}).splitlines()
    assert lines[0] == "ours is ours static compiled"
    assert lines[-1] == "vs bf16 compiled: 2.00x, vs best other int8: 1.25x (torchao)"


@pytest.mark.parametrize("path", ["onednn", "int_mm", "triton", "cublas", "scaled_mm"])
def test_inference_overhead_is_beyond_the_bare_product_of_the_path(tools: Callable[[str], Any], path: str) -> None:
    report = tools("report")
    bare = {"triton": "int_mm", "cublas": "int_mm"}.get(path, path)
    rows = [{"name": bare, "seconds": [2.0]}, {"name": "ours static eager", "seconds": [3.0], "path": path}]
    results: dict[str, Any] = {"steps": [], "gemm": [row | {"shape": [8, 8, 8], "count": 1} for row in rows]}
    assert report.overhead(results, results["gemm"][1]) == pytest.approx(0.5)
    assert report.summary(results).splitlines()[0] == "quantize and rescale, static eager: 50 % of the product"


def test_inference_products_of_a_gpu(tools: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That they can be made; here on a CPU, uncompiled."""
    tool = tools("gemm")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    products = tool.Gemms(torch.device("cpu"))
    assert not {tool.SCALED_MM, tool.TORCHAO} & set(products.names)
    found = [tool.SCALED_MM] if scaled_works(torch.device("cpu")) else []
    for name in [*found, *([tool.TORCHAO] if torchao_installed() else [])]:
        run, path = products.make((32, 64, 48), name)
        assert run().shape == (32, 48) and run().dtype == torch.bfloat16 and not path


# ---- pipelines


def test_caches_are_judged_by_what_denoisers_give() -> None:
    pipeline = make_pipeline()
    denoisers = {"transformer": pipeline.transformer}

    def run() -> list[torch.Tensor]:
        return [torch.as_tensor(images(pipeline))]

    row = judged(denoisers, run(), run)
    assert (row.result, row.reason, row.nfc, row.modules) == ("right", "", ((5, 10),), 4)
    assert 0.5 < row.saved[0] < 1
    for block in pipeline.transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)  # nothing of attention and MLP gets through
        torch.nn.init.zeros_(block.norm1.linear.bias)
    row = judged(denoisers, run(), run)
    assert (row.result, row.reason) == ("wrong", "transformer: nothing was forecast")


def test_the_page_of_pipelines_says_why() -> None:
    row = {"denoisers": ["unet"], "modules": 2, "nfc": [[2, 4]], "saved": [0.5]}
    caches = [
        row | {"pipeline": "A", "result": "right", "reason": ""},
        row | {"pipeline": "B", "result": "wrong", "reason": "unet: nothing was forecast"},
        row | {"pipeline": "C", "result": "refused", "reason": "CacheError: no component of C attends"},
        row | {"pipeline": "D", "result": "not built", "reason": "OSError: no file"},
    ]
    page = swept([{"pipeline": "B", "result": "refused", "reason": "TapeError: B: it steps no scheduler"}], caches)
    assert "| B | it steps no scheduler |" in page
    assert "A cache is right on 1 of 3" in page
    assert "| B | 2 | 50% | unet: nothing was forecast |" in page
    assert "| C | 2 | 50% | no component of it attends |" in page and "| D |" not in page
