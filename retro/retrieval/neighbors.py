"""The neighbors of every chunk, computed ahead: a table of rows and distances beside the store it points into.

neighbors/<hash>/    rows.npy int64 [chunks, k], -1 = none    distances.npy float32 [chunks, k]    neighbors.json
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.embedder import Embedder, embed_chunks
from retro.retrieval.files import check_files, file_record, load_json, open_npy, save_json, save_npy, stable_hash
from retro.retrieval.index import Index, build_index, check_queries, exact_search, resolve_kind
from retro.retrieval.store import Store

log = logging.getLogger(__name__)

_QUERY_ROWS = 4096  # chunks searched at a time
_FETCHED_HITS = 1 << 20  # hits held at a time while the over-fetch grows
EXCLUDE = ("same_document", "none")


@dataclass(frozen=True)
class NeighborTable:
    """Neighbors of every chunk of a store, nearest first, memory-mapped; row -1 (distance inf) = none."""

    rows: Int64[np.ndarray, "chunks k"]
    distances: Float32[np.ndarray, "chunks k"]
    record: dict[str, Any]
    path: Path

    def verify(self) -> None:
        """Compare the files with their recorded checksums; ValueError names the one that differs."""
        check_files(self.path, self.record["files"], checksums=True)


def build_neighbors(
    store: Store,
    k: int,
    queries: Store | None = None,
    exclude: str = "same_document",
    index: str = "exact",
    embedder: Embedder | None = None,
    progress: bool = False,
) -> NeighborTable:
    """The k nearest chunks of `store` for every chunk of `queries` (None: of `store` itself).

    Arguments:
        exclude: "same_document" leaves out chunks of the query's own document (in another store: of the same document
            id); "none" leaves out nothing, not even the chunk itself.
        index: "exact" is a blocked matrix product; else the kind of index to search through ("auto", "scann", "faiss"),
            whose over-fetch grows until k neighbors survive the exclusion or the index is exhausted.
        embedder: needed only if it embeds queries with another prefix than keys; None loads the one the manifest names.

    Chunks with fewer neighbors are filled with -1. The same table is opened if it is there already.
    Raises ValueError if k is larger than the store, or the two stores have different embedders or tokenizers.
    """
    queries = queries or store
    _check(store, queries, k, exclude)
    settings = {"k": k, "exclude": exclude, "index": resolve_kind(index)}
    folder = _folder(store, queries, settings)
    if (folder / "neighbors.json").is_file():
        try:
            return _open(folder, k)
        except ValueError as error:
            log.warning("computing the table again: %s", error)
    _write_table(store, queries, settings, folder, embedder, progress)
    return _open(folder, k)


def open_neighbors(
    store: Store, queries: Store | None = None, k: int | None = None, exclude: str | None = "same_document"
) -> NeighborTable:
    """Open a table that `build_neighbors` wrote for these stores: the one with the fewest neighbors >= k, cut to k.

    Raises ValueError if there is none.
    """
    wanted = (store.fingerprint, (queries or store).fingerprint)
    found = []
    for file in sorted((store.path / "neighbors").glob("*/neighbors.json")):
        record = load_json(file)
        same = (record["store"], record["queries"]) == wanted and exclude in (None, record["exclude"])
        if same and record["k"] >= (k or 1):
            found.append((record["k"], record["index"] != "exact", file.parent))
    if not found:
        raise ValueError(
            f"{store.path} has no neighbor table with k >= {k or 1} for {(queries or store).path}; "
            f"write one with `retro neighbors {store.path} --k {k or 2}`"
            + (f" --queries {queries.path}" if queries else "")
        )
    best = min(found) if k else max(found, key=lambda item: (item[0], not item[1]))
    return _open(best[2], k or best[0])


def _check(store: Store, queries: Store, k: int, exclude: str) -> None:
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude must be one of {', '.join(EXCLUDE)}, not {exclude!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if k > len(store.searchable_rows):
        raise ValueError(
            f"k = {k} is larger than the {len(store.searchable_rows)} searchable chunks of {store.path}; ask for fewer"
        )
    for name in ("embedder", "tokenizer"):
        mine, other = store.manifest[name], queries.manifest[name]
        if mine["fingerprint"] != other["fingerprint"]:
            raise ValueError(
                f"{store.path} and {queries.path} were built with different {name}s: "
                f"{mine['name']} ({mine['fingerprint'][:12]}) and {other['name']} ({other['fingerprint'][:12]}); "
                "build both with the same"
            )
    if store.chunk_len != queries.chunk_len:
        raise ValueError(
            f"{store.path} has chunks of {store.chunk_len} tokens, {queries.path} of {queries.chunk_len}; "
            "build both with the same chunk_len"
        )


def _folder(store: Store, queries: Store, settings: dict[str, Any]) -> Path:
    name = stable_hash({**settings, "store": store.fingerprint, "queries": queries.fingerprint})[:16]
    return store.path / "neighbors" / name


def _open(folder: Path, k: int) -> NeighborTable:
    record = load_json(folder / "neighbors.json")
    check_files(folder, record["files"], checksums=False)
    rows, distances = open_npy(folder / "rows.npy"), open_npy(folder / "distances.npy")
    return NeighborTable(rows[:, :k], distances[:, :k], record, folder)


def _write_table(
    store: Store, queries: Store, settings: dict[str, Any], folder: Path, embedder: Embedder | None, progress: bool
) -> None:
    k = settings["k"]
    engine = None if settings["index"] == "exact" else build_index(store, settings["index"])
    embedder = _query_embedder(queries, embedder)
    documents = _excluded_documents(store, queries) if settings["exclude"] == "same_document" else None
    rows = np.empty((queries.num_chunks, k), np.int64)
    distances = np.empty((queries.num_chunks, k), np.float32)
    with _bar(queries.num_chunks, progress) as bar:
        for start in range(0, queries.num_chunks, _QUERY_ROWS):
            part = slice(start, min(start + _QUERY_ROWS, queries.num_chunks))
            keys = _query_keys(queries, np.arange(part.start, part.stop), embedder)
            excluded = None if documents is None else documents[part]
            rows[part], distances[part] = _nearest(store, engine, keys, k, excluded, bar)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "neighbors.json").unlink(missing_ok=True)
    save_npy(folder / "rows.npy", rows)
    save_npy(folder / "distances.npy", distances)
    record = {**settings, "store": store.fingerprint, "queries": queries.fingerprint, "chunks": queries.num_chunks}
    record |= {"missing": int((rows < 0).sum()), "chunks_without_neighbors": int((rows[:, 0] < 0).sum())}
    record["recall"] = getattr(engine, "recall", 1.0)
    record["files"] = {name: file_record(folder / name) for name in ("rows.npy", "distances.npy")}
    save_json(folder / "neighbors.json", record)


def _nearest(
    store: Store, engine: Index | None, keys: np.ndarray, k: int, excluded: np.ndarray | None, bar: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and squared distances [q, k] of one block of queries."""
    if engine is None:
        rows, scores, _ = exact_search(store, keys, k, excluded, lambda pairs: bar.update(pairs / store.num_chunks))
    else:
        blocked = None if excluded is None else [{int(row)} if row >= 0 else set() for row in excluded]
        rows, scores, _ = search_excluding(engine, store, keys, k, blocked)
        bar.update(len(keys))
    return rows, -scores


def search_excluding(
    engine: Index, store: Store, keys: Float32[np.ndarray, "q d"], k: int, excluded: list[set[int]] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k nearest rows of each query outside its excluded document rows: rows, scores and mask [q, k].

    The over-fetch doubles, for the queries that need it, until k rows survive or the index has no more to give.
    """
    if excluded is None or not any(excluded):
        return engine.search(keys, k)
    rows = np.full((len(keys), k), -1, np.int64)
    scores = np.full((len(keys), k), -np.inf, np.float32)
    waiting, fetch = np.arange(len(keys)), k + 8
    while len(waiting):
        fetch = max(min(fetch, engine.num_rows), 1)
        size, short = max(_FETCHED_HITS // fetch, 1), []
        for start in range(0, len(waiting), size):
            group = waiting[start : start + size]
            found, found_scores, mask = engine.search(keys[group], fetch)
            kept = mask & ~_in_documents(store, found, [excluded[q] for q in group])
            order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
            kept, width = np.take_along_axis(kept, order, 1), order.shape[1]
            rows[group, :width] = np.where(kept, np.take_along_axis(found, order, 1), -1)
            scores[group, :width] = np.where(kept, np.take_along_axis(found_scores, order, 1), -np.inf)
            short.append(group[(kept.sum(1) < k) & mask[:, -1]])  # a masked hit: the engine found no more than that
        if fetch >= engine.num_rows:
            break
        waiting, fetch = np.concatenate(short), fetch * 2
    return rows, scores, rows >= 0


def _in_documents(store: Store, rows: np.ndarray, excluded: list[set[int]]) -> np.ndarray:
    """Which rows [q, c] belong to one of their query's excluded documents."""
    documents = store.document_rows(np.maximum(rows, 0))
    width = max(map(len, excluded))
    table = np.full((len(excluded), width), -1, np.int64)
    for q, blocked in enumerate(excluded):
        table[q, : len(blocked)] = sorted(blocked)
    if width == 1:
        return documents == table
    return np.stack([np.isin(found, blocked) for found, blocked in zip(documents, table, strict=True)])


def _excluded_documents(store: Store, queries: Store) -> Int64[np.ndarray, " chunks"]:
    """For every chunk of `queries`, the document row of `store` that holds its own document, or -1."""
    own = queries.document_rows(np.arange(queries.num_chunks))
    if queries.fingerprint == store.fingerprint:
        return own
    row_of = {name: row for row, name in enumerate(store.document_ids)}
    return np.asarray([row_of.get(name, -1) for name in queries.document_ids], np.int64)[own]


def _query_embedder(queries: Store, embedder: Embedder | None) -> Embedder | None:
    """None where a chunk's stored key is also its query; else the embedder, checked against the store's."""
    described = queries.manifest["embedder"]
    if described.get("query_prefix", "") == described.get("passage_prefix", ""):
        return None
    from retro.retrieval.retriever import embedder_of

    return embedder_of(queries, embedder)


def _query_keys(queries: Store, rows: np.ndarray, embedder: Embedder | None) -> Float32[np.ndarray, "q d"]:
    if embedder is None:
        return queries.keys(rows)
    return check_queries(embed_chunks(embedder, queries.tokenizer, queries.token_lists(rows), is_query=True), queries)


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    shown = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"  # n grows by parts of a chunk
    return tqdm(total=total, desc="neighbors", unit=" chunks", disable=not progress, smoothing=0.05, bar_format=shown)
