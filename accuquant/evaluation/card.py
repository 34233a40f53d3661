"""The model card of an export, and the short table of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accuquant.evaluation.metrics import METRICS
from accuquant.export.torchao import TORCHAO_VERSIONS
from accuquant.recipe import Export
from accuquant.runtime.arithmetic import describe_arithmetic

CARD = """---
library_name: diffusers
tags: [quantized, accuquant]
base_model: {model}
---
# {model}, quantized by accuquant

```python
{loading}
```

Measured on {num_samples} held-out samples against full precision, same noise
({scheduler}, {num_inference_steps} steps, {guidance}):

| figure | value |
|---|---|
{rows}

Types: {types}. {arithmetic}Calibrated {how}:
{network_evaluations} network evaluations in {seconds:.0f} s. `report.html` shows where the rest was lost; `recipe.yaml`
reproduces this folder with `accuquant calibrate`.
"""
LOADING = {
    "accuquant": """import accuquant  # teaches diffusers the format
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")""",
    # without a dtype, diffusers makes the rest of a torchao model bfloat16, but not the autoencoder
    "torchao": """import torch
from diffusers import DiffusionPipeline  # and torchao {torchao}; accuquant is not needed

pipeline = DiffusionPipeline.from_pretrained("{name}", dtype=torch.{dtype})""",
}


def model_card(export: Export, dtype: str, metrics: dict[str, Any]) -> str:
    """README.md of the export, with its figures; ``dtype`` is what its pipeline is to be loaded in."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures(metrics))
    types = sorted({f"{m['weight']}/{m['activation']}" for m in metrics["modules"] if m["weight"] != "float"})
    calibration, used = metrics["calibration"], metrics.get("arithmetic")
    how = "with M = {steps_per_group} denoising steps per group, gradient `{gradient}`".format(**calibration)
    return CARD.format(
        **{k: metrics[k] for k in ("model", "num_samples", "scheduler", "num_inference_steps")},
        guidance="the usual guidance" if metrics["guidance_scale"] is None else f"guidance {metrics['guidance_scale']}",
        **{k: calibration[k] for k in ("network_evaluations", "seconds")},
        how="by block reconstruction" if calibration["target"] == "blocks" else how,
        loading=LOADING[export.format].format(name=Path(export.output).name, dtype=dtype, torchao=TORCHAO_VERSIONS),
        types=", ".join(f"`{t}`" for t in types),
        arithmetic=f"Layers were computed by {describe_arithmetic(used)}. " if used else "",
        rows=rows,
    )


def figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The short table: what terminal and model card show."""
    rows, size = [], metrics["size"]
    if "initial" in metrics:
        before = metrics["initial"]
        rows.append(
            (
                "before calibration",
                f"{before['final_relative_l2']['mean']:.4f} relative L2, {before['latent_psnr']:.2f} dB",
            )
        )
    rows += [metric.row(metrics[metric.name]) for metric in METRICS if metrics.get(metric.name) is not None]
    if "cache" in metrics:
        cache = metrics["cache"]
        spread = f" ± {cache['nfc']['std']:.1f}" if cache["nfc"]["std"] else ""
        naive = metrics.get("E_naive")
        parts = " + ".join(f"{metrics[k]:.4f} {name}" for k, name in (("E_q", "quantized"), ("E_c", "cached")))
        rows += [
            ("where it comes from", f"{parts} + {metrics['interaction']:.4f} interaction"),
            *([("naive stacking", f"{naive:.4f} relative L2")] if naive else []),
            ("full computations (NFC)", f"{cache['nfc']['mean']:.1f}{spread} of {cache['num_steps']} steps"),
            ("cache memory", f"{cache['nbytes'] / 1e6:.1f} MB"),
            ("a full step, a cached step", _step_times(cache["seconds"])),
            ("bit-operations with the cache", f"{cache['bit_operations_ratio']:.3f} of float32"),
        ]
    rows += [
        ("denoiser size", f"{size['quantized_bytes'] / 1e6:.2f} MB ({size['ratio']:.3f} of float32)"),
        ("its quantized layers", f"{size['layers_ratio']:.3f} of float32"),
        ("bit-operations", f"{metrics['bit_operations']['ratio']:.3f} of float32"),
    ]
    return rows


def _step_times(seconds: dict[str, float | None]) -> str:
    full, skipped = seconds["full_step"], seconds["cached_step"]
    assert full is not None
    return f"{full * 1e3:.1f} ms" + (f", {skipped * 1e3:.1f} ms ({full / skipped:.1f}x)" if skipped else "")
