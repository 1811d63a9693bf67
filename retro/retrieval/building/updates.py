"""The next generation of a store: documents added, documents removed, removed text deleted from disk.

An update writes new files beside the old ones and then one new manifest, which is the whole of the change: killed at
any moment it leaves the old generation or the new one, and the same command, run again, finishes. Only `compact`
deletes what an older generation needs, and stores that are open keep reading their maps of it. One process writes at a
time; readers never wait. A reader of a generation that was compacted goes on with what it has opened, but cannot open
an index that is not there: see `Store.check_on_disk`.

What depends on a generation: indexes are brought up to date by the update itself; neighbor tables are of one generation
(after an update run `retro neighbors` again); training on the new generation has another order of windows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from retro.retrieval.building.build import BuildSettings, plan_build, write_shards
from retro.retrieval.building.parts import write_documents
from retro.retrieval.building.settling import PARTS
from retro.retrieval.embedding.embedder import Embedder, NoEmbedder
from retro.retrieval.files import (
    TEMPORARY_PREFIX,
    delete,
    file_record,
    folder_record,
    is_abandoned,
    load_json,
    save_json,
    save_npy,
    sync,
    write_lock,
    written_aside,
)
from retro.retrieval.indexing.index import KINDS, build_index
from retro.retrieval.indexing.lexical import build_lexical
from retro.retrieval.indexing.search import embedder_of, is_keyless
from retro.retrieval.store import CHUNK_DTYPE, FORMAT_VERSION, Store

log = logging.getLogger(__name__)

_COPIED_ROWS = 1 << 16


def add_documents(
    path: str | Path,
    inputs: Sequence[str],
    embedder: Embedder | None = None,
    decontaminate: Sequence[str] | None = None,
    index: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Store:
    """Add documents in new shards behind the others, and open the new generation.

    They are cut and embedded as the store's are: with its tokenizer, embedder, chunk_len, min_chunk_len and key_dtype.
    The last addition, given again, is opened as it is.

    Arguments:
        inputs: see `retro.corpus.read_documents`.
        embedder: None loads the one that the manifest names.
        decontaminate: held-out inputs. A store that was built with some wants them again, or [] for none.
        index: bring the indexes that the store has up to date.
        settings: fields of `BuildSettings` that say how documents are read and filtered (text_field, on_bad,
            deduplicate, min_date, ...) and who does the work (executor, workers, batch_size); as the store was built
            where they are not given. deduplicate compares with the store's documents as well, but for those that came
            in without it, or with another one: how many these are is logged. It needs the memory that a build of all
            these documents would (see `retro.retrieval.filters.Deduplicator`).

    Writes shards/<new>/, rejects/<generation>/ and the manifest. Raises ValueError and leaves the store as it was: an
    id that it holds, a record that is no document, no document at all, a setting that the store has fixed.
    """
    with _writing(Path(path), keep_work=True) as store:
        embedder = _embedder_for(store, embedder)
        chosen = _settings_like(store, inputs, decontaminate, settings)
        plan = plan_build(chosen, store.tokenizer, embedder) | {"generation": store.generation + 1}
        said = _said(store, plan)
        if _is_last(store, "add", said):
            log.info("%s holds these documents already", path)
        else:
            try:
                written = write_shards(store, chosen, plan, embedder, progress)
            except ValueError:
                _clear_leftovers(store)
                raise
            _save_generation(store, "add", _with(store, written), said | {"counts": written["counts"]})
        new = _opened(store.path, index)
        _clear_leftovers(new)
        return new


def remove_documents(path: str | Path, ids: Collection[str], index: bool = True) -> Store:
    """Remove documents by id, and open the new generation.

    From now on no search, value or text of the store gives anything of them; their bytes stay on disk, for readers of
    older generations, until `compact`. Their ids may be added again. Ids that are removed already are left as they are.

    Arguments:
        index: bring the indexes that the store has up to date.

    Writes removed/<generation>.npy and the manifest. Raises ValueError and writes nothing for an id that the store does
    not hold.
    """
    with _writing(Path(path), keep_work=True) as store:
        rows = _rows_to_remove(store, list(ids))
        if not len(rows):
            log.info("%s: all of these documents are removed already", path)
        else:
            _save_generation(store, "remove", _without(store, rows), {"documents": len(rows)})
        return _opened(store.path, index)


def compact(path: str | Path, index: bool = True, progress: bool = False) -> Store:
    """Delete removed text from disk, merge small shards, and open the new generation; rows get new numbers.

    Shards that hold nothing removed, and cannot be merged with the next into one of at most `shard_chunks`, stay as
    they are; the others are written anew without it. Then the old ones are deleted, with every index and neighbor table
    that was made of them. Stores that are open keep reading what they have mapped.

    index: bring the indexes that the store has up to date.
    """
    with _writing(Path(path)) as store:
        groups = _groups(store)
        if any(_is_rewritten(store, group) for group in groups) or len(store.removed_documents):
            with _bar(store, groups, progress) as bar:
                changes = _compacted(store, groups, bar)
            _save_generation(store, "compact", changes, {})
            _clear_leftovers(Store.open(store.path), readers=True)  # the removed text, whatever becomes of indexes
        else:
            log.info("%s is compact already", path)
        new = _opened(store.path, index)
        _delete_older(new)
        return new


# Writers


@contextmanager
def _writing(path: Path, keep_work: bool = False) -> Iterator[Store]:
    """Hold the store's lock, clear away what a killed writer left, and give the present generation.

    keep_work: leave what an unfinished addition has done, which the same addition takes up.
    """
    Store.open(path)  # else the lock would be written into a folder that is no store
    with write_lock(path):
        store = Store.open(path)
        _clear_leftovers(store, keep_work)
        yield store


def _clear_leftovers(store: Store, keep_work: bool = False, readers: bool = False) -> None:
    """Delete temporary files, and what no manifest came to name or none names any more.

    readers: also of indexes that processes are building, who then say that the store was compacted.
    """
    path, generation = store.path, store.generation
    updates = store.manifest.get("updates", [])
    compacted = max((update["generation"] for update in updates if update["verb"] == "compact"), default=0)
    stale = [file for file in path.glob("removed/[0-9]*.npy") if not compacted < int(file.stem) <= generation]
    stale += (folder for folder in path.glob("rejects/[0-9]*") if int(folder.name) > generation)
    for place in (".", "removed", "shards", "shards/*", "rejects", "rejects/*"):
        stale += path.glob(f"{place}/{TEMPORARY_PREFIX}*")
    for place in ("index", "neighbors"):  # whoever searches may write here, without the lock
        stale += (left for left in path.glob(f"{place}/{TEMPORARY_PREFIX}*") if readers or is_abandoned(left))
    if not keep_work:
        named = {record["name"] for record in store.shards}
        stale += (folder for folder in path.glob("shards/*") if folder.name not in named)
        stale += path.glob(PARTS)
    for leftover in stale:
        log.info("deleting %s", leftover)
        delete(leftover)


def _save_generation(store: Store, verb: str, changes: dict[str, Any], said: dict[str, Any]) -> None:
    """Write the manifest of the next generation: this is the moment of the update."""
    generation = store.generation + 1
    updates = [*store.manifest.get("updates", []), {"generation": generation, "verb": verb, **said}]
    manifest = {**store.manifest, **changes, "generation": generation, "updates": updates}
    save_json(store.path / "manifest.json", manifest | {"format_version": FORMAT_VERSION})


def _opened(path: Path, index: bool) -> Store:
    """The new generation, with the indexes that the last one had brought up to date."""
    store = Store.open(path)
    if index and store.num_searchable:
        for kind, settings in sorted(_indexes(path)):
            try:
                _build_index(store, kind, json.loads(settings))
            except ValueError as error:
                log.warning("the %s index of %s is left behind: %s", kind, path, error)
    return store


def _indexes(path: Path) -> set[tuple[str, str]]:
    """Kinds of the indexes in a store, each with its settings as JSON."""
    records = [record for file in path.glob("index/[!.]*/index.json") if "kind" in (record := _read_record(file))]
    dense = {(r["kind"], json.dumps(r["settings"], sort_keys=True)) for r in records if r["kind"] in KINDS}
    return dense | {(record["kind"], "{}") for record in records if record["kind"] not in KINDS}


def _read_record(file: Path) -> dict[str, Any]:
    """The record of an index or a table; nothing where it is damaged."""
    try:
        record = load_json(file)
    except (ValueError, FileNotFoundError) as error:
        log.warning("%s is left out: %s", file.parent, error)
        return {}
    return record if isinstance(record, dict) else {}


def _build_index(store: Store, kind: str, settings: dict[str, Any]) -> None:
    if kind in KINDS:
        build_index(store, kind, **settings)
    else:
        build_lexical(store, kind)


# Add

_FIXED = {
    *("store", "inputs", "tokenizer", "key_dtype", "chunk_len", "min_chunk_len", "shard_chunks", "index", "embedder"),
    *("pooling", "query_prefix", "passage_prefix", "max_length", "normalize", "similarity", "query_encoder"),
    *("attention", "pool_prefix"),
}  # the fields of BuildSettings that a store has settled


def _embedder_for(store: Store, embedder: Embedder | None) -> Embedder:
    return NoEmbedder() if embedder is None and is_keyless(store) else embedder_of(store, embedder)


def _settings_like(
    store: Store, inputs: Sequence[str], decontaminate: Sequence[str] | None, given: dict[str, Any]
) -> BuildSettings:
    """The settings of an addition: the store's own but for what is given; ValueError for one that is fixed."""
    names = {field.name for field in fields(BuildSettings)}
    for name in given:
        if name not in names:
            raise ValueError(f"an addition takes no setting {name!r}; it takes {', '.join(sorted(names - _FIXED))}")
        if name in _FIXED:
            raise ValueError(f"{name} is fixed by the store {store.path}; leave it out, or build another store")
    if given.get("executor") == "ranks":
        raise ValueError("the executor ranks builds whole stores only; add with local or ray")
    if decontaminate is None and store.manifest.get("held_out"):
        held_out = ", ".join(item["name"] for item in store.manifest["held_out"])
        raise ValueError(
            f"{store.path} was built with decontaminate ({held_out}), of which it keeps no text; give these inputs "
            "again, or an empty list to add without"
        )
    recorded = {name: value for name, value in store.manifest["settings"].items() if name in names}
    if not decontaminate:
        recorded.pop("decontaminate_by", None)
    if "deduplicate" in given and given["deduplicate"] != recorded.get("deduplicate"):
        recorded |= {"deduplicate_at": None, "deduplicate_ngram": None}  # of the store's own comparison
    own = {"store": str(store.path), "inputs": list(inputs), "tokenizer": str(store.path / "tokenizer")}
    own |= {"embedder": store.manifest["embedder"]["name"], "decontaminate": list(decontaminate or [])}
    return BuildSettings(**{**recorded, **own, "index": "none", **given})


def _said(store: Store, plan: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of an addition: its inputs, and the settings that are not the store's."""
    own = store.manifest["settings"]
    changed = {name: value for name, value in plan["settings"].items() if value != own.get(name)}
    return {"inputs": plan["inputs"], "held_out": plan["held_out"], "settings": changed}


def _is_last(store: Store, verb: str, said: dict[str, Any]) -> bool:
    """Whether the store's generation comes from this very update."""
    last = store.manifest.get("updates", [{}])[-1]
    return {**last, "generation": store.generation, "verb": verb, **said} == last


def _with(store: Store, written: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says once the new shards are in it."""
    rejects = {**store.manifest["rejects"], **written["rejects"]}
    counts = _added(store.manifest["counts"], written["counts"])
    return {"shards": [*store.shards, *written["shards"]], "counts": counts, "rejects": rejects}


def _added(counts: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two records of counts as one, those by name within them too."""
    merged = dict(counts)
    for name, value in new.items():
        merged[name] = _added(counts.get(name, {}), value) if isinstance(value, dict) else counts.get(name, 0) + value
    return merged


# Remove


def _rows_to_remove(store: Store, ids: list[str]) -> np.ndarray:
    """Document rows of ids that are there; ValueError names those that never were."""
    found = store.find_documents(ids)
    missing = [name for name in ids if name not in found]
    gone = store.find_documents(missing, removed=True) if missing else {}
    unknown = [name for name in missing if name not in gone]
    if unknown:
        others = f" (nor {len(unknown) - 1} others of those given)" if len(unknown) > 1 else ""
        raise ValueError(
            f"{store.path} holds no document with the id {unknown[0]!r}{others}, so that nothing was removed; "
            "give ids that it holds"
        )
    return np.sort(np.fromiter(found.values(), np.int64, len(found)))


def _without(store: Store, rows: np.ndarray) -> dict[str, Any]:
    """What the manifest says once the documents are removed; writes the list of all removed documents."""
    spans, counts = store.document_spans[rows], dict(store.manifest["counts"])
    before = np.column_stack([store.removed_documents, store.removed_spans])
    removed = np.concatenate([before, np.column_stack([rows, spans])])
    last = np.asarray(store.chunk_lens(spans.sum(1) - 1))
    counts["documents"] -= len(rows)
    counts["chunks"] -= int(spans[:, 1].sum())
    counts["short_chunks"] -= int((last < store.min_chunk_len).sum())
    for number, record in enumerate(store.shards):
        low, high = np.searchsorted(rows, record["first_document"] + np.array([0, record["documents"]]))
        local = rows[low:high] - record["first_document"]
        if len(local):
            table = store.document_table(number, ["num_tokens", "num_bytes"]).take(local)
            counts["tokens"] -= int(table.column("num_tokens").to_numpy().sum())
            counts["bytes"] -= int(table.column("num_bytes").to_numpy().sum())
    counts["removed"] = counts.get("removed", 0) + len(rows)
    file = store.path / "removed" / f"{store.generation + 1:05d}.npy"
    file.parent.mkdir(exist_ok=True)
    sync(store.path)
    save_npy(file, removed[np.argsort(removed[:, 0])])
    record = {"file": f"removed/{file.name}", "documents": len(removed), **file_record(file)}
    return {"counts": counts, "removed": record}


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
    return tqdm(total=rows, desc="compacting", unit=" chunks", disable=not progress, smoothing=0.05)


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


def _copy_rows(arrays: list[np.ndarray], live: list[np.ndarray], shape: tuple[int, ...], file: Path) -> None:
    """Write the rows that are left of several arrays [rows, width] as one array of a shape that holds them all."""
    with written_aside(file) as aside:
        out = np.lib.format.open_memmap(aside, "w+", arrays[0].dtype, shape)
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
    stale = [folder for folder in store.path.glob("index/[!.]*") if not _is_of(store, folder, present)]
    tables = (folder for folder in store.path.glob("neighbors/[!.]*") if list(folder.glob("*.json")))  # else: begun
    stale += (folder for folder in tables if not _is_of(store, folder, present))
    for folder in stale:
        log.info("deleting %s, which is of an older generation", folder)
        delete(folder)


def _is_of(store: Store, folder: Path, shards: set[str]) -> bool:
    """Whether an index or a table was made of the present generation, or of shards that it still has."""
    for record in map(_read_record, folder.glob("*.json")):
        if record.get("store") == store.fingerprint or (record.get("shards") and set(record["shards"]) <= shards):
            return True
    return False
