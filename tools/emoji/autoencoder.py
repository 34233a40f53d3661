"""The autoencoder of the emoji models: images of 64 x 64 to latents (4, 16, 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tools.emoji.data import BACKGROUNDS, paint
from tools.training import Facts, Run, Stage, cosine, train_stage

KL_WEIGHT, EDGE_WEIGHT, BATCH = 1e-6, 0.5, 16


def make_autoencoder() -> AutoencoderKL:
    """4 times smaller in each direction, as wide as two cores can train in a quarter of an hour."""
    widths = (16, 48, 96)
    return AutoencoderKL(
        latent_channels=4,
        sample_size=64,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_autoencoder(drawings: Tensor, steps: int, run: Run) -> tuple[AutoencoderKL, Facts]:
    """Trains on drawings (N, 4, 64, 64) over backgrounds of any colour, half of them those of the prompts."""
    device, named = run.device, torch.tensor(list(BACKGROUNDS.values()))

    def loss_fn(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawings), (BATCH,), generator=generator)
        any_colour = torch.randint(256, (BATCH, 3), generator=generator)
        of_prompts = named[torch.randint(len(named), (BATCH,), generator=generator)]
        colours = torch.where(torch.rand(BATCH, 1, generator=generator) < 0.5, any_colour, of_prompts)
        images = paint(drawings[chosen], colours).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(images).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample
        decoded, mean, log_variance = decoded.float(), posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss: Tensor = (
            F.l1_loss(decoded, images)
            + F.mse_loss(decoded, images)
            + EDGE_WEIGHT * edges(decoded, images)
            + KL_WEIGHT * kl
        )
        return loss

    stage = Stage(run, "autoencoder", steps, 2e-3, cosine(steps), f"steps={steps}")
    return train_stage(stage, make_autoencoder, loss_fn)


def edges(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours: what makes outlines crisp."""
    across = F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
    return across + F.l1_loss(decoded.diff(dim=2), images.diff(dim=2))


@dataclass(frozen=True)
class Latents:
    """Means of all drawings on all backgrounds, (N, backgrounds, 4, 16, 16) in float16, shifted and scaled."""

    values: Tensor
    shift_factor: float
    scaling_factor: float


@torch.no_grad()
def encode_all(model: AutoencoderKL, drawings: Tensor, device: torch.device) -> Latents:
    found = []
    for background in BACKGROUNDS.values():
        colours = torch.tensor(background).expand(len(drawings), 3)
        images = (paint(a, b).to(device) for a, b in zip(drawings.split(64), colours.split(64), strict=True))
        found.append(torch.cat([model.encode(batch).latent_dist.mean.cpu() for batch in images]))
    values = torch.stack(found, dim=1)
    shift, scale = values.mean().item(), 1 / values.std().item()
    return Latents(((values - shift) * scale).half(), shift, scale)


@torch.no_grad()
def psnr(model: AutoencoderKL, drawings: Tensor, device: torch.device) -> float:
    """Mean over the drawings of how well they come back, in dB, each on one of the backgrounds."""
    named = torch.tensor(list(BACKGROUNDS.values()))
    images = paint(drawings, named[torch.arange(len(drawings)) % len(named)])
    errors = []
    for batch in images.split(64):
        decoded = model.decode(model.encode(batch.to(device)).latent_dist.mean).sample.clamp(-1, 1).cpu()
        errors.append((decoded - batch).square().flatten(1).mean(1))
    return 10 * math.log10(4) - 10 * torch.cat(errors).log10().mean().item()
