"""Writes a trained pipeline as a folder that ships: half precision, a card, a sample sheet, how it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor

from tools.training import Facts


def write_folder(
    out: Path,
    pipeline: DiffusionPipeline,
    max_bytes: int,
    fill: Callable[[Path], None],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the pipeline beside `out` in half precision, lets `fill` add to it, then puts it in its place.

    Raises:
        FileExistsError: `out` is something else than a pipeline folder.
        ValueError: The folder holds more than `max_bytes`.
    """
    if out.exists() and not (out / "model_index.json").is_file():
        raise FileExistsError(f"{out} exists and is no pipeline folder; not replacing it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for component in pipeline.components.values():
        if hasattr(component, "register_to_config"):
            component.register_to_config(_name_or_path="")  # no folder of this machine
    pipeline.to(dtype).save_pretrained(partial)
    pipeline.to(torch.float32)  # as it will be loaded; its parts may be wanted for the next one
    for config in partial.glob("text_encoder*/config.json"):
        # transformers loads a model in the type its config names, diffusers in float32: one type for the pipeline
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    fill(partial)

    # safetensors writes files that only their owner can read; a bundled model is for everyone.
    size = 0
    for file in filter(Path.is_file, partial.rglob("*")):
        file.chmod(0o644)
        size += file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{partial} holds {size} bytes, more than {max_bytes}")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"wrote {out}: {size / 1e6:.1f} MB")


def sheet(images: Tensor, captions: list[str], file: Path, columns: int = 8) -> None:
    """Images (N, 3, H, W) in [-1, 1], each above its prompt."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, caption in zip(axes[: len(images)], images, captions, strict=True):
        axis.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
        axis.set_title(wrapped(caption), fontsize=6, y=-0.05, verticalalignment="top")
    figure.savefig(file, dpi=130)


def wrapped(text: str, width: int = 22) -> str:
    """A caption in lines of about this many letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def course(curve: list[tuple[int, float]], seen: dict[int, Tensor], prompts: list[str], file: Path) -> None:
    """The loss over the updates, and below it the same prompts (N, 3, H, W) sampled after some of them."""
    figure = Figure(figsize=(10, 3 + 1.15 * len(seen)), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 1.15 * max(1, len(seen)))))
    axis = above.subplots()
    axis.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=1)
    axis.set(xlabel="update", ylabel="loss", ylim=(0, 1.1 * max(loss for _, loss in curve[len(curve) // 20 :])))
    if seen:
        for row, (step, images) in zip(
            below.subplots(len(seen), len(prompts), squeeze=False), seen.items(), strict=True
        ):
            for cell, image in zip(row, images, strict=True):
                cell.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
                cell.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{step}", rotation=0, horizontalalignment="right")
    figure.savefig(file, dpi=100)


def facts_table(facts: Facts) -> str:
    plain = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    return "\n".join(
        ["| training | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in plain.items())]
    )
