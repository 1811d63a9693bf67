"""Figures over the examples of a task with their intervals, and what they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from retro.evaluation.bits import neighbors_of
from retro.evaluation.intervals import interval, ratio, resampled_sums
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.reading import Reader
from retro.provenance import versions

Figure = tuple[float, list[float]]  # value, [low, high]


def mean(values: Float[np.ndarray, " d"], seed: int = 0) -> Figure:
    """The mean over examples, and the low and high end over examples drawn anew (95%)."""
    return quotient(values, np.ones(len(values)), seed)


def quotient(above: Float[np.ndarray, " d"], below: Float[np.ndarray, " d"], seed: int = 0) -> Figure:
    """sum(above) / sum(below), and the low and high end over examples drawn anew (95%)."""
    drawn = resampled_sums(np.stack([above, below], axis=1).astype(np.float64), seed=seed)
    ends = [float(end) for end in interval(ratio(drawn[:, 0], drawn[:, 1]))]
    return float(np.sum(above) / np.sum(below)), ends


def with_intervals(figures: Mapping[str, Figure]) -> dict[str, dict[str, Any]]:
    """{column: (value, [low, high])} as {column: {"value", "interval"}}."""
    return {column: {"value": value, "interval": ends} for column, (value, ends) in figures.items()}


def about(reader: Reader) -> dict[str, Any]:
    """What a result says of model, store, neighbors and code."""
    model, retriever = reader.model, reader.retriever
    result = {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "versions": versions(),
    }
    if retriever is not None:
        result |= {"store_fingerprint": retriever.store.fingerprint, "index": retriever.index.kind}
    if retriever is not None and reads_neighbors(model):
        result |= {"num_neighbors": neighbors_of(model, reader.num_neighbors), "decontaminate": reader.decontaminate}
    return result | {"seed": reader.seed}
