"""Who is in the picture? A small classifier of the real emoji, to check that a drawn one can be recognised."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.emoji.data import SIZE, Emoji, paint, render
from tools.training import Facts, Run, Stage, cosine, train_stage

BATCH, WIDTHS, FEATURES = 128, (32, 64, 128, 192), 128
HELD_OUT_SIZE, HELD_OUT_COLOURS = (
    54,
    ((214, 120, 84), (72, 129, 134), (235, 228, 214), (91, 87, 140)),
)  # never trained on


class EmojiJudge(nn.Module):
    """Images (N, 3, 64, 64) in [-1, 1] to a score (N, names) for every name; the cosine with the name's vector."""

    def __init__(self, names: int) -> None:
        super().__init__()
        layers, width = list[nn.Module](), 3
        for wider in WIDTHS:
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
            layers += [nn.Conv2d(wider, wider, 3, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (SIZE >> len(WIDTHS)) ** 2, FEATURES))
        self.names = nn.Parameter(torch.randn(names, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.body(images), dim=1) @ F.normalize(self.names, dim=1).T


def train_judge(drawings: Tensor, steps: int, run: Run) -> tuple[EmojiJudge, Facts]:
    """Trains on all drawings (N, 4, 64, 64): moved, scaled, a little blurred and noisy, on any colour.

    What the generator never saw is known to the judge: it could not be recognised otherwise.
    """

    def loss_fn(model: EmojiJudge, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawings), (BATCH,), generator=generator)
        colours = torch.randint(256, (BATCH, 3), generator=generator)
        u = torch.rand(BATCH, 5, generator=generator)
        images = paint(moved(drawings[chosen], u[:, 0] * 2 - 1, u[:, 1:3] * 2 - 1), colours)
        smaller = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        images = torch.lerp(images, smaller, u[:, 3, None, None, None])
        images += 0.15 * u[:, 4, None, None, None] * torch.randn(images.shape, generator=generator)
        with torch.autocast(run.device.type, torch.bfloat16):
            scores = model(images.to(run.device))
        return F.cross_entropy(20 * scores.float(), chosen.to(run.device))

    stage = Stage(run, "judge", steps, 2e-3, cosine(steps), f"steps={steps} names={len(drawings)}")
    return train_stage(stage, lambda: EmojiJudge(len(drawings)), loss_fn)


def moved(drawings: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Drawings scaled by up to 15 % and shifted by up to 4 pixels; outside of them nothing is drawn."""
    theta = torch.zeros(len(drawings), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.1 * torch.exp(0.15 * scale)
    theta[:, :, 2] = shift * 8 / SIZE
    opacity = drawings[:, 3:].float() / 255
    coloured = torch.cat([drawings[:, :3].float() * opacity, drawings[:, 3:].float()], dim=1)
    grid = F.affine_grid(theta, list(drawings.shape), align_corners=False)
    coloured = F.grid_sample(coloured, grid, align_corners=False)
    return torch.cat([coloured[:, :3] * 255 / coloured[:, 3:].clamp_min(1), coloured[:, 3:]], dim=1)


def held_out_images(emoji: list[Emoji]) -> Tensor:
    """Real emoji drawn in a size, at places and on colours that the judge was not trained on."""
    small, room = render(emoji, HELD_OUT_SIZE), SIZE - HELD_OUT_SIZE
    places, colours = torch.arange(len(emoji)), torch.tensor(HELD_OUT_COLOURS)
    drawings = torch.zeros(len(emoji), 4, SIZE, SIZE, dtype=torch.uint8)
    for i, (left, top) in enumerate(zip((places * 3) % (room + 1), (places * 7) % (room + 1), strict=True)):
        drawings[i, :, top : top + HELD_OUT_SIZE, left : left + HELD_OUT_SIZE] = small[i]
    return paint(drawings, colours[places % len(colours)])


@torch.no_grad()
def scores(judge: EmojiJudge, images: Tensor) -> Tensor:
    return torch.cat([judge(batch) for batch in images.split(256)])


def found_among(scores: Tensor, asked: Tensor, candidates: int, seed: int = 0) -> Tensor:
    """(N,) whether the asked name has the highest score of itself and ``candidates - 1`` others drawn by chance."""
    names, generator = scores.shape[1], torch.Generator().manual_seed(seed)
    right = torch.ones(len(scores), dtype=torch.bool)
    for i, name in enumerate(asked.tolist()):
        others = torch.randperm(names - 1, generator=generator)[: candidates - 1]
        others += others >= name  # all names but the asked one
        right[i] = scores[i, name] > scores[i, others].max()
    return right


def save_judge(judge: EmojiJudge, emoji: list[Emoji], folder: Path) -> None:
    """Weights in half precision, the names as lines of a text file in the order of the scores."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: t.half().cpu() for key, t in judge.state_dict().items()}, folder / "judge.safetensors")
    (folder / "names.txt").write_text("".join(f"{one.name}\n" for one in emoji))


def load_judge(folder: Path) -> tuple[EmojiJudge, list[str]]:
    names = (folder / "names.txt").read_text().splitlines()
    judge = EmojiJudge(len(names))
    judge.load_state_dict({key: t.float() for key, t in load_file(folder / "judge.safetensors").items()})
    return judge.requires_grad_(False), names
