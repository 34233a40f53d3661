"""Samples from a quantized model with plain diffusers: one image of each digit.

python tools/demo.py out/dit_w8a8
"""

import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline
from PIL import Image

import accuquant  # noqa: F401  registers the format with diffusers

CLASSES = list(range(10))
COLUMNS, ZOOM = 5, 4


def grid(images: list[Image.Image]) -> Image.Image:
    """All images in rows of `COLUMNS`, each pixel `ZOOM` wide."""
    width, height = (side * ZOOM for side in images[0].size)
    sheet = Image.new("L", (COLUMNS * width, -(-len(images) // COLUMNS) * height))
    for i, image in enumerate(images):
        tile = image.convert("L").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % COLUMNS * width, i // COLUMNS * height))
    return sheet


def main(folder: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(CLASSES, guidance_scale=1.5, num_inference_steps=50, generator=generator)
    samples = folder / "samples.png"
    grid(result.images).save(samples)
    print(f"images: {samples}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
