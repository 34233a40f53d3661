"""Recipes for small random pipelines, what is sampled from them, and what tests compare."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file
from torch import Tensor

from accuquant.caching.runs import Runs
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.session import Session
from accuquant.pipeline.data import Samples
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.tape import Tape
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Recipe, Sampling
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.observe import observed


def recipe_tree(model: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe for a small random model; keyword arguments replace sections."""
    tree: dict[str, Any] = {
        "model": {"id": str(model), "device": "cpu"},
        "sampling": {"num_inference_steps": 6, "guidance_scale": 1.5},
        "data": {"path": "digits.jsonl", "num_samples": 4},
        "quantization": {
            "timestep_groups": 3,
            "rules": [
                {
                    "modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*",
                    "weight": "int4",
                    "activation": "int8",
                    "granularity": "group",
                    "group_size": 16,
                },
                {"modules": r"transformer_blocks\.\d+\.norm1\.linear", "weight": "int8", "tune": False},
            ],
        },
        "objective": {"iterations": 4, "batch_size": 2, "steps_per_group": 2},
        "evaluation": {"num_samples": 3, "batch_size": 3, "num_images": 2, "neighbours": 0},
        "export": {"output": str(output)},
    }
    return tree | changes


INT8 = {"weight": "int8", "activation": "int8"}
INT4 = {"weight": "int4", "activation": "int8", "granularity": "group", "group_size": 16}
TYPES = [
    {"modules": r"transformer_blocks\.\d+\.attn1\..*", "choose": [INT8, INT4]},
    {"modules": r"transformer_blocks\.\d+\.ff\..*", "choose": [INT8, INT4]},
]
SMALL = {"orders": [1], "trials": 2, "finalists": 1, "levels": [1.0], "schedules": ["interval", "best"]}


def tune_recipe(model: Path | str, output: Path, **section: Any) -> Recipe:
    """A search of seconds, over the types of attention and MLP."""
    given = {"bit_operations": 0.16, "types": TYPES, "combinations": 2} | SMALL | section
    changes: dict[str, Any] = {
        "sampling": {"num_inference_steps": 8, "guidance_scale": 1.5},
        "data": {"path": "digits.jsonl", "num_samples": 8},
        "objective": {"iterations": 4, "cached_iterations": 2, "batch_size": 4},  # two tapes, and two of validation
        "evaluation": {"num_samples": 3, "batch_size": 8, "num_images": 2, "neighbours": 0},  # two more of leaders
    }
    return parse_recipe(recipe_tree(model, output, tune=given, **changes), "test")


def sampled(
    pipeline: Any, labels: tuple[int, ...] = (1, 2), seed: int = 5, steps: int = 10, guidance: float = 1.5
) -> torch.Tensor:
    """What a class-conditional pipeline hands to its decoder: final latents."""
    sampling = Sampling(num_inference_steps=steps, guidance_scale=guidance)
    return decoder_input(pipeline, list(labels), [seed + i for i in range(len(labels))], sampling)


def finals(tapes: Sequence[Tape], components: dict[str, Any] | None = None) -> Tensor:
    """(B, N) last latents of the tapes' samples, by the pipeline's networks as they are now, or by others."""
    return torch.cat([tape.per_sample(tape.end(components)) for tape in tapes])


def recorded_finals(tapes: Sequence[Tape]) -> Tensor:
    """(B, N) last latents that the tapes were recorded with."""
    return torch.cat([tape.per_sample(tape.state(len(tape))) for tape in tapes])


def trajectory(tape: Tape, components: dict[str, Any] | None = None) -> Tensor:
    """(T + 1, B, N) all latents of a tape's samples, by the pipeline's networks as they are now, or by others."""
    return torch.stack([tape.per_sample(state) for state in tape.rolled(components)])


@torch.no_grad()
def output_at(session: Session, module: str, i: int) -> Tensor:
    """What a module gives at step i, as it is now, on full precision's latents of all calibration samples."""
    found = list[Tensor]()
    for tape in session.reference.tapes:
        with observed(session.network, [module]) as seen:
            tape.step(i, tape.state(i))
        found.append(seen[module].output)
    return torch.cat(found)


def runs_of(pipeline: Any, steps: int, labels: Sequence[int]) -> Runs:
    """What a search for a class-conditional pipeline's cache compares with, made when it is first asked for."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)

    @cache
    def few(count: int, batch_size: int) -> list[Tape]:
        return dit_tapes(pipeline, steps, labels=labels[:count], batch_size=batch_size, images=True)

    levels = [float(t) for t in scheduler.timesteps]
    return Runs(pipeline.transformer, levels, len(labels), few, lambda: few(len(labels), len(labels)))


def dit_tapes(
    pipeline: Any, steps: int, guidance: float = 1.5, labels: Sequence[int] = (1, 2), batch_size: int = 8, **more: Any
) -> list[Tape]:
    """A class-conditional pipeline as it is now, on seeds from 0 on."""
    recorder = Recorder(pipeline, Sampling(num_inference_steps=steps, guidance_scale=guidance))
    samples = Samples([{"class_labels": label} for label in labels], list(range(len(labels))))
    return recorder.tapes(samples, batch_size, Reporter(quiet=True), "", **more)


def images(pipeline: DiTPipeline, **changes: Any) -> Any:
    """Of ten steps of a class-conditional pipeline's own; keyword arguments change the call."""
    arguments = dict(class_labels=[1, 2], num_inference_steps=10, guidance_scale=1.5, output_type="np") | changes
    return pipeline(generator=[torch.Generator().manual_seed(s) for s in (5, 6)], **arguments).images


class Abort(Exception):
    pass


def aborted(denoiser: torch.nn.Module, calls: int, run: Callable[[], object]) -> None:
    """The run, cut short in the denoiser's call of that number."""
    made = 0

    def stop(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == calls:
            raise Abort

    handle = denoiser.register_forward_hook(stop)
    with pytest.raises(Abort):
        run()
    handle.remove()


def decoder_input(pipeline: Any, labels: list[int], seeds: list[int], sampling: Sampling) -> Tensor:
    """What the pipeline hands to its decoder: final latents over the scaling factor."""
    kept: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, *a, **k: (kept.append(z), decode(z, *a, **k))[1]
    try:
        pipeline(
            labels,
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="pt",
        )
    finally:
        pipeline.vae.decode = decode
    return kept[0]


def finite_differences(steps: list[int], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """D_0, D_1, ... at the last full step. TaylorSeer: D_{j+1} = (D_j - D_j at the one before) / the last gap."""
    last = len(steps) - 1
    if last == 0:
        return [values[0]]
    before = finite_differences(steps[:-1], values[:-1])
    found = [values[-1]]
    for old in before:
        found.append((found[-1] - old) / (steps[last] - steps[last - 1]))
    return found


def interrupted_and_resumed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, iteration: int) -> Path:
    """The recipe's export, after Ctrl-C at the start of this update with the cache on and a second run that went on."""
    update = UpdateLoop.update

    def interrupted(self: UpdateLoop, number: int) -> dict[str, Any]:
        if self.cache is not None and number == iteration:
            raise KeyboardInterrupt
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(UpdateLoop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(recipe, Reporter(quiet=True))
    return calibrate(recipe, Reporter(quiet=True), resume=True)


BURN = "import torch\ntorch.set_num_threads(2)\na = torch.randn(700, 700)\nprint('hot', flush=True)\nwhile True: a @ a"


@contextmanager
def busy_cores() -> Iterator[None]:
    """Two other processes multiply meanwhile, with two threads each."""
    burners = [subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for burner in burners:
            assert burner.stdout is not None and burner.stdout.readline() == b"hot\n"
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def importable(folder: Path) -> dict[str, str]:
    """Environment of a process that imports from the folder first, and whatever this one's PYTHONPATH names."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def as_allocated(model: torch.nn.Module) -> Any:
    """The model with its values where torch puts tensors: files are mapped at any address, where sums may differ."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is torch.Tensor and not tensor.is_mkldnn:
            tensor.data = tensor.data.clone()
    return model


def assert_same_weights(one: Path, other: Path) -> None:
    """Two exports' denoisers, to the last bit."""
    expected, found = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
