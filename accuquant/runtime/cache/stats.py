"""What a cache did in a trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheStats:
    """What the cache did in the last trajectory.

    Attributes:
        full_steps: steps computed in full, counted from 0; ``nfc`` is their number.
        num_steps: steps of the trajectory.
        nbytes: most bytes that factors, inputs and ratios took.
        input_errors: RCS's e of each step; empty with other schedules.
        modules: names of the cached modules.
        saved: share of the products of the denoiser's layers that a skipped step leaves out, measured in the first call
            after `enable_cache`; None before it, and of a denoiser that is compiled.
    """

    full_steps: tuple[int, ...]
    num_steps: int
    nbytes: int
    input_errors: tuple[float, ...]
    modules: tuple[str, ...] = field(repr=False)
    saved: float | None = None

    @property
    def nfc(self) -> int:
        return len(self.full_steps)


@dataclass
class Trace:
    """Record of one trajectory."""

    full: list[bool] = field(default_factory=list)
    nbytes: int = 0
    input_errors: list[float] = field(default_factory=list)
