"""Compaction: removed text is deleted from disk, and small shards are merged."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from retro.common.files import delete, folder_record, new_npy, save_npy, sync, written_aside
from retro.retrieval.building.generations import clear_leftovers, open_generation, read_record, save_generation, writing
from retro.retrieval.building.tasks import write_documents
from retro.retrieval.store.format import CHUNK_DTYPE
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

_COPIED_ROWS = 1 << 16


def compact(path: str | Path, index: bool = True, progress: bool = False) -> Store:
    """Delete removed text from disk, merge small shards, and open the new generation; rows get new numbers.

    Shards that hold nothing removed, and cannot be merged with the next into one of at most `shard_chunks`, stay as
    they are; the others are written anew without it. Then the old ones are deleted, with every index and neighbor table
    that was made of them. Stores that are open keep reading what they have mapped.

    index: bring the indexes that the store has up to date.
    """
    with writing(Path(path)) as store:
        groups = _groups(store)
        if any(_is_rewritten(store, group) for group in groups) or len(store.removed_documents):
            with _bar(store, groups, progress) as bar:
                changes = _compacted(store, groups, bar)
            save_generation(store, "compact", changes, {})
            clear_leftovers(Store.open(store.path), readers=True)  # the removed text, whatever becomes of indexes
        else:
            log.info("%s is compact already", path)
        new = open_generation(store.path, index)
        _delete_older(new)
        return new


# Compact


def _groups(store: Store) -> list[list[int]]:
    """Numbers of consecutive shards that become one: as many as fit into `shard_chunks` without their removed rows."""
    limit, groups, size = store.manifest["settings"]["shard_chunks"], [], 0
    for number in range(len(store.shards)):
        rows = store.shards[number]["rows"] - _num_removed(store, number)
        if groups and size + rows <= limit:
            groups[-1].append(number)
            size += rows
        else:
            groups.append([number])
            size = rows
    return groups


def _removed_in(store: Store, number: int) -> np.ndarray:
    """Which rows [rows] of a shard are removed."""
    record = store.shards[number]
    return store.is_removed(record["first_row"] + np.arange(record["rows"]))


def _num_removed(store: Store, number: int) -> int:
    """How many rows of a shard are removed."""
    first, rows = store.shards[number]["first_row"], store.shards[number]["rows"]
    low, high = np.searchsorted(store.removed_spans[:, 0], [first, first + rows])
    return int(store.removed_spans[low:high, 1].sum())


def _is_rewritten(store: Store, group: list[int]) -> bool:
    return len(group) > 1 or _num_removed(store, group[0]) > 0


def _bar(store: Store, groups: list[list[int]], progress: bool) -> Any:
    """The chunks that are written anew, their rate, and the time that is left."""
    from tqdm.auto import tqdm

    rewritten = [number for group in groups if _is_rewritten(store, group) for number in group]
    rows = sum(store.shards[number]["rows"] - _num_removed(store, number) for number in rewritten)
    return tqdm(total=rows, desc="compacting", unit=" chunks", disable=not progress or None, smoothing=0.05)


def _compacted(store: Store, groups: list[list[int]], bar: Any) -> dict[str, Any]:
    """What the manifest says once every group is one shard; writes those shards."""
    records: list[dict[str, Any]] = []
    number = 1 + max((int(record["name"]) for record in store.shards), default=-1)
    for group in groups:
        if not _is_rewritten(store, group):
            record = store.shards[group[0]]
        else:
            record = _write_shard(store, group, f"{number:05d}", bar)
            number += 1
        if record["rows"]:
            first_row = sum(before["rows"] for before in records)
            first_document = sum(before["documents"] for before in records)
            records.append({**record, "first_row": first_row, "first_document": first_document})
    truncated = sum(record["truncated_chunks"] for record in records)
    return {"shards": records, "removed": None, "counts": {**store.manifest["counts"], "truncated_chunks": truncated}}


def _write_shard(store: Store, group: list[int], name: str, bar: Any) -> dict[str, Any]:
    """Write one shard of what is left of several, and return its record."""
    live = [~_removed_in(store, number) for number in group]
    rows = int(sum(part.sum() for part in live))
    if not rows:
        return {"rows": 0}
    folder = store.path / "shards" / name
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
    table = _write_documents(store, group, folder)
    chunks = _write_chunks(store, group, live, folder)
    arrays = [store.shard_arrays(number) for number in group]
    _copy_rows([one.tokens for one in arrays], live, (rows * store.chunk_len,), folder / "tokens.npy")
    _copy_rows([one.keys for one in arrays], live, (rows, store.key_dim), folder / "keys.npy")
    bar.update(rows)
    log.info("%s: %d chunks of %d shards written to shards/%s", store.path, rows, len(group), name)
    return {
        "name": name,
        "generation": store.generation + 1,
        "rows": rows,
        "documents": table.num_rows,
        "tokens": int(chunks["length"].sum(dtype=np.int64)),
        "bytes": int(table.column("num_bytes").to_numpy().sum()),
        "short_chunks": int((chunks["length"] < store.min_chunk_len).sum()),
        "truncated_chunks": min(sum(store.shards[number]["truncated_chunks"] for number in group), rows),  # at most
        "files": folder_record(folder),
    }


def _write_documents(store: Store, group: list[int], folder: Path) -> Any:
    """Write documents.parquet of the documents that are left, and return the table."""
    import pyarrow as pa

    tables = [store.live_table(number) for number in group]
    table = pa.concat_tables(tables, promote_options="default")  # signatures are in some shards only
    counts = table.column("num_chunks").to_numpy()
    place = table.column_names.index("first_chunk")
    table = table.set_column(place, table.schema.field(place), pa.array(np.cumsum(counts) - counts))
    write_documents(folder / "documents.parquet", table)
    return table


def _write_chunks(store: Store, group: list[int], live: list[np.ndarray], folder: Path) -> np.ndarray:
    """Write chunks.npy of the rows that are left, their documents counted anew, and return it."""
    parts, documents = [np.zeros(0, CHUNK_DTYPE)], 0
    for number, kept in zip(group, live, strict=True):
        chunks = np.array(store.shard_arrays(number).chunks[kept])
        if len(chunks):
            starts = np.diff(chunks["document"].astype(np.int64), prepend=-1) != 0
            chunks["document"] = documents + np.cumsum(starts) - 1
            documents = int(chunks["document"][-1]) + 1
            parts.append(chunks)
    save_npy(folder / "chunks.npy", np.concatenate(parts))
    return np.concatenate(parts)


def _copy_rows(arrays: list[Any], live: list[np.ndarray], shape: tuple[int, ...], file: Path) -> None:
    """Write the rows that are left of several arrays [rows, width] as one array of a shape that holds them all."""
    with written_aside(file) as aside:
        out = new_npy(aside, arrays[0].dtype, shape)
        rows, at = out.reshape(-1, arrays[0].shape[1]) if out.size else out, 0
        for array, kept in zip(arrays, live, strict=True):
            for start in range(0, len(array), _COPIED_ROWS):
                block = array[start : start + _COPIED_ROWS][kept[start : start + _COPIED_ROWS]]
                rows[at : at + len(block)] = block
                at += len(block)
        out.flush()
        del rows, out


def _delete_older(store: Store) -> None:
    """Delete the indexes and neighbor tables that were made of older generations."""
    present = {store.shard_fingerprint(number) for number in range(len(store.shards))}
    files = [*store.path.glob("index/*/index.json"), *store.path.glob("neighbors/*/neighbors.json")]
    for file in (file for file in files if re.fullmatch("[0-9a-f]{16}", file.parent.name)):
        record = read_record(file)
        is_of_shards = bool(record.get("shards")) and set(record["shards"]) <= present
        if record.get("store") != store.fingerprint and not is_of_shards:
            log.info("deleting %s, which is of an older generation", file.parent)
            delete(file.parent, store.path)
