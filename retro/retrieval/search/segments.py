"""Indexes in segments: each a folder index/<hash>/ that serves the rows of whole consecutive shards.

A segment is keyed by its kind, its settings and the fingerprints of its shards, and counts rows from its first shard.
So a shard that is added needs a segment of its own and leaves the others as they are, documents that are removed
leave all of them (their rows are dropped from the answers), and `compact` keeps those whose shards it kept.

When more than 8 segments would serve a store, the newest are joined, back to front, while the one before has less than
twice the rows joined so far and all have at most `max_rows`: their number grows with the logarithm of the rows, and a
row is indexed again that often. An engine that can extend a segment puts new shards into the one before them instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32

from retro.common.checksums import open_array
from retro.common.files import clear_abandoned, delete, folder_record, folder_written_aside, new_npy, stable_hash
from retro.common.own import check_no_links
from retro.common.records import FILES, load_record, save_record
from retro.common.values import CountOrZero, check_record
from retro.retrieval.search.exact import blocks
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

MAX_SEGMENTS = 8
_FIELDS = {"kind": str, "settings": dict[str, Any], "shards": list[str], "skipped": str | None, "rows": CountOrZero}
_FIELDS |= {"files": FILES}
_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True)
class ShardRange:
    """The shards first .. stop - 1 of a store, and the folder and record of the segment that serves them, if any."""

    first: int
    stop: int
    folder: Path | None = None
    record: dict[str, Any] | None = None


class StoreRows:
    """The store rows of a segment, ascending; its own are counted from the first row of its shards and may lie in a
    file, memory-mapped."""

    def __init__(self, first: int, own: UInt32[np.ndarray, " rows"]) -> None:
        self.first, self._own = first, np.asarray(own)

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, chosen: Any) -> Int64[np.ndarray, "*chosen"]:
        """Those at some places of the segment."""
        return self.first + self._own[chosen].astype(np.int64)

    def count_to(self, own: int) -> int:
        """How many are not above one of its own rows, which is given as these are: numpy would copy all into another
        type."""
        return int(np.searchsorted(self._own, self._own.dtype.type(own), "right"))

    def count_within(self, spans: Int64[np.ndarray, "q w 2"]) -> Int64[np.ndarray, " q"]:
        """How many lie in any of w spans of store rows that have none in common."""
        own = np.clip(spans - self.first, 0, np.iinfo(self._own.dtype).max).astype(self._own.dtype)
        return np.diff(np.searchsorted(self._own, own))[..., 0].sum(-1)


def row_range(store: Store, shards: ShardRange) -> tuple[int, int]:
    """The first row of the shards and the first behind them."""
    first, last = store.shards[shards.first], store.shards[shards.stop - 1]
    return first["first_row"], last["first_row"] + last["rows"]


def num_rows(store: Store, shards: ShardRange) -> int:
    start, stop = row_range(store, shards)
    return stop - start


def find_segments(store: Store, kind: str) -> list[ShardRange]:
    """The segments of a kind that serve shards of the store as it is, whatever their settings."""
    fingerprints = [store.shard_fingerprint(number) for number in range(len(store.shards))]
    found = []
    for folder, record in segment_records(store, kind):
        served = record["shards"]
        for first in range(len(fingerprints) - len(served) + 1):
            shards = ShardRange(first, first + len(served), folder, record)
            if fingerprints[first : shards.stop] == served and _is_whole(store, shards):
                found.append(shards)
    return found


def segment_records(store: Store, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """The folders and records of all segments of a kind, also of those that serve other generations."""
    found = index_records(store)
    return [(folder, record) for folder, record in found if record.get("shards") and record["kind"] == kind]


def index_records(store: Store) -> list[tuple[Path, dict[str, Any]]]:
    """The folders and records of all segments and indexes; {} for one that is damaged."""
    files = sorted((store.path / "index").glob("[!.]*/index.json"))
    return [(file.parent, _read(file)) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        record = load_record(file)
        return check_record(file, record, _FIELDS) if "shards" in record else record
    except ValueError as error:
        log.warning("an index is left out: %s", error)
        return {}


def _is_whole(store: Store, shards: ShardRange) -> bool:
    """Whether a segment that was built after a removal has all rows that this generation of the store searches."""
    if shards.record["skipped"] is None:
        return True
    try:
        rows = np.asarray(open_array(shards.folder, "rows.npy", shards.record["files"]))
    except ValueError:
        return False
    first, last = row_range(store, shards)
    return all(np.isin(searchable_block(store, first, part), rows).all() for part in blocks(first, last, _BLOCK_ROWS))


def searchable_block(store: Store, first: int, part: tuple[int, int]) -> UInt32[np.ndarray, " c"]:
    """The searchable rows of a range, counted from `first`."""
    return (store.searchable_in(*part) - first).astype(np.uint32)


def write_rows(store: Store, shards: ShardRange, file: Path) -> UInt32[np.ndarray, " c"]:
    """Write the searchable rows of the shards, counted from their first, and return them memory-mapped."""
    first, last = row_range(store, shards)
    parts = list(blocks(first, last, _BLOCK_ROWS))
    count, at = sum(len(store.searchable_in(*part)) for part in parts), 0
    rows = new_npy(file, np.uint32, (count,))
    for part in parts:
        found = searchable_block(store, first, part)
        rows[at : at + len(found)] = found
        at += len(found)
    rows.flush()
    return rows


def cover(store: Store, found: Iterable[ShardRange]) -> list[ShardRange]:
    """Of the segments found, those that together serve the most rows, each row once; fewer are better than more."""
    ending: dict[int, list[ShardRange]] = {}
    for shards in found:
        ending.setdefault(shards.stop, []).append(shards)
    best: list[tuple[int, int, Any]] = [(0, 0, None)]  # rows, -segments, (segment, those before it)
    for stop in range(1, len(store.shards) + 1):
        options = [best[-1]]
        for shards in ending.get(stop, []):
            rows, count, before = best[shards.first]
            options.append((rows + num_rows(store, shards), count - 1, (shards, before)))
        best.append(max(options, key=lambda option: option[:2]))
    chosen, chain = [], best[-1][2]
    while chain is not None:
        chosen.append(chain[0])
        chain = chain[1]
    return chosen[::-1]


def uncovered(store: Store, chosen: list[ShardRange]) -> list[ShardRange]:
    """The shards between the segments of a cover."""
    gaps, at = [], 0
    for shards in [*chosen, ShardRange(len(store.shards), len(store.shards))]:
        if at < shards.first:
            gaps.append(ShardRange(at, shards.first))
        at = shards.stop
    return gaps


def plan_segments(store: Store, chosen: list[ShardRange], max_rows: int) -> list[ShardRange]:
    """The segments that should serve a store of which some are there: see the rule above; new ones have no folder."""
    new = [part for gap in uncovered(store, chosen) for part in _split(store, gap, max_rows)]
    planned = sorted([*chosen, *new], key=lambda shards: shards.first)
    while len(planned) > MAX_SEGMENTS:
        joined, start = num_rows(store, planned[-1]), len(planned) - 1
        while start and (rows := num_rows(store, planned[start - 1])) < 2 * joined and joined + rows <= max_rows:
            joined, start = joined + rows, start - 1
        if start == len(planned) - 1:
            break
        planned[start:] = [ShardRange(planned[start].first, planned[-1].stop)]
    return planned


def extensions(store: Store, planned: list[ShardRange], max_rows: int) -> list[tuple[ShardRange, ShardRange | None]]:
    """Planned segments, new ones joined to those before them, each with the one that is there and that it extends."""
    found: list[tuple[ShardRange, ShardRange | None]] = []
    for shards in planned:
        before, base = found[-1] if found else (None, None)
        if before is None or shards.folder or num_rows(store, before) + num_rows(store, shards) > max_rows:
            found.append((shards, None))
        else:
            found[-1] = ShardRange(before.first, shards.stop), before if before.folder else base
    return found


def _split(store: Store, shards: ShardRange, max_rows: int) -> list[ShardRange]:
    """Shards cut into ranges of at most `max_rows` rows, or of one shard where that has more."""
    parts: list[ShardRange] = []
    for number in range(shards.first, shards.stop):
        longer = ShardRange(parts[-1].first, number + 1) if parts else None
        if longer and num_rows(store, longer) <= max_rows:
            parts[-1] = longer
        else:
            parts.append(ShardRange(number, number + 1))
    return parts


def write_segment(store: Store, shards: ShardRange, record: dict[str, Any], write: Any) -> ShardRange:
    """Write the segment of some shards through write(folder, rows) -> further fields of its record; rows.npy is there.

    record: kind and settings. Returns the shards with its folder and record.
    """
    first, last = row_range(store, shards)
    record = record | {
        "shards": [store.shard_fingerprint(number) for number in range(shards.first, shards.stop)],
        "skipped": _skipped(store, first, last),
    }
    folder = store.path / "index" / stable_hash(record)[:16]

    def write_record(aside: Path) -> dict[str, Any]:
        rows = write_rows(store, shards, aside / "rows.npy")
        return record | {"rows": len(rows)} | write(aside, rows)

    return ShardRange(
        shards.first, shards.stop, folder, write_index(store, folder, write_record, range(shards.first, shards.stop))
    )


def write_index(
    store: Store, folder: Path, write: Callable[[Path], dict[str, Any]], numbers: Iterable[int] | None = None
) -> dict[str, Any]:
    """Write a folder of index/ through write(a temporary folder) -> its record, and return what its index.json says.

    numbers: the shards that it is made of; None is all. Nothing is left of it, and ValueError raised, if they are no
    longer there (see `Store.check_on_disk`).
    """
    store.check_on_disk(numbers)
    check_no_links(store.path, "index")
    folder.parent.mkdir(exist_ok=True)
    clear_abandoned(folder.parent, store.path)
    try:
        with folder_written_aside(folder) as aside:
            try:
                record = write(aside)
                save_record(aside / "index.json", record | {"files": folder_record(aside)})
            except (OSError, RuntimeError) as error:  # an engine's own, too
                if not aside.is_dir():  # `compact` deletes what is being written of any generation
                    raise FileNotFoundError(f"{aside} is gone") from error
                raise
            store.check_on_disk(numbers)
        store.check_on_disk(numbers)
        return load_record(folder / "index.json")
    except Exception as error:
        try:
            store.check_on_disk(numbers)
        except ValueError:
            delete(folder, store.path)
            raise
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{folder} was deleted while it was written; open {store.path} again") from error
        raise


def _skipped(store: Store, first: int, last: int) -> str | None:
    """Which documents between two rows are removed already, as a hash; None if none is."""
    rows = [part for part in blocks(first, last, _BLOCK_ROWS) if store.is_removed(np.arange(*part)).any()]
    if not rows:
        return None
    removed = [(low - first + np.flatnonzero(store.is_removed(np.arange(low, high)))).tolist() for low, high in rows]
    return stable_hash(removed)[:16]
