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

from retro.retrieval import lexical
from retro.retrieval.embedder import Embedder, embed_chunks
from retro.retrieval.files import check_files, file_record, load_json, open_npy, save_json, save_npy, stable_hash
from retro.retrieval.index import check_queries, resolve_kind
from retro.retrieval.queries import Queries
from retro.retrieval.search import embedder_of, is_keyless, open_searcher, parse_kind
from retro.retrieval.store import Store

log = logging.getLogger(__name__)

_QUERY_ROWS = 1024  # chunks searched at a time
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
        index: what to search through (see retro.retrieval.search): "exact" is a blocked matrix product over the keys;
            of "auto", "scann" and "faiss" the over-fetch grows until k neighbors survive the exclusion or the index is
            exhausted; "tfidf" and "bm25" go by shared words; "exact+tfidf" fuses both.
        embedder: needed only if it embeds queries with another prefix than keys; None loads the one the manifest names.

    Chunks with fewer neighbors are filled with -1. Distances are squared L2, or -score where words decide. The same
    table is opened if it is there already.
    Raises ValueError if k is larger than the store, or the two stores have different embedders or tokenizers.
    """
    queries = queries or store
    index = _resolved(store, index)
    _check(store, queries, k, exclude, uses_keys=_uses_keys(index))
    settings = {"k": k, "exclude": exclude, "index": index}
    folder = _folder(store, queries, settings)
    if (folder / "neighbors.json").is_file():
        try:
            return _open(folder, k)
        except ValueError as error:
            log.warning("computing the table again: %s", error)
    _write_table(store, queries, settings, folder, embedder, progress)
    return _open(folder, k)


def open_neighbors(
    store: Store,
    queries: Store | None = None,
    k: int | None = None,
    exclude: str | None = "same_document",
    index: str | None = None,
) -> NeighborTable:
    """Open a table that `build_neighbors` wrote for these stores: the one with the fewest neighbors >= k, cut to k.

    index: which kind it must have been searched through; None takes any, first one of exact search.
    Raises ValueError if there is none.
    """
    wanted = (store.fingerprint, (queries or store).fingerprint)
    index = None if index is None else _resolved(store, index)
    found = []
    for file in sorted((store.path / "neighbors").glob("*/neighbors.json")):
        record = load_json(file)
        same = (record["store"], record["queries"]) == wanted and exclude in (None, record["exclude"])
        same = same and index in (None, record["index"])
        if same and record["k"] >= (k or 1):
            found.append((record["index"] != "exact", record["k"], file.parent))
    if not found:
        index = "tfidf" if index is None and is_keyless(store) else index
        raise ValueError(
            f"{store.path} has no neighbor table with k >= {k or 1} for {(queries or store).path}; "
            f"write one with `retro neighbors {store.path} --k {k or 2}"
            + (f" --queries {queries.path}" if queries else "")
            + (f" --index {index}`" if index else "`")
        )
    best = min(found) if k else min(found, key=lambda item: (item[0], -item[1]))
    return _open(best[2], k or best[1])


def _resolved(store: Store, index: str) -> str:
    """A kind of index with what "auto" stands for."""
    kinds = parse_kind(index, is_keyless(store))
    return "+".join(kind if kind in lexical.KINDS else resolve_kind(kind) for kind in kinds)


def _uses_keys(index: str) -> bool:
    return any(kind not in lexical.KINDS for kind in index.split("+"))


def _check(store: Store, queries: Store, k: int, exclude: str, uses_keys: bool) -> None:
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude must be one of {', '.join(EXCLUDE)}, not {exclude!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if k > len(store.searchable_rows):
        raise ValueError(
            f"k = {k} is larger than the {len(store.searchable_rows)} searchable chunks of {store.path}; ask for fewer"
        )
    for name in ("embedder", "tokenizer") if uses_keys else ("tokenizer",):
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
    k, searcher = settings["k"], open_searcher(store, settings["index"], build=True)
    uses_keys = _uses_keys(settings["index"])
    embedder = _query_embedder(queries, embedder) if uses_keys else None
    documents = _excluded_documents(store, queries) if settings["exclude"] == "same_document" else None
    rows = np.empty((queries.num_chunks, k), np.int64)
    distances = np.empty((queries.num_chunks, k), np.float32)
    with _bar(queries.num_chunks, progress) as bar:
        for start in range(0, queries.num_chunks, _QUERY_ROWS):
            part = np.arange(start, min(start + _QUERY_ROWS, queries.num_chunks))
            excluded = None if documents is None else [{row} - {-1} for row in documents[part].tolist()]
            keys = _query_keys(queries, part, embedder) if uses_keys else None
            asked = Queries(queries.tokenizer, None, queries.token_lists(part), keys)
            rows[part], scores, _ = searcher.search(asked, k, excluded)
            distances[part] = -scores
            bar.update(len(part))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "neighbors.json").unlink(missing_ok=True)
    save_npy(folder / "rows.npy", rows)
    save_npy(folder / "distances.npy", distances)
    record = {**settings, "store": store.fingerprint, "queries": queries.fingerprint, "chunks": queries.num_chunks}
    record |= {"missing": int((rows < 0).sum()), "chunks_without_neighbors": int((rows[:, 0] < 0).sum())}
    record["recall"] = searcher.recall
    record["files"] = {name: file_record(folder / name) for name in ("rows.npy", "distances.npy")}
    save_json(folder / "neighbors.json", record)


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
    return embedder_of(queries, embedder)


def _query_keys(queries: Store, rows: np.ndarray, embedder: Embedder | None) -> Float32[np.ndarray, "q d"]:
    if embedder is None:
        return queries.keys(rows)
    return check_queries(embed_chunks(embedder, queries.tokenizer, queries.token_lists(rows), is_query=True), queries)


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="neighbors", unit=" chunks", disable=not progress, smoothing=0.05)
