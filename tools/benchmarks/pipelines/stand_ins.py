"""Tiny random stand-ins for what diffusers' own tests fetch from a hub: tokenizers, encoders, processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.benchmarks.pipelines.parts import byte_tokenizer, clip_tokenizer, t5_tokenizer

WIDE = 1103  # as many words as the tests' own configurations have


def tokenizer(name: str) -> Any:
    """By what the name says."""
    if "t5" in name.lower():
        return t5_tokenizer()
    if "clip" in name.lower():
        return clip_tokenizer(77)
    return byte_tokenizer()


def t5_config(name: str) -> Any:
    kind = transformers.UMT5Config if "umt5" in name.lower() else transformers.T5Config
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return kind(vocab_size=WIDE, pad_token_id=0, **sizes)


def bert(_: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    }
    return transformers.BertModel(transformers.BertConfig(vocab_size=WIDE, **sizes)).eval()


def llama(_: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WIDE, **sizes)).eval()


def gemma3(_: str) -> Any:
    shared: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = transformers.Gemma3TextConfig(
        vocab_size=WIDE, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, **shared
    )
    vision = transformers.SiglipVisionConfig(num_hidden_layers=1, image_size=28, patch_size=14, **shared)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


STAND_INS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("AutoTokenizer", "CLIPTokenizer", "T5Tokenizer", "T5TokenizerFast"), tokenizer),
    **dict.fromkeys(("Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "LlamaTokenizerFast"), tokenizer),
    **dict.fromkeys(("RobertaTokenizer", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast"), tokenizer),
    "AutoConfig": t5_config,
    "T5EncoderModel": lambda name: transformers.T5EncoderModel(t5_config(name)).eval(),
    "UMT5EncoderModel": lambda name: transformers.UMT5EncoderModel(t5_config("umt5")).eval(),
    "BertModel": bert,
    "LlamaForCausalLM": llama,
    "Gemma3ForConditionalGeneration": gemma3,
}


@contextmanager
def without_hub() -> Iterator[None]:
    """For as long as the block runs, what has a stand-in is not fetched; folders load as they do."""
    with ExitStack() as undo:
        for name, make in STAND_INS.items():
            kind = getattr(transformers, name, None)
            if kind is not None:
                undo.callback(_replace(kind, make))
        yield


def _replace(kind: Any, make: Callable[[str], Any]) -> Callable[[], None]:
    own = kind.__dict__.get("from_pretrained")
    inherited = kind.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(str(name)).is_dir():
            return inherited(name, *args, **kwargs)
        torch.manual_seed(0)
        return make(str(name))

    kind.from_pretrained = staticmethod(from_pretrained)

    def undo() -> None:
        if own is None:
            del kind.from_pretrained
        else:
            kind.from_pretrained = own

    return undo
