"""Samples from a quantized model with plain diffusers: an image of each of some prompts.

python tools/demo.py out/emoji_w8a8
"""

import sys
from pathlib import Path

import accuquant  # noqa: F401  teaches diffusers the format; imported first, it spares us what torchao says

# isort: split
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging

from accuquant.cli.generate import grid

PROMPTS = [
    "cat face on a pink background",
    "red heart",
    "woman firefighter, medium skin tone",
    "grinning face",
    "christmas tree on a gray background",
    "person biking, light skin tone",
    "watermelon",
    "rocket on a blue background",
]


def main(folder: Path) -> None:
    logging.set_verbosity_error()  # it warns of parts that were left out on purpose
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    generator = torch.Generator().manual_seed(0)
    call = {"guidance_scale": 4.0, "num_inference_steps": 28, "height": 64, "width": 64, "max_sequence_length": 1}
    result = pipeline(PROMPTS, generator=generator, **call)
    samples = folder / "samples.png"
    grid(result.images).save(samples)
    print(f"images: {samples}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
