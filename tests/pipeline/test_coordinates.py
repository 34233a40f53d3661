"""The noise level of a call is found among its arguments, whatever they are called and whichever way they go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from pipelines import make_pipeline, make_stable_diffusion
from torch import Tensor

from accuquant.pipeline.coordinates import Coordinate, arguments, coordinate_of, noise_levels
from accuquant.pipeline.lowering import TapeError
from accuquant.pipeline.record import record


class OddNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Told how clean its latents are, by position, with a name of its own."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(6, 6)

    def forward(self, x: Tensor, cleanness: Tensor, strength: float, *, told: bool = True) -> tuple[Tensor]:
        return (self.proj(x) * (1 + cleanness[:, None]) * strength,)


class OddPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that nobody has heard of."""

    def __init__(self, brain: OddNetwork, noise_scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(brain=brain, noise_scheduler=noise_scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, generator: torch.Generator, tells: bool = True) -> Tensor:
        x = torch.randn(2, 6, generator=generator)
        self.noise_scheduler.set_timesteps(steps)
        for t in self.noise_scheduler.timesteps:
            cleanness = (1 - t / 1000).expand(2) if tells else torch.zeros(2)
            x = self.noise_scheduler.step(self.brain(x, cleanness, 0.5)[0], t, x).prev_sample
        return x


def odd(tells: bool = True) -> Any:
    torch.manual_seed(0)
    pipeline = OddPipeline(OddNetwork(), DDIMScheduler(clip_sample=False))
    return record(pipeline, steps=4, generator=torch.Generator().manual_seed(0), tells=tells)


def test_a_timestep_that_falls() -> None:
    call = {"class_labels": [1, 2], "guidance_scale": 1.5, "num_inference_steps": 4}
    tape = record(make_pipeline(), **call, generator=torch.Generator().manual_seed(0))
    assert coordinate_of(tape, "transformer") == Coordinate("timestep")
    assert noise_levels(tape, "transformer") == [[float(t)] for t in tape.pipeline.scheduler.timesteps]


def test_positional_arguments_have_names() -> None:
    """The U-Net's timestep is passed by position."""
    call = {"prompt": ["a"], "height": 32, "width": 32, "num_inference_steps": 3}
    tape = record(make_stable_diffusion(), **call, generator=torch.Generator().manual_seed(0))
    assert coordinate_of(tape, "unet") == Coordinate("timestep")
    assert {"sample", "timestep", "encoder_hidden_states"} <= set(arguments(tape.steps[0].calls[0], tape.pipeline.unet))


def test_a_network_of_other_habits() -> None:
    tape = odd()
    assert tape.denoisers == {"brain"}
    assert coordinate_of(tape, "brain") == Coordinate("cleanness", falls=False)
    levels = [level for (level,) in noise_levels(tape, "brain")]
    assert levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(-0.25, abs=0.01)


def test_no_such_argument() -> None:
    with pytest.raises(TapeError, match=r"no argument of brain goes one way.*cleanness, strength"):
        coordinate_of(odd(tells=False), "brain")


def test_of_many_tokens_the_largest_counts() -> None:
    assert Coordinate("timestep").of(torch.tensor([[0.0, 500.0], [0.0, 500.0]])) == 500
    assert Coordinate("t", falls=False).of(torch.tensor([0.1, 0.3])) == pytest.approx(-0.1)
    assert Coordinate("t").of(7) == 7
