"""The code of a recording cut into steps: constants folded, and in each step no more than later ones need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from accuquant.core.trajectory import State
from accuquant.pipeline.lowering import Advance, Apply, Instruction, Invoke, Lowering, Slot, TapeError, Template
from accuquant.pipeline.tape import Step, Tail, Tape, run, same


def cut(pipeline: DiffusionPipeline, lowering: Lowering) -> Tape:
    """The tape of a lowered recording, with the states that the recorded outputs of its networks give.

    Raises:
        TapeError: there is no loop of two steps or more, or the tape does not give the recorded latents.
    """
    name, code = type(pipeline).__name__, lowering.code
    marks = [k for k, one in enumerate(code) if isinstance(one, Advance)]
    if not marks:
        raise TapeError(
            f"{name} steps no scheduler in its call: it has no denoising loop, or one that makes its steps by itself, "
            "which cannot be recorded"
        )
    denoisers = _denoisers(code)
    looped = denoisers | {one.component for one in code[marks[0] : marks[-1]] if isinstance(one, Invoke)}
    for one in code:
        if isinstance(one, Invoke) and one.component in looped and one.writes:
            raise TapeError(
                f"{name}: {one.component} writes into what it is given (a cache of keys and values), so a step of it "
                "cannot be made twice"
            )
    code, constants = _folded(code, looped)
    code, first = _with_initial_latents(code, lowering.count)
    parts, after = _into_steps(code, looped)
    if len(parts) < 2:
        raise TapeError(f"{name} made a single step: calibration needs two or more (num_inference_steps)")
    latents = [tuple(first), *(_latents_after(part, f"{name}: step {i}") for i, part in enumerate(parts))]
    made = [leaf.number for leaf in tree_leaves(lowering.returned) if isinstance(leaf, Slot)]
    tail, needed = _tail(after, [number for number in made if number not in constants], latents[-1])

    # Backwards: of each step no more than later ones need.
    steps = list[Step]()
    for i in reversed(range(len(parts))):
        history_out = tuple(sorted(needed - set(latents[i + 1])))
        kept, needed = _slice(parts[i], needed | set(latents[i + 1]))
        history_in = tuple(sorted(needed - set(latents[i])))
        steps.insert(0, Step(kept, latents[i], history_in, latents[i + 1], history_out))
    if steps[0].history_in:
        raise TapeError(f"{name}: the first step reads {len(steps[0].history_in)} values that were never computed")

    # Forwards: the states, from the outputs that the networks gave.
    values = dict(zip(latents[0], first.values(), strict=True))
    states = [State(tuple(values.values()))]
    with torch.no_grad():
        for i, step in enumerate(steps):
            run(step.code, values, lambda one: one.held)
            ends = [one for one in parts[i] if isinstance(one, Advance)]
            if not all(same(values[one.previous.number], one.value) for one in ends):
                raise TapeError(f"{name}: step {i} of the tape does not give the latents that the pipeline had")
            states.append(State(*(tuple(values[n] for n in group) for group in (step.latents_out, step.history_out))))
            values = {n: values[n] for n in step.latents_out + step.history_out}
    steps = [replace(step, code=_without_outputs(step.code)) for step in steps]
    tail = None if tail is None else replace(tail, code=_without_outputs(tail.code))
    return Tape(pipeline, steps, states, frozenset(denoisers), frozenset(looped), tail)


def _into_steps(code: list[Instruction], looped: set[str]) -> tuple[list[list[Instruction]], list[Instruction]]:
    """The instructions of each step, and those after the last.

    A step ends with the last scheduler's step before the next call of a network; what lies between the two is of the
    next one.
    """
    steps: list[list[Instruction]] = [[]]
    between: list[Instruction] = []  # since the last scheduler's step
    for one in code:
        ended = bool(steps[-1]) and isinstance(steps[-1][-1], Advance)
        if isinstance(one, Advance):
            steps[-1] += [*between, one]
            between = []
        elif ended and isinstance(one, Invoke) and one.component in looped:
            steps.append([*between, one])
            between = []
        elif ended:
            between.append(one)
        else:
            steps[-1].append(one)
    if not any(isinstance(one, Advance) for one in steps[-1]):  # networks called once more, after the last step
        between = steps.pop() + between
    return steps, between


def _latents_after(step: list[Instruction], where: str) -> tuple[int, ...]:
    ends = [one.previous for one in step if isinstance(one, Advance)]
    if not all(isinstance(end, Slot) for end in ends):
        raise TapeError(f"{where} ends with latents that depend on no network")
    return tuple(dict.fromkeys(end.number for end in ends))


def _slice(code: list[Instruction], needed: set[int]) -> tuple[tuple[Apply | Invoke, ...], set[int]]:
    """The instructions that ``needed`` slots come from, and the slots that these read from before."""
    kept: list[Apply | Invoke] = []
    for one in reversed(code):
        if not isinstance(one, Advance) and needed & set(one.outputs):
            kept.append(one)
            needed = (needed | one.given.numbers) - set(one.outputs)
    return tuple(reversed(kept)), needed


def _tail(code: list[Instruction], wanted: list[int], latents: tuple[int, ...]) -> tuple[Tail | None, set[int]]:
    """What the pipeline makes of the last latents, and the slots that it reads.

    It ends with the tensors that the pipeline returned, without embeddings of prompts and other constants; where they
    went through NumPy, with the decoder's last output.
    """
    decoded = [one.outputs[0] for one in code if isinstance(one, Invoke) and one.component.endswith(".decode")]
    outputs = wanted[:1] or decoded[-1:]
    if not outputs:
        return None, set()
    kept, needed = _slice(code, set(outputs))
    return Tail(kept, latents, tuple(sorted(needed - set(latents))), outputs[0], bool(wanted)), needed


def _without_outputs(code: tuple[Apply | Invoke, ...]) -> tuple[Apply | Invoke, ...]:
    return tuple(replace(one, held=()) if isinstance(one, Invoke) else one for one in code)


def _denoisers(code: list[Instruction]) -> set[str]:
    """The components whose output reaches a scheduler's step without passing through another call."""
    by_slot = {number: one for one in code if not isinstance(one, Advance) for number in one.outputs}
    found: set[str] = set()
    pending = [one.previous.number for one in code if isinstance(one, Advance) and isinstance(one.previous, Slot)]
    visited: set[int] = set()
    while pending:
        number = pending.pop()
        if number in visited or number not in by_slot:
            continue
        visited.add(number)
        one = by_slot[number]
        if isinstance(one, Invoke):
            if "." not in one.component:  # pictures that are encoded to be blended in do not denoise
                found.add(one.component)
        else:
            pending += one.given.numbers
    return found


def _folded(code: list[Instruction], looped: set[str]) -> tuple[list[Instruction], dict[int, Tensor]]:
    """Without the instructions whose result is the same at every replay; and these results."""
    known: dict[int, Tensor] = {}
    kept: list[Instruction] = []
    with torch.no_grad():
        for one in code:
            if isinstance(one, Advance):
                kept.append(Advance(one.scheduler, _known(one.sample, known), _known(one.previous, known), one.value))
                continue
            given = one.given.substituted(known) if one.given.numbers & known.keys() else one.given
            constant = not given.numbers
            if isinstance(one, Apply):
                if constant:
                    run([replace(one, given=given)], known, lambda _: ())
                else:
                    kept.append(replace(one, given=given))
            elif constant and one.component not in looped:
                known.update(zip(one.outputs, one.held, strict=True))
            else:
                kept.append(replace(one, given=given))
    return kept, known


def _known(value: Any, known: dict[int, Tensor]) -> Any:
    return known.get(value.number, value) if isinstance(value, Slot) else value


def _with_initial_latents(code: list[Instruction], count: int) -> tuple[list[Instruction], dict[int, Tensor]]:
    """The first sample of each scheduler is no constant but the first state; returns its slots with their values."""
    first: dict[int, Tensor] = {}
    for one in code:
        if isinstance(one, Invoke) and first:
            break
        sample = one.sample if isinstance(one, Advance) else None
        if isinstance(sample, Tensor) and not any(sample is tensor for tensor in first.values()):
            first[count + len(first)] = sample
    slots = {id(tensor): Slot(number) for number, tensor in first.items()}

    def replaced(template: Template) -> Template:
        if not any(id(leaf) in slots for leaf in template.leaves):
            return template
        leaves = [slots.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in template.leaves]
        return Template(tree_unflatten(leaves, template.spec))

    out: list[Instruction] = []
    for one in code:
        match one:
            case Apply():
                out.append(replace(one, given=replaced(one.given)))
            case Invoke():
                given = replaced(one.given)
                out.append(replace(one, given=given))
            case Advance():
                out.append(one)
    return out, first
