"""Feature caching as diffusers hooks: attention and MLP of every block are computed at full steps and forecast between.

One `Controller` for each denoiser decides which steps are full. A hook on the denoiser tells it of every call; hooks on
the cached modules ask it whether to compute, so at the other steps nothing of attention and MLP runs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from accuquant.core.coordinate import USUAL, Coordinate
from accuquant.errors import CacheError
from accuquant.runtime.cache.controller import Controller
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.cache.share import Share, is_compiled
from accuquant.runtime.calls import calling_pipeline, current_run, follow
from accuquant.runtime.observe import by_name

HOOK = "accuquant_cache"
FITTED = "cache_correction"  # the denoiser's submodule that holds what was fitted, to be saved with the weights

NO_GRAPH = "a denoiser with a feature cache is no single graph: call accuquant.compile_cached in place of torch.compile"

_outside_graphs: Callable[[Any], Any] = torch.compiler.disable(reason=NO_GRAPH)
# what a hook calls is compiled all the same
_eager: Callable[[Any], Any] = torch.compiler.disable(recursive=False, reason=NO_GRAPH)


class Hook(ModelHook):
    """What ours have in common."""

    wrapper: Any = None  # the module's forward once the hook is on
    compiled: Any = None  # what computes in place of the module's own

    def __init__(self, controller: Controller, name: str = "") -> None:
        super().__init__()
        self.controller, self.name = controller, name

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled or self.fn_ref.original_forward)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        raise CacheError("a copy of a cached model would run the original's weights; call disable_cache before copying")


class Contexts(StateManager):
    """The name that a pipeline gives its next call of the denoiser; it belongs to the pipeline's own call."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        super().__init__(dict)

    @property
    def _context(self) -> Any:
        return self.controller.state.given_context

    @_context.setter
    def _context(self, context: Any) -> None:
        self.controller.state.given_context = context


class Calls(Hook):
    """On the denoiser: tells the controller of each call, and of a pipeline's reset.

    Calls are followed by a pre-hook of torch's: offloading puts back forward methods as it found them.

    Args:
        parts: what else is hooked, and how: a module may be replaced later, by one with an adapter around it.
        measures: what a skipped step saves, in the first call.
    """

    _is_stateful = True
    handle: Any = None  # of the pre-hook

    def __init__(self, controller: Controller, parts: dict[str, Callable[[], Hook]], measures: bool) -> None:
        super().__init__(controller)
        self.contexts, self.parts = Contexts(controller), parts
        self.hooked: dict[str, nn.Module] = {}
        self.measures = measures

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.names = list(inspect.signature(module.forward).parameters)
        self.coordinate = _coordinate(module, self.names, self.controller.plan)
        return module

    @_outside_graphs
    def follow(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = by_name(self.names, args, kwargs)
        level = self.coordinate.of(given.pop(self.coordinate.argument))
        latent = next(leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        self.controller.end_measuring()
        if self.measures:
            self.measures = False
            if not is_compiled(module) and all(hook_of(part).compiled is None for part in self.hooked.values()):  # type: ignore[union-attr]
                self.controller.share = Share(module, self.controller.skipped)
        begins = not current_run().is_call and self.controller.state.step < 0
        if begins and (pipeline := calling_pipeline()) is not None:
            follow(pipeline)  # its next call is known as one
        self.hook_parts(module)
        context = self.controller.state.given_context
        self.controller.enter(context.name if context else None, level, latent, _flags(given))

    def hook_parts(self, denoiser: nn.Module) -> None:
        """Have the hooks on the modules that are there now."""
        for name, make in self.parts.items():
            part, before = denoiser.get_submodule(name), self.hooked.get(name)
            if part is before:
                continue
            if before is not None:
                unhooked(before)
            hooked(part, make())
            self.hooked[name] = part

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline is done."""
        stats, order = self.controller.stats(), self.controller.plan.highest_order
        if self.controller.state.step >= 0 and stats.nfc <= order and stats.nfc < stats.num_steps:
            warnings.warn(
                f"order {order} needs {order + 1} full computations, this trajectory of {stats.num_steps} steps had "
                f"{stats.nfc}: a lower order was used. Lower order or interval",
                stacklevel=2,
            )
        self.controller.reset()
        return module


class Cached(Hook):
    """On a cached module: computes and remembers, or forecasts.

    Args:
        tap: name of the fused block whose normalised input stands for this module's own.
    """

    def __init__(self, controller: Controller, name: str, tap: str | None = None) -> None:
        super().__init__(controller, name)
        self.tap = tap

    @_eager
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.controller.paused:
            return self.compute(*args, **kwargs)
        inputs = _inputs(args, kwargs)
        if self.tap:
            inputs = (self.controller.state.tapped.pop(self.tap),)
        if not self.controller.computes(self.name, inputs[0]):
            return self.controller.predict(self.name, inputs)
        output = self.controller.corrected(self.name, self.compute(*args, **kwargs))
        self.controller.remember(self.name, inputs, output)
        return output


class Deviation(Hook):
    """On the last of a run of blocks: what they add to the hidden states is the feature (CacheQuant's DiT variant)."""

    @_eager
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.controller.paused:
            return self.compute(*args, **kwargs)
        hidden = _inputs(args, kwargs)[0]
        if not self.controller.computes(self.name, hidden):  # then the blocks before have passed their input on
            return hidden + self.controller.predict(self.name, (hidden,))
        output = self.compute(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise CacheError(f"feature: blocks: {self.name} gives {type(output).__name__}; use feature: modules")
        first = self.controller.state.tapped.pop(self.name, hidden)
        computed = output - first
        deviation = self.controller.corrected(self.name, computed)
        self.controller.remember(self.name, (first,), deviation)
        return output if deviation is computed else first + deviation


class Bypassed(Hook):
    """On a block that only the cached block ``feature`` reads: at skipped steps it passes its input on.

    Args:
        first: its input is where the feature's deviation begins.
    """

    def __init__(self, controller: Controller, feature: str, first: bool) -> None:
        super().__init__(controller, feature)
        self.first = first

    @_eager
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = _inputs(args, kwargs)[0]
        if self.controller.paused or self.controller.computes(self.name, hidden):
            if self.first:
                self.controller.state.tapped[self.name] = hidden
            return self.compute(*args, **kwargs)
        if hasattr(module, "downsamplers"):  # a U-Net counts what it is given for its skip connections
            return hidden, (hidden,) * (len(module.resnets) + len(module.downsamplers or ()))  # type: ignore[arg-type]
        return hidden


class Tap(Hook):
    """On the norm of the fused block ``name``: keeps its output, which is the input of attention and MLP both."""

    @_eager
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.controller.state.tapped[self.name] = output[0] if isinstance(output, tuple) else output
        return output


class Skipped(Hook):
    """On attention and MLP projection of the fused block ``name``: nothing is computed where proj_out is forecast."""

    @_eager
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tapped = self.controller.state.tapped[self.name]
        if self.controller.paused or self.controller.computes(f"{self.name}.proj_out", tapped):
            return self.compute(*args, **kwargs)
        inputs = _inputs(args, kwargs)
        if hasattr(module, "out_features"):  # right in shape, and never read
            return inputs[0].new_zeros(()).expand(*inputs[0].shape[:-1], int(module.out_features))  # type: ignore[arg-type]
        return inputs if len(inputs) > 1 else inputs[0]


def hook_of(module: nn.Module) -> Hook | None:
    registry = vars(module).get("_diffusers_hook")
    return registry.get_hook(HOOK) if registry is not None else None


def hooked(module: nn.Module, hook: Hook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    hook.wrapper = module.forward


def unhooked(module: nn.Module) -> None:
    """Take our hook off a module, if it has one."""
    if (hook := hook_of(module)) is None:
        return
    registry: Any = module._diffusers_hook
    if isinstance(hook, Calls):
        hook.handle.remove()
    outer, last = vars(module)["forward"], registry._hook_order[-1] == HOOK
    on_top = last and outer is not hook.wrapper and vars(module).get("_old_forward") is hook.wrapper
    registry.remove_hook(HOOK, recurse=False)
    if on_top:  # accelerate came later and called ours
        module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]
    elif last and outer is not hook.wrapper:  # ours is gone already: accelerate has put back what it had found
        module.forward = outer
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    if not registry.hooks:
        del module._diffusers_hook


def _coordinate(denoiser: nn.Module, names: list[str], plan: CachePlan) -> Coordinate:
    """What says a call's noise level: as calibration found it, or the argument that is usual.

    Listed levels below 0 are those of a model whose timestep rises.

    Raises:
        CacheError: no argument is.
    """
    if (clock := getattr(denoiser, "step_clock", None)) is not None:
        found: Coordinate = clock.coordinate
        return found
    usual = Coordinate.usual(names)
    if usual is None:
        raise CacheError(
            f"{type(denoiser).__name__}.forward has none of the arguments {', '.join(USUAL)}: nothing says which step "
            f"a call is of; its arguments are {', '.join(names)}"
        )
    return replace(usual, falls=not any(level < 0 for level in plan.full_timesteps or ()))


def _flags(given: dict[str, Any]) -> str:
    """What a call of the denoiser is told by words and booleans, also inside of what it is given."""
    leaves, _ = tree_flatten_with_path(given)
    return "".join(f" {keystr(path)}={leaf}" for path, leaf in leaves if isinstance(leaf, bool | str))


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """hidden_states and, of joint attention, encoder_hidden_states: the inputs of its two outputs."""
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    hidden = args[0] if args else kwargs.get("hidden_states", tensors[0] if tensors else None)
    other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return tuple(t for t in (hidden, other) if isinstance(t, Tensor))
