"""Prompts to tokens to embeddings: a byte-pair vocabulary of the emoji's names, and small CLIP text encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tools.emoji.data import BACKGROUNDS, Emoji, base, prompt, varied_prompt

VOCABULARY, MAX_TOKENS = 2048, 26  # the longest name on a background has 25 tokens
PROMPT_DROP = 0.1  # share of training samples without a prompt, for guidance


def train_tokenizer(emoji: Iterable[Emoji], folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own, from the names and tags of what is trained on.

    It is kept in `folder` and read from there again: ties between equally frequent pairs fall by chance, and a network
    that goes on training must meet the same tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        texts = [text for one in emoji for text in (*(prompt(one.name, b) for b in BACKGROUNDS), ", ".join(one.tags))]
        made = CLIPTokenizer().train_new_from_iterator(texts, VOCABULARY, show_progress=False)
        made.model_max_length = MAX_TOKENS
        partial = folder.with_name(folder.name + ".partial")
        made.save_pretrained(partial)
        partial.rename(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: CLIPTextModelWithProjection = CLIPTextModelWithProjection(config)
    model.set_attn_implementation("eager")  # the fused backward is slow on a CPU
    return model


def tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """(len(prompts), MAX_TOKENS), padded and cut as the pipelines do it."""
    how = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    found: Tensor = tokenizer(prompts, **how).input_ids
    return found


def weights(emoji: list[Emoji]) -> Tensor:
    """(N,) how often each is drawn: of n that differ in skin tone and the like, as often in all as sqrt(n) others."""
    kin = Counter(base(one.name) for one in emoji)
    return torch.tensor([kin[base(one.name)] ** -0.5 for one in emoji])


def draw(
    emoji: list[Emoji], latents: Tensor, tokenizer: CLIPTokenizer, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of latents (batch, 4, 16, 16), float32, and the tokens of its prompts, a tenth of them empty."""
    index = torch.multinomial(weights(emoji), batch, replacement=True, generator=generator)
    # a third on the background that goes without saying
    background = (torch.randint(12, (batch,), generator=generator) - 4).clamp_min(0)
    random = Random(int(torch.randint(2**62, (), generator=generator)))
    names = list(BACKGROUNDS)
    prompts = [
        "" if random.random() < PROMPT_DROP else varied_prompt(emoji[i], names[b], random)
        for i, b in zip(index.tolist(), background.tolist(), strict=True)
    ]
    return latents[index, background].float(), tokens(tokenizer, prompts)
