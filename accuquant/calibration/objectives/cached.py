"""AccuQuant with a feature cache on: groups begin at full steps, and forecasts may learn as well as weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from accuquant.calibration.objectives.base import Cost, GradientSource, Job, Material
from accuquant.calibration.objectives.cached_steps import CachedSteps
from accuquant.calibration.reference import states_of
from accuquant.core.trajectory import cached_groups, group_gradient
from accuquant.errors import RecipeError
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted

LEAST_UNIT = 0.02  # of a forecast that is the last output itself, and of those near it
USUAL_INTERVAL = 4  # of full steps, where a dry run does not know them


@final
class CachedTrajectory(GradientSource):
    """Gradients of `core.trajectory`, features and all; only full steps count as evaluations.

    Attributes:
        cache: the material's; it uses weights for its forecasts where these learn.
        full_steps: that the cache computes.
        learned: what the forecasts know, with the weights that they learn; None where they learn none.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        assert material.cache is not None
        self.cache = material.cache
        self.learned: Fitted | None = None
        forecasts = "forecast" in material.objective.learn
        lengths: dict[float, dict[str, float]] = {}

        def note(module: str, forecast: Tensor, last: Tensor) -> Tensor:
            relative = float((forecast - last).norm() / last.norm().clamp_min(1e-20))
            lengths.setdefault(controller.state.timestep, {})[module] = min(max(relative, LEAST_UNIT), 1.0)
            return forecast

        with cached(material.network, self.cache, material.fitted) as controller:
            controller.weigh = note
            material.tape(0).rolled()
            self.full_steps = controller.stats().full_steps
        if forecasts:
            self.learned = self._forecast_weights(controller.modules, lengths)
            self.cache = replace(self.cache, learned=True)
            self.parameters = self.parameters | {"forecast": dict(self.learned.learned.named_parameters())}

    @classmethod
    def cost(cls, job: Job) -> Cost:
        """About: which steps are full, and so how many are in a group, is known when the cache has been found."""
        assert job.cache is not None
        nfc = job.cache.target_nfc or len(job.cache.full_steps or ())
        full = nfc or job.num_steps / (job.cache.interval or USUAL_INTERVAL)
        inside = max(1.0, full * job.steps_per_group / job.num_steps)  # rolled, and computed again
        return Cost(round(job.objective.iterations * 2 * inside))

    def gradient(self, update: int) -> tuple[float, dict[str, Any]]:
        of, (start, stop) = self.material, self._group(update)
        tape = of.tape(update)
        steps, reference = CachedSteps(tape, self.controller, of.levels, self.full_steps), states_of(tape)
        loss = group_gradient(
            steps,
            reference,
            start,
            stop,
            gradient=of.objective.gradient,
            loss=of.objective.loss,
            scale=self.scale,
            variances=of.reference.variances[len(tape)] if of.objective.gradient == "variance" else None,
            initial=steps.before(start, reference),
        )
        self.scaled_back(self.scale)
        self.network_evaluations += steps.full_evaluations
        return loss, {"steps_per_group": stop - start}

    def where(self, update: int) -> str:
        start, stop = self._group(update)
        return f"steps {start} to {stop - 1}"

    @contextmanager
    def running(self) -> Iterator[None]:
        fitted = self.learned or self.material.fitted
        with cached(self.material.network, self.cache, fitted) as self.controller:
            yield

    def _group(self, update: int) -> tuple[int, int]:
        """Groups in random order, each once before any comes again; M = 1 during the warm-up."""
        of = self.material
        warm = update < of.objective.warmup_fraction * of.objective.iterations
        cut = cached_groups(self.full_steps, of.num_steps, 1 if warm else of.steps_per_group)
        return cut[of.draws.one_of(update, len(cut))]

    def _forecast_weights(self, modules: tuple[str, ...], lengths: dict[float, dict[str, float]]) -> Fitted:
        """One weight a skipped step and module.

        Args:
            lengths: timestep -> module -> how far its forecast is from the last output, relative to that.
        """
        of = self.material
        skipped = [i for i in range(of.num_steps) if i not in self.full_steps]
        if not skipped:
            raise RecipeError("objective.cached_learn: 'forecast' is learned at skipped steps, and all are full")
        timesteps = [of.levels[i] for i in skipped]
        noise = of.fitted.noise if of.fitted is not None else None
        learned = Fitted(learned_timesteps=timesteps, learned_modules=modules, noise=noise)
        for k in range(1, len(skipped)):  # those of a gap learn as one: fewer numbers, and less noise in each
            if skipped[k] == skipped[k - 1] + 1:
                learned.learned[k] = learned.learned[k - 1]
        # a share of the last output weighs as many times more than one of its change as the output is longer
        units = torch.tensor([[lengths[t][module] for module in modules] for t in timesteps])
        device = of.tape(0).state(0).latents[0].device
        learned.units = list(units.to(device))
        return learned.to(device)
