"""Where in the noise a denoiser's call is: one number, read from the argument that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OF_A_KIND = re.compile(r"_timesteps?$")
USUAL = ("timestep", "timesteps", "timestep_ratio", "t", "sigma", "sigmas", "noise_labels")


@dataclass(frozen=True)
class Coordinate:
    """How a denoiser's calls say how noisy their latents are.

    Attributes:
        argument: its name in the network's forward.
        falls: whether it falls from step to step (a timestep) or rises (1 - sigma).
    """

    argument: str = "timestep"
    falls: bool = True

    @classmethod
    def usual(cls, parameters: Iterable[str]) -> Coordinate | None:
        """By the names that networks have for it, where nothing was recorded; None where there is none of them.

        Where none is called so, the first of those that networks of several kinds have: ``vision_timesteps``.
        """
        given = list(parameters)
        named = [*(name for name in USUAL if name in given), *(name for name in given if OF_A_KIND.search(name))]
        return cls(named[0]) if named else None

    def of(self, given: Any) -> float:
        """From an argument's value: falling from step to step. The largest counts where it is given for each token.

        Image-to-video models give frames that are known already the timestep 0.
        """
        tensor = given.detach() if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
        oriented = tensor.double() if self.falls else -tensor.double()
        return float(oriented.max())
