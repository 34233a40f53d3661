"""The state of a feature cache: counts the steps of a trajectory, decides which are full, keeps the modules' memories.

It learns of every call of the denoiser, in pipelines that name their calls (`cache_context`) and in those that do not:

- a timestep against the trajectory's direction (most fall, Mochi's rise), another batch size, or another latent at the
  first timestep begins a new trajectory;
- without named contexts, calls at one timestep with the same latent are the calls of guidance, told apart by order;
- a later timestep that is called again with another latent is a step of its own (Heun, PNDM). Guidance whose two calls
  have different latents has to name them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accuquant.core.forecasts import Memory
from accuquant.core.schedule import RCS, interval_is_full
from accuquant.errors import CacheError
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.stats import CacheStats, Trace
from accuquant.runtime.observe import Call


class Controller:
    """The state that all hooks of one denoiser share.

    Args:
        modules: names of the cached ones, whose outputs are forecast.
        bypassed: names of those that need not run at skipped steps because only cached ones read them.
        begins: cached block -> the block at whose input begins the deviation that is forecast.
        noise: of each cached module, where the plan's forecasts know it.
    """

    def __init__(
        self,
        plan: CachePlan,
        modules: tuple[str, ...],
        bypassed: tuple[str, ...] = (),
        begins: dict[str, str] | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.plan, self.modules, self.bypassed, self.begins = plan, modules, bypassed, begins or {}
        self.forecasts = {module: plan.forecast(module, (noise or {}).get(module)) for module in modules}
        self.last = Trace()
        self.driven = self.follows_calls = self.paused = False
        self.fitted: Fitted | None = None  # what `correct` and `weigh` take theirs from
        self.correct: Callable[[str, Tensor, bool], Tensor] | None = None  # module, output, whether it was computed
        self.weigh: Callable[[str, Tensor, Tensor], Tensor] | None = None  # module, forecast, last output
        self.see: Callable[[str, tuple[Tensor, ...], Any], None] | None = None  # module, inputs, what it computed
        order = max(1, plan.order)
        self.rcs = RCS(plan.tau, order, plan.warmup, plan.max_gap) if plan.tau is not None else None
        self._forget()

    def reset(self) -> None:
        """Begin a new trajectory; the record of the last one stays for `stats`."""
        if self.step >= 0:
            self.last = self.trace
        self._forget()

    def _forget(self) -> None:
        self.step, self.timestep, self.batch, self.direction = -1, 0.0, 0, 0.0
        self.nbytes = 0
        self.context, self.calls, self.calls_before = "", list[str](), 0
        self.named = self.forced = False
        self.full: bool | None = None
        self.latent: Tensor | None = None
        self.memories: dict[tuple[str, str], tuple[Memory | None, ...]] = {}
        self.tapped: dict[str, Tensor] = {}
        self.timesteps_done = 0  # of the listed full timesteps after the first
        self.trace = Trace()
        if self.rcs is not None:
            self.rcs.reset()

    def enter(self, name: str | None, timestep: float, latent: Tensor) -> None:
        """The denoiser is called."""
        if self.driven and self.follows_calls:
            self.context = name or f"call {len(self.calls)}"
            self.calls.append(self.context)
        if self.driven or self.paused:
            return
        same, moved = self.step >= 0 and timestep == self.timestep, timestep - self.timestep
        repeated = name in self.calls if name else self.latent is not None and not _equal(self.latent, latent)
        again = same and bool(repeated)
        turned = moved * self.direction < 0
        if turned or (again and self.step == 0) or (not same and self.batch not in (0, len(latent))):
            self.reset()
        elif self.step == 0 and not same:
            self.direction = moved
        same = same and not again and self.step >= 0
        self.named = name is not None
        if not same:
            self._next_step(timestep, len(latent))
        self.context = name or f"call {len(self.calls)}"
        self.calls.append(self.context)
        self.latent = latent.clone()  # a loop may write the next latent into the same tensor

    def drive(
        self,
        context: str | None,
        step: int,
        timestep: float,
        full: bool,
        memories: dict[tuple[str, str], tuple[Memory | None, ...]],
    ) -> None:
        """Have the next calls be this step, full or not, from these memories; new ones keep their graph.

        Args:
            context: of all calls; None tells them apart by the names that they have, or by their order.
        """
        self.driven, self.step, self.timestep, self.full = True, step, timestep, full
        self.follows_calls, self.context, self.calls = context is None, context or "", []
        self.memories = dict(memories)
        self.trace.full = [full]

    def _next_step(self, timestep: float, batch: int) -> None:
        before, now = self.calls_before, len(self.calls)
        if self.step + 1 == self.plan.num_inference_steps:
            raise CacheError(f"cache.num_inference_steps is {self.step + 1}, and a step more was sampled; correct it")
        self.step, self.timestep, self.batch, self.forced = self.step + 1, timestep, batch, False
        self.full = self._scheduled(timestep)
        # Unnamed calls at the first timestep may have been a trajectory that was aborted right there: two calls are
        # believed to be guidance only when the second step has two as well.
        if not self.named and self.step == 1 and now > 1:
            self.forced = True
        if not self.named and self.step >= 2 and now != before:
            self.memories = {key: _restarted(m) for key, m in self.memories.items() if key[0] in self.calls}
            self.nbytes = sum(m.nbytes() for ms in self.memories.values() for m in ms if m)
            self.forced = True
        if self.forced and self.rcs is None:
            self.full = True
        self.calls_before, self.calls = now, []
        self.trace.full.append(bool(self.full))

    def _scheduled(self, timestep: float) -> bool | None:
        """None where RCS decides, once the watched input is known."""
        plan, step = self.plan, self.step
        if self.rcs is not None:
            return None
        if plan.full_steps is not None:
            return step in plan.full_steps
        if plan.full_timesteps is not None:  # at the first step at or below each listed value, or as soon as may be
            due = sum(t >= timestep for t in plan.full_timesteps[1:]) > self.timesteps_done
            self.timesteps_done += due and step > 0
            return step == 0 or due
        assert plan.interval is not None
        return interval_is_full(step, plan.interval, plan.warmup, plan.offset)

    def computes(self, module: str, input: Tensor) -> bool:
        """Whether this module is computed now; the first question in a step is what RCS answers by its input."""
        if self.full is None:
            assert self.rcs is not None
            self.full = self.rcs.is_full(self.step, input, self.forced)
            self.trace.input_errors.append(self.rcs.history[-1])
            self.trace.full[-1] = self.full
        known = (self.context, module) in self.memories
        if not known:
            self.trace.full[-1] = True
        return self.full or not known

    def corrected(self, module: str, output: Any) -> Any:
        """What a full step computed; the first of several outputs is the one that is corrected."""
        if self.correct is None:
            return output
        if isinstance(output, tuple):
            return (self.correct(module, output[0], True), *output[1:])
        return self.correct(module, output, True)

    def features(self, seen: dict[str, Call]) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output of every cached module as forecasts know them, from the calls of the modules themselves."""
        found = {}
        for module in self.modules:
            first, output = seen[self.begins.get(module, module)].input, seen[module].output
            found[module] = (first, output - first if module in self.begins else output)
        return found

    def remember(self, module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
        if self.see is not None:
            self.see(module, inputs, output)
        key, tensors = (self.context, module), output if isinstance(output, tuple) else (output,)
        old = self.memories.get(key) or (None,) * len(tensors)
        self.nbytes -= sum(memory.nbytes() for memory in old if memory)
        memories = list[Memory | None]()
        for i, (memory, tensor) in enumerate(zip(old, tensors, strict=True)):
            if not isinstance(tensor, Tensor):
                memories.append(None)
                continue
            memory = memory if memory and memory.factors[0].shape == tensor.shape else None
            stored, input = self._stored(tensor), self._stored(inputs[min(i, len(inputs) - 1)])
            memories.append(self.forecasts[module].update(memory, self.step, stored, input))
        self.memories[key] = tuple(memories)
        self.nbytes += sum(memory.nbytes() for memory in memories if memory)
        watched = self.rcs.memory.nbytes() if self.rcs is not None and self.rcs.memory is not None else 0
        self.trace.nbytes = max(self.trace.nbytes, self.nbytes + watched)
        if self.plan.num_inference_steps == self.step + 1:
            del self.memories[key]  # before the decoder needs the room

    def predict(self, module: str, inputs: tuple[Tensor, ...]) -> Any:
        key, outputs = (self.context, module), list[Tensor | None]()
        for i, memory in enumerate(self.memories[key]):
            if memory is None:
                outputs.append(None)
                continue
            input = inputs[min(i, len(inputs) - 1)]
            output = self.forecasts[module].predict(memory, self.step, self._stored(input))
            if self.weigh is not None:
                output = self.weigh(module, output, memory.factors[0])
            output = output.to(input.device, input.dtype)
            outputs.append(output if self.correct is None or i > 0 else self.correct(module, output, False))
        if self.plan.num_inference_steps == self.step + 1:
            del self.memories[key]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = getattr(torch, self.plan.factors_dtype) if self.plan.factors_dtype else tensor.dtype
        tensor = tensor if self.driven else tensor.detach()
        return tensor.to(self.plan.factors_device or tensor.device, dtype)

    def stats(self) -> CacheStats:
        trace = self.trace if self.step >= 0 else self.last
        full = tuple(i for i, computed in enumerate(trace.full) if computed)
        return CacheStats(full, len(trace.full), trace.nbytes, tuple(trace.input_errors), self.modules)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _restarted(memories: tuple[Memory | None, ...]) -> tuple[Memory | None, ...]:
    return tuple(memory.restart() if memory else None for memory in memories)
