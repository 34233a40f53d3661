"""What the tuner has tried: candidates with the errors of each of their samples, kept line by line in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from accuquant.core.choice import log_error
from accuquant.errors import RecipeError
from accuquant.runtime.cache.fitted import Fitted, Noise
from accuquant.runtime.cache.plan import CachePlan

ALONE, NAIVE = "alone", "naive stacking"
CORRECTED = {
    "none": "",
    "cache": ", forecasts corrected",
    "quantization": ", full steps corrected",
    "both": ", all corrected",
}
LEARNED = {
    "forecast": "forecasts, with the cache on",
    "weights": "weights, with the cache on",
    "both": "weights and forecasts, with the cache on",
}
PARTS = {"none": (False, False), "cache": (True, False), "quantization": (False, True), "both": (True, True)}
Forecast = tuple[str, int, bool]  # estimation, order, noise_aware


@dataclass(frozen=True)
class Candidate:
    """A cache on one choice of types, and what a rollout of the quantized, cached model has shown of it.

    Attributes:
        key: what it is found again by.
        types, cache: in words.
        parts: what is corrected, a key of `PARTS`.
        asked_nfc, nfc: full computations of a trajectory, of the budget and as counted.
        bit_operations: of a trajectory, as a fraction of float32 without a cache.
        seconds: of a trajectory of eight samples.
        latent_errors, image_errors: relative L2 of each validation sample; of the first ones, where others have more.
        calibrated: how the model was: `ALONE`, or one of `LEARNED`.
        elapsed: seconds that it took to try.
        noise: what its forecasts know of the quantization noise, if they do; what was learned is fitted anew.
        rival: whose method it is, if not ours.
    """

    key: str
    types: str
    cache: str
    forecast: Forecast
    schedule: str
    parts: str
    asked_nfc: int
    nfc: float
    bit_operations: float
    seconds: float
    latent_errors: tuple[float, ...]
    image_errors: tuple[float, ...]
    calibrated: str
    elapsed: float
    plan: CachePlan
    noise: Noise | None = None
    rival: str | None = None

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    def __post_init__(self) -> None:
        if not 0 < len(self.latent_errors) == len(self.image_errors):
            raise ValueError("a latent and an image error of each sample are needed, and of one sample at least")

    @classmethod
    def from_line(cls, line: str) -> Candidate:
        """What `line` has written.

        Raises:
            ValueError: the line is of something else, or not whole.
        """
        return _ADAPTER.validate_json(line)

    def line(self) -> str:
        """One line of JSON."""
        return _ADAPTER.dump_json(self, exclude_none=True).decode()

    def measure(self, samples: int | None = None) -> Tensor:
        """(B,) of the first ``samples``, or of all: mean over both errors of their logarithm."""
        return log_error(torch.tensor(self.latent_errors[:samples]), torch.tensor(self.image_errors[:samples]))

    @property
    def samples(self) -> int:
        """Validation samples that it was rolled out on."""
        return len(self.latent_errors)

    @property
    def cost(self) -> tuple[float, ...]:
        """What is taken of equals: less computation, then less time, then what is simpler, then what is ours."""
        simpler = sum(PARTS[self.parts]) + (self.calibrated != ALONE), self.forecast[1] + self.forecast[2]
        return round(self.bit_operations, 9), round(self.seconds, 9), *simpler, self.rival is not None

    @property
    def fitted(self) -> Fitted:
        """What its forecasts know; what was learned for them or corrects them is fitted anew."""
        return Fitted(noise=self.noise)

    @property
    def learned(self) -> str | None:
        """What its model has learned with the cache on, in the words of `tune.learning`."""
        return next((what for what, words in LEARNED.items() if words == self.calibrated), None)


_ADAPTER = TypeAdapter(Candidate)


class Tried:
    """Every candidate that was confirmed, a line of JSON each; a later line of the same one has more samples.

    Raises:
        RecipeError: the file has lines of something else, of another version perhaps.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._found = path, dict[str, Candidate]()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                candidate = Candidate.from_line(line)
            except ValidationError as error:
                if number == len(lines) and not _is_json(line):  # it was cut off
                    break
                what = error.errors()[0]
                where = ".".join(map(str, what["loc"])) or "it"
                raise RecipeError(
                    f"{path}: line {number} is not a candidate as this version writes them ({where}: {what['msg']}); "
                    "--overwrite starts the search over"
                ) from error
            self._found[candidate.key] = candidate
        path.write_text("".join(f"{candidate.line()}\n" for candidate in self.candidates), encoding="utf-8")

    @property
    def candidates(self) -> list[Candidate]:
        """In the order in which they were tried first."""
        return list(self._found.values())

    def find(self, key: str) -> Candidate | None:
        return self._found.get(key)

    def add(self, candidate: Candidate) -> Candidate:
        self._found[candidate.key] = candidate
        with self.path.open("a", encoding="utf-8") as file:
            file.write(candidate.line() + "\n")
        return candidate


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
