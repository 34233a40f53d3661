"""The U-Net of the emoji: Stable Diffusion's pipeline, small, trained to predict the noise of the same latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.emoji.data import Emoji
from tools.emoji.text import draw
from tools.training import Facts, Run, prolongable, train_stage

BATCH = 64


class Networks(nn.Module):
    """What is trained together; the text encoder begins as the transformer's first one ended."""

    def __init__(self, text_encoder: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.unet = make_unet(text_encoder.config.hidden_size)
        self.text_encoder = CLIPTextModel(text_encoder.config)
        known = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
        own = self.text_encoder.state_dict()
        self.text_encoder.load_state_dict({key: known[key.removeprefix("text_model.")] for key in own})


def make_unet(text_width: int) -> UNet2DConditionModel:
    """Two resolutions, a residual block on the way down and two on the way up; attention at the lower one, and between.

    At the higher one attention would take half of a training step on a CPU.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for how many heads there are
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def train_unet(
    emoji: list[Emoji],
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModelWithProjection,
    steps: int,
    run: Run,
    watch: Callable[[Networks, int], None],
) -> tuple[Networks, Facts]:
    """Noise prediction on latents (N, backgrounds, 4, 16, 16) of the emoji and their prompts."""
    scheduler, device = make_scheduler(), run.device

    def make() -> Networks:
        networks = Networks(text_encoder)
        networks.unet.set_attn_processor(AttnProcessor())  # the fused backward of attention is slow on a CPU
        return networks

    def loss_fn(networks: Networks, generator: torch.Generator) -> Tensor:
        clean, ids = draw(emoji, latents, tokenizer, BATCH, generator)
        clean, ids = clean.to(device), ids.to(device)
        timestep = torch.randint(1000, (BATCH,), generator=generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = networks.unet(noisy, timestep, networks.text_encoder(ids)[0], return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    return train_stage(prolongable(run, "unet", steps, 1e-3, BATCH), make, loss_fn, watch)


def make_pipeline(networks: Networks, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The complete pipeline; diffusers' own attention in the place of the one that training used."""
    networks.unet.set_attn_processor(AttnProcessor2_0())
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = (vae, networks.text_encoder, tokenizer, networks.unet, make_scheduler())
    pipeline = StableDiffusionPipeline(*parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
