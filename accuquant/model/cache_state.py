"""The state of a feature cache: counts the steps of a trajectory, decides which are full, keeps the modules' memories.

It learns of every call of the denoiser, in pipelines that name their calls (`cache_context`) and in those that do not:

- a timestep against the trajectory's direction (most fall, Mochi's rise), another batch size, or another latent at the
  first timestep begins a new trajectory;
- without named contexts, calls at one timestep with the same latent are the calls of guidance, told apart by order;
- a later timestep that is called again with another latent is a step of its own (Heun, PNDM). Guidance whose two calls
  have different latents has to name them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.correction import apply_affine
from accuquant.core.predictors import RFE, Forecast, Memory, NoiseAware, Reuse, Taylor, weighted
from accuquant.core.schedule import RCS, interval_is_full
from accuquant.recipe import Cache, RecipeError


class CacheError(RecipeError):
    """A cache that cannot be put on this model, is already there, or is not what its config says."""


@dataclass(frozen=True)
class CacheStats:
    """What the cache did in the last trajectory.

    Attributes:
        full_steps: steps computed in full, counted from 0; ``nfc`` is their number.
        num_steps: steps of the trajectory.
        nbytes: most bytes that factors, inputs and ratios took.
        input_errors: RCS's e of each step; empty with other schedules.
        modules: names of the cached modules.
    """

    full_steps: tuple[int, ...]
    num_steps: int
    nbytes: int
    input_errors: tuple[float, ...]
    modules: tuple[str, ...] = field(repr=False)

    @property
    def nfc(self) -> int:
        return len(self.full_steps)


@dataclass
class Trace:
    """Record of one trajectory."""

    full: list[bool] = field(default_factory=list)
    nbytes: int = 0
    input_errors: list[float] = field(default_factory=list)


class Shares(nn.ParameterList):
    """(M, 2) of each step. As forward gives it: offloading brings what a module holds when its forward is called."""

    def forward(self, step: int) -> Tensor:
        return self.get_parameter(str(step))


class Correction(nn.Module):
    """What calibration finds for a cache: a slope and an intercept of every channel of the cached modules' outputs, and
    how much a forecast takes of the last output and of its change. A step between the timesteps takes the nearest.

    Args:
        timesteps: S values, of skipped steps, whose forecasts are corrected.
        channels: of each cached module's output.
        full_timesteps: F values, of full steps, whose computed outputs are corrected.
        learned_timesteps: L values, of skipped steps, whose forecasts are weighted, before they are corrected.
        learned_modules: M names of those that are.
    """

    def __init__(
        self,
        timesteps: Sequence[float] = (),
        channels: dict[str, int] | None = None,
        full_timesteps: Sequence[float] = (),
        learned_timesteps: Sequence[float] = (),
        learned_modules: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.timesteps, self.full_timesteps = list(timesteps), list(full_timesteps)
        self.learned_timesteps, self.learned_modules = list(learned_timesteps), list(learned_modules)
        ones = torch.ones(len(learned_modules), 2)
        self.units: list[Tensor] | None = (
            None  # of the last output's weights, while they are learned: (M,) at each step
        )
        # one tensor a step, so that those of a gap can be one while they are learned
        self.learned = Shares(nn.Parameter(ones.clone(), requires_grad=False) for _ in learned_timesteps)
        rows = len(timesteps) + len(full_timesteps)
        for name, count in (channels or {}).items():
            identity = torch.stack([torch.ones(rows, count), torch.zeros(rows, count)], 1)
            self.register_parameter(name.replace(".", "/"), nn.Parameter(identity, requires_grad=False))

    def forward(self, module: str) -> Tensor:
        """(S + F, 2, C) of a module."""
        return self.get_parameter(module.replace(".", "/"))

    def correct(self, module: str, output: Tensor, timestep: float, computed: bool) -> Tensor:
        """A forecast, or with ``computed`` what a full step gave; as it is where nothing was fitted to its kind."""
        first, known = (len(self.timesteps), self.full_timesteps) if computed else (0, self.timesteps)
        if not known:
            return output
        return apply_affine(self(module)[first + _nearest(known, timestep)], output)

    def weigh(self, module: str, forecast: Tensor, last: Tensor, timestep: float) -> Tensor:
        """A forecast with the learned weights of ``last``, the output it begins from, and of its change."""
        step, index = _nearest(self.learned_timesteps, timestep), self.learned_modules.index(module)
        a, b = self.learned.forward(step)[index].unbind()
        if self.units is not None:
            a = 1 + self.units[step][index] * (a - 1)
        return weighted(forecast, last, a, b)

    @torch.no_grad()
    def settled(self) -> Correction:
        """Weights as they are stored: in no units, and those of each step for itself."""
        if self.units is not None:
            found = [weights.detach().clone() for weights in self.learned]
            for weights, unit in zip(found, self.units, strict=True):
                weights[:, 0] = 1 + unit * (weights[:, 0] - 1)
            self.learned = Shares(nn.Parameter(weights, requires_grad=False) for weights in found)
            self.units = None
        return self

    def named_in(self, config: Cache) -> Cache:
        """The config of a cache that has these learned weights."""
        names = {"learned_timesteps": tuple(self.learned_timesteps), "learned_modules": tuple(self.learned_modules)}
        return config.model_copy(update=names)

    def with_learned(self, other: Correction | None) -> Correction:
        """This one with the learned weights of another."""
        if other is not None:
            self.learned_timesteps, self.learned_modules = other.learned_timesteps, other.learned_modules
            self.learned = other.learned
        return self


class Controller:
    """The state that all hooks of one denoiser share.

    Args:
        modules: names of the cached ones, whose outputs are forecast.
        bypassed: names of those that need not run at skipped steps because only cached ones read them.
        begins: cached block -> the block at whose input begins the deviation that is forecast.
    """

    def __init__(
        self,
        config: Cache,
        modules: tuple[str, ...],
        bypassed: tuple[str, ...] = (),
        begins: dict[str, str] | None = None,
    ) -> None:
        self.config, self.modules, self.bypassed, self.begins = config, modules, bypassed, begins or {}
        self.forecasts = {module: forecast_of(config, module) for module in modules}
        self.last = Trace()
        self.driven = self.paused = False
        self.correct: Callable[[str, Tensor, bool], Tensor] | None = None  # module, output, whether it was computed
        self.weigh: Callable[[str, Tensor, Tensor], Tensor] | None = None  # module, forecast, last output
        order = max(1, config.forecast_order)
        self.rcs = RCS(config.tau, order, config.warmup, config.max_gap) if config.tau is not None else None
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
        context: str,
        step: int,
        timestep: float,
        full: bool,
        memories: dict[tuple[str, str], tuple[Memory | None, ...]],
    ) -> None:
        """Have the next calls be this step, full or not, from these memories; new ones keep their graph."""
        self.driven, self.context, self.step, self.timestep, self.full = True, context, step, timestep, full
        self.memories = dict(memories)
        self.trace.full = [full]

    def _next_step(self, timestep: float, batch: int) -> None:
        before, now = self.calls_before, len(self.calls)
        if self.step + 1 == self.config.num_inference_steps:
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
        config, step = self.config, self.step
        if self.rcs is not None:
            return None
        if config.full_steps is not None:
            return step in config.full_steps
        if config.full_timesteps is not None:  # at the first step at or below each listed value, or as soon as may be
            due = sum(t >= timestep for t in config.full_timesteps[1:]) > self.timesteps_done
            self.timesteps_done += due and step > 0
            return step == 0 or due
        assert config.interval is not None
        return interval_is_full(step, config.interval, config.warmup, config.offset)

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

    def features(self, seen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output of every cached module as forecasts know them, from those of the modules themselves."""
        found = {}
        for module in self.modules:
            first = seen[self.begins.get(module, module)][0]
            found[module] = (first, seen[module][1] - first if module in self.begins else seen[module][1])
        return found

    def remember(self, module: str, inputs: tuple[Tensor, ...], output: Any) -> None:
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
        if self.config.num_inference_steps == self.step + 1:
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
        if self.config.num_inference_steps == self.step + 1:
            del self.memories[key]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = getattr(torch, self.config.factors_dtype) if self.config.factors_dtype else tensor.dtype
        tensor = tensor if self.driven else tensor.detach()
        return tensor.to(self.config.factors_device or tensor.device, dtype)

    def stats(self) -> CacheStats:
        trace = self.trace if self.step >= 0 else self.last
        full = tuple(i for i, computed in enumerate(trace.full) if computed)
        return CacheStats(full, len(trace.full), trace.nbytes, tuple(trace.input_errors), self.modules)


def forecast_of(config: Cache, module: str) -> Forecast:
    """A module's forecast; with ``noise_aware`` each module has its own noise."""
    if config.noise_aware and config.estimation != "reuse":
        assert config.noise is not None
        own_out, own_in = config.noise[module]
        relational = config.estimation == "rfe"
        return NoiseAware(config.forecast_order, config.differences, config.norm, relational, own_out, own_in)
    if config.estimation == "reuse":
        return Reuse()
    if config.estimation == "taylor":
        return Taylor(config.forecast_order, config.differences)
    return RFE(config.forecast_order, config.differences, config.norm)


def _nearest(known: list[float], timestep: float) -> int:
    return min(range(len(known)), key=lambda i: abs(known[i] - timestep))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _restarted(memories: tuple[Memory | None, ...]) -> tuple[Memory | None, ...]:
    return tuple(memory.restart() if memory else None for memory in memories)
