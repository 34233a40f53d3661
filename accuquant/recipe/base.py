"""What every section of a recipe builds on: the strict base class, numbers, and errors for the person who wrote it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def found(value: Any) -> str:
    """A value from YAML, shown to the person who wrote it."""
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else "a section"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, which has no dot, as text; where a number is due, it means one."""
    scientific = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if scientific else value


Number = Annotated[float, BeforeValidator(_scientific)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
