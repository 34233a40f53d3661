"""Calibration data: class ids or prompts from JSON lines, split so that held-out classes are never calibrated on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accuquant.errors import RecipeError
from accuquant.recipe import Data
from accuquant.recipe.file import find_shipped

VALIDATION_SEED_OFFSET = 500_000  # noise that neither calibration nor evaluation uses
HELD_OUT_SEED_OFFSET = 1_000_000  # keeps held-out noise apart from calibration noise


@dataclass(frozen=True)
class Samples:
    """Inputs (class ids or prompts) and one noise seed for each."""

    inputs: list[Any]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Split:
    """Disjoint sets of distinct classes or prompts."""

    calibration: list[Any]
    held_out: list[Any]


def load_split(data: Data, key: str) -> Split:
    """Read the distinct values of ``key`` and split them by the recipe's seed.

    Args:
        key: ``class_id`` or ``prompt``, what the pipeline is conditioned on.

    Raises:
        RecipeError: no such file, a line without ``key``, or too few distinct values to hold any out.
    """
    import datasets  # slow to import, and needed here only

    path = find_shipped("calib_data", data.path)
    values: list[Any] = datasets.Dataset.from_dict({key: _read(path, key)}).unique(key)
    count = round(len(values) * data.held_out_fraction)
    if not 0 < count < len(values):
        raise RecipeError(
            f"data.held_out_fraction: {data.held_out_fraction} of the {len(values)} distinct {key} values in {path} "
            f"leaves {len(values) - count} to calibrate on and {count} to judge by; both need at least one"
        )
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(data.seed)).tolist()
    return Split([values[i] for i in sorted(order[count:])], [values[i] for i in sorted(order[:count])])


def _read(path: Path, key: str) -> list[Any]:
    """The value of ``key`` in each line; a mistake in the file is named with its line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.path: {path} cannot be read as text ({error})") from error
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"data.path: line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where} is not JSON ({getattr(error, 'msg', error)}): {line.strip()[:60]}") from error
        if not isinstance(row, dict) or key not in row:
            raise RecipeError(f"{where} has no {key!r}, which this model is conditioned on: {line.strip()[:60]}")
        value = row[key]
        if not (isinstance(value, str) if key == "prompt" else type(value) is int and 0 <= value < 2**31):
            wanted = "text" if key == "prompt" else "a whole number from 0 on"
            raise RecipeError(f"{where}: {key} must be {wanted}: {line.strip()[:60]}")
        values.append(value)
    if not values:
        raise RecipeError(
            f"data.path: {path} is empty; it needs lines such as " + '{"class_id": 3} or {"prompt": "a fox"}'
        )
    return values


def draw(values: list[Any], count: int, first_seed: int) -> Samples:
    """``count`` samples that go round the values evenly, each with a seed of its own."""
    return Samples([values[i % len(values)] for i in range(count)], [first_seed + i for i in range(count)])


def calibration_samples(split: Split, data: Data) -> Samples:
    return draw(split.calibration, data.num_samples, data.seed * 100_000)


def validation_samples(split: Split, data: Data, count: int) -> Samples:
    """The first ``count`` of as many as are wanted; inputs that are not calibrated on come first, if there are any."""
    seen = split.calibration[: data.num_samples]
    return draw(split.calibration[len(seen) :] + seen, count, data.seed * 100_000 + VALIDATION_SEED_OFFSET)


def held_out_samples(split: Split, data: Data, count: int) -> Samples:
    return draw(split.held_out, count, HELD_OUT_SEED_OFFSET + data.seed * 100_000)
