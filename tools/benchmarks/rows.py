"""Results of a benchmark: JSON lines in the files of a folder, one for each run, which are only ever added to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All that was measured so far; a benchmark in several processes has a file for each."""
    return [row for file in sorted(folder.glob("results*.jsonl")) for row in read_lines(file)]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of one file; none where there is no such file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def add_row(folder: Path, row: dict[str, Any], shard: str = "") -> None:
    """The folder is made if absent.

    Args:
        shard: i/n, of which the file is, where several processes measure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"results-{shard.replace('/', '-')}.jsonl" if shard else "results.jsonl"
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
