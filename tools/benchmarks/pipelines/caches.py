"""What a feature cache does on every pipeline class of the installed diffusers that can be built, see `sweep`.

Of each: without a cache, with one that is full at every step (equal), once more (equal: nothing is left of the call
before), with every second step forecast in each denoiser (other outputs of it, and finite ones), and with the cache
taken off again (equal). A denoiser that is called twice with the same arguments gives the same, also where the second
call is forecast: each feature is put where it was taken from. What share of the denoiser's products a skipped step
saves is counted.

Denoisers have random weights without zeros: dummy components often have layers that hide what their blocks give. Where
one makes fewer than two of four steps, as with a small strength, more are asked for.

    python -m tools.benchmarks.pipelines.caches CHECKOUT --out build/caches.jsonl      # goes on where it stopped
    python -m tools.benchmarks.pipelines.caches CHECKOUT --out build/caches.jsonl --table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from accuquant.caching.enable import cache_stats, denoisers_in, disable_cache, enable_cache
from accuquant.errors import CacheError
from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import cached
from tools.benchmarks.pipelines.parts import matters
from tools.benchmarks.pipelines.sweep import MORE_STEPS, STEPS, build, counts, short, sweep

FULL = Cache(estimation="taylor", order=1, interval=1)
HALF = Cache(estimation="taylor", order=1, interval=2, warmup=1)


@dataclass(frozen=True)
class Row:
    """What became of a class: ``right``, ``refused`` in our words, ``wrong``, ``failed``, or ``not built``.

    Attributes:
        nfc: full steps and all steps of each denoiser, with every second one forecast.
        saved: share of the denoiser's products, attention's among them, that a skipped step leaves out.
    """

    pipeline: str
    result: str
    reason: str = ""
    denoisers: tuple[str, ...] = ()
    modules: int = 0
    nfc: tuple[tuple[int, int], ...] = ()
    saved: tuple[float, ...] = ()


def tried(kind: Any, case: Any) -> Row:
    """The row of one class."""
    row = tried_in(STEPS, kind, case)
    few = row.result in ("right", "wrong") and any(steps < 2 for _, steps in row.nfc)
    return tried_in(MORE_STEPS, kind, case) if few else row


def tried_in(steps: int, kind: Any, case: Any) -> Row:
    name = kind.__name__
    try:
        pipeline, arguments = build(kind, case)
        denoisers = denoisers_in(pipeline)
        for part in denoisers.values():
            matters(part)

        def run() -> list[Tensor]:
            """All tensors that a call gives."""
            torch.manual_seed(0)
            with torch.no_grad():
                return tensors_of(pipeline(**arguments(steps)))

        plain = run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Row(name, "not built", short(error))
    if not finite(plain):
        return Row(name, "not built", "what it gives is not finite, without a cache")
    try:
        if not denoisers:
            enable_cache(pipeline, FULL)  # says why not
        return replace(judged(denoisers, plain, run), pipeline=name)
    except CacheError as error:
        return Row(name, "refused", short(error))
    except Exception as error:
        return Row(name, "failed", short(error))


def judged(denoisers: dict[str, nn.Module], plain: list[Tensor], run: Callable[[], list[Tensor]]) -> Row:
    if not same(plain, run()):
        return Row("", "failed", "two calls without a cache differ")
    for part in denoisers.values():
        enable_cache(part, FULL)
    once, again = run(), run()
    counted = [cache_stats(part) for part in denoisers.values()]
    for part in denoisers.values():
        disable_cache(part)
    wrong = [
        *(["full steps differ"] if not same(plain, once) else []),
        *(["a second call differs"] if not same(once, again) else []),
        *(["a step counted as skipped"] if any(s.nfc != s.num_steps for s in counted) else []),
    ]
    nfc, modules = list[tuple[int, int]](), 0
    for name, part in denoisers.items():
        with calls_of(part) as computed:
            run()
        enable_cache(part, HALF)
        with calls_of(part) as forecast:
            half = run()
        stats = cache_stats(part)
        nfc.append((stats.nfc, stats.num_steps))
        modules += len(stats.modules)
        disable_cache(part)
        outputs = [[output for _, output in calls] for calls in (computed, forecast)]
        wrong += [f"{name}: forecasts are not finite"] if not finite(half) or not finite(outputs[1]) else []
        if stats.num_steps > 1 and (stats.nfc == stats.num_steps or same(*outputs)):
            wrong.append(f"{name}: nothing was forecast")
        wrong += [f"{name}: the same call again is forecast as another"] if not repeats(part, computed) else []
    wrong += ["something is left of the cache"] if not same(plain, run()) else []
    saved = tuple(share for part in denoisers.values() for share in saved_products(part, run))
    return Row("", "wrong" if wrong else "right", "; ".join(wrong), tuple(denoisers), modules, tuple(nfc), saved)


def tensors_of(made: Any) -> list[Tensor]:
    leaves = tree_leaves(vars(made) if hasattr(made, "__dict__") else made)
    return [torch.as_tensor(leaf).double() for leaf in leaves if isinstance(leaf, Tensor) or hasattr(leaf, "dtype")]


Calls = list[tuple[Any, Tensor]]  # arguments, and the first tensor that they gave


@contextmanager
def calls_of(part: nn.Module) -> Iterator[Calls]:
    """The calls of a denoiser that give something, its arguments as they were before."""
    found, given = Calls(), list[Any]()

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(copied((args, kwargs)))

    def end(_: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        arguments, tensors = given.pop(), tensors_of(made)
        if tensors:
            found.append((arguments, tensors[0].clone()))

    handles = [part.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)]
    handles.append(part.register_forward_hook(end, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def copied(arguments: Any) -> Any:
    """With tensors and lists of its own: networks write into those, and take things out of these."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)


@torch.no_grad()
def repeats(part: nn.Module, calls: Calls) -> bool:
    """Whether the first call, forecast from itself, gives the same."""
    if not calls:
        return True

    def again() -> list[Tensor]:
        args, kwargs = copied(calls[0][0])
        return tensors_of(part(*args, **kwargs))

    with cached(part, HALF.changed(estimation="reuse", order=0)) as controller:
        controller.drive(0, 1.0, True, {})
        computed = again()
        controller.drive(1, 0.0, False, controller.state.memories)
        return same(computed, again())


def finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def saved_products(part: nn.Module, run: Callable[[], Any]) -> list[float]:
    """The share of a denoiser's products that a skipped step saves; none where torch cannot count them."""
    enable_cache(part, HALF)
    try:
        with flops(part) as seen:
            run()
    except (TypeError, Unsupported):  # flex attention, which works under none of torch's modes; it did without
        return []
    finally:
        disable_cache(part)
    return [round(1 - min(seen) / max(seen), 3)] if seen else []


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def flops(part: nn.Module) -> Iterator[list[int]]:
    """Floating-point operations of each call of a module."""
    seen: list[int] = []
    with FlopCounterMode(display=False) as counter:
        before = 0

        def begin(*_: Any) -> None:
            nonlocal before
            before = counter.get_total_flops()

        handles = [part.register_forward_pre_hook(begin)]
        handles.append(part.register_forward_hook(lambda *_: seen.append(counter.get_total_flops() - before)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [counts(rows), "", "| pipeline | result | modules | saved | reason |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        if row["result"] != "not built":
            saved = " / ".join(f"{share:.0%}" for share in row["saved"])
            lines.append(f"| {row['pipeline']} | {row['result']} | {row['modules']} | {saved} | {row['reason']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sweep(__doc__, tried, table)
