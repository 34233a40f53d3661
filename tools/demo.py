"""Samples from a quantized model with plain diffusers: one image of each digit.

python tools/demo.py out/dit_w8a8
"""

import sys
from pathlib import Path

import accuquant  # noqa: F401  teaches diffusers the format; imported first, it spares us what torchao says

# isort: split
import torch
from diffusers import DiTPipeline
from diffusers.utils import logging

from accuquant.cli.generate import grid

CLASSES = list(range(10))


def main(folder: Path) -> None:
    logging.set_verbosity_error()  # it warns that the names of classes, read from JSON, are text
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
