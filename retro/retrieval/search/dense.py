"""Segments of keys: an engine's codes propose candidates, the memory-mapped keys of the store order them exactly.

index/<hash>/    index.json    rows.npy uint32, counted from the first row of its shards    the files of its engine

How far a segment is searched (lists, candidates) is tuned to a recall when it is built; index.json has what was
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from retro.common.files import check_files, open_npy
from retro.common.records import save_record
from retro.common.values import Count, CountOrZero, Probability, check_record
from retro.retrieval.search.engines import (
    ENGINES,
    CountedEngine,
    IndexEngine,
    IndexLayout,
    Work,
    choose_layout,
    engine_of,
)
from retro.retrieval.search.exact import Hits, blocks, exact_search, merge, no_hits, rescore
from retro.retrieval.search.segments import ShardRange, StoreRows, row_range, write_segment
from retro.retrieval.store.store import Store

TUNED_NEIGHBORS = 10  # k of the recall that is tuned and stored
_QUERIES = 256
_FIELDS = {
    "layout": {"engine": str, "codes": str, "soar": bool} | dict.fromkeys(("lists", "block", "bits"), CountOrZero),
    "recall": {"recall": Probability, "lists_searched": CountOrZero, "candidates": Count},
}
_CANDIDATES = 640  # for 10 neighbors; eight times as many where these do not reach a recall
_LEAST_GAIN = 0.002  # of recall by 2.8 times the lists, below which it is left at these
_ROWS = 1 << 20  # whose removal is looked up at a time
_FOUND = 1 << 20  # candidates held at a time
_FEW = 4  # a search looks further where it compares fewer than one in so many of its candidates
_KEY_READ = 4  # what a byte of a stored key costs against a byte of a code that is scanned


@dataclass(frozen=True)
class Effort:
    """How far a search goes: inverted lists or leaves (0 where there are none) and candidates for 10 neighbors.

    For k neighbors candidates grow in proportion, but from 4 k on no further.
    """

    lists: int
    candidates: int

    def considered(self, k: int, num_rows: int) -> int:
        """Candidates for k neighbors."""
        wanted = min(-(-self.candidates * k // TUNED_NEIGHBORS), 4 * k)
        return min(max(wanted, self.candidates, k), num_rows)


@dataclass(frozen=True)
class Scale:
    """How far a search goes, as shares of the effort to which segments are tuned."""

    lists: float = 1.0
    candidates: float = 1.0


class Segment:
    """The rows of some shards, searched through codes; documents that were removed are dropped from the answers.

    engine: None opens that of the folder.
    """

    def __init__(self, store: Store, shards: ShardRange, engine: IndexEngine | None = None) -> None:
        self.store, self.shards = store, shards
        self.folder: Path = shards.folder
        self.record: dict[str, Any] = shards.record
        self.layout = IndexLayout(**shards.record["layout"])
        self.first_row, _ = row_range(store, shards)
        self._rows = StoreRows(self.first_row, open_npy(shards.folder / "rows.npy"))
        self._has_removed = len(store.removed_documents) > 0
        self.num_rows = len(self._rows)
        self.num_live = self.num_rows
        if self._has_removed:
            self.num_live = sum(len(self.live_rows(*part)) for part in blocks(0, self.num_rows, _ROWS))
        self.engine = engine or engine_of(self.layout).open(self.layout, shards.folder)

    @property
    def effort(self) -> Effort:
        """As it was tuned."""
        return Effort(self.record["recall"]["lists_searched"], self.record["recall"]["candidates"])

    def scaled(self, scale: Scale) -> Effort:
        """As it was tuned, times a scale."""
        lists, candidates = ceil(self.effort.lists * scale.lists), ceil(self.effort.candidates * scale.candidates)
        return Effort(min(lists, self.layout.lists), candidates)

    def live_rows(self, start: int, stop: int) -> Int64[np.ndarray, " c"]:
        """Store rows of a range of the segment's own, without those that were removed."""
        rows = self._rows[start:stop]
        return rows[~self.store.is_removed(rows)] if self._has_removed else rows

    def live_rows_at(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Store rows at some ascending places among those that were not removed."""
        found, first = [np.zeros(0, np.int64)], 0
        for part in blocks(0, self.num_rows, _ROWS):
            rows = self.live_rows(*part)
            found.append(rows[places[slice(*np.searchsorted(places, [first, first + len(rows)]))] - first])
            first += len(rows)
        return np.concatenate(found)

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        excluded: Int64[np.ndarray, "q w"] | None = None,
        scale: Scale | None = None,
        once: bool = False,
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """The k nearest rows outside a query's excluded documents that are found, and their squared distances.

        What is looked at grows with the share of removed rows. Queries that find fewer rows than the segment has
        for them, or few candidates outside their excluded documents, look twice as far, until they have seen all;
        not if `once`.
        """
        rows, distances = no_hits(len(queries), k)
        spans, allowed = None, np.full(len(queries), self.num_live)
        if excluded is not None:
            excluded = np.sort(np.where(np.isin(excluded, self.store.removed_documents), -1, excluded), axis=1)
            drop_copies(excluded, excluded)
            spans = self.store.row_ranges(excluded)
            allowed -= self._rows.count_within(spans)
        waiting = np.flatnonzero(allowed)
        scale, wider, least = scale or Scale(), self.num_rows / max(self.num_live, 1), 0
        while len(waiting):
            effort = self.scaled(Scale(scale.lists * wider, scale.candidates * wider))
            fetch = min(ceil(k * wider), self.num_rows)
            considered = effort.considered(fetch, self.num_rows)
            if self._has_removed or spans is not None:
                fetch = considered  # of which some are dropped
            if spans is not None:
                least = least or considered // (_FEW * (1 + self.layout.soar))
            size, left = max(_FOUND // max(considered, effort.lists), 1), []
            for start, stop in blocks(0, len(waiting), size):
                part = waiting[start:stop]
                of_part = None if spans is None else spans[part]
                found, apart = self.scored(queries[part], fetch, considered, effort.lists, of_part)
                rows[part], distances[part] = _nearest(found, apart, k)
                missing = (rows[part] >= 0).sum(1) < np.minimum(allowed[part], k)
                left.append(part[missing | ((found >= 0).sum(1) < np.minimum(allowed[part], least))])
            if once or (considered == self.num_rows and effort.lists == self.layout.lists):
                break
            waiting, wider = np.concatenate(left), wider * 2
        return rows, distances

    def attempt(
        self, queries: Float32[np.ndarray, "q d"], k: int, effort: Effort
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """The k nearest of what one search of an effort finds."""
        fetch = min(k, self.num_rows)
        considered = effort.considered(fetch, self.num_rows)
        size, parts = max(_FOUND // max(considered, effort.lists), 1), []
        for start, stop in blocks(0, len(queries), size):
            parts.append(_nearest(*self.scored(queries[start:stop], fetch, considered, effort.lists), k))
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def rows_compared(self, queries: Float32[np.ndarray, "q d"], effort: Effort) -> float:
        """Rows whose codes or keys a search of an effort compares with a query, the mean of these queries."""
        if isinstance(self.engine, CountedEngine):
            return float(self.engine.rows_compared(queries, effort.lists).mean())
        share = effort.lists / self.layout.lists if self.layout.lists else 1.0
        return self.num_rows * share * (2 if self.layout.soar else 1)

    def scored(
        self,
        queries: Float32[np.ndarray, "q d"],
        wanted: int,
        considered: int,
        lists: int,
        spans: Int64[np.ndarray, "q w 2"] | None = None,
    ) -> tuple[Int64[np.ndarray, "q c"], Float64[np.ndarray, "q c"]]:
        """The candidates of one search outside the spans of a query, each once, in any order (-1: none), and their
        squared distances."""
        found = self.store_rows(self.engine.candidates(queries, wanted, considered, lists))
        if self.layout.soar:
            found = np.sort(found, axis=1)
            drop_copies(found, found)
        drop(found, spans)
        return found, rescore(self.store, queries, found)

    def store_rows(self, local: Int64[np.ndarray, "q c"]) -> Int64[np.ndarray, "q c"]:
        """Store rows of the segment's own, -1 for what is missing or removed."""
        found = self._rows[local]
        found[local < 0] = -1
        if self._has_removed:
            found[self.store.is_removed(found)] = -1
        return found


def drop(rows: Int64[np.ndarray, "q c"], spans: Int64[np.ndarray, "q w 2"] | None) -> None:
    """Put -1 for the rows within the spans of a query."""
    for span in () if spans is None else np.moveaxis(spans, 1, 0)[..., None]:
        rows[(rows >= span[:, 0]) & (rows < span[:, 1])] = -1


def drop_copies(rows: Int64[np.ndarray, "q c"], ordered: Int64[np.ndarray, "q c"]) -> None:
    """Put -1 for those whose place in an ordered array holds the same as the place before."""
    rows[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1


def _nearest(rows: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a list, by distance, then row; an engine that orders by whole keys gives most of them so."""
    ascending = rows.shape[1] == k and (distances[:, 1:] > distances[:, :-1]).all()
    if ascending and np.isfinite(distances[:, -1]).all():
        return rows, distances
    return merge(*no_hits(len(rows), k), rows, distances, k)


def open_segment(store: Store, shards: ShardRange) -> Segment:
    """Open one segment; ValueError names a file that is missing or damaged, on which ScaNN would abort the process."""
    check_segment(shards, checksums=True)
    return Segment(store, shards)


def check_segment(shards: ShardRange, checksums: bool) -> None:
    """Refuse a segment with a ValueError that names what is wrong in its record or its files."""
    check_record(shards.folder / "index.json", shards.record, _FIELDS)
    check_files(shards.folder, shards.record["files"], checksums=checksums)


def write_dense(
    store: Store,
    shards: ShardRange,
    kind: str,
    settings: dict[str, Any],
    target: float,
    work: Work,
    base: ShardRange | None = None,
) -> ShardRange:
    """Write the segment of some shards, tuned to a recall, and return these with its folder and record.

    base: a segment of the first of these shards, whose codes are kept if its engine can do so.

    The peak of memory is `EngineKind.peak_bytes`.
    """

    def write(folder: Path, rows: np.ndarray) -> dict[str, Any]:
        store_rows, is_written = StoreRows(row_range(store, shards)[0], rows), False
        if base is not None:
            layout = IndexLayout(**base.record["layout"])
            is_written = engine_of(layout).extend(layout, base.folder, store, store_rows, folder, work)
        if not is_written:
            layout = choose_layout(kind, settings, len(rows), store.key_dim)
            engine_of(layout).write(layout, store, store_rows, folder, work)
        record = {"layout": asdict(layout), "settings": settings}
        segment = Segment(store, ShardRange(shards.first, shards.stop, folder, record))
        return {"layout": asdict(layout), "recall": tune(segment, target)}

    record = {"format_version": ENGINES[kind].format_version, "kind": kind, "settings": settings}
    return write_segment(store, shards, record | ({"base": base.folder.name} if base else {}), write)


def retune(segment: Segment, target: float) -> None:
    """Tune a segment to another recall and write that into its index.json."""
    segment.record["recall"] = tune(segment, target)
    segment.store.check_on_disk(range(segment.shards.first, segment.shards.stop))
    save_record(segment.folder / "index.json", segment.record)


# Tuning


def tune(segment: Segment, target: float, sample: QuerySample | None = None) -> dict[str, Any]:
    """Find the least effort that reaches a recall@10 against exact search, on up to 256 rows as queries.

    Numbers of lists are tried from 1 on, each with ever fewer candidates while the target is reached; where no number
    of lists reaches it with 640 candidates, or more lists no longer help, they are tried with more candidates. The cost
    of an effort is counted in bytes that it reads, so that the choice does not depend on the machine. What settings fix
    (leaves_to_search, probes, candidates) is left at that.

    Returns what index.json stores: recall, whether it reaches the target, lists_searched, candidates (for 10
    neighbors), and how it was measured.
    """
    sample, candidates = sample or QuerySample(segment), _candidates(segment)
    reached: list[Effort] = []
    for counts in (candidates, *([count] for count in _more(segment))):
        reached = reached or _reached(segment, sample, target, counts)
    tried = reached or [sample.best]
    effort = min(tried, key=lambda effort: cost_of(segment, effort))
    recall = sample.recall(effort)
    measured = {"recall": recall, "target": target, "reached": recall >= target}
    measured |= {"lists_searched": effort.lists, "candidates": effort.candidates}
    return sample.record | measured


def _reached(segment: Segment, sample: QuerySample, target: float, candidates: list[int]) -> list[Effort]:
    """Efforts that reach the target: for ever more lists, with the fewest candidates that do."""
    found: list[Effort] = []
    left, recalls = list(candidates), []
    for lists in _lists(segment):
        recalls.append(sample.recall(Effort(lists, candidates[-1])))
        if target / 2 < recalls[-1] < target and recalls[-1] < min(recalls[-4:]) + _LEAST_GAIN and len(recalls) > 3:
            break
        while left and sample.recall(Effort(lists, left[-1])) >= target:
            found.append(Effort(lists, left.pop()))
        least = min((cost_of(segment, effort) for effort in found), default=np.inf)
        if not left or cost_of(segment, Effort(lists, left[0])) > least:
            break
    return found


def _lists(segment: Segment) -> list[int]:
    """Numbers of lists to try, ascending."""
    settings, most = segment.record["settings"], segment.layout.lists
    given = settings.get(engine_of(segment.layout).searched)
    return [min(given or 0, most)] if given or not most else _ladder(1, most)


def _candidates(segment: Segment) -> list[int]:
    """Numbers of candidates to try, ascending."""
    given = segment.record["settings"]["candidates"]
    if given or engine_of(segment.layout).is_exact(segment.layout):
        return [given or TUNED_NEIGHBORS]
    return _ladder(TUNED_NEIGHBORS, max(min(_CANDIDATES, segment.num_rows), TUNED_NEIGHBORS))


def _more(segment: Segment) -> list[int]:
    """Numbers of candidates to try where these do not suffice."""
    fixed = len(_candidates(segment)) == 1
    return [] if fixed else [min(_CANDIDATES << power, segment.num_rows) for power in (1, 2, 3)]


def _ladder(first: int, last: int) -> list[int]:
    """first .. last, each 1.4 times the one before."""
    steps = {round(first * 2 ** (step / 2)) for step in range(64)}
    return [*sorted(count for count in steps if count < last), last]


def cost_of(segment: Segment, effort: Effort) -> float:
    """Bytes read by a search: codes of the lists, their centroids, and keys of the candidates."""
    width, layout, engine = segment.store.key_dim, segment.layout, engine_of(segment.layout)
    share = effort.lists / layout.lists if layout.lists else 1.0
    scanned = segment.num_rows * engine.code_bytes(layout, width) * share + 4.0 * layout.lists * width
    return scanned + effort.candidates * 4 * width * (1 if engine.has_copy(layout) else _KEY_READ)


class QuerySample:
    """Queries, and the scores of their exact neighbors: keys that a segment does not hold, or else some of its rows,
    whose own rows do not count."""

    def __init__(self, segment: Segment, held_out: Float32[np.ndarray, "q d"] | None = None) -> None:
        seed = segment.record["settings"]["seed"]
        rows = segment.num_live
        size = min(_QUERIES, rows) if held_out is None else len(held_out)
        self.own = np.full(size, -1)
        if held_out is None:
            self.own = segment.live_rows_at(np.sort(np.random.default_rng(seed).choice(rows, size, replace=False)))
        self.segment, self.k = segment, max(min(TUNED_NEIGHBORS, rows - 1), 1)
        self.record = {"k": self.k, "queries": size if rows > 1 else 0, "seed": seed}
        self.queries = segment.store.keys(self.own) if held_out is None else held_out
        searched = row_range(segment.store, segment.shards)
        search = lambda queries, k: exact_search(segment.store, queries, k, rows=searched)  # noqa: E731
        self._exact = _scores_without_self(search, self.queries, self.own, self.k)
        self._known: dict[Effort, np.ndarray] = {}

    @property
    def distances(self) -> Float32[np.ndarray, " q"]:
        """From each query to its k-th exact neighbor, squared."""
        return -self._exact[:, -1]

    @property
    def best(self) -> Effort:
        """Of those that were tried."""
        return max(self._known, key=self.recall)

    def recall(self, effort: Effort) -> float:
        return float(self.recall_of_each(effort).mean())

    def recall_of_each(self, effort: Effort) -> Float64[np.ndarray, " q"]:
        if not self.record["queries"]:
            return np.ones(1)
        if effort not in self._known:
            search = lambda queries, k: self.segment.attempt(queries, k, effort)  # noqa: E731
            found = _scores_without_self(lambda q, k: _hits(*search(q, k)), self.queries, self.own, self.k)
            self._known[effort] = _is_near(found, self._exact).mean(1)
        return self._known[effort]


def _hits(rows: np.ndarray, distances: np.ndarray) -> Hits:
    return rows, (-distances).astype(np.float32), rows >= 0


def _scores_without_self(
    search: Callable[[np.ndarray, int], Hits], queries: np.ndarray, own: np.ndarray, k: int
) -> Float32[np.ndarray, "q k"]:
    """Scores of the k best hits that are not the query's own row (-inf where fewer)."""
    rows, scores, _ = search(queries, k + 1)
    scores = np.where(rows == own[:, None], -np.inf, scores)
    return -np.sort(-scores, axis=1)[:, :k]


def _is_near(found: np.ndarray, exact: np.ndarray) -> Bool[np.ndarray, "q k"]:
    """Which hits are at least as near as the k-th exact neighbor: of equal ones any will do."""
    return found >= exact[:, -1:] * (1 + 1e-6)  # scores are negative
