"""What else could be done with the same store, over the same tokens. See `measure_baselines`."""

from retro.evaluation.baselines.table import (
    METHODS,
    baselines_rows,
    baselines_table,
    measure_baselines,
)
from retro.evaluation.settings import BaselineSettings

__all__ = ["METHODS", "BaselineSettings", "baselines_rows", "baselines_table", "measure_baselines"]
