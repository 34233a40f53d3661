"""Does the model draw what it is asked for? Samples for prompts of every kind, looked up by the judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from tools.emoji.data import BACKGROUNDS, SPLITS, Emoji, base, prompt, split
from tools.emoji.judge import EmojiJudge, found_among, held_out_images, scores

GUIDANCE, STEPS, CANDIDATES, BATCH = 4.0, 28, 100, 25


@dataclass(frozen=True)
class Found:
    """Of the samples of one split: how many, and the shares recognised."""

    split: str
    samples: int
    among_candidates: float  # of 100: the asked name and 99 others drawn by chance
    among_all: float
    among_kin: float  # of the names with the same first words: its other skin tones, directions, members


def kin(names: list[str]) -> list[list[int]]:
    """For each name those that differ only in what is behind the colon, itself among them."""
    by_base: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_base.setdefault(base(name), []).append(i)
    return [by_base[base(name)] for name in names]


def questions(names: list[str], per_split: int) -> Iterator[tuple[str, int, str]]:
    """Split, index and prompt of at most `per_split` names of each split, spread evenly; half name a background."""
    backgrounds = list(BACKGROUNDS)
    for kind in SPLITS:
        having = [i for i, name in enumerate(names) if split(name) == kind]
        chosen = having[:: -(-len(having) // per_split)] if having else []
        for k, i in enumerate(chosen):
            yield kind, i, prompt(names[i], backgrounds[k // 2 % len(backgrounds)] if k % 2 else None)


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, prompts: list[str], seed: int = 0, **call: Any) -> Tensor:
    """Images (N, 3, 64, 64) in [-1, 1] at guidance 4 and 28 steps; each prompt has noise of its own."""
    parts = []
    for first in tqdm(range(0, len(prompts), BATCH), desc="samples"):
        part = prompts[first : first + BATCH]
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(len(part))]
        how = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "pt", "generator": generators}
        parts.append(pipeline(part, **how | call).images.float().cpu())
    return torch.cat(parts) * 2 - 1


def recognised(judge: EmojiJudge, names: list[str], images: Tensor, asked: list[int]) -> dict[str, float]:
    """Shares of the images whose asked name scores highest among 100, among all, and among its kin."""
    found, targets, families = scores(judge, images), torch.tensor(asked), kin(names)
    best = [families[i][int(row[families[i]].argmax())] for i, row in zip(asked, found, strict=True)]
    return {
        "among_candidates": found_among(found, targets, CANDIDATES).double().mean().item(),
        "among_all": (found.argmax(1) == targets).double().mean().item(),
        "among_kin": (torch.tensor(best) == targets).double().mean().item(),
    }


def on_real_images(judge: EmojiJudge, emoji: list[Emoji]) -> Found:
    """The check's own accuracy: real emoji, drawn as the judge never saw them."""
    names, every = [one.name for one in emoji], list(range(len(emoji)))
    return Found("real images", len(emoji), **recognised(judge, names, held_out_images(emoji), every))


def on_samples(
    pipeline: DiffusionPipeline, judge: EmojiJudge, names: list[str], per_split: int, **call: Any
) -> list[Found]:
    """What is recognised of the pipeline's samples, a row for each split; `call` goes to the pipeline."""
    asked = list(questions(names, per_split))
    images = sample(pipeline, [text for _, _, text in asked], **call)
    found = []
    for kind in SPLITS:
        rows = [k for k, (of, _, _) in enumerate(asked) if of == kind]
        if rows:
            shares = recognised(judge, names, images[rows], [asked[k][1] for k in rows])
            found.append(Found(kind, len(rows), **shares))
    return found


def table(rows: list[Found]) -> str:
    lines = ["| prompts | images | among 100 | among all | among its kin |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        shares = (f"{100 * share:.1f} %" for share in (row.among_candidates, row.among_all, row.among_kin))
        lines.append(f"| {row.split} | {row.samples} | {' | '.join(shares)} |")
    return "\n".join(lines)
