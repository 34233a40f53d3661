"""Single steps of a rollout under its cache, with the cache's state as tensors that can be differentiated."""

from __future__ import annotations

from torch import Tensor

from accuquant.core.cached_objective import State
from accuquant.core.forecasts import Memory
from accuquant.model.rollout import Conditions, Rollout
from accuquant.runtime.cache.controller import Controller

ALONE = "driven"  # the one context there is: guidance halves are in one batch


class CachedSteps:
    """The `CachedDenoiser` of `core.cached_objective`: a rollout whose denoiser has a cache on it.

    Args:
        full_steps: of the trajectory; they decide which gaps the forecasts bridge.
    """

    def __init__(
        self, rollout: Rollout, controller: Controller, conditions: Conditions, full_steps: tuple[int, ...]
    ) -> None:
        self.rollout, self.controller, self.conditions = rollout, controller, conditions
        self.full_steps, self.history = full_steps, controller.plan.highest_order
        self.full_evaluations = 0

    def full(self, i: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Guided prediction (B, C, H, W) of step i, and the cache's state after it."""
        self.full_evaluations += 1
        self.controller.drive(ALONE, i, float(self.rollout.timesteps[i]), True, self._memories(i, state))
        prediction = self.rollout.predict(i, x, self.conditions)
        return prediction, _state(self.controller)

    def skipped(self, i: int, x: Tensor, state: State) -> Tensor:
        """Guided prediction (B, C, H, W) of step i, its cached modules forecast."""
        self.controller.drive(ALONE, i, float(self.rollout.timesteps[i]), False, self._memories(i, state))
        return self.rollout.predict(i, x, self.conditions)

    def _memories(self, step: int, state: State) -> dict[tuple[str, str], tuple[Memory | None, ...]]:
        """The modules' memories, as they were after the last full step before ``step``."""
        steps = tuple(reversed([i for i in self.full_steps if i < step]))
        parts: dict[str, dict[int, dict[str, Tensor]]] = {}
        for (module, output, role), tensor in state.items():
            parts.setdefault(module, {}).setdefault(int(output), {})[role] = tensor
        memories: dict[tuple[str, str], tuple[Memory | None, ...]] = {}
        for module, outputs in parts.items():
            found: list[Memory | None] = [None] * (max(outputs) + 1)
            for index, roles in outputs.items():
                factors = tuple(roles[f"factor {j}"] for j in range(sum(role.startswith("factor") for role in roles)))
                found[index] = Memory(steps[: len(factors)], factors, roles.get("input"), roles.get("ratio"))
            memories[ALONE, module] = tuple(found)
        return memories


def _state(controller: Controller) -> State:
    state: State = {}
    for (_, module), memories in controller.memories.items():
        for index, memory in enumerate(memories):
            if memory is None:
                continue
            named = {f"factor {j}": factor for j, factor in enumerate(memory.factors)}
            named |= {k: t for k, t in (("input", memory.input), ("ratio", memory.ratio)) if t is not None}
            state |= {(module, str(index), role): tensor for role, tensor in named.items()}
    return state
