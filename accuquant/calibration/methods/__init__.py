"""Passes over a model before the updates: one a file."""

from accuquant.calibration.methods.base import Method
from accuquant.calibration.methods.mse import LeastSquares
from accuquant.calibration.methods.round_to_nearest import RoundToNearest

METHODS: dict[str, type[Method]] = {  # `quantization.initialization`
    "mse": LeastSquares,
    "round_to_nearest": RoundToNearest,
}
