"""A feature cache's decisions: which steps of a trajectory are full, and what forecasts are made from at the others.

It learns of every call of the denoiser, in pipelines that name their calls (`cache_context`) and in those that do not.
What it knows belongs to the call of the pipeline that is running (`accuquant.runtime.calls`); outside of one:

- a timestep against the trajectory's direction (most fall, Mochi's rise), another batch size, or another latent at the
  first timestep begins a new trajectory;
- without named contexts, calls at one timestep with the same latent are the calls of guidance, told apart by order;
- a later timestep that is called again with another latent is a step of its own (Heun, PNDM). Guidance whose two calls
  have different latents has to name them.

As soon as the scheduler has made a step, its steps are those of the trajectory, whatever is called between them; back
at the first timestep the next one begins, as films are made piece by piece.

A call is forecast from calls of its own form only, that is with latents of one shape and the same flags: one that fills
a cache of keys and values is not like those that read it. A module that works several times in a call has a memory for
each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accuquant.core.forecasts import Memory
from accuquant.core.schedule import RCS, interval_is_full
from accuquant.errors import CacheError
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.share import Share
from accuquant.runtime.cache.state import Memories, State
from accuquant.runtime.cache.stats import CacheStats, Trace
from accuquant.runtime.calls import current_run
from accuquant.runtime.observe import Call

LEAST_SAVED = 0.5  # of a step's products, below which it is said


class Controller:
    """What all hooks of one denoiser share.

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
        self.last, self.paused = Trace(), False
        self.share: Share | None = None  # what counts the products of the call that is running
        self.saved: float | None = None
        self.fitted: Fitted | None = None  # what `correct` and `weigh` take theirs from
        self.correct: Callable[[str, Tensor, bool], Tensor] | None = None  # module, output, whether it was computed
        self.weigh: Callable[[str, Tensor, Tensor], Tensor] | None = None  # module, forecast, last output
        self.see: Callable[[str, tuple[Tensor, ...], Any], None] | None = None  # module, inputs, what it computed

    @property
    def state(self) -> State:
        """Of the run that this is asked in."""
        run = current_run()
        found: State | None = run.states.get(self)
        return self._fresh() if found is None else found

    def _fresh(self) -> State:
        plan, run = self.plan, current_run()
        rcs = None
        if plan.tau is not None:
            rcs = RCS(plan.tau, max(1, plan.order), plan.warmup, plan.max_gap)
        made = run.states[self] = State(rcs, run.scheduler_steps)
        return made

    def ended(self, state: State) -> None:
        """A trajectory is over; its record stays for `stats`."""
        if state.step >= 0:
            self.last = state.trace

    def reset(self) -> State:
        """Begin a new trajectory."""
        self.ended(self.state)
        return self._fresh()

    def enter(self, name: str | None, timestep: float, latent: Tensor, flags: str = "") -> None:
        """The denoiser is called; ``flags`` say what kind of a call it is."""
        state, run = self.state, current_run()
        if self.paused:
            return
        form = f"{tuple(latent.shape)}{flags}"
        if state.driven:
            state.begin_call(name or f"call {len(state.calls)}", form)
            return
        if run.is_call and state.sees_scheduler and state.is_back(timestep):
            state = self.reset()
        stepped = run.scheduler_steps > state.scheduler_steps[1]
        state.scheduler_steps = (state.scheduler_steps[0], run.scheduler_steps)
        moved = timestep - state.timestep
        if run.is_call and state.sees_scheduler:
            same = not stepped
            if len(latent) != state.batch and not same:
                self._other_batch(state)
        else:
            same = state.step >= 0 and moved == 0
            repeated = name in state.calls if name else state.latent is not None and not _equal(state.latent, latent)
            again = same and bool(repeated)
            other = not same and state.batch not in (0, len(latent))
            if state.turns(timestep) or (again and state.step == 0) or other:
                state = self.reset()
            same = same and not again and state.step >= 0
        state.named = name is not None
        if not same:
            self._next_step(state, timestep, len(latent))
        context = name if name and name not in state.calls else f"{name or 'call'} {len(state.calls)}"
        state.begin_call(context, form)
        state.latent = latent.clone()  # a loop may write the next latent into the same tensor

    def _other_batch(self, state: State) -> None:
        """Guidance was taken off or put on midway: what is known of the samples is of no use, and the step is full."""
        state.memories, state.nbytes, state.tapped, state.calls = {}, 0, {}, []
        if state.rcs is not None:
            state.rcs.memory = None

    def drive(self, step: int, timestep: float, full: bool, memories: Memories) -> None:
        """Have the next calls be this step, full or not, from these memories; new ones keep their graph."""
        state = self.state
        state.driven, state.step, state.timestep, state.full = True, step, timestep, full
        state.context, state.calls = "", []
        state.memories = dict(memories)
        state.trace.full = [full]

    def _next_step(self, state: State, timestep: float, batch: int) -> None:
        before, now = state.calls_before, len(state.calls)
        if state.step + 1 == self.plan.num_inference_steps:
            raise CacheError(f"cache.num_inference_steps is {state.step + 1}, and a step more was sampled; correct it")
        state.move_to(timestep)
        state.batch, state.forced = batch, False
        state.full = self._scheduled(state, timestep)
        # Unnamed calls at the first timestep may have been a trajectory that was aborted right there: two calls are
        # believed to be guidance only when the second step has two as well.
        believed = state.named or state.sees_scheduler
        if not believed and state.step == 1 and now > 1:
            state.forced = True
        if not believed and state.step >= 2 and now != before:
            state.memories = {key: _restarted(m) for key, m in state.memories.items() if key.context in state.calls}
            state.nbytes = sum(m.nbytes() for ms in state.memories.values() for m in ms if m)
            state.forced = True
        if state.forced and state.rcs is None:
            state.full = True
        state.calls_before, state.calls = now, []
        state.trace.full.append(bool(state.full))

    def _scheduled(self, state: State, timestep: float) -> bool | None:
        """None where RCS decides, once the watched input is known."""
        plan, step = self.plan, state.step
        if state.rcs is not None:
            return None
        if plan.full_steps is not None:
            return step in plan.full_steps
        if plan.full_timesteps is not None:  # at the first step at or below each listed value, or as soon as may be
            due = sum(t >= timestep for t in plan.full_timesteps[1:]) > state.listed_done
            state.listed_done += due and step > 0
            return step == 0 or due
        assert plan.interval is not None
        return interval_is_full(step, plan.interval, plan.warmup, plan.offset)

    def computes(self, module: str, input: Tensor) -> bool:
        """Whether this module is computed now; the first question in a step is what RCS answers by its input."""
        state = self.state
        if state.full is None:
            assert state.rcs is not None
            state.full = state.rcs.is_full(state.step, input, state.forced)
            state.trace.input_errors.append(state.rcs.history[-1])
            state.trace.full[-1] = state.full
        known = state.key(module) in state.memories
        if not known:
            state.trace.full[-1] = True
        return state.full or not known

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
        state = self.state
        key, tensors = state.key(module), output if isinstance(output, tuple) else (output,)
        old = state.memories.get(key) or (None,) * len(tensors)
        state.nbytes -= sum(memory.nbytes() for memory in old if memory)
        memories = list[Memory | None]()
        for i, (memory, tensor) in enumerate(zip(old, tensors, strict=True)):
            if not isinstance(tensor, Tensor):
                memories.append(None)
                continue
            memory = memory if memory and memory.factors[0].shape == tensor.shape else None
            stored, input = self._stored(tensor), self._stored(inputs[min(i, len(inputs) - 1)])
            memories.append(self.forecasts[module].update(memory, state.step, stored, input))
        state.memories[key] = tuple(memories)
        state.nbytes += sum(memory.nbytes() for memory in memories if memory)
        watched = state.rcs.memory.nbytes() if state.rcs is not None and state.rcs.memory is not None else 0
        state.trace.nbytes = max(state.trace.nbytes, state.nbytes + watched)
        state.count(module)
        if self.plan.num_inference_steps == state.step + 1:
            del state.memories[key]  # before the decoder needs the room

    def predict(self, module: str, inputs: tuple[Tensor, ...]) -> Any:
        state = self.state
        key, outputs = state.key(module), list[Tensor | None]()
        state.count(module)
        for i, memory in enumerate(state.memories[key]):
            if memory is None:
                outputs.append(None)
                continue
            input = inputs[min(i, len(inputs) - 1)]
            output = self.forecasts[module].predict(memory, state.step, self._stored(input))
            if self.weigh is not None:
                output = self.weigh(module, output, memory.factors[0])
            output = output.to(input.device, input.dtype)
            outputs.append(output if self.correct is None or i > 0 else self.correct(module, output, False))
        if self.plan.num_inference_steps == state.step + 1:
            del state.memories[key]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = getattr(torch, self.plan.factors_dtype) if self.plan.factors_dtype else tensor.dtype
        tensor = tensor if self.state.driven else tensor.detach()
        return tensor.to(self.plan.factors_device or tensor.device, dtype)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of what does not run at skipped steps."""
        return (*self.modules, *self.bypassed)

    def end_measuring(self) -> None:
        """What a skipped step saves is known, once the call that it is counted in is over."""
        if self.share is None:
            return
        self.saved, self.share = self.share.end(), None
        if self.saved is not None and self.saved < LEAST_SAVED:
            more = ". Name more as modules, or use feature: blocks" if self.plan.feature == "modules" else ""
            warnings.warn(
                f"a skipped step saves {self.saved:.0%} of the products of the denoiser's layers: most of them are "
                f"outside what is cached{more}",
                stacklevel=2,
            )

    def stats(self) -> CacheStats:
        self.end_measuring()
        state = self.state
        trace = state.trace if state.step >= 0 else self.last
        full = tuple(i for i, computed in enumerate(trace.full) if computed)
        return CacheStats(full, len(trace.full), trace.nbytes, tuple(trace.input_errors), self.modules, self.saved)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _restarted(memories: tuple[Memory | None, ...]) -> tuple[Memory | None, ...]:
    return tuple(memory.restart() if memory else None for memory in memories)
