"""What the end-to-end tests found, for docs/pipelines.md: `make test-pipelines` keeps it, and writes the page of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "pipelines.md"
KEPT = "ACCUQUANT_PIPELINES"  # environment variable: a folder of one file for each example


def note(name: str, **facts: Any) -> None:
    """Keep the facts of an example, if they are wanted."""
    if folder := os.environ.get(KEPT):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps({"name": name} | facts), encoding="utf-8")


def named() -> set[str]:
    """The examples on the page."""
    return set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
