"""The recall of a join through an approximate index, measured on a sample of its queries against exact search."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from retro.retrieval.search.engines import engine_of
from retro.retrieval.search.exact import exact_search
from retro.retrieval.search.index import ApproximateIndex
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import DenseSearcher

SAMPLE = 512  # queries
_STRATA = 10
_WORST = 2  # of the strata, that count together: of one alone the sample says too little
_BELOW = 0.05  # how far these may lie below the recall to which the index was tuned
_WIDENINGS = [2 ** (step / 2) for step in range(7)]


def widen(
    searcher: DenseSearcher,
    index: ApproximateIndex,
    queries: Queries,
    k: int,
    documents: Int64[np.ndarray, " q"] | None,
) -> dict[str, Any]:
    """Widen the index of a searcher until it finds, of the exact k nearest of these queries, the share that it was
    tuned to, and hardly less in the two worst strata: tenths of the queries, by the distance of their k-th neighbor.

    What settings fix (leaves_to_search, probes, candidates) is left at that. Returns the recall, that of each stratum
    (nearest first), the number of queries and how much further than tuned the index looks.
    """
    exact = -exact_search(index.store, queries.keys, k, documents)[1].astype(np.float64)
    excluded = None if documents is None else [{row} - {-1} for row in documents.tolist()]
    target = max((segment.record["recall"]["target"] for segment in index.segments), default=1.0)
    found: dict[str, Any] = {"recall": 1.0, "recall_of_strata": [], "sample": len(queries), "widening": 1.0}
    for widening in _WIDENINGS[: 1 if not index.segments or _is_fixed(index) else None]:
        index.widening = widening
        shares = share_found(-searcher.search(queries, k, excluded)[1].astype(np.float64), exact)
        order = np.argsort(exact[:, -1], kind="stable")
        order = order[~np.isnan(shares[order])]
        if not len(order):
            break
        strata = [float(shares[part].mean()) for part in np.array_split(order, min(_STRATA, len(order)))]
        found |= {"recall": float(shares[order].mean()), "recall_of_strata": strata, "widening": widening}
        if found["recall"] >= target and np.mean(sorted(strata)[:_WORST]) >= target - _BELOW:
            break
    return found


def _is_fixed(index: ApproximateIndex) -> bool:
    names = ["candidates", engine_of(index.segments[0].layout).searched]
    return any(segment.record["settings"].get(name) for segment in index.segments for name in names)


def share_found(found: Float64[np.ndarray, "q k"], exact: Float64[np.ndarray, "q k"]) -> Float64[np.ndarray, " q"]:
    """Of each query the share of its exact neighbors for which one as near was found; nan where it has none.

    Both are distances, ascending; infinite where there is no neighbor.
    """
    there = np.isfinite(exact)
    counts = there.sum(1)
    last = np.where(there, exact, -np.inf).max(1)
    near = (found <= (last * (1 + 1e-6))[:, None]).sum(1)
    return np.where(counts > 0, np.minimum(near, counts) / np.maximum(counts, 1), np.nan)
