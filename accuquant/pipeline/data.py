"""Calibration data: rows from JSON lines, split so that held-out ones are never calibrated on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from accuquant.errors import RecipeError
from accuquant.pipeline.rows import Row, check_row, is_unconditional
from accuquant.recipe import Data
from accuquant.recipe.file import find_shipped

EXAMPLES = '{"class_labels": 3} or {"prompt": "a fox"}'
NOTHING = "{} (the pipeline is unconditional: nothing but noise tells its samples apart)"
VALIDATION_SEED_OFFSET = 500_000  # noise that neither calibration nor evaluation uses
HELD_OUT_SEED_OFFSET = 1_000_000  # keeps held-out noise apart from calibration noise


@dataclass(frozen=True)
class Samples:
    """Rows of data and one noise seed for each."""

    rows: list[Row]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> Samples:
        """At most ``count`` of them."""
        return Samples(self.rows[:count], self.seeds[:count])

    def batches(self, size: int) -> list[Samples]:
        return [Samples(self.rows[k : k + size], self.seeds[k : k + size]) for k in range(0, len(self), size)]


@dataclass(frozen=True)
class Split:
    """Disjoint sets of distinct rows; of an unconditional pipeline both are its only row, and noise alone is held out.

    Attributes:
        folder: of the file they are from, that pictures are relative to.
    """

    calibration: list[Row]
    held_out: list[Row]
    folder: Path


def load_split(data: Data, pipeline: DiffusionPipeline) -> Split:
    """Read the distinct rows and split them by the recipe's seed; the only one of an unconditional pipeline is shared.

    Raises:
        RecipeError: no such file, a line that the pipeline cannot be called with, or too few distinct rows to hold any
            out.
    """
    import datasets  # slow to import, and needed here only

    path = find_shipped("calib_data", data.path)
    lines = [json.dumps(row, sort_keys=True) for row in _read(path, pipeline)]
    rows: list[Row] = [json.loads(line) for line in datasets.Dataset.from_dict({"row": lines}).unique("row")]
    if len(rows) == 1 and is_unconditional(pipeline):
        return Split(rows, rows, path.parent)
    count = round(len(rows) * data.held_out_fraction)
    if not 0 < count < len(rows):
        raise RecipeError(
            f"data.held_out_fraction: {data.held_out_fraction} of the {len(rows)} distinct rows in {path} "
            f"leaves {len(rows) - count} to calibrate on and {count} to judge by; both need at least one"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(data.seed)).tolist()
    return Split([rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])], path.parent)


def _read(path: Path, pipeline: DiffusionPipeline) -> list[Row]:
    """Each line's row; a mistake in the file is named with its line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.path: {path} cannot be read as text ({error})") from error
    rows, examples = list[Row](), NOTHING if is_unconditional(pipeline) else EXAMPLES
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"data.path: line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where} is not JSON ({getattr(error, 'msg', error)}): {line.strip()[:60]}") from error
        if not isinstance(row, dict) or not (row or is_unconditional(pipeline)):
            raise RecipeError(f"{where} is no row such as {examples}: {line.strip()[:60]}")
        try:
            check_row(pipeline, row)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}: {line.strip()[:60]}") from error
        if rows and row.keys() != rows[0].keys():
            raise RecipeError(
                f"{where} has other keys than the lines before it, {', '.join(rows[0]) or 'none'}: {line.strip()[:60]}"
            )
        rows.append(row)
    if not rows:
        raise RecipeError(f"data.path: {path} is empty; it needs lines such as {examples}")
    return rows


def draw(rows: list[Row], count: int, first_seed: int) -> Samples:
    """``count`` samples that go round the rows evenly, each with a seed of its own."""
    return Samples([rows[i % len(rows)] for i in range(count)], [first_seed + i for i in range(count)])


def calibration_samples(split: Split, data: Data) -> Samples:
    return draw(split.calibration, data.num_samples, data.seed * 100_000)


def validation_samples(split: Split, data: Data, count: int) -> Samples:
    """The first ``count`` of as many as are wanted; rows that are not calibrated on come first, if there are any."""
    seen = split.calibration[: data.num_samples]
    return draw(split.calibration[len(seen) :] + seen, count, data.seed * 100_000 + VALIDATION_SEED_OFFSET)


def held_out_samples(split: Split, data: Data, count: int) -> Samples:
    return draw(split.held_out, count, HELD_OUT_SEED_OFFSET + data.seed * 100_000)
