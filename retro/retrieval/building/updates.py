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

import logging
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from retro.common.files import file_record, save_npy, sync
from retro.retrieval.building.build import plan_build, write_shards
from retro.retrieval.building.generations import clear_leftovers, open_generation, save_generation, writing
from retro.retrieval.building.settings import BuildSettings
from retro.retrieval.embedding.embedder import Embedder, NoEmbedder
from retro.retrieval.search.searchers import embedder_of, is_keyless
from retro.retrieval.store.store import Store
from retro.text.corpus import as_list

log = logging.getLogger(__name__)


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
        inputs: see `retro.text.corpus.read_documents`.
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
    with writing(Path(path), keep_work=True) as store:
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
                clear_leftovers(store)
                raise
            save_generation(store, "add", _with(store, written), said | {"counts": written["counts"]})
        new = open_generation(store.path, index)
        clear_leftovers(new)
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
    with writing(Path(path), keep_work=True) as store:
        rows = _rows_to_remove(store, list(ids))
        if not len(rows):
            log.info("%s: all of these documents are removed already", path)
        else:
            save_generation(store, "remove", _without(store, rows), {"documents": len(rows)})
        return open_generation(store.path, index)


# Add


FIXED = {
    *("store", "inputs", "tokenizer", "key_dtype", "chunk_len", "min_chunk_len", "shard_chunks", "index", "embedder"),
    *("pooling", "query_prefix", "passage_prefix", "max_length", "normalize", "similarity", "query_encoder"),
    *("attention", "pool_prefix", "recall"),
}  # the fields of BuildSettings that are the store's own


def _embedder_for(store: Store, embedder: Embedder | None) -> Embedder:
    return NoEmbedder() if embedder is None and is_keyless(store) else embedder_of(store, embedder)


def _settings_like(
    store: Store, inputs: Sequence[str], decontaminate: Sequence[str] | None, given: dict[str, Any]
) -> BuildSettings:
    """The settings of an addition: the store's own but for what is given; ValueError for one that is fixed."""
    names = {field.name for field in fields(BuildSettings)}
    for name in given:
        if name not in names:
            raise ValueError(f"an addition takes no setting {name!r}; it takes {', '.join(sorted(names - FIXED))}")
        if name in FIXED:
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
    own = {"store": str(store.path), "inputs": as_list(inputs), "tokenizer": str(store.path / "tokenizer")}
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
