"""Real pipeline classes of tiny random weights, saved as complete folders: recorded, replayed, loaded again.

Four of them run always, all with `make test-pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from zoo.images import IMAGES, Example
from zoo.others import OTHERS
from zoo.videos import VIDEOS

from accuquant.pipeline.coordinates import noise_levels
from accuquant.pipeline.loading import left_out
from accuquant.pipeline.record import record, rehearse
from accuquant.pipeline.rows import call_of

ALWAYS = {"stable_diffusion_3", "flux_dev_two_calls", "wan_two_experts", "controlnet"}
ZOO = [
    pytest.param(make, id=make.__name__, marks=() if make.__name__ in ALWAYS else pytest.mark.pipelines)
    for make in (*IMAGES, *VIDEOS, *OTHERS)
]
STEPS = 4


@pytest.fixture(scope="module", params=ZOO)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Example, Path]:
    """A pipeline that was saved and loaded again, and a folder with the pictures that rows name."""
    make: Callable[[], Example] = request.param
    pipeline, row, settings = make()
    folder = tmp_path_factory.mktemp(make.__name__)
    picture, mask = Image.new("RGB", (32, 32), (200, 40, 40)), Image.new("L", (32, 32))
    picture.paste((20, 60, 200), (4, 4, 20, 28))
    mask.paste(255, (8, 8, 24, 24))
    picture.save(folder / "in.png")
    mask.save(folder / "mask.png")
    pipeline.save_pretrained(folder / "saved")
    loaded = DiffusionPipeline.from_pretrained(folder / "saved", **left_out(str(folder / "saved")))
    loaded.set_progress_bar_config(disable=True)
    return (loaded, row, settings | {"num_inference_steps": STEPS}), folder


def called(example: tuple[Example, Path]) -> dict[str, Any]:
    (pipeline, row, settings), folder = example
    torch.manual_seed(0)
    count = 1 if "image" in row and "WanImageToVideo" in type(pipeline).__name__ else 2
    return call_of(pipeline, [row] * count, [1, 2][:count], settings, folder)


def test_it_is_recorded_and_replayed(example: tuple[Example, Path]) -> None:
    """Every step gives what the pipeline's own schedulers gave (which recording compares), and does so again."""
    pipeline = example[0][0]
    tape = record(pipeline, **called(example))
    assert len(tape) >= STEPS - 1
    with torch.no_grad():
        state = tape.state(0)
        for i in range(len(tape)):
            state = tape.step(i, state)
            for a, b in zip(state.tensors, tape.state(i + 1).tensors, strict=True):
                assert torch.equal(a, b)
    assert state.latents[0].isfinite().all()
    expected = pipeline(**called(example), output_type="latent")
    final = expected[0] if isinstance(expected, tuple) else next(iter(expected.values()))
    if isinstance(final, torch.Tensor):  # inpainting puts the picture in once more, after the last step
        assert torch.equal(final, tape.returned(state))


def test_every_denoiser_is_found_with_its_noise_levels(example: tuple[Example, Path]) -> None:
    tape = rehearse(example[0][0], **called(example))
    wanted = {"transformer", "transformer_2", "unet", "prior"} & {
        name for name, part in tape.pipeline.components.items() if part is not None
    }
    assert tape.denoisers == wanted
    assert "controlnet" not in tape.denoisers and ("controlnet" in tape.looped) == hasattr(tape.pipeline, "controlnet")
    for denoiser in tape.denoisers:
        levels = [level for step in noise_levels(tape, denoiser) for level in step]
        assert levels and levels == sorted(levels, reverse=True)


def test_gradients_reach_every_denoiser(example: tuple[Example, Path]) -> None:
    """Through the whole loop, into the networks of its first and its last step."""
    pipeline = example[0][0]
    tape = record(pipeline, **called(example))
    networks = {name: getattr(pipeline, name).requires_grad_(True) for name in tape.denoisers}
    state = tape.state(0)
    for i in range(len(tape)):
        state = tape.step(i, state)
    loss = torch.stack([t.float().square().mean() for t in state.latents]).sum()
    parameters = [p for network in networks.values() for p in network.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    reached = sum(g is not None and bool(g.abs().sum() > 0) for g in found)
    assert reached > 0.6 * len(parameters)
    for network in networks.values():
        network.requires_grad_(False)
