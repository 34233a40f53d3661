"""Attention processors, which some pipelines set for the time of a run: perturbed attention guidance does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline

Processors = dict[str, Any]


def processors_of(pipeline: DiffusionPipeline) -> dict[str, Processors]:
    """Of each component that has some, by name."""
    found: dict[str, Processors] = {}
    for name, component in pipeline.components.items():
        if hasattr(component, "set_attn_processor") and hasattr(component, "attn_processors"):
            found[name] = dict(component.attn_processors)
    return found


def changed_processors(pipeline: DiffusionPipeline, call: str, before: dict[str, Processors]) -> Processors | None:
    """Those of the component that is called, if they are others than before."""
    name = call.partition(".")[0]
    if name not in before:
        return None
    now = dict(getattr(pipeline, name).attn_processors)
    return None if _same(now, before[name]) else now


@contextmanager
def processing(network: Any, processors: Processors) -> Iterator[None]:
    """With these for as long as the block runs."""
    before = dict(network.attn_processors)
    network.set_attn_processor(dict(processors))  # which empties the dictionary that it is given
    try:
        yield
    finally:
        network.set_attn_processor(before)


@contextmanager
def processors_kept(pipeline: DiffusionPipeline) -> Iterator[None]:
    """All components have those again that they had: a run that is cut short does not set them back."""
    before = processors_of(pipeline)
    try:
        yield
    finally:
        for name, processors in before.items():
            component: Any = getattr(pipeline, name)
            if not _same(dict(component.attn_processors), processors):
                component.set_attn_processor(dict(processors))


def _same(a: Processors, b: Processors) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
