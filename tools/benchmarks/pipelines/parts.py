"""Small random parts that pipelines are made of: tokenizers, text encoders, autoencoders."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c.get('text', '') }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 320


def byte_tokenizer(kind: type[Any] = transformers.PreTrainedTokenizerFast, max_length: int = 512) -> Any:
    """A token for each byte, with a chat template: for encoders that are language models."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = kind(tokenizer_object=inner, model_max_length=max_length, **names)
    tokenizer.chat_template = CHAT
    return tokenizer


def clip_tokenizer(max_length: int = 16) -> Any:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=max_length)


def clip_encoder(width: int = 32, projected: bool = True, max_length: int = 16) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    words += [(f"{space}{chr(c)}", -6.0) for space in ("▁", "") for c in range(ord("a"), ord("z") + 1)]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0)


def t5_encoder(width: int = 32, multilingual: bool = False) -> Any:
    sizes: dict[str, Any] = {
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if multilingual:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=64, **sizes)).eval()
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=64, **sizes)).eval()


def language_model(kind: str, width: int = 16, layers: int = 2) -> Any:
    """A decoder such as ``Gemma2Model``, ``Qwen3Model``, ``LlamaModel``."""
    config = getattr(transformers, kind.replace("ForCausalLM", "").replace("Model", "") + "Config")(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def autoencoder(channels: int = 4, levels: int = 2, **config: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        **config,
    ).eval()


def matters(network: Any, seed: int = 0) -> Any:
    """Weights that keep the size of what they multiply and are not zero, so that every module matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() >= 2:
            fan = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan**-0.5, generator=generator)
        elif not bool(parameter.detach().isfinite().all()):  # left as it was found in memory
            torch.nn.init.zeros_(parameter)
    return network.eval()
