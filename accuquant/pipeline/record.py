"""`record`: one run of a pipeline as a tape that was seen to compute the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from accuquant.pipeline.cut import cut
from accuquant.pipeline.lowering import Lowering, TapeError
from accuquant.pipeline.processors import processors_kept
from accuquant.pipeline.recording import Call, OtherOutputs, Outputs, Place, Recording, write_down
from accuquant.pipeline.seams import Seams, mapped, previous_sample, takes, unwrapped
from accuquant.pipeline.tape import Tape, run, same

PERTURBED = 0.02  # of its spread, by which the self-check moves a network's output


def rehearse(pipeline: DiffusionPipeline, **call: Any) -> Tape:
    """As `record`, with each network evaluated once and then giving the same again: all of a tape but its values.

    Raises:
        TapeError: see `record`.
    """
    return recorded(pipeline, call, known={})[0]


def record(pipeline: DiffusionPipeline, **call: Any) -> Tape:
    """Runs ``pipeline(**call)`` once at full precision and returns it as a tape; one run is one batch.

    Then the loop is run a second time with made-up outputs of its networks, none of which is evaluated: the tape must
    give the same latents at every step, or the pipeline is refused. And one step is made again by the networks
    themselves, which may not remember what they were called with before.

    Raises:
        TapeError: the pipeline steps no scheduler, or fewer than twice; or its tape does not compute what it computes.
    """
    return recorded(pipeline, call)[0]


def recorded(
    pipeline: DiffusionPipeline,
    call: dict[str, Any],
    known: Outputs | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Tape, Outputs]:
    """`record`, with what the networks gave in its steps: given as ``known``, it makes the same tape again.

    Raises:
        TapeError: see `record`.
        OtherOutputs: known outputs are of something else.
    """
    if takes(pipeline, "output_type"):
        call = {"output_type": "latent"} | call
    with repeatable(call) as again, processors_kept(pipeline):
        recording = write_down(pipeline, again(), known, progress)
        calls = [event for event in recording.events if isinstance(event, Call)]
        if not calls:
            raise TapeError(
                f"{type(pipeline).__name__} calls no network of its own: record the pipelines inside it, one by one"
            )
        tape = cut(pipeline, Lowering(recording))
        self_check(pipeline, again(), recording, tape)
    outputs = {k: one.held for k, one in enumerate(calls) if one.component in tape.looped}
    if known and known.keys() != outputs.keys():
        raise OtherOutputs(f"there are outputs of {len(known)} calls, and the run makes {len(outputs)}")
    if known is None:
        check_networks(pipeline, tape)
    return tape, outputs


class _LoopEnded(Exception):
    """All steps that were recorded have been made."""


def self_check(pipeline: DiffusionPipeline, call: dict[str, Any], recording: Recording, tape: Tape) -> None:
    """Compares tape and pipeline, both with the recorded outputs of the networks moved a little.

    Raises:
        TapeError: they do not give equal latents: a Python number or an array that depends on the networks is frozen
            in the tape.
    """
    name = type(pipeline).__name__
    calls = [event for event in recording.events if isinstance(event, Call)]
    latents: list[Tensor] = []
    made, total = 0, sum(len(step.latents_out) for step in tape.steps)

    def moved(index: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(index)
        outputs = []
        for tensor in calls[index].held:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
                spread = tensor.float().std().nan_to_num() + 1e-3
                tensor = (tensor.float() + PERTURBED * spread * noise).to(tensor.dtype)
            outputs.append(tensor)
        return outputs

    def on_call(component: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal made
        if made >= len(calls) or calls[made].component != component:
            raise TapeError(f"{name} calls other networks the second time: {component} at call {made}")
        index, made = made, made + 1
        tensors = moved(index) if component in tape.looped else calls[index].held
        if not tensors:  # its output hides its tensors from torch, and was left alone
            return method(*args, **kwargs)
        handed = iter(tensors)
        return mapped(lambda leaf: next(handed).clone() if isinstance(leaf, Place) else leaf, calls[index].outputs)

    def on_step(_: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents.append(previous_sample(result).clone())
        if len(latents) == total:
            raise _LoopEnded
        return result

    with torch.no_grad(), Seams(pipeline, on_call, on_step).held(), suppress(_LoopEnded):
        unwrapped(pipeline)(**call)
    if len(latents) < total:
        raise TapeError(
            f"{name} cannot be replayed: it steps its schedulers {total} times, and {len(latents)} times when it is "
            "called again with other outputs of its networks"
        )
    found = iter(latents)
    values = dict(zip(tape.steps[0].latents_in, tape.state(0).latents, strict=True))
    with torch.no_grad():
        for i, step in enumerate(tape.steps):
            run(step.code, values, lambda one: moved(one.index))
            if not all(same(values[number], next(found)) for number in step.latents_out):
                raise TapeError(
                    f"{name} cannot be replayed: step {i} of {len(tape)} depends on its networks through a number or "
                    "an array that Python read"
                )


def check_networks(pipeline: DiffusionPipeline, tape: Tape) -> None:
    """Makes the second step once more.

    Raises:
        TapeError: the networks do not give what they gave: they keep something of earlier calls.
    """
    name, reason = type(pipeline).__name__, ""
    try:
        with torch.no_grad():
            found = tape.step(1, tape.state(1)).latents
        equal = all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, tape.state(2).latents, strict=True)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network says when it is called out of turn
        equal, reason = False, f" ({type(error).__name__}: {error})"
    if not equal:
        raise TapeError(
            f"{name} cannot be replayed: called again with the same arguments, {' and '.join(sorted(tape.looped))} "
            f"gives something else; it remembers earlier calls, as a cache of keys and values does{reason}"
        )


@contextmanager
def repeatable(call: dict[str, Any]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Gives the arguments of a pipeline's call as often as asked, each time with the same noise to come.

    Afterwards all generators are where one run left them.
    """
    generators = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Generator)]
    before, after = _random_states(generators), list[Any]()
    runs = 0

    def again() -> dict[str, Any]:
        nonlocal runs
        if runs == 1:
            after.append(_random_states(generators))
        runs += 1
        _set_random_states(generators, before)
        return {key: tree_map(_copied, value) for key, value in call.items()}

    try:
        yield again
    finally:
        if after:
            _set_random_states(generators, after[0])


@contextmanager
def drawing_from(seed: int, pipeline: DiffusionPipeline) -> Iterator[None]:
    """What a pipeline draws without its generator follows from the seed; torch's own noise then goes on as before."""
    with torch.random.fork_rng([pipeline.device] if pipeline.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _random_states(generators: list[torch.Generator]) -> tuple[Any, ...]:
    device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    own = [generator.get_state() for generator in generators]
    return own, torch.get_rng_state(), device, np.random.get_state(), random.getstate()


def _set_random_states(generators: list[torch.Generator], states: tuple[Any, ...]) -> None:
    own, of_torch, device, of_numpy, of_python = states
    for generator, state in zip(generators, own, strict=True):
        generator.set_state(state)
    torch.set_rng_state(of_torch)
    if device:
        torch.cuda.set_rng_state_all(device)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
