"""The loop of calibration: gradient, regulariser, optimizer step, record, save; and how an interrupted run goes on.

Where gradients come from is `calibration.objectives`' business. Everything random is drawn from (seed, update number),
so a run that resumes at update n does what it would have done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from accuquant.calibration.layers import Trainable
from accuquant.calibration.objectives import OBJECTIVES, WITH_CACHE
from accuquant.calibration.objectives.base import Material, Parameters
from accuquant.calibration.reference import Draws, Reference
from accuquant.core import rounding
from accuquant.errors import RecipeError
from accuquant.files import write_tensors
from accuquant.pipeline.denoisers import Denoiser
from accuquant.recipe import Objective
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan

SAVE_EVERY_SECONDS = 20.0
ROUNDING_WEIGHT = 0.01  # of AdaRound's regulariser against the normalised group loss
ADAM_BETAS = (0.9, 0.99)
SAVED_AS = "calibration"  # metadata of the state's file


class UpdateLoop:
    """Calibrates the trainable layers of denoisers against a reference.

    Args:
        timestep_groups: of each step.
        layers: those that are tuned.
        steps_per_group: M, decided.
        cache: on during the updates; groups then begin at its full steps, and only those count as evaluations.
        fitted: what the cache's forecasts know, such as the noise.

    Attributes:
        source: where gradients come from.
        history: one entry an update: iteration, loss, steps_per_group (or block), network_evaluations so far, seconds.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        timestep_groups: list[int],
        layers: dict[str, Trainable],
        reference: Reference,
        objective: Objective,
        seed: int = 0,
        steps_per_group: int = 1,
        cache: CachePlan | None = None,
        fitted: Fitted | None = None,
    ) -> None:
        self.layers, self.objective, self.cache = layers, objective, cache
        self.steps_per_group, self.device = steps_per_group, reference.tapes[0].state(0).latents[0].device
        for one in denoisers:
            one.network.requires_grad_(False)
        given = (reference, self._of_layers(), objective, steps_per_group, Draws(seed, len(reference.tapes)))
        of = Material(denoisers, timestep_groups, *given, cache, fitted)
        self.source = (OBJECTIVES[objective.target] if cache is None else WITH_CACHE)(of)
        self.parameters = self.source.parameters
        for parameters in self.parameters.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        rates = objective.learning_rates.model_dump()
        layerwise = [
            {
                "params": [parameter],
                "lr": rates[kind] * (1.0 if kind == "forecast" else layers[name].step_unit(kind)),
            }
            for kind, parameters in self.parameters.items()
            for name, parameter in parameters.items()
        ]
        self.rates = [float(group["lr"]) for group in layerwise]
        self.optimizer = torch.optim.Adam(layerwise or [{"params": []}], betas=ADAM_BETAS, eps=1e-15)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.stepping = False

    @property
    def updates(self) -> int:
        return self.source.updates

    @property
    def network_evaluations(self) -> int:
        """Denoising steps that the network was evaluated for so far."""
        return self.source.network_evaluations

    def run(self, state: Path | None = None, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Make the remaining updates; with ``state``, save there now and then and when interrupted."""
        if not self.parameters:
            return
        saved = time.monotonic()
        with self.source.running():
            try:
                while len(self.history) < self.updates:
                    entry = self.update(len(self.history))
                    self.history.append(entry)
                    self.stepping = False
                    if progress is not None:
                        progress(entry)
                    if state is not None and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                        self.save(state)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                if state is not None and not self.stepping:  # in the middle of a step nothing whole is there to save
                    self.save(state)
                raise

    def update(self, iteration: int) -> dict[str, Any]:
        """Make one update; returns its entry of the history."""
        started = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        loss, entry = self.source.gradient(iteration)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of update {iteration} ({self.source.where(iteration)}) is {loss}; "
                "lower objective.learning_rates or start from quantization.initialization: mse"
            )
        done = self.source.done(iteration)
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

    def _regularise(self, done: float) -> None:
        """AdaRound's term for what has a gradient, ``done`` of the way to the end of its updates."""
        logits = {k: v for k, v in self.parameters.get("rounding", {}).items() if v.grad is not None}
        beta = rounding.annealed_beta(done)
        if logits and beta is not None:
            (ROUNDING_WEIGHT * torch.stack([rounding.regulariser(v, beta) for v in logits.values()]).mean()).backward()

    def _of_layers(self) -> Parameters:
        """What the layers learn; shared scales are one."""
        chosen: Parameters = {}
        kinds: tuple[str, ...] = self.objective.learn  # of updates with the cache on: with forecast
        for kind in kinds:
            if kind == "forecast":  # the cache's
                continue
            found = dict[str, nn.Parameter]()
            for name, layer in self.layers.items():
                learned = layer.learnable(kind)
                if learned is not None and all(learned is not other for other in found.values()):
                    found[name] = learned
            if not found and self.objective.iterations:
                key = "learn" if self.cache is None else "cached_learn"
                raise RecipeError(f"objective.{key}: {kind!r} names no parameter of any tuned module; take it out")
            chosen[kind] = found
        return chosen

    def save(self, path: Path) -> None:
        """Write parameters, optimizer moments and history; the file is replaced when it is whole."""
        tensors: dict[str, Tensor] = {f"source/{k}": t for k, t in self.source.state().items()}
        for kind, parameters in self.parameters.items():
            for name, parameter in parameters.items():
                tensors[f"{kind}/{name}/value"] = parameter.detach()
                for moment, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{kind}/{name}/{moment}"] = value
        about = {
            "history": self.history,
            # of whole updates
            "network_evaluations": self.history[-1]["network_evaluations"] if self.history else 0,
            "seconds": self.seconds,
        }
        write_tensors(path, tensors, {SAVED_AS: json.dumps(about)})

    def load(self, path: Path) -> None:
        """Continue where `save` was.

        Raises:
            RecipeError: the file belongs to another recipe (its tensors do not fit) or to another version.
        """
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            metadata = file.metadata() or {}
            if SAVED_AS not in metadata:
                raise RecipeError(f"{path} was written by another version; start over with --overwrite")
            about = json.loads(metadata[SAVED_AS])
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
            own = {k.removeprefix("source/"): file.get_tensor(k) for k in keys if k.startswith("source/")}
        self.history, self.seconds = about["history"], about["seconds"]
        self.source.resume(len(self.history), about["network_evaluations"], own)
