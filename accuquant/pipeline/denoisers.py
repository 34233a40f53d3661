"""The networks of a pipeline that denoise, as a tape shows them; most have one, Wan has two experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from accuquant.core.coordinate import Coordinate
from accuquant.pipeline.coordinates import coordinate_of, noise_levels
from accuquant.pipeline.tape import Tape


@dataclass(frozen=True)
class Denoiser:
    """One of them.

    Attributes:
        name: of the component.
        prefix: of its modules' names among those of all denoisers; empty where there is one.
        levels: the noise level of each step that it works in, by the step's number.
    """

    name: str
    prefix: str
    network: nn.Module
    coordinate: Coordinate
    levels: dict[int, float]


def denoisers_of(tape: Tape) -> list[Denoiser]:
    """In the order in which they work.

    Raises:
        TapeError: nothing says how noisy the latents of one are.
    """
    several, found = len(tape.denoisers) > 1, list[Denoiser]()
    for name in tape.denoisers:
        levels = {i: levels[0] for i, levels in enumerate(noise_levels(tape, name)) if levels}
        network: nn.Module = getattr(tape.pipeline, name)
        found.append(Denoiser(name, f"{name}." if several else "", network, coordinate_of(tape, name), levels))
    return sorted(found, key=lambda one: (min(one.levels), one.name))


def several(owner: str, names: Iterable[str]) -> str:
    """What is said where a cache is asked for that would be of more than one."""
    each = ", ".join(f"pipeline.{name}" for name in names)
    return f"{owner} has several denoisers, and a cache is of one: enable it on each apart ({each})"


def joined(networks: Mapping[str, nn.Module]) -> nn.Module:
    """One module that finds the modules of all by their names: the only one itself, or one that holds several."""
    if len(networks) == 1:
        return next(iter(networks.values()))
    whole = nn.Module()
    for name, network in networks.items():
        whole.add_module(name, network)
    return whole


def step_levels(denoisers: Sequence[Denoiser]) -> list[float]:
    """The noise level of every step, by the denoiser that works in it; the first, where several do."""
    levels: dict[int, float] = {}
    for one in denoisers:
        levels = one.levels | levels
    return [levels[i] for i in sorted(levels)]
