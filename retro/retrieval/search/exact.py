"""Exact search over the stored keys in blocks: the kNN join's, and the measure of every other search.

Scores are -squared L2 distance (higher is closer). A matrix product only proposes candidates; distances are computed
anew from the differences, by the same arithmetic wherever a key is compared, so that lists found apart can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from retro.common.devices import find_device
from retro.common.values import NumNeighbors, check_value
from retro.retrieval.store.format import are_measurable
from retro.retrieval.store.store import Store

if TYPE_CHECKING:
    from retro.retrieval.search.on_device import DeviceKeys

_OVER_SELECT = 16  # candidates kept beyond k, so that rounding of the matrix product cannot displace a true neighbor
_BLOCK_SCORES = 1 << 24  # scores held at a time by exact search
_PAIRS = 1 << 11  # keys gathered at a time, so few that their memory is used again
_CACHED_PAIRS = 1 << 8  # distances computed at a time, so few that they stay in cache

Hits = tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"], Bool[np.ndarray, "q k"]]


class ExactIndex:
    """Blocked matrix product and top-k over all searchable rows; ties go to the lower row."""

    kind = "exact"

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_rows = store.num_searchable

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int, excluded: Int64[np.ndarray, "q w"] | None = None
    ) -> Hits:
        """The k nearest rows of each query outside its excluded documents."""
        return exact_search(self.store, check_queries(queries, self.store), k, excluded)


def check_queries(queries: Any, store: Store) -> Float32[np.ndarray, "q d"]:
    """Queries as float32; ValueError names the first row that is not finite, or too long, or the width if it is not
    the store's."""
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != store.key_dim:
        raise ValueError(f"queries must be [q, {store.key_dim}], as the store's keys, not {list(queries.shape)}")
    wrong = np.flatnonzero(~are_measurable(queries))
    if len(wrong):
        raise ValueError(f"query row {wrong[0]} is not finite, or longer than 9e18; a query must hold numbers only")
    return queries


def check_k(k: int) -> None:
    check_value("k", k, NumNeighbors)


def exact_search(
    store: Store,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    excluded: Int64[np.ndarray, "q w"] | None = None,
    rows: tuple[int, int] | None = None,
    device: str | None = None,
) -> Hits:
    """The k nearest searchable rows of each query, in bounded memory; equal scores are ordered by row.

    The answer does not depend on how the work is cut: lists of several ranges, merged by score and row, are the list
    of the whole.

    Arguments:
        excluded: document rows whose chunks are left out for the query (-1: nothing is).
        rows: search start .. stop - 1 only; None is the whole store.
        device: where the products are computed, see retro.retrieval.search.on_device; None is the
            environment's RETRO_DEVICE, else the first GPU. Accelerators other than CUDA's leave it to the CPU.
    """
    import torch

    check_k(k)
    first, last = _row_range(store, rows)
    where = find_device(device)
    if where.type == "cuda":
        from retro.retrieval.search.on_device import keys_on

        return search_on_device(keys_on(store, where), queries, k, excluded, (first, last))
    num_queries = min(len(queries), 1024) or 1
    block = max(_BLOCK_SCORES // num_queries, 1024)
    best, distances = no_hits(len(queries), k)
    for start, stop in blocks(first, last, block):
        found = _KeyBlock(store, start, stop, torch)
        for low in range(0, len(queries), num_queries):
            part = slice(low, low + num_queries)
            documents = None if excluded is None else excluded[part]
            new_rows, new_distances = found.nearest(queries[part], k, documents, distances[part, -1])
            best[part], distances[part] = merge(best[part], distances[part], new_rows, new_distances, k)
    return as_hits(best, distances)


def search_on_device(
    keys: DeviceKeys,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    excluded: Int64[np.ndarray, "q w"] | None,
    rows: tuple[int, int],
) -> Hits:
    """As `exact_search`: a device proposes candidates; queries with more near the k-th than these are searched here."""
    found, top, scale = keys.candidates(queries, k + _OVER_SELECT, excluded, *rows)
    norms = np.square(queries, dtype=np.float64).sum(1)
    tolerance = _tolerance(scale, norms)
    needed = np.isfinite(top) & (top >= (top[:, k - 1] - 2 * tolerance)[:, None])
    distances = rescore(keys.store, queries, np.where(needed, found, -1))
    best, distances = merge(*no_hits(len(queries), k), found, distances, k)
    unsure = np.flatnonzero(needed[:, -1])
    if len(unsure):
        documents = None if excluded is None else excluded[unsure]
        best[unsure], scores, _ = exact_search(keys.store, queries[unsure], k, documents, rows, device="cpu")
        distances[unsure] = -scores
    return as_hits(best, distances)


def _tolerance(scale: float, norms: Float64[np.ndarray, " q"]) -> Float64[np.ndarray, " q"]:
    """More than rounding can move a score, in the matrix product and to float32 in the end."""
    return 1e-5 * (scale + np.sqrt(norms * 2 * scale)) + 1.2e-7 * norms + 1e-30


def _row_range(store: Store, rows: tuple[int, int] | None) -> tuple[int, int]:
    first, last = (0, store.num_chunks) if rows is None else rows
    if not 0 <= first <= last <= store.num_chunks:
        raise ValueError(f"rows must lie in the store's 0 .. {store.num_chunks}, not {first} .. {last}")
    return first, last


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """start .. stop - 1 in consecutive ranges of at most `size`."""
    return ((low, min(low + size, stop)) for low in range(start, stop, size))


def no_hits(num_queries: int, k: int) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """Rows -1 and infinite distances."""
    return np.full((num_queries, k), -1, np.int64), np.full((num_queries, k), np.inf)


def as_hits(rows: Int64[np.ndarray, "q k"], distances: Float64[np.ndarray, "q k"]) -> Hits:
    """Rows, scores and mask from rows and distances."""
    return rows, (-distances).astype(np.float32), rows >= 0


class _KeyBlock:
    """The searchable keys of a range of rows, ready for many queries."""

    def __init__(self, store: Store, start: int, stop: int, torch: Any) -> None:
        self.rows = store.searchable_in(start, stop)
        keys = store.key_block(start, stop)
        self.keys = keys if len(self.rows) == stop - start else keys[self.rows - start]
        self.documents = store.document_rows(self.rows)
        self.torch = torch
        self.matrix = torch.from_numpy(np.ascontiguousarray(self.keys))
        self.halves = self.matrix.square().sum(1) / 2
        self.scale = float(self.halves.max()) if len(self.rows) else 0.0

    def nearest(
        self, queries: np.ndarray, k: int, documents: np.ndarray | None, border: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates [q, up to k + 16] with their exact squared distances.

        Infinite where excluded, or certainly beyond `border` [q], the k-th distance found so far.
        """
        if not len(self.rows):
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0))
        scores = self._scores(queries, documents)
        top, chosen = (x.numpy() for x in scores.topk(min(k + _OVER_SELECT, len(self.rows)), dim=1))
        norms = np.square(queries, dtype=np.float64).sum(1)
        tolerance = _tolerance(self.scale, norms)
        needed = np.isfinite(top) & (norms[:, None] - 2 * top <= (border + 4 * tolerance)[:, None])
        distances = _distances(self.keys.__getitem__, queries, chosen, needed)
        rows = self.rows[chosen]
        for q in self._uncertain(top, needed, tolerance, k):
            rows[q], distances[q] = self._all_close(
                queries[q], scores[q], top[q, k - 1] - 3 * tolerance[q], top.shape[1]
            )
        return rows, distances

    def _scores(self, queries: np.ndarray, documents: np.ndarray | None) -> Any:
        """Inner product - |key|^2 / 2 [q, c]: the order of -squared L2; -inf where the document is excluded."""
        from retro.common.products import fast_products
        from retro.retrieval.search.on_device import own_rows

        with fast_products():
            scores = self.torch.addmm(-self.halves, self.torch.from_numpy(queries), self.matrix.T)
        for own, columns in () if documents is None else own_rows(documents, self.documents):
            scores[own, columns] = -self.torch.inf
        return scores

    def _uncertain(self, top: np.ndarray, needed: np.ndarray, tolerance: np.ndarray, k: int) -> list[int]:
        """Queries with more rows near the k-th score than candidates were kept (many duplicates)."""
        if top.shape[1] == len(self.rows) or top.shape[1] <= k:
            return []
        gap = np.where(needed[:, -1], top[:, k - 1] - np.where(needed[:, -1], top[:, -1], 0), np.inf)
        return np.flatnonzero(gap <= 2 * tolerance).tolist()

    def _all_close(
        self, query: np.ndarray, scores: Any, least: float | np.floating, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `width` nearest of all rows whose score is at least `least`."""
        close = (scores >= float(least)).nonzero()[:, 0].numpy()
        distances = _distances(self.keys.__getitem__, query[None], close[None], np.ones((1, len(close)), bool))[0]
        order = np.lexsort((close, distances))[:width]
        return self.rows[close[order]], distances[order]


def rescore(
    store: Store, queries: Float32[np.ndarray, "q d"], rows: Int64[np.ndarray, "q k"]
) -> Float64[np.ndarray, "q k"]:
    """Squared distances of each query to the stored keys of its rows, as float32 holds them; infinite for row -1."""
    return _distances(store.keys, queries, rows, rows >= 0)


def _distances(
    keys: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, places: np.ndarray, needed: np.ndarray
) -> np.ndarray:
    """Squared distances [q, c] to keys(places) where needed, else infinite; each depends on its two vectors only.

    Rounded to float32, as scores are, so that lists are ordered alike whether distances or scores are compared.
    """
    import torch

    distances = np.full(places.shape, np.inf)
    pairs, flat = np.flatnonzero(needed), distances.reshape(-1)
    for start in range(0, len(pairs), _PAIRS):
        gathered = torch.from_numpy(keys(places.reshape(-1)[pairs[start : start + _PAIRS]]))
        for at, block in enumerate(gathered.split(_CACHED_PAIRS)):
            part = pairs[start + at * _CACHED_PAIRS :][: len(block)]
            block -= torch.from_numpy(queries[part // places.shape[1]])
            flat[part] = block.square_().sum(-1, dtype=torch.float64).float().numpy()
    return distances


def merge(
    rows: Int64[np.ndarray, "q a"],
    distances: Float64[np.ndarray, "q a"],
    new_rows: Int64[np.ndarray, "q b"],
    new_distances: Float64[np.ndarray, "q b"],
    k: int,
) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """The k nearest of two lists, by distance, then row; infinite distances become row -1."""
    rows, distances = np.concatenate([rows, new_rows], 1), np.concatenate([distances, new_distances], 1)
    rows = np.where(np.isfinite(distances), rows, -1)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)
