"""How far a join looks through an approximate index, fitted on a sample of its queries against exact search."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from retro.retrieval.search.dense import Scale, cost_of
from retro.retrieval.search.engines import engine_of
from retro.retrieval.search.exact import exact_search
from retro.retrieval.search.index import ApproximateIndex

SAMPLE = 1024  # queries
_STRATA = 10
_WORST = 2  # of the strata, that count together: of one alone the sample says too little
_BELOW = 0.05  # how far these may lie below the recall to which the index was tuned
_SHARES = [2 ** (step / 4) for step in range(-12, 13)]
_TRIED = 4  # numbers of lists, each with the fewest candidates


def fit_scale(
    index: ApproximateIndex,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    excluded: Int64[np.ndarray, "q w"] | None,
) -> dict[str, Any]:
    """Fit the scale of an index to what a join needs: the cheapest with which it finds, of the exact k nearest of these
    queries, the share that it was tuned to, and hardly less in the two worst strata: tenths of the queries, by the
    distance of their k-th neighbor.

    What settings fix (leaves_to_search, probes, candidates) is left at that. Returns the recall, that of each stratum
    (nearest first), the number of queries and the scale.
    """
    exact = -exact_search(index.store, queries, k, excluded)[1].astype(np.float64)
    target = max((segment.record["recall"]["target"] for segment in index.segments), default=1.0)

    def recall(scale: Scale, looks_again: bool = True) -> tuple[float, list[float]]:
        index.scale, index.looks_again = scale, looks_again
        return _recall(-index.search(queries, k, excluded)[1].astype(np.float64), exact)

    def is_enough(scale: Scale) -> bool:
        if recall(scale, looks_again=False)[0] < target - _BELOW:
            return False  # a second look of many queries costs more than a longer first one
        mean, strata = recall(scale)
        worst = sorted(strata)[:_WORST]
        return mean >= target and sum(worst) >= len(worst) * (target - _BELOW)

    def cost(scale: Scale) -> float:
        return sum(cost_of(segment, segment.scaled(scale)) for segment in index.segments)

    def with_fewest_candidates(lists: float) -> Scale:
        return Scale(lists, _first(_SHARES, lambda share: is_enough(Scale(lists, share))))

    scale = Scale()
    if index.segments and not _is_fixed(index):
        fewest = _first(_SHARES, lambda share: is_enough(Scale(share, _SHARES[-1])))
        lists = _SHARES[_SHARES.index(fewest) :][:_TRIED]
        scale = min(map(with_fewest_candidates, lists), key=cost)
    mean, strata = recall(scale)
    return {"recall": mean, "recall_of_strata": strata, "sample": len(queries), "scale": asdict(scale)}


def _first(shares: Sequence[float], is_enough: Callable[[float], bool]) -> float:
    """The least that is enough, else the last; of shares in ascending order."""
    return shares[bisect_left(shares[:-1], True, key=is_enough)]


def _recall(found: Float64[np.ndarray, "q k"], exact: Float64[np.ndarray, "q k"]) -> tuple[float, list[float]]:
    """The mean share found, and that of each stratum; 1 where no query has a neighbor."""
    shares = share_found(found, exact)
    order = np.argsort(exact[:, -1], kind="stable")
    order = order[~np.isnan(shares[order])]
    if not len(order):
        return 1.0, []
    strata = [float(shares[part].mean()) for part in np.array_split(order, min(_STRATA, len(order)))]
    return float(shares[order].mean()), strata


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
