"""The tuning loop: which group is visited when, at what rate, and how an interrupted run goes on.

Everything random is drawn from (seed, update number), so a run that resumes at update n does what it would have done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer
from accuquant.calibration.objectives.blocks import Reconstruction
from accuquant.calibration.objectives.cached_steps import CachedSteps
from accuquant.core import rounding
from accuquant.core.cached_objective import cached_group_gradient, cached_groups
from accuquant.core.objective import group_gradient, groups
from accuquant.errors import RecipeError
from accuquant.files import write_tensors
from accuquant.model.rollout import Conditions, Rollout
from accuquant.recipe import Objective
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import cached
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock

SAVE_EVERY_SECONDS = 20.0
ROUNDING_WEIGHT = 0.01  # of AdaRound's regulariser against the normalised group loss
REFRESHES = 3  # how often inputs from the quantized trajectory are sampled anew
LEAST_UNIT = 0.02  # of a forecast that is the last output itself, and of those near it
ADAM_BETAS = (0.9, 0.99)


@dataclass
class Reference:
    """Full-precision trajectories of the calibration samples.

    Attributes:
        latents: (T + 1, B, C, H, W); predictions: (T, B, C, H, W).
        conditions: their noise and conditioning.
    """

    latents: Tensor
    predictions: Tensor
    conditions: Conditions

    @cached_property
    def variances(self) -> Tensor:
        """(T + 1,) mean square of the latents, the marginal variance that `gradient: variance` scales by."""
        return self.latents.double().square().flatten(1).mean(1)

    def take(self, index: Tensor) -> Reference:
        return Reference(self.latents[:, index], self.predictions[:, index], self.conditions.take(index))

    def first(self, count: int) -> Reference:
        """At most ``count`` samples."""
        return self.take(torch.arange(min(count, len(self.conditions)), device=self.latents.device))

    def join(self, other: Reference) -> Reference:
        latents, predictions = (
            torch.cat(pair, 1) for pair in ((self.latents, other.latents), (self.predictions, other.predictions))
        )
        return Reference(latents, predictions, Conditions.join([self.conditions, other.conditions]))


@dataclass
class Tuner:
    """Calibrates the trainable layers of a rollout's denoiser against a reference.

    Attributes:
        cache: on during the updates; groups then begin at its full steps, and only those count as evaluations.
        fitted: what the cache's forecasts know, such as the noise.
        learned: the same, with weights of the forecasts where `objective.learn` has them; ``cache`` then uses them.
        blocks: what learns where ``objective.target`` is blocks, instead of groups of steps.
        history: one entry an update: iteration, loss, steps_per_group (or block), network_evaluations so far, seconds.
    """

    rollout: Rollout
    clock: StepClock
    layers: dict[str, TrainableLayer]
    reference: Reference
    objective: Objective
    seed: int = 0
    steps_per_group: int = 1
    cache: CachePlan | None = None
    fitted: Fitted | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    network_evaluations: int = 0
    seconds: float = 0.0
    stepping: bool = False

    def __post_init__(self) -> None:
        self.learned: Fitted | None = None
        self.blocks: Reconstruction | None = None
        if self.cache is not None:
            self._begin_cached(self.cache)
        self.parameters = self._choose_parameters()
        if self.cache is None and self.objective.target == "blocks" and self.objective.iterations:
            learning: dict[str, list[nn.Parameter]] = {}
            for parameters in self.parameters.values():
                for name, parameter in parameters.items():
                    learning.setdefault(name, []).append(parameter)
            given = (learning, self.reference.latents, self.reference.conditions, self.objective.iterations)
            self.blocks = Reconstruction(self.rollout, self.clock, *given, partial(self._batch, stream=3))
        rates = self.objective.learning_rates.model_dump()
        layerwise = [
            {
                "params": [parameter],
                "lr": rates[kind] * (1.0 if kind == "forecast" else self.layers[name].step_unit(kind)),
            }
            for kind, parameters in self.parameters.items()
            for name, parameter in parameters.items()
        ]
        self.rates = [float(group["lr"]) for group in layerwise]
        self.optimizer = torch.optim.Adam(layerwise or [{"params": []}], betas=ADAM_BETAS, eps=1e-15)
        self.drifted: Tensor | None = None  # latents of the quantized trajectory, for inputs: quantized

    @property
    def updates(self) -> int:
        return self.blocks.updates if self.blocks is not None else self.objective.iterations

    def run(self, state: Path | None = None, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Make the remaining updates; with ``state``, save there now and then and when interrupted."""
        if not self.parameters:
            return
        if self.cache is None:
            self._run(state, progress)
            return
        with cached(self.rollout.denoiser, self.cache, self.learned or self.fitted) as self.controller:
            self._run(state, progress)

    def _begin_cached(self, cache: CachePlan) -> None:
        """Where the full steps are; and weights for the forecasts at the others."""
        lengths: dict[float, dict[str, float]] = {}

        def note(module: str, forecast: Tensor, last: Tensor) -> Tensor:
            relative = float((forecast - last).norm() / last.norm().clamp_min(1e-20))
            lengths.setdefault(controller.timestep, {})[module] = min(max(relative, LEAST_UNIT), 1.0)
            return forecast

        with cached(self.rollout.denoiser, cache, self.fitted) as controller:
            controller.weigh = note
            self.rollout.trajectory(self.reference.conditions.take(self._batch(0)))
            self.full_steps = controller.stats().full_steps
        if "forecast" in self.objective.learn:
            skipped = [i for i in range(self.rollout.num_steps) if i not in self.full_steps]
            if not skipped:
                raise RecipeError("objective.cached_learn: 'forecast' is learned at skipped steps, and all are full")
            timesteps = [float(self.rollout.timesteps[i]) for i in skipped]
            noise = self.fitted.noise if self.fitted is not None else None
            learned = Fitted(learned_timesteps=timesteps, learned_modules=controller.modules, noise=noise)
            for k in range(1, len(skipped)):  # those of a gap learn as one: fewer numbers, and less noise in each
                if skipped[k] == skipped[k - 1] + 1:
                    learned.learned[k] = learned.learned[k - 1]
            # a share of the last output weighs as many times more than one of its change as the output is longer
            units = torch.tensor([[lengths[t][module] for module in controller.modules] for t in timesteps])
            learned.units = list(units.to(self.reference.latents.device))
            self.learned = learned.to(self.reference.latents.device)
            self.cache = replace(cache, learned=True)

    def _run(self, state: Path | None, progress: Callable[[dict[str, Any]], None] | None) -> None:
        saved = time.monotonic()
        try:
            while len(self.history) < self.updates:
                entry = self._update(len(self.history))
                self.history.append(entry)
                self.stepping = False
                if progress is not None:
                    progress(entry)
                if state is not None and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    self.save(state)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if state is not None and not self.stepping:  # in the middle of a step nothing whole is there to be saved
                self.save(state)
            raise

    def _update(self, iteration: int) -> dict[str, Any]:
        started = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        if self.blocks is None:
            position = iteration
            entry, loss, what = self._follow_trajectory(iteration)
        else:
            index, position = self.blocks.place(iteration)
            loss = self.blocks.gradient(iteration, self._one_of)
            self.network_evaluations = self.blocks.evaluations(iteration + 1)
            entry, what = {"block": self.blocks.blocks[index]}, self.blocks.blocks[index]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of update {iteration} ({what}) is {loss}; "
                "lower objective.learning_rates or start from quantization.initialization: mse"
            )
        done = position / self.objective.iterations
        self._regularise(done)
        decay = 0.5 * (1 + math.cos(math.pi * done))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * decay
        self.stepping = True
        self.optimizer.step()
        self.seconds += time.monotonic() - started
        return {
            "iteration": iteration,
            "loss": loss,
            **entry,
            "network_evaluations": self.network_evaluations,
            "seconds": round(self.seconds, 3),
        }

    def _follow_trajectory(self, iteration: int) -> tuple[dict[str, Any], float, str]:
        """Add the gradient of one group of steps."""
        start, stop = self._group(iteration)
        batch = self._batch(iteration)
        if self.objective.inputs == "quantized" and self.cache is None:
            self._refresh(iteration)
        drifted = None if self.drifted is None else self.drifted[start][batch]
        loss = self._gradient(self.reference.take(batch), start, stop, drifted)
        return {"steps_per_group": stop - start}, loss, f"steps {start} to {stop - 1}"

    def _gradient(self, reference: Reference, start: int, stop: int, initial: Tensor | None) -> float:
        """Add the group's gradient to the parameters', with the cache where there is one; returns the loss."""
        how: dict[str, Any] = {
            "gradient": self.objective.gradient,
            "loss": self.objective.loss,
            "variances": self.reference.variances,
        }
        group = (self.rollout.solver, reference.latents, reference.predictions, start, stop)
        if self.cache is not None:
            steps = CachedSteps(self.rollout, self.controller, reference.conditions, self.full_steps)
            loss = cached_group_gradient(steps, *group, self.full_steps, **how)
            self.network_evaluations += steps.full_evaluations
            return loss

        def denoise(i: int, x: Tensor) -> Tensor:
            self.network_evaluations += 1
            return self.rollout.predict(i, x, reference.conditions)

        return group_gradient(denoise, *group, initial=initial, **how)

    def _group(self, iteration: int) -> tuple[int, int]:
        """Groups in random order, each once before any comes again; M = 1 during the warm-up."""
        warm = iteration < self.objective.warmup_fraction * self.objective.iterations
        length = 1 if warm else self.steps_per_group
        num_steps = self.rollout.num_steps
        cut = groups(num_steps, length) if self.cache is None else cached_groups(self.full_steps, num_steps, length)
        return cut[self._one_of(iteration, len(cut))]

    def _one_of(self, iteration: int, count: int) -> int:
        """In random order, each once before any comes again."""
        epoch, position = divmod(iteration, count)
        return int(torch.randperm(count, generator=self._generator(1, epoch))[position])

    def _batch(self, iteration: int, stream: int = 2) -> Tensor:
        total = len(self.reference.conditions)
        chosen = torch.randperm(total, generator=self._generator(stream, iteration))[: self.objective.batch_size]
        return chosen.to(self.reference.latents.device)

    def _generator(self, stream: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 4 + stream) * 10_000_019 + number)

    def _refresh(self, iteration: int) -> None:
        """Sample the calibration set with the model as it is now."""
        if self.drifted is None or iteration % max(1, self.objective.iterations // REFRESHES) == 0:
            parts = []
            for conditions in self.reference.conditions.batches(self.objective.batch_size):
                parts.append(self.rollout.trajectory(conditions)[0])
            # a batch's step costs what an update's evaluation costs
            self.network_evaluations += self.rollout.num_steps * len(parts)
            self.drifted = torch.cat(parts, 1)

    def _regularise(self, done: float) -> None:
        """AdaRound's term for what has a gradient, ``done`` of the way to the end of its updates."""
        logits = {k: v for k, v in self.parameters.get("rounding", {}).items() if v.grad is not None}
        beta = rounding.annealed_beta(done)
        if logits and beta is not None:
            (ROUNDING_WEIGHT * torch.stack([rounding.regulariser(v, beta) for v in logits.values()]).mean()).backward()

    def _choose_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Kind -> layer name -> parameter; everything else is frozen."""
        for parameter in self.rollout.denoiser.parameters():
            parameter.requires_grad_(False)
        chosen: dict[str, dict[str, nn.Parameter]] = {}
        kinds: tuple[str, ...] = self.objective.learn  # of updates with the cache on: with forecast
        for kind in kinds:
            if kind == "forecast":
                assert self.learned is not None  # the recipe asks for it with a cache only
                found = dict(self.learned.learned.named_parameters())
            else:
                found = dict[str, nn.Parameter]()
                for name, layer in self.layers.items():
                    learned = layer.learnable(kind)
                    if learned is not None and all(learned is not other for other in found.values()):
                        found[name] = learned  # shared scales are one
            if not found and self.objective.iterations:
                key = "learn" if self.cache is None else "cached_learn"
                raise RecipeError(f"objective.{key}: {kind!r} names no parameter of any tuned module; take it out")
            chosen[kind] = found
        for parameters in chosen.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        return chosen

    def save(self, path: Path) -> None:
        """Write parameters, optimizer moments and history; the file is replaced when it is whole."""
        tensors: dict[str, Tensor] = {}
        for kind, parameters in self.parameters.items():
            for name, parameter in parameters.items():
                tensors[f"{kind}/{name}/value"] = parameter.detach()
                for moment, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{kind}/{name}/{moment}"] = value
        if self.drifted is not None:
            tensors["drifted"] = self.drifted
        about = {
            "history": self.history,
            # of whole updates
            "network_evaluations": self.history[-1]["network_evaluations"] if self.history else 0,
            "seconds": self.seconds,
            "steps_per_group": self.steps_per_group,
        }
        write_tensors(path, tensors, {"tuner": json.dumps(about)})

    def load(self, path: Path) -> None:
        """Continue where `save` was.

        Raises:
            RecipeError: the file belongs to another recipe (its tensors do not fit).
        """
        device = self.reference.latents.device
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads(file.metadata()["tuner"])
            keys = set(file.keys())
            for kind, parameters in self.parameters.items():
                for name, parameter in parameters.items():
                    base = f"{kind}/{name}/"
                    if base + "value" not in keys or file.get_tensor(base + "value").shape != parameter.shape:
                        raise RecipeError(f"{path} does not fit this recipe ({base[:-1]}); start over with --overwrite")
                    parameter.data.copy_(file.get_tensor(base + "value"))
                    moments = [k for k in keys if k.startswith(base) and k != base + "value"]
                    if moments:
                        # Adam keeps its step counter on the CPU
                        self.optimizer.state[parameter] = {
                            k.removeprefix(base): t.cpu() if (t := file.get_tensor(k)).dim() == 0 else t
                            for k in moments
                        }
            self.drifted = file.get_tensor("drifted") if "drifted" in keys else None
        self.history = about["history"]
        self.network_evaluations, self.seconds = about["network_evaluations"], about["seconds"]
        self.steps_per_group = about["steps_per_group"]
