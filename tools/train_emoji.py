"""Trains the two text-to-image models of emoji that accuquant carries, from nothing, and writes their folders.

`bundled:emoji-sd3` is a small Stable Diffusion 3 (joint attention, flow matching, two CLIP text encoders), and
`bundled:emoji-unet` a small Stable Diffusion (U-Net, noise prediction), of the same pictures by their names. Then a
classifier of the real emoji is asked whether it finds in the samples what the prompts asked for.

Drawings: Noto Emoji by Google, Apache-2.0, npm package `@iconify-json/noto`. Names and tags: npm package
`emojibase-data`, MIT. Both are read from where npm put them:

    npm install --prefix build/emoji @iconify-json/noto@1 emojibase-data@17
    python -m tools.train_emoji                          # train (or go on where it stopped), check, write both folders
    python -m tools.train_emoji --check out/emoji_w8a8   # the check alone, of any folder with such a pipeline
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant.pipeline.loading import left_out
from tools.emoji import bundle, sd3, unet
from tools.emoji.autoencoder import Latents, encode_all, psnr, train_autoencoder
from tools.emoji.cards import ORIGIN, SD3_CARD, UNET_CARD
from tools.emoji.check import STEPS, Found, on_real_images, on_samples, sample, table
from tools.emoji.data import BACKGROUNDS, load_emoji, render
from tools.emoji.judge import load_judge, save_judge, train_judge
from tools.emoji.text import train_tokenizer
from tools.training import Facts, Run, parse_options

BUNDLED = Path("accuquant/bundled")
SHOWN = (
    "grinning face",
    "waving hand, dark skin tone",
    "red heart",
    "cat face on a pink background",
    "rocket on a blue background",
    "watermelon",
    "soccer ball on a green background",
    "woman firefighter, medium skin tone",
    "sailboat on a blue background",
    "hamburger",
    "octopus on a yellow background",
    "christmas tree on a gray background",
    "person biking, light skin tone",
    "rainbow",
    "alarm clock on a pink background",
    "fox on a green background",
)
WATCHED = SHOWN[:8]


@dataclass
class Options:
    """The command line: each field is the option of its name."""

    packages: Path = Path("build/emoji/node_modules")  # where npm put the drawings and their names
    out: Path = BUNDLED  # both folders are written here
    work: Path = Path("build/train_emoji")  # checkpoints, to resume from
    docs: Path = Path("docs/emoji")  # loss curves and samples over training
    steps_autoencoder: int = 4000
    steps_judge: int = 4000
    steps_sd3: int = 8000
    steps_unet: int = 6000
    num_check: int = 300  # samples of each kind of prompt, at most
    num_inference_steps: int = STEPS  # of the check and of all sheets
    compile: bool = True  # compile the transformer's blocks for training
    seed: int = 0
    check: Path | None = None  # only check this folder


def train(options: Options) -> None:
    """Every stage in its turn, each taken up where it stopped; then both folders, checked as they were written."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, out, docs = Run(options.work, device, options.seed), options.out, options.docs
    docs.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji(options.packages)
    seen = [one for one in emoji if one.split == "seen"]
    print(f"{len(seen)} of {len(emoji)} emoji to train on.\n{ORIGIN}")
    drawings, call = render(seen), {"num_inference_steps": options.num_inference_steps}

    # 1. The autoencoder, and all latents.
    vae, trained = train_autoencoder(drawings, options.steps_autoencoder, run)
    latents = encoded(vae, drawings, run.work / f"latents-{options.steps_autoencoder}.safetensors", device)
    vae.register_to_config(shift_factor=latents.shift_factor, scaling_factor=latents.scaling_factor)
    common: Facts = {"drawings": f"{len(seen)} of {len(emoji)}, 64 x 64, on {len(BACKGROUNDS)} backgrounds"}
    common |= of_stage("autoencoder", trained) | {"seed": options.seed, "torch": torch.__version__}
    common |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    unseen = render(one for one in emoji if one.split != "seen")
    common |= {"autoencoder_held_out_psnr_db": psnr(vae, unseen, device)}

    # 2. The judge of what is drawn.
    judge, trained = train_judge(render(emoji), options.steps_judge, run)
    common |= of_stage("judge", trained)
    real = on_real_images(judge.cpu(), emoji)
    print(table([real]))

    # 3. The transformer with its text encoders.
    tokenizer = train_tokenizer(seen, run.work / "tokenizer")
    make: Any = partial(sd3.make_pipeline, vae=vae, tokenizer=tokenizer)
    watch = watcher(make, "sd3", run, **call, max_sequence_length=1)
    networks, trained = sd3.train_sd3(
        seen, latents.values, tokenizer, options.steps_sd3, run, watch, compiled=options.compile
    )
    bundle.course(trained["curve"], watched("sd3", run), list(WATCHED), docs / "sd3-training.png")
    facts = common | {"batch": sd3.BATCH} | of_stage("transformer", trained)

    def fill(folder: Path) -> None:
        save_judge(judge, emoji, folder / "judge")
        finish(folder, folder / "judge", SD3_CARD, facts, real, options.num_check, **call)

    if not is_written(out / "emoji-sd3", facts):
        bundle.write_folder(out / "emoji-sd3", make(networks), 40_000_000, fill)

    # 4. The U-Net on the same latents.
    make = partial(unet.make_pipeline, vae=vae, tokenizer=tokenizer)
    watch = watcher(make, "unet", run, **call)
    begin = networks.text_encoder.float()
    unets, trained = unet.train_unet(seen, latents.values, tokenizer, begin, options.steps_unet, run, watch)
    bundle.course(trained["curve"], watched("unet", run), list(WATCHED), docs / "unet-training.png")
    facts = common | {"batch": unet.BATCH} | of_stage("unet", trained)

    def fill_unet(folder: Path) -> None:
        finish(folder, out / "emoji-sd3" / "judge", UNET_CARD, facts, real, options.num_check, **call)

    if not is_written(out / "emoji-unet", facts):
        bundle.write_folder(out / "emoji-unet", make(unets), 12_000_000, fill_unet)


def is_written(folder: Path, facts: Facts) -> bool:
    """Whether an earlier run wrote the folder of this very training, and checked it."""
    file = folder / "training.json"
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    rows = [Found(**row) for row in record.pop("check")]
    if record != facts:
        return False
    print(f"{folder} is there already\n{table(rows)}")
    return True


def of_stage(name: str, trained: Facts) -> Facts:
    """A stage's figures for the record."""
    figures = {"updates": trained["steps"], "minutes": round(trained["seconds"] / 60, 1), "loss": trained["final_loss"]}
    return {f"{name}_{key}": value for key, value in figures.items()}


def encoded(vae: AutoencoderKL, drawings: Tensor, file: Path, device: torch.device) -> Latents:
    """All latents, from `file` if an earlier run left them there."""
    if file.is_file():
        with safe_open(file, "pt") as stored:
            shift, scale = (float(stored.metadata()[key]) for key in ("shift_factor", "scaling_factor"))
        return Latents(load_file(file)["values"], shift, scale)
    found = encode_all(vae, drawings, device)
    factors = {"shift_factor": str(found.shift_factor), "scaling_factor": str(found.scaling_factor)}
    save_file({"values": found.values}, file.with_suffix(".partial"), factors)
    file.with_suffix(".partial").replace(file)
    return found


def watcher(
    make_pipeline: Callable[[Any], DiffusionPipeline], name: str, run: Run, **call: Any
) -> Callable[[Any, int], None]:
    """Leaves samples of a few prompts beside the checkpoints whenever it is called, for a look during training."""

    def watch(networks: Any, step: int) -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            images = sample(make_pipeline(networks), list(WATCHED), **call)
        save_file({"images": images}, run.work / f"{name}-{step:06d}.samples")
        bundle.sheet(images, list(WATCHED), run.work / f"{name}-{step:06d}.png")

    return watch


def watched(name: str, run: Run) -> dict[int, Tensor]:
    """What the watcher left, at most eight of it, by the number of updates."""
    files = sorted(run.work.glob(f"{name}-*.samples"))
    chosen = sorted({round(k * (len(files) - 1) / 7) for k in range(8)}) if files else []
    return {int(files[k].stem.rpartition("-")[2]): load_file(files[k])["images"] for k in chosen}


def load(folder: Path) -> DiffusionPipeline:
    """Either of the two pipelines, as written."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **left_out(str(folder)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def finish(folder: Path, judge: Path, card: str, facts: Facts, real: Found, num_check: int, **call: Any) -> None:
    """Judges the folder as written, and adds sample sheet, record and card."""
    pipeline = load(folder)
    rows = [real, *on_samples(pipeline, *load_judge(judge), num_check, **call)]
    print(table(rows))
    bundle.sheet(sample(pipeline, list(SHOWN), **call), list(SHOWN), folder / "samples.png")
    record = facts | {"check": [asdict(row) for row in rows]}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card.format(check=table(rows), facts=bundle.facts_table(facts)))


def check(folder: Path, num_check: int, **call: Any) -> list[Found]:
    """The retrieval check of a folder with one of the two pipelines, quantized or not."""
    return on_samples(load(folder), *load_judge(BUNDLED / "emoji-sd3" / "judge"), num_check, **call)


def main() -> int:
    options = parse_options(Options, __doc__ or "")
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    if options.check is None:
        train(options)
        return 0
    how = {"num_inference_steps": options.num_inference_steps}
    print(table(check(options.check, options.num_check, **how)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
