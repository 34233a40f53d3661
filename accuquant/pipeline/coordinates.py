"""Where in the noise each call of a denoiser is: the one argument that says so, found in the recording.

Pipelines name and scale it as they like: `timestep` mostly, `t`, `timesteps`, a sigma, 1 - sigma, one value for every
token. It is the argument that is a constant of each call and goes one way from step to step.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from accuquant.core.coordinate import USUAL, Coordinate
from accuquant.pipeline.lowering import Invoke, TapeError
from accuquant.pipeline.tape import Tape


def arguments(one: Invoke, network: nn.Module) -> dict[str, Any]:
    """What a call was given, by the names of the network's forward; slots where it depends on other networks."""
    args, kwargs = tree_unflatten(one.given.leaves, one.given.spec)
    bound = inspect.signature(network.forward).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def coordinate_of(tape: Tape, denoiser: str) -> Coordinate:
    """The argument of a denoiser that says how noisy its latents are.

    Raises:
        TapeError: no argument goes one way through the steps.
    """
    network = getattr(tape.pipeline, denoiser)
    first_calls = [calls[0] for calls in calls_of(tape, denoiser) if calls]
    named = [arguments(one, network) for one in first_calls]
    common = [name for name in named[0] if all(_is_constant(each.get(name)) for each in named)]
    ordered = [*(name for name in USUAL if name in common), *(name for name in common if name not in USUAL)]
    for name in ordered:
        for falls in (True, False):
            coordinate = Coordinate(name, falls)
            values = [coordinate.of(each[name]) for each in named]
            # two steps may round to one value in bfloat16
            if len(values) == 1 or (values[0] > values[-1] and all(a >= b for a, b in itertools.pairwise(values))):
                return coordinate
    raise TapeError(
        f"{type(tape.pipeline).__name__}: no argument of {denoiser} goes one way from step to step, so nothing says "
        f"how noisy its latents are; its constant arguments are {', '.join(common) or 'none'}"
    )


def calls_of(tape: Tape, denoiser: str) -> list[list[Invoke]]:
    """The denoiser's calls in each step; none where another one works."""
    return [[one for one in step.calls if one.component == denoiser] for step in tape.steps]


def noise_levels(tape: Tape, denoiser: str) -> list[list[float]]:
    """The coordinate of each call of a denoiser, step by step."""
    coordinate, network = coordinate_of(tape, denoiser), getattr(tape.pipeline, denoiser)
    return [
        [coordinate.of(arguments(one, network)[coordinate.argument]) for one in calls]
        for calls in calls_of(tape, denoiser)
    ]


def _is_constant(value: Any) -> bool:
    """Whether an argument can be a coordinate: a number, or a tensor of numbers, that depends on no network."""
    if isinstance(value, Tensor):
        return value.numel() > 0 and not value.is_complex() and value.dtype is not torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)
