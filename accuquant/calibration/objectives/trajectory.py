"""AccuQuant: groups of M denoising steps, run in the quantized model and compared with full precision at their ends."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor

from accuquant.calibration.objectives.base import Cost, GradientSource, Job, Material
from accuquant.calibration.reference import states_of
from accuquant.core.trajectory import State, group_gradient, groups

REFRESHES = 3  # how often inputs from the quantized trajectory are sampled anew


@final
class Trajectory(GradientSource):
    """Gradients of `core.trajectory`, one group of steps an update; M = 1 during the warm-up.

    With ``inputs: quantized`` groups start from latents that the quantized model was at, sampled again now and then.
    """

    # the more steps an update simulates, the fewer updates there are for the same cost: each then has to go further
    trials: ClassVar = ((1, 1.0), (2, 2.0), (5, 3.0), (10, 5.0))

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.drifted: list[list[State]] = []  # of each tape, along the quantized trajectory

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
        tape = of.tape(update)
        if of.objective.inputs == "quantized":
            self._refresh(update)

        def step(i: int, state: State) -> State:
            self.network_evaluations += 1
            return tape.step(i, state)

        loss = group_gradient(
            step,
            states_of(tape),
            start,
            stop,
            gradient=of.objective.gradient,
            loss=of.objective.loss,
            scale=self.scale,
            variances=of.reference.variances[len(tape)] if of.objective.gradient == "variance" else None,
            initial=self.drifted[of.draws.tape(update)][start] if self.drifted else None,
        )
        self.scaled_back(self.scale)
        return loss, {"steps_per_group": stop - start}

    def where(self, update: int) -> str:
        start, stop = self._group(update)
        return f"steps {start} to {stop - 1}"

    def state(self) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for k, states in enumerate(self.drifted):
            for i, state in enumerate(states):
                found |= {f"drifted/{k}/{i}/{n}": tensor for n, tensor in enumerate(state.tensors)}
        # a solver keeps a tensor in several states, and a file holds none twice
        return {name: tensor.clone() for name, tensor in found.items()}

    def resume(self, update: int, network_evaluations: int, state: dict[str, Tensor]) -> None:
        super().resume(update, network_evaluations, state)
        if state:
            self.drifted = [
                [
                    State(*(tuple(state[f"drifted/{k}/{i}/{n}"] for n in numbers) for numbers in _numbers(recorded)))
                    for i, recorded in enumerate(states_of(tape))
                ]
                for k, tape in enumerate(self.material.reference.tapes)
            ]

    def _group(self, update: int) -> tuple[int, int]:
        """Groups in random order, each once before any comes again."""
        of = self.material
        warm = update < of.objective.warmup_fraction * of.objective.iterations
        cut = groups(len(of.tape(update)), 1 if warm else of.steps_per_group)
        return cut[of.draws.one_of(update, len(cut))]

    def _refresh(self, update: int) -> None:
        """Sample the calibration set with the model as it is now."""
        of = self.material
        if not self.drifted or update % max(1, of.objective.iterations // REFRESHES) == 0:
            self.drifted = [tape.rolled() for tape in of.reference.tapes]
            self.network_evaluations += sum(map(len, of.reference.tapes))


def _numbers(state: State) -> tuple[range, range]:
    """Where latents and history are among a state's tensors."""
    return range(len(state.latents)), range(len(state.latents), len(state.tensors))
