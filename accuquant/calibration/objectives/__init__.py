"""What calibration follows full precision in: one source of gradients a file."""

from accuquant.calibration.objectives.base import GradientSource
from accuquant.calibration.objectives.blocks import Blocks
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.objectives.trajectory import Trajectory

OBJECTIVES: dict[str, type[GradientSource]] = {  # `objective.target`, in the order in which `auto` tries them
    "trajectory": Trajectory,
    "blocks": Blocks,
}
AUTO = "auto"  # tries them
WITH_CACHE: type[GradientSource] = CachedTrajectory  # `objective.cached_iterations`, after either
