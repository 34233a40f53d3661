"""Trains a small U-Net denoiser of digits by prompt, and writes it as a diffusers StableDiffusionPipeline folder.

What an objective does for a transformer at 50 steps says nothing of a U-Net with few steps, so this
trains one in about four minutes of one core: residual blocks, self- and cross-attention, samplers, prompts,
noise prediction, DDIM. Autoencoder and classifier are those of the bundled digits model; the text encoder is a CLIP of
random weights, frozen: ten words need no more than ten different embeddings. After so few updates it denoises well
and hardly follows its prompt; `--steps` buys more.

    python tools/train_small_unet.py --out build/small-unet
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from accuquant.evaluation.digit_classifier import DigitClassifier

BUNDLED = Path(__file__).parent.parent / "accuquant" / "bundled" / "digits-dit"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT_DROP, STEPS, GUIDANCE, WIDTH = 0.1, 20, 3.0, 32
EVALUATED = 100


def make_pipeline(seed: int) -> StableDiffusionPipeline:
    """Untrained U-Net, random text encoder, the bundled autoencoder."""
    torch.manual_seed(seed)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, merges=[], model_max_length=8)
    ends: dict[str, Any] = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    size: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=8, **size, **ends))
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    vae = AutoencoderKL.from_pretrained(BUNDLED, subfolder="vae")
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(vae.eval(), encoder.eval(), tokenizer, unet.eval(), scheduler, **none)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def load_latents(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Scaled latents (1797, 4, 16, 16) of scikit-learn's scans, and their digits (1797,)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(256)])
    return latents * vae.config.scaling_factor, torch.tensor(digits.target)


@torch.no_grad()
def embeddings(pipeline: StableDiffusionPipeline) -> Tensor:
    """(11, 8, WIDTH): what the U-Net is given for each digit's word, and for no prompt."""
    tokens = pipeline.tokenizer([*WORDS, ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    found: Tensor = pipeline.text_encoder(tokens)[0]
    return found


def train(pipeline: StableDiffusionPipeline, steps: int, batch: int, rate: float, seed: int) -> dict[str, Any]:
    """Minimise the error of the predicted noise; returns the figures."""
    latents, labels = load_latents(pipeline.vae)
    texts, unet, scheduler = embeddings(pipeline), pipeline.unet, pipeline.scheduler
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator, losses, started = torch.Generator().manual_seed(seed), list[float](), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < PROMPT_DROP
        prompt = texts[torch.where(dropped, len(WORDS), labels[index])]
        timestep = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        predicted = unet(scheduler.add_noise(latents[index], noise, timestep), timestep, prompt).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            print(f"{step + 1} of {steps}: {sum(losses[-100:]) / 100:.4f}", flush=True)
    last = losses[-100:]
    return {"steps": steps, "batch": batch, "loss": sum(last) / len(last), "seconds": time.monotonic() - started}


@torch.no_grad()
def agreement(pipeline: StableDiffusionPipeline) -> float:
    """Share of generated digits that the bundled classifier reads as their prompt."""
    classifier, right = DigitClassifier.from_folder(BUNDLED / "classifier"), 0
    for k in range(0, EVALUATED, 50):
        how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
        generators = [torch.Generator().manual_seed(k + i) for i in range(50)]
        latents = pipeline([WORDS[i % 10] for i in range(50)], generator=generators, **how).images
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
        right += int((classifier(images).argmax(1) == torch.arange(50) % 10).sum())
    return right / EVALUATED


def make_small_unet(out: Path, steps: int = 800, batch: int = 16, rate: float = 2e-3, seed: int = 0) -> dict[str, Any]:
    """Train, judge and write the folder: the pipeline, `prompts.jsonl` and `training.json`."""
    pipeline = make_pipeline(seed)
    facts = train(pipeline, steps, batch, rate, seed) | {"seed": seed, "agreement": agreement(pipeline)}
    facts["parameters"] = sum(p.numel() for p in pipeline.unet.parameters())
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    (partial / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    (partial / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/small-unet"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists() and not (options.out / "model_index.json").is_file():
        raise SystemExit(f"{options.out} exists and is no pipeline folder; not replacing it")
    print(json.dumps(make_small_unet(options.out, options.steps, seed=options.seed), indent=1))


if __name__ == "__main__":
    main()
