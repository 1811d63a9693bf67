"""Nearest keys: exact search, ScaNN, faiss and routed lists behind one protocol.

Every index answers with store rows, scores = -squared L2 distance computed from the stored keys (higher is closer),
and a mask: a hit that an engine could not find is masked, never another row. Approximate indexes are made of segments
(retro.retrieval.search.segments), folders index/<hash>/ that serve whole shards; shards without one are searched
exactly.

A kind is "auto", "exact", "scann", "routed" or "faiss"; the last three choose their codes by size, or take them by
name, as in "scann:ah" and "faiss:ivf-pq" (retro.retrieval.search.engines has the list).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from retro.common.files import check_files, delete, stable_hash
from retro.retrieval.search.dense import TUNED_NEIGHBORS, Scale, Segment, open_segment, retune, write_dense
from retro.retrieval.search.engines import ENGINES, FAISS_FLAT_ROWS, ROUTED_ROWS, Work
from retro.retrieval.search.exact import (
    ExactIndex,
    Hits,
    as_hits,
    check_k,
    check_queries,
    exact_search,
    merge,
    no_hits,
    rescore,
)
from retro.retrieval.search.postings import KINDS as LEXICAL_KINDS
from retro.retrieval.search.segments import (
    ShardRange,
    cover,
    extensions,
    find_segments,
    index_records,
    plan_segments,
    row_range,
    segment_records,
    uncovered,
)
from retro.retrieval.store.store import Store

__all__ = [
    "FAISS_FLAT_ROWS", "ApproximateIndex", "ExactIndex", "Hits", "Index", "build_index", "check_k",
    "check_queries", "check_searchable", "exact_search", "measured_recall", "open_index", "rescore", "resolve_kind",
]  # fmt: skip

log = logging.getLogger(__name__)

RECALL = 0.95  # tuned to, where nobody names another


@runtime_checkable
class Index(Protocol):
    """search [q, d], k -> store rows [q, k] (-1 where missing), scores (-squared L2; -inf where missing), mask.

    excluded: document rows whose chunks are left out for the query, filled up with -1.
    """

    kind: str
    num_rows: int

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int, excluded: Int64[np.ndarray, "q w"] | None = None
    ) -> Hits: ...


class ApproximateIndex:
    """Segments of consecutive shards, each served by an engine, and exact search over shards without one.

    recall: of the segments as they were tuned, weighted by their rows; exact search counts as 1.
    name: changes with what is searched, and how far.
    scale: how far it looks, against what its segments are tuned to.
    looks_again: whether queries that find little look further.
    """

    scale, looks_again = Scale(), True

    def __init__(self, store: Store, kind: str, segments: list[Segment]) -> None:
        self.store, self.kind, self.segments = store, kind, segments
        self.num_rows = store.num_searchable
        gaps = [row_range(store, shards) for shards in uncovered(store, [segment.shards for segment in segments])]
        self.exact_ranges = [part for part in gaps if len(store.searchable_in(*part))]
        served = sum(segment.num_live for segment in segments)
        found = sum(segment.num_live * segment.record["recall"]["recall"] for segment in segments)
        self.recall: float = 1.0 - (served - found) / max(self.num_rows, 1)
        self.folders = [segment.folder for segment in segments]
        efforts = [[segment.folder.name, *vars(segment.effort).values()] for segment in segments]
        self.name = stable_hash([efforts, self.exact_ranges])[:16]
        if self.exact_ranges:
            log.warning(
                "%d of %d rows of %s are in no segment of its %s index and are searched exactly; "
                "`retro build --index %s` adds the segment",
                self.num_rows - served, self.num_rows, store.path, kind, kind,
            )  # fmt: skip

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int, excluded: Int64[np.ndarray, "q w"] | None = None
    ) -> Hits:
        """The k nearest rows of each query outside its excluded documents that the engines find, merged by score."""
        check_k(k)
        queries = check_queries(queries, self.store)
        lists = self._lists(queries, k, excluded) if len(queries) else iter(())
        found = next(lists, None) or no_hits(len(queries), k)
        for further in lists:
            found = merge(*found, *further, k)
        return as_hits(*found)

    def _lists(
        self, queries: np.ndarray, k: int, excluded: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows and distances of each segment, then of each range that has none."""
        for segment in self.segments:
            yield segment.search(queries, k, excluded, self.scale, once=not self.looks_again)
        for part in self.exact_ranges:
            rows, scores, _ = exact_search(self.store, queries, k, excluded, rows=part)
            yield rows, -scores.astype(np.float64)


def build_index(
    store: Store,
    kind: str = "auto",
    recall: float | None = None,
    executor: str = "local",
    workers: int | None = None,
    **settings: Any,
) -> Index:
    """Build an index of the store's searchable rows: the segments that are not there already.

    Arguments:
        kind: "auto" (routed from 200,000 rows, else scann, faiss, exact, whichever is installed first), "exact"
            (nothing to build), "scann", "routed" or "faiss", or one of these with its codes, as in "faiss:ivf-pq".
        recall: of the 10 nearest, to which each segment is tuned; None keeps what is tuned, and tunes new segments to
            the same, or to 0.95 if there are none. One that is not reached is said in the log, with the best found.
        settings: scann: leaves, leaves_to_search, soar; faiss: lists, probes; routed: lists, probes (for a query as far
            from its nearest centroid as rows are on average; others visit up to four times as many); all: codes,
            candidates (for 10 neighbors, ordered by the stored keys), training_sample, max_segment_rows, seed. Each has
            a default by the number of rows; an unknown name raises ValueError.

    Writes index/<hash>/{index.json, rows.npy, ...}, a folder a segment; see retro.retrieval.search.segments for
    which.
    """
    kind, codes = _split(resolve_kind(kind, store.num_searchable))
    if codes:
        settings = {"codes": codes, **settings}
    _check_recall(recall)
    if kind == "exact":
        _refuse_unknown(settings, {})
        return ExactIndex(store)
    chosen = _settings(kind, settings)
    check_searchable(store)
    there = _undamaged(store, kind, chosen)
    target = recall or _target(store, kind, chosen)
    work = Work(chosen["training_sample"], chosen["seed"], executor, workers)
    segments = []
    most = chosen["max_segment_rows"]
    planned = plan_segments(store, there, most)
    planned = [part for part in planned if part.folder or len(store.searchable_in(*row_range(store, part)))]
    extended = extensions(store, planned, most) if ENGINES[kind].extends else [(shards, None) for shards in planned]
    for shards, base in extended:
        if shards.folder is None:
            shards = write_dense(store, shards, kind, chosen, target, work, base)
            _say_recall(shards)
        segment = Segment(store, shards)
        if recall and segment.record["recall"]["target"] != recall:
            retune(segment, recall)
            _say_recall(segment.shards)
        segments.append(segment)
    return ApproximateIndex(store, _named(kind, chosen), segments)


def open_index(store: Store, kind: str = "auto") -> Index:
    """Open an index that `build_index` wrote; "auto" takes any, and exact search where there is none.

    Of several, the one that serves the most rows is opened, then the kind that "auto" would build, then the one of the
    highest recall; shards that it does not serve are searched exactly.
    Raises ValueError if none of that kind is there for this state of the store, or a file of it is missing or damaged.
    """
    if not (shard_ranges := served_by(store, kind)):
        return ExactIndex(store)
    record = shard_ranges[0].record
    segments = [open_segment(store, shards) for shards in shard_ranges]
    return ApproximateIndex(store, _named(record["kind"], record["settings"]), segments)


def served_by(store: Store, kind: str = "auto") -> list[ShardRange]:
    """The segments that `open_index` opens, none where it searches exactly; ValueError as there."""
    if kind == "exact":
        return []
    engine, codes = _split(kind if kind == "auto" else resolve_kind(kind))
    best = resolve_kind("auto", store.num_searchable)
    wanted = [name for name in ENGINES if engine == name or (engine == "auto" and _importable(name))]
    wanted.sort(key=lambda name: name != best)  # of those that serve as many rows, the first
    found = [(family, -order) for order, name in enumerate(wanted) for family in _families(store, name, codes)]
    if found:
        return max(found, key=lambda one: (_rows(store, one[0]), one[1], _recall(one[0])))[0]
    if kind == "auto":
        return []
    raise ValueError(
        f"{store.path} has no {kind} index for its present state; build one with `retro build --index {kind}`"
    )


def measured_recall(store: Store) -> dict[str, dict[str, Any]]:
    """For each engine, what index.json of the index that `open_index` opens records of its recall, and the recall of
    the indexes of words that are there for this state of the store."""
    found = {}
    for kind in ENGINES:
        if families := _families(store, kind):
            best = max(families, key=lambda shard_ranges: (_rows(store, shard_ranges), _recall(shard_ranges)))
            largest = max(best, key=lambda shards: shards.record["rows"])
            found[kind] = largest.record["recall"] | {"recall": _recall(best)}
    for _, record in index_records(store):
        if record.get("kind") in LEXICAL_KINDS and record.get("store") == store.fingerprint:
            found[record["kind"]] = {"k": TUNED_NEIGHBORS, "recall": record["recall"]}
    return found


def resolve_kind(kind: str, rows: int = 0) -> str:
    """The kind that "auto" stands for here with so many rows; ValueError for an unknown kind or one not installed."""
    if kind == "auto" and rows >= ROUTED_ROWS and _importable("routed"):
        return "routed"
    if kind == "auto":
        return next((name for name in ENGINES if _importable(name)), "exact")
    engine, codes = _split(kind)
    if kind in LEXICAL_KINDS:
        raise ValueError(
            f"{kind} is a lexical search, which needs no index of keys; open it by Retriever(store, {kind!r})"
        )
    if engine not in ("exact", *ENGINES, *LEXICAL_KINDS):
        raise ValueError(f"the index kind must be auto, exact, {', '.join(ENGINES)}, tfidf or bm25, not {kind!r}")
    all_codes = ENGINES[engine].codes if engine in ENGINES else ("exact",) * (engine in LEXICAL_KINDS)
    if codes not in (None, *all_codes) or engine in LEXICAL_KINDS:
        known = ", ".join(f"{engine}:{name}" for name in all_codes) or engine
        raise ValueError(f"the index kind {kind!r} is unknown; of its engine there are {known}")
    if not _importable(engine):
        raise ValueError(f"the index kind {kind} needs a library that is not installed; {ENGINES[engine].remedy}")
    return kind


def check_searchable(store: Store) -> None:
    """ValueError for a store of which no chunk is long enough to be found."""
    if not store.num_live_chunks:
        raise ValueError(f"{store.path} holds no document any more; add some")
    if not store.num_searchable:
        raise ValueError(
            f"{store.path} has no chunk of at least {store.min_chunk_len} tokens to index; "
            "build it with a smaller min_chunk_len"
        )


def _importable(kind: str) -> bool:
    return kind == "exact" or find_spec(ENGINES[kind].module) is not None


def _split(kind: str) -> tuple[str, str | None]:
    """ "faiss:ivf-pq" to engine and codes."""
    engine, _, codes = kind.partition(":")
    return engine, codes or None


def _named(kind: str, settings: dict[str, Any]) -> str:
    return f"{kind}:{settings['codes']}" if settings["codes"] else kind


def _settings(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a kind; None is the default by the number of rows of the segment."""
    common = {"codes": None, "candidates": None, "training_sample": ENGINES[kind].training_sample, "seed": 0}
    common["max_segment_rows"] = ENGINES[kind].most_rows
    defaults = {**dict.fromkeys(ENGINES[kind].settings), **common}
    _refuse_unknown(given, defaults)
    chosen = {**defaults, **given}
    if chosen["codes"] not in (None, *ENGINES[kind].codes):
        raise ValueError(f"codes of {kind} must be one of {', '.join(ENGINES[kind].codes)}, not {chosen['codes']!r}")
    for name, value in chosen.items():
        if name not in ("seed", "codes", "soar") and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return chosen


def _refuse_unknown(given: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the index takes no setting {unknown[0]!r}; it takes {', '.join(known) or 'none'}")


def _check_recall(recall: float | None) -> None:
    if recall is not None and not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1, not {recall}")


def _say_recall(shards: ShardRange) -> None:
    found, layout = shards.record["recall"], shards.record["layout"]
    log.log(
        logging.INFO if found["reached"] else logging.WARNING,
        "%s: %d rows as %s, recall@%d %.4f with %d of %d lists and %d candidates%s",
        shards.folder, shards.record["rows"], layout["codes"], found["k"], found["recall"], found["lists_searched"],
        layout["lists"], found["candidates"],
        "" if found["reached"] else f"; the recall of {found['target']:g} that was asked for is not reached",
    )  # fmt: skip


def _target(store: Store, kind: str, settings: dict[str, Any]) -> float:
    """The recall to which segments of these settings were tuned in any generation of the store, else the default."""
    records = [record for _, record in segment_records(store, kind) if record["settings"] == settings]
    return max((record["recall"]["target"] for record in records), default=RECALL)


def _undamaged(store: Store, kind: str, settings: dict[str, Any]) -> list[ShardRange]:
    """The segments of these settings that serve the store; damaged ones and those of another format are deleted."""
    found = [shards for shards in find_segments(store, kind) if shards.record["settings"] == settings]
    for shards in found:
        try:
            _check_format(shards)
            check_files(shards.folder, shards.record["files"], checksums=True)
        except ValueError as error:
            log.warning("building the index again: %s", error)
            delete(shards.folder, store.path)
    return cover(store, [shards for shards in found if shards.folder.is_dir()])


def _check_format(shards: ShardRange) -> None:
    kind, version = shards.record["kind"], shards.record.get("format_version")
    if version != ENGINES[kind].format_version:
        raise ValueError(
            f"{shards.folder} has format {version}, which this version of the library does not read; "
            f"build it again with `retro build --index {kind}`"
        )


def _families(store: Store, kind: str, codes: str | None = None) -> list[list[ShardRange]]:
    """Of each group of segments of the same settings, those that serve the store."""
    groups: dict[str, list[ShardRange]] = {}
    for shards in find_segments(store, kind):
        try:
            _check_format(shards)
        except ValueError as error:
            log.warning("an index is left out: %s", error)
            continue
        if codes in (None, shards.record["settings"]["codes"]):
            groups.setdefault(stable_hash(shards.record["settings"]), []).append(shards)
    return [cover(store, group) for group in groups.values()]


def _rows(store: Store, shard_ranges: list[ShardRange]) -> int:
    return sum(shards.record["rows"] for shards in shard_ranges)


def _recall(shard_ranges: list[ShardRange]) -> float:
    rows = [shards.record["rows"] for shards in shard_ranges]
    return float(np.average([shards.record["recall"]["recall"] for shards in shard_ranges], weights=rows))
