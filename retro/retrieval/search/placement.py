"""Which shard of a distributed search holds what: ranges of rows, segments, or some groups of a segment's lists.

exact                     equal ranges of rows
routed                    groups of lists: those that lie close to each other on one shard, so that a query is sent
                          to few of them
other engines, words      whole segments, each to the shard of the fewest rows
the second stage, ">"     rows, each to the shard that has its words; of an embedder, equal ranges of rows
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.search import continuation, lexical
from retro.retrieval.search.engines import IndexLayout
from retro.retrieval.search.engines.routed import open_groups
from retro.retrieval.search.engines.routing import NUM_LISTS_OF_A_ROW
from retro.retrieval.search.index import served_by
from retro.retrieval.search.searchers import is_keyless, parse_kind, scored_by_words
from retro.retrieval.search.segments import ShardRange, num_rows, row_range, uncovered
from retro.retrieval.store.store import Store


@dataclass(frozen=True)
class ShardAssignment:
    """What one shard holds of one kind of search.

    ranges: rows that are searched exactly, or, of a second stage, that are scored.
    segments: their first shard of the store, the one behind the last, and the folder's name.
    lists: the same, and which groups of the segment's lists.
    """

    kind: str
    ranges: list[tuple[int, int]] = field(default_factory=list)
    segments: list[tuple[int, int, str]] = field(default_factory=list)
    lists: list[tuple[int, int, str, list[int]]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"rows {start} to {stop - 1}" for start, stop in self.ranges]
        segments = [f"segment {name}" for _, _, name in self.segments]
        lists = [f"{len(groups)} groups of lists of segment {name}" for *_, name, groups in self.lists]
        of_index = [f"{part} of {self.kind}" for part in segments + lists]
        return ", ".join(rows + of_index)

    @property
    def is_empty(self) -> bool:
        """Whether it is nothing at all."""
        return not (self.ranges or self.segments or self.lists)


Plan = list[dict[str, ShardAssignment]]  # of each shard, by kind; a second stage has its > before it


def plan_shards(store: Store, kind: str, num_shards: int) -> Plan:
    """What each shard holds of a kind of search; kinds joined by "+" or ">" are spread over the same shards.

    There may be fewer shards than asked for, where there are fewer segments. Lexical indexes and what a second stage
    learns are built if they are missing. Raises ValueError as `open_searcher` does.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, not {num_shards}")
    first, separator, second = kind.partition(">")
    names = parse_kind(first, is_keyless(store))
    words = scored_by_words(second) if separator else None
    if second == continuation.KIND:
        continuation.build_continuation(store)
    shards: Plan = [{} for _ in range(num_shards)]
    for place, name in enumerate(name for name in names if name in lexical.KINDS):
        for number, part in enumerate(_of_words(store, name, num_shards)):
            shards[-1 - (place + number) % num_shards][name] = part
    for name in names:
        if name not in lexical.KINDS:
            _deal(shards, name, _of_keys(store, name, num_shards))
    if separator:
        parts = _of_words(store, words, num_shards, scored=True) if words else _of_rows(store, num_shards)
        _deal(shards, f">{second}", parts)
    return [shard for shard in shards if shard]


def _deal(shards: Plan, name: str, parts: Iterable[ShardAssignment]) -> None:
    for shard, part in zip(shards, parts, strict=False):
        if not part.is_empty:
            shard[name] = part


def _of_rows(store: Store, num_shards: int) -> list[ShardAssignment]:
    borders = [number * store.num_chunks // num_shards for number in range(num_shards + 1)]
    ranges = [(start, stop) for start, stop in zip(borders[:-1], borders[1:], strict=True) if start < stop]
    return [ShardAssignment("exact", [part]) for part in ranges]


def _of_words(store: Store, kind: str, num_shards: int, scored: bool = False) -> list[ShardAssignment]:
    """Segments of an index of words; with the rows of each where these are `scored`."""
    parts = [ShardAssignment(kind) for _ in range(num_shards)]
    segments = [segment.shards for segment in lexical.build_lexical(store, kind, own=()).segments]
    for number, shards in _least_loaded(store, segments, np.zeros(num_shards, np.int64)):
        parts[number].segments.append((shards.first, shards.stop, shards.folder.name))
        if scored:
            parts[number].ranges.append(row_range(store, shards))
    return [part for part in parts if not part.is_empty]


def _of_keys(store: Store, kind: str, num_shards: int) -> list[ShardAssignment]:
    """Groups of lists; then other segments, and ranges of shards without one."""
    if not (segments := served_by(store, kind)):
        return _of_rows(store, num_shards)
    parts = [ShardAssignment(kind) for _ in range(num_shards)]
    divided = [shards for shards in segments if is_divided(shards)]
    loads, placed = _place_groups(store, divided, num_shards)
    for shards, of_group in zip(divided, placed, strict=True):
        for number in np.unique(of_group):
            groups = np.flatnonzero(of_group == number).tolist()
            parts[number].lists.append((shards.first, shards.stop, shards.folder.name, groups))
    whole = [shards for shards in segments if not is_divided(shards)] + uncovered(store, segments)
    for number, shards in _least_loaded(store, whole, loads):
        if shards.folder is None:
            parts[number].ranges.append(row_range(store, shards))
        else:
            parts[number].segments.append((shards.first, shards.stop, shards.folder.name))
    return [part for part in parts if not part.is_empty]


def is_divided(shards: ShardRange) -> bool:
    """Whether a segment's lists are spread over the shards."""
    layout = IndexLayout(**shards.record["layout"])
    return layout.engine == "routed" and layout.lists > 0


def _least_loaded(
    store: Store, parts: list[ShardRange], loads: Int64[np.ndarray, " n"]
) -> Iterator[tuple[int, ShardRange]]:
    """Each part, the largest first, and which has the fewest rows so far, to whose load they are added."""
    for shards in sorted(parts, key=lambda shards: (-num_rows(store, shards), shards.first)):
        number = int(loads.argmin())
        loads[number] += num_rows(store, shards)
        yield number, shards


def _place_groups(
    store: Store, segments: list[ShardRange], num_shards: int
) -> tuple[Int64[np.ndarray, " n"], list[Int64[np.ndarray, " g"]]]:
    """The rows that each shard gets, and where the groups of each segment go; those of all are placed together."""
    centroids, rows = [np.zeros((0, store.key_dim), np.float32)], [np.zeros(0, np.int64)]
    for shards in segments:
        router = open_groups(shards.folder, shards.record, [])
        centroids.append(router.groups)
        rows.append(np.bincount(router.group_of_list, router.lengths).astype(np.int64))
    placed = place_by_similarity(np.concatenate(centroids), np.concatenate(rows), num_shards)
    loads = np.bincount(placed, np.concatenate(rows), num_shards).astype(np.int64) // NUM_LISTS_OF_A_ROW
    return loads, np.split(placed, np.cumsum([len(of) for of in rows])[:-1])[1:]


def place_by_similarity(
    centroids: Float32[np.ndarray, "g d"], rows: Int64[np.ndarray, " g"], num_shards: int
) -> Int64[np.ndarray, " g"]:
    """A shard for each group: all are cut in two across the direction in which they differ most, where the rows on
    both sides are as many as the shards there, and each side again."""
    placed = np.zeros(len(rows), np.int64)

    def cut(groups: np.ndarray, first: int, count: int) -> None:
        if count == 1 or len(groups) < 2:
            placed[groups] = first
            return
        weight = rows[groups, None] + 1.0
        apart = centroids[groups] - (weight * centroids[groups]).sum(0) / weight.sum()
        along = apart @ np.linalg.eigh(apart.T @ (weight * apart))[1][:, -1]
        order, left = groups[np.argsort(along, kind="stable")], count // 2
        share = np.cumsum(rows[order]) * count / max(rows[groups].sum(), 1)
        at = int(np.clip(np.abs(share - left).argmin() + 1, 1, len(order) - 1))
        cut(order[:at], first, left)
        cut(order[at:], first + left, count - left)

    cut(np.arange(len(rows)), 0, num_shards)
    return placed
