"""Calibration data: class ids or prompts from JSON lines, split so that held-out classes are never calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accuquant.recipe import Data, RecipeError, find_shipped

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


def load_split(data: Data, key: str, beside: Path | None = None) -> Split:
    """Read the distinct values of ``key`` and split them by the recipe's seed.

    Args:
        key: ``class_id`` or ``prompt``, what the pipeline is conditioned on.
        beside: folder of the recipe, where a relative path is looked for first.

    Raises:
        RecipeError: no such file, a line without ``key``, or too few distinct values to hold any out.
    """
    import datasets  # slow to import, and needed here only

    path = find_shipped("calib_data", data.path, beside=beside)
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_json(str(path), keep_in_memory=True)
    except Exception as error:  # datasets wraps parser errors in several types of its own
        raise RecipeError(f"data.path: {path} is not JSON lines ({str(error).splitlines()[0]})") from error
    if key not in table.column_names:
        raise RecipeError(f"data.path: the lines of {path} have no {key!r}; this model needs it (found {table.column_names})")
    values = list(dict.fromkeys(v for v in table[key] if v is not None))
    count = round(len(values) * data.held_out_fraction)
    if not 0 < count < len(values):
        raise RecipeError(
            f"data.held_out_fraction: {data.held_out_fraction} of the {len(values)} distinct {key} values in {path} "
            f"leaves {len(values) - count} to calibrate on and {count} to judge by; both need at least one"
        )
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(data.seed)).tolist()
    return Split([values[i] for i in sorted(order[count:])], [values[i] for i in sorted(order[:count])])


def draw(values: list[Any], count: int, first_seed: int) -> Samples:
    """``count`` samples that go round the values evenly, each with a seed of its own."""
    return Samples([values[i % len(values)] for i in range(count)], [first_seed + i for i in range(count)])


def calibration_samples(split: Split, data: Data) -> Samples:
    return draw(split.calibration, data.num_samples, data.seed * 100_000)


def held_out_samples(split: Split, data: Data, count: int) -> Samples:
    return draw(split.held_out, count, HELD_OUT_SEED_OFFSET + data.seed * 100_000)
