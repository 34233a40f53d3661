"""What a feature cache does on every pipeline class of the installed diffusers that can be built, see `sweep`.

Of each: without a cache, with one that is full at every step (equal), once more (equal: nothing is left of the call
before), with every second step forecast (other, and finite), and with the cache taken off again (equal). What share of
the denoiser's products a skipped step saves is counted.

    python -m tools.benchmarks.pipelines.caches CHECKOUT --out build/caches.jsonl      # goes on where it stopped
    python -m tools.benchmarks.pipelines.caches CHECKOUT --out build/caches.jsonl --table
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from accuquant.caching.enable import cache_stats, denoisers_in, disable_cache, enable_cache
from accuquant.errors import CacheError
from accuquant.recipe import Cache
from tools.benchmarks.pipelines.sweep import build, counts, short, sweep

FULL = Cache(estimation="taylor", order=1, interval=1)
HALF = Cache(estimation="taylor", order=1, interval=2, warmup=2)


@dataclass(frozen=True)
class Row:
    """What became of a class: ``right``, ``refused`` in our words, ``wrong``, ``failed``, or ``not built``.

    Attributes:
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
    name = kind.__name__
    try:
        pipeline, _ = build(kind, case)
        plain = output(pipeline, kind, case)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Row(name, "not built", short(error))
    try:
        return judged(name, pipeline, plain, lambda: output(pipeline, kind, case))
    except CacheError as error:
        return Row(name, "refused", short(error))
    except Exception as error:
        return Row(name, "failed", short(error))


def judged(name: str, pipeline: Any, plain: list[Tensor], run: Any) -> Row:
    found = denoisers_in(pipeline)
    if not found:
        enable_cache(pipeline, FULL)  # says why not
    if not same(plain, run()):
        return Row(name, "failed", "two calls without a cache differ")
    for part in found.values():
        enable_cache(part, FULL)
    once, again = run(), run()
    counted = [cache_stats(part) for part in found.values()]
    for part in found.values():
        disable_cache(part)
    wrong = [
        *(["full steps differ"] if not same(plain, once) else []),
        *(["a second call differs"] if not same(once, again) else []),
        *(["a step counted as skipped"] if any(s.nfc != s.num_steps for s in counted) else []),
    ]
    for part in found.values():
        enable_cache(part, HALF)
    with flops(list(found.values())) as seen:
        half = run()
    stats = [cache_stats(part) for part in found.values()]
    modules = sum(len(s.modules) for s in stats)
    for part in found.values():
        disable_cache(part)
    skipping = any(s.nfc < s.num_steps for s in stats)
    wrong += ["forecasts are not finite"] if not all(bool(t.isfinite().all()) for t in half) else []
    wrong += ["nothing was forecast"] if skipping and same(plain, half) else []
    wrong += ["something is left of the cache"] if not same(plain, run()) else []
    saved = tuple(round(1 - min(calls) / max(calls), 3) for calls in seen if calls)
    nfc = tuple((s.nfc, s.num_steps) for s in stats)
    return Row(name, "wrong" if wrong else "right", "; ".join(wrong), tuple(found), modules, nfc, saved)


def output(pipeline: Any, kind: Any, case: Any) -> list[Tensor]:
    """All tensors that a call gives, of fresh arguments: generators among them are used up."""
    torch.manual_seed(0)
    with torch.no_grad():
        made = pipeline(**build(kind, case)[1])
    leaves = tree_leaves(vars(made) if hasattr(made, "__dict__") else made)
    return [torch.as_tensor(leaf).double() for leaf in leaves if isinstance(leaf, Tensor) or hasattr(leaf, "dtype")]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def flops(parts: list[nn.Module]) -> Iterator[list[list[int]]]:
    """Floating-point operations of each call of each part."""
    seen: list[list[int]] = [[] for _ in parts]
    with FlopCounterMode(display=False) as counter:
        handles, before = [], [0] * len(parts)
        for i, part in enumerate(parts):

            def begin(*_: Any, i: int = i) -> None:
                before[i] = counter.get_total_flops()

            def end(*_: Any, i: int = i) -> None:
                seen[i].append(counter.get_total_flops() - before[i])

            handles += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
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
