"""Trains a network in steps that can be interrupted at any moment and go on later to the same end.

Every network that comes with this repository is trained by `train_stage`: averaged weights, a checkpoint beside the
work every half minute, and a loss curve that survives an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

Net = TypeVar("Net", bound=nn.Module)
Options = TypeVar("Options")
Facts = dict[str, Any]
LossFn = Callable[[Net, torch.Generator], Tensor]


def parse_options(kind: type[Options], description: str) -> Options:
    """The command line as a dataclass: each field is the option of its name, its type that of the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):  # type: ignore[arg-type]
        flag, made = "--" + field.name.replace("_", "-"), Path if field.default is None else type(field.default)
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if made is bool else {"type": made}
        parser.add_argument(flag, default=field.default, **how)
    return kind(**vars(parser.parse_args()))


def cosine(steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: rises over the first tenth (500 steps at most), falls as a cosine to 0."""
    rise = min(500, steps // 10 + 1)
    return lambda step: min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def constant_then_linear(steps: int, decay: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: 1 after 200 steps of rise, falling linearly to 0 over the last `decay`.

    Unlike a cosine it does not presume the number of steps: a run that has not begun to fall can be prolonged.
    """
    return lambda step: min(1.0, (step + 1) / 200, (steps - step) / decay)


def adamw(model: nn.Module, rate: float) -> list[Optimizer]:
    cuda = next(model.parameters()).is_cuda
    return [AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda)]


@dataclass(frozen=True)
class Run:
    """What all networks that are trained together share: the folder of checkpoints, the device, the seed."""

    work: Path
    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """The training of one network: its checkpoint is taken up only by a stage of the same `recipe`, device and seed."""

    run: Run
    name: str
    steps: int
    rate: float  # learning rate at its peak
    schedule: Callable[[int], float]  # share of that rate at each step
    recipe: str  # all else that the weights depend on, in words
    optimizers: Callable[[nn.Module, float], list[Optimizer]] = adamw
    ema_decay: float = 0.9995
    save_every: float = 30.0  # seconds between checkpoints
    log_every: int = 200
    watch_every: int = 0  # steps between calls of `watch`; none if 0

    @property
    def checkpoint(self) -> Path:
        return self.run.work / f"{self.name}.safetensors"

    @property
    def of(self) -> str:
        """What the checkpoint is of."""
        return f"{self.run.device.type} seed={self.run.seed} {self.recipe}"


def prolongable(run: Run, name: str, steps: int, rate: float, batch: int) -> Stage:
    """A long stage that is looked at on its way; its recipe leaves the steps out, so that there may be more of them."""
    schedule, recipe = constant_then_linear(steps, max(1, steps // 4)), f"batch={batch}"
    return Stage(
        run, name, steps, rate, schedule, recipe, ema_decay=0.999, save_every=120, log_every=50, watch_every=1000
    )


def train_stage(
    stage: Stage, make: Callable[[], Net], loss_fn: LossFn[Net], watch: Callable[[Net, int], None] | None = None
) -> tuple[Net, Facts]:
    """Trains a network or takes up its checkpoint; returns it with its averaged weights, and the figures.

    `watch` sees the network with its averaged weights every `watch_every` steps.

    Raises:
        SystemExit: interrupted or told to end; the step under way is finished and saved first.
    """
    device = stage.run.device
    torch.manual_seed(stage.run.seed)
    # eval() throughout: the only thing that train mode changes in diffusers' networks is their own label dropout,
    # which draws apart in every block; a loss that wants dropout drops a sample's label in all blocks together.
    model = make().to(device).requires_grad_(True).eval()
    weights = list(model.parameters())
    averages = [p.detach().clone() for p in weights]
    optimizers = stage.optimizers(model, stage.rate)
    rates = [group["lr"] for group in _groups(optimizers)]
    generator = torch.Generator(device).manual_seed(stage.run.seed)
    stage.run.work.mkdir(parents=True, exist_ok=True)
    first, seconds, curve = 0, 0.0, list[tuple[int, float]]()

    names = [name for name, _ in model.named_parameters()]

    def state() -> dict[str, Tensor]:
        held = {f"model.{name}": p.detach() for name, p in zip(names, weights, strict=True)}
        held |= {f"ema.{name}": average for name, average in zip(names, averages, strict=True)}
        for i, optimizer in enumerate(optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                held |= {f"optimizer.{i}.{j}.{key}": value for key, value in values.items()}
        return held

    # Take up the checkpoint, if it is of this very recipe.
    if stage.checkpoint.is_file():
        with safe_open(stage.checkpoint, "pt") as stored:
            metadata: dict[str, str] = stored.metadata()
        if metadata["recipe"] == stage.of:
            saved = load_file(stage.checkpoint, device=device.type)
            first, seconds, curve = (json.loads(metadata[key]) for key in ("step", "seconds", "curve"))
            with torch.no_grad():
                for name, p, average in zip(names, weights, averages, strict=True):
                    p.copy_(saved[f"model.{name}"])
                    average.copy_(saved[f"ema.{name}"])
            for i, optimizer in enumerate(optimizers):
                restored = optimizer.state_dict()
                for key in (key for key in saved if key.startswith(f"optimizer.{i}.")):
                    _, _, j, moment = key.split(".")
                    restored["state"].setdefault(int(j), {})[moment] = saved[key]
                optimizer.load_state_dict(restored)
            generator.set_state(saved["rng"].cpu())
            print(f"{stage.name}: going on from step {first}")

    clock = time.monotonic
    start = saved_at = clock()
    taken = seconds

    def save(step: int) -> None:
        nonlocal taken
        taken = seconds + clock() - start
        tensors = {key: tensor.cpu() for key, tensor in state().items()} | {"rng": generator.get_state()}
        figures = {"step": step, "seconds": taken, "curve": curve}
        metadata = {"recipe": stage.of} | {key: json.dumps(value) for key, value in figures.items()}
        partial = stage.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        partial.replace(stage.checkpoint)

    with _told_to_end() as told:
        window, counted = torch.zeros((), device=device), 0
        bar = tqdm(range(first, stage.steps), desc=stage.name, initial=first, total=stage.steps, mininterval=1.0)
        for step in bar:
            for group, rate in zip(_groups(optimizers), rates, strict=True):
                group["lr"] = rate * stage.schedule(step)
            batch_loss = loss_fn(model, generator)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            batch_loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(
                    averages, list[Tensor](weights), 1 - min(stage.ema_decay, (1 + step) / (10 + step))
                )

            # The loss is summed on the device and read seldom: each read makes the host wait.
            window, counted, done = window + batch_loss.detach(), counted + 1, step + 1 == stage.steps
            if (step + 1) % stage.log_every == 0 or done:
                curve.append((step + 1, window.item() / counted))
                window, counted = torch.zeros_like(window), 0
                bar.set_postfix(loss=f"{curve[-1][1]:.4f}")
            if watch and stage.watch_every and ((step + 1) % stage.watch_every == 0 or done):
                with _averaged(weights, averages):
                    watch(model, step + 1)
            if told or done or clock() - saved_at > stage.save_every:
                save(step + 1)
                saved_at = clock()
            if told:
                bar.close()
                print(f"{stage.name}: stopped, saved at step {step + 1} of {stage.steps}")
                raise SystemExit(128 + told[0])

    torch._foreach_copy_([p.data for p in weights], averages)
    final_loss = curve[-1][1] if curve else None
    facts = {"steps": stage.steps, "final_loss": final_loss, "seconds": taken, "curve": curve}  # as saved
    return model.requires_grad_(False), facts


def _groups(optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


@contextmanager
def _averaged(weights: list[nn.Parameter], averages: list[Tensor]) -> Iterator[None]:
    """The averages in the place of the weights, for as long as somebody looks."""
    own = [p.detach().clone() for p in weights]
    torch._foreach_copy_([p.data for p in weights], averages)
    try:
        with torch.no_grad():
            yield
    finally:
        torch._foreach_copy_([p.data for p in weights], own)


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """The signals that arrived: one only raises a flag, so that the step under way is finished first."""
    told: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: told.append(number)) for number in signals}
    try:
        yield told
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
