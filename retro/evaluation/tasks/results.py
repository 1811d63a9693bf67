"""Figures over the examples of a task with their intervals, and what they were measured with."""

from __future__ import annotations

from typing import Any

from retro.evaluation.bits import neighbors_of
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.reading import Reader
from retro.provenance import versions


def with_interval(value: float, low: float, high: float) -> dict[str, Any]:
    """A figure as a result holds it."""
    return {"value": value, "interval": [low, high]}


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
