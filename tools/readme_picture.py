"""The README's first picture: what a model draws in full precision and what its exports draw, on the same noise.

    python -m tools.readme_picture out/emoji_w8a8 out/emoji_w4a8 --out docs/emoji/quantized.png

Prompts are of the recipe's held-out lines: nothing was calibrated on them. Below each image is its PSNR against full
precision.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from accuquant.export.load import load_export, recipe_of
from accuquant.pipeline.data import held_out_samples, load_split
from accuquant.pipeline.loading import load_pipeline
from accuquant.pipeline.rows import asked_for, call_of
from accuquant.progress import Reporter
from tools.emoji.bundle import wrapped

COLUMNS = 8
TITLES = {"int8": "int8 weights and activations", "int4": "int4 weights, int8 activations"}


def drawn(pipeline: Any, recipe: Any, rows: list[Any], seeds: list[int]) -> Tensor:
    """(B, H, W, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    call = call_of(pipeline, rows, seeds, recipe.sampling.settings, Path())
    with torch.no_grad():
        return torch.from_numpy(pipeline(**call, output_type="np").images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    recipe = recipe_of(given.exports[0])
    full = load_pipeline(recipe.model)
    samples = held_out_samples(load_split(recipe.data, full), recipe.data, COLUMNS)
    pictures = [("full precision", drawn(full, recipe, samples.rows, samples.seeds))]
    for folder in given.exports:
        own = recipe_of(folder)
        weight = next(rule.weight for rule in own.quantization.rules if rule.weight != "float" and rule.tune)
        export = load_export(folder, own, Reporter(quiet=True))
        pictures.append((TITLES[weight], drawn(export, own, samples.rows, samples.seeds)))

    figure, grid = plt.subplots(len(pictures), COLUMNS, figsize=(1.35 * COLUMNS, 1.62 * len(pictures) + 0.5))
    for row, (title, images) in zip(grid, pictures, strict=True):
        for column, (axis, image) in enumerate(zip(row, images, strict=True)):
            axis.imshow(image.clamp(0, 1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            error = float((image - pictures[0][1][column]).square().mean())
            below = [] if images is pictures[0][1] else [f"{-10 * math.log10(max(error, 1e-12)):.1f} dB"]
            if images is pictures[-1][1]:
                below.append(wrapped(str(asked_for(samples.rows[column]))))
            axis.set_xlabel("\n".join(below), fontsize=7)
        row[0].set_title(title, loc="left", fontsize=9)
    figure.tight_layout()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110)
    print(given.out)


if __name__ == "__main__":
    main()
