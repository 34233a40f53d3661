"""What every section of a recipe builds on: the strict base class, numbers, and errors for the person who wrote it."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def found(value: Any) -> str:
    """A value from YAML, shown to the person who wrote it."""
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else "a section"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def closest(word: str, valid: list[str]) -> str:
    """The most similar one; of equals the one with the nearest letters, so for int5 it is int4 and not int8."""

    def likeness(name: str) -> tuple[float, int]:
        apart = sum(abs(ord(a) - ord(b)) for a, b in zip(word, name, strict=False))
        return difflib.SequenceMatcher(None, word.lower(), name).ratio(), -apart

    best = max(sorted(valid), key=likeness, default="")
    return best if likeness(best)[0] >= 0.5 else ""


def nearest(word: Any, valid: list[str]) -> str:
    close = closest(word, valid) if isinstance(word, str) else ""
    return f" (did you mean {close!r}?)" if close else ""


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, which has no dot, as text; where a number is due, it means one."""
    scientific = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if scientific else value


Number = Annotated[float, BeforeValidator(_scientific)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
