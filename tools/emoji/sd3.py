"""The text-to-image transformer of the emoji: Stable Diffusion 3's, small, trained with its two text encoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tools.emoji.data import Emoji
from tools.emoji.text import draw, make_text_encoder
from tools.training import Facts, Run, prolongable, train_stage

WIDTHS, LAYERS, HEADS, HEAD_DIM = (128, 192), (2, 3), 3, 64
BATCH, SHIFT = 128, 2.0
T5_TOKENS = 256  # the pipeline's default `max_sequence_length`: as many zeros stand where T5 is left out


class Networks(nn.Module):
    """What is trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = make_transformer()
        self.text_encoder = make_text_encoder(tokenizer, WIDTHS[0], LAYERS[0])
        self.text_encoder_2 = make_text_encoder(tokenizer, WIDTHS[1], LAYERS[1])

    def embed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (N, tokens, 320) and pooled (N, 320), as the pipeline makes them."""
        encoded = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        states, pooled = [e.hidden_states[-2] for e in encoded], [e.text_embeds for e in encoded]
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)


def make_transformer() -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        caption_projection_dim=HEADS * HEAD_DIM,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    # The initialisation that diffusers leaves out: each block starts as the identity.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm1" in name or "norm_out" in name or "proj_out" in name:
            nn.init.zeros_(parameter)
        elif "embed" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
    return model


class OnePaddingToken:
    """Joint attention of SD3 over one token that stands for n equal ones: log n is added to its logits.

    Without T5 the pipeline appends `max_sequence_length` zeros to the prompt. Nothing tells them apart, so they stay
    equal in all blocks, and one of them with n times the weight gives the same images for a fraction of the work. The
    products are written out since the fused backward of attention is slow on a CPU.
    """

    def __init__(self) -> None:
        self.log_count = torch.zeros(1)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Any) -> Any:
            return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

        images, text = hidden_states, encoder_hidden_states
        query = torch.cat([attn.norm_q(heads(attn.to_q(images))), attn.norm_added_q(heads(attn.add_q_proj(text)))], 2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(images))), attn.norm_added_k(heads(attn.add_k_proj(text)))], 2)
        value = torch.cat([heads(attn.to_v(images)), heads(attn.add_v_proj(text))], 2)
        logits = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        logits = logits + F.pad(self.log_count[:, None, None, None], (logits.shape[-1] - 1, 0))
        found = (logits.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for_images, for_text = found[:, : images.shape[1]], found[:, images.shape[1] :]
        for_text = for_text if attn.context_pre_only else attn.to_add_out(for_text)
        images = attn.to_out[0](for_images)
        return images, for_text


def velocity(
    networks: Networks, attention: OnePaddingToken, noisy: Tensor, sigma: Tensor, ids: Tensor, count: Tensor
) -> Tensor:
    """What the transformer predicts for latents (N, 4, 16, 16) at noise levels (N,), with `count` (N,) zero tokens."""
    prompts, pooled = networks.embed(ids)
    attention.log_count = count.log()
    found: Tensor = networks.transformer(
        hidden_states=noisy,
        timestep=sigma * 1000,
        encoder_hidden_states=F.pad(prompts, (0, 0, 0, 1)),
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return found


def train_sd3(
    emoji: list[Emoji],
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    steps: int,
    run: Run,
    watch: Callable[[Networks, int], None],
    compiled: bool = True,
) -> tuple[Networks, Facts]:
    """Flow matching on latents (N, backgrounds, 4, 16, 16) of the emoji and their prompts.

    `watch` sees the networks with their averaged weights after every thousand updates; `compiled` costs a minute and
    makes each update after that a third shorter.
    """
    attention, device = OnePaddingToken(), run.device

    def make() -> Networks:
        networks = Networks(tokenizer)
        set_attention(networks, attention)
        if compiled:
            for block in networks.transformer.transformer_blocks:
                block.compile()
        return networks

    def look(networks: Networks, step: int) -> None:
        with torch.compiler.set_stance("force_eager"):
            watch(networks, step)
        set_attention(networks, attention)

    def loss_fn(networks: Networks, generator: torch.Generator) -> Tensor:
        clean, ids = draw(emoji, latents, tokenizer, BATCH, generator)
        clean, ids = clean.to(device), ids.to(device)
        u = torch.randn(BATCH, generator=generator).sigmoid()  # logit-normal, as Stable Diffusion 3 draws it
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # half the samples see the pipeline's default number of zero tokens, the others any
        any_count = torch.rand(BATCH, generator=generator) * math.log(T5_TOKENS)
        count = torch.where(torch.rand(BATCH, generator=generator) < 0.5, math.log(T5_TOKENS), any_count).exp()
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = velocity(networks, attention, noisy, sigma, ids, count.to(device))
        return F.mse_loss(predicted.float(), noise - clean)

    return train_stage(prolongable(run, "sd3", steps, 1.5e-3, BATCH), make, loss_fn, look)


def set_attention(networks: Networks, attention: OnePaddingToken | JointAttnProcessor2_0) -> None:
    for block in networks.transformer.transformer_blocks:
        block.attn.set_processor(attention)


def make_pipeline(networks: Networks, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The complete pipeline; diffusers' own attention in the place of the one that training used."""
    set_attention(networks, JointAttnProcessor2_0())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    encoders: dict[str, CLIPTextModelWithProjection] = {
        "text_encoder": networks.text_encoder,
        "text_encoder_2": networks.text_encoder_2,
    }
    none = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline(
        networks.transformer, scheduler, vae, tokenizer=tokenizer, tokenizer_2=tokenizer, **encoders, **none
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
