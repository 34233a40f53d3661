"""AccuQuant: groups of M denoising steps, run in the quantized model and compared with full precision at their ends."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from accuquant.calibration.objectives.base import Cost, GradientSource, Job, Material
from accuquant.core.objective import group_gradient, groups

REFRESHES = 3  # how often inputs from the quantized trajectory are sampled anew


@final
class Trajectory(GradientSource):
    """Gradients of `core.objective`, one group of steps an update; M = 1 during the warm-up.

    With ``inputs: quantized`` groups start from latents that the quantized model was at, sampled again now and then.
    """

    # the more steps an update simulates, the fewer updates there are for the same cost: each then has to go further
    trials: ClassVar = ((1, 1.0), (2, 2.0), (5, 3.0), (10, 5.0))

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.drifted: Tensor | None = None  # (T + 1, B, C, H, W) of the quantized trajectory

    @classmethod
    def cost(cls, job: Job) -> Cost:
        objective = job.objective
        if not objective.iterations:
            return Cost(0)
        cut = groups(job.num_steps, job.steps_per_group)
        warm = objective.warmup_fraction
        each = warm + (1 - warm) * sum(2 * (stop - start) - 1 for start, stop in cut) / len(cut)
        evaluations = round(objective.iterations * each)
        if objective.inputs == "quantized":
            every = max(1, objective.iterations // REFRESHES)
            evaluations += -(-objective.iterations // every) * job.num_steps * -(-job.num_samples // job.batch)
        return Cost(evaluations)

    def gradient(self, update: int) -> tuple[float, dict[str, Any]]:
        of, (start, stop) = self.material, self._group(update)
        batch = of.draws.batch(update)
        if of.objective.inputs == "quantized":
            self._refresh(update)
        reference = of.reference.take(batch)

        def denoise(i: int, x: Tensor) -> Tensor:
            self.network_evaluations += 1
            return of.rollout.predict(i, x, reference.conditions)

        loss = group_gradient(
            denoise,
            of.rollout.solver,
            reference.latents,
            reference.predictions,
            start,
            stop,
            gradient=of.objective.gradient,
            loss=of.objective.loss,
            variances=of.reference.variances,
            initial=None if self.drifted is None else self.drifted[start][batch],
        )
        return loss, {"steps_per_group": stop - start}

    def where(self, update: int) -> str:
        start, stop = self._group(update)
        return f"steps {start} to {stop - 1}"

    def state(self) -> dict[str, Tensor]:
        return {} if self.drifted is None else {"drifted": self.drifted}

    def resume(self, update: int, network_evaluations: int, state: dict[str, Tensor]) -> None:
        super().resume(update, network_evaluations, state)
        self.drifted = state.get("drifted")

    def _group(self, update: int) -> tuple[int, int]:
        """Groups in random order, each once before any comes again."""
        of = self.material
        warm = update < of.objective.warmup_fraction * of.objective.iterations
        cut = groups(of.rollout.num_steps, 1 if warm else of.steps_per_group)
        return cut[of.draws.one_of(update, len(cut))]

    def _refresh(self, update: int) -> None:
        """Sample the calibration set with the model as it is now."""
        of = self.material
        if self.drifted is None or update % max(1, of.objective.iterations // REFRESHES) == 0:
            parts = []
            for conditions in of.reference.conditions.batches(of.objective.batch_size):
                parts.append(of.rollout.trajectory(conditions)[0])
            # a batch's step costs what an update's evaluation costs
            self.network_evaluations += of.rollout.num_steps * len(parts)
            self.drifted = torch.cat(parts, 1)
