"""What else could be done with the same store, over the same tokens. See `measure_baselines`."""

from retro.evaluation.baselines.table import measure_baselines
from retro.evaluation.settings import METHODS, BaselineSettings

__all__ = ["METHODS", "BaselineSettings", "measure_baselines"]
