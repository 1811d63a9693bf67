"""The neighbors of every chunk, computed ahead: a table of rows and distances beside the store it points into.

neighbors/<hash>/    rows.npy int64 [chunks, k], -1 = none    distances.npy float32 [chunks, k]    neighbors.json
neighbors/<hash>/job/    what is done of a table that is not finished: a record of each task, blocks of hits

The join is a job of tasks (retro.retrieval.executors.tasks): blocks of queries, each searched in the whole store or,
by exact search where they are few, in ranges of its rows; then one that merges them into the table. How it is cut
depends on the sizes of the stores alone, and exact distances on their two vectors alone, so the table's bytes do not
depend on the executor, the number of workers or interruptions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.common.checksums import CheckedArray, open_array
from retro.common.files import check_files, clear_abandoned, delete, stable_hash
from retro.common.own import check_no_links
from retro.common.records import FILES, load_record
from retro.common.values import NumNeighbors
from retro.retrieval.building.join import Join, run_join, shared_with_tasks
from retro.retrieval.embedding.embedder import Embedder
from retro.retrieval.search import lexical
from retro.retrieval.search.exact import check_k
from retro.retrieval.search.index import resolve_kind
from retro.retrieval.search.searchers import goes_by_words, is_keyless, parse_kind
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

EXCLUDE = ("same_document", "none")
_FIELDS = {"store": str, "queries": str, "exclude": str, "index": str, "k": NumNeighbors, "files": FILES}


@dataclass(frozen=True)
class NeighborTable:
    """Neighbors of every chunk of a store, nearest first, memory-mapped; row -1 (distance inf) = none."""

    rows: Int64[np.ndarray | CheckedArray, "chunks k"]
    distances: Float32[np.ndarray | CheckedArray, "chunks k"]
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
    executor: str = "local",
    workers: int | None = None,
) -> NeighborTable:
    """The k nearest chunks of `store` for every chunk of `queries` (None: of `store` itself).

    Arguments:
        exclude: "same_document" leaves out chunks of the query's own document (in another store: of the same document
            id); "none" leaves out nothing, not even the chunk itself.
        index: what to search through (see retro.retrieval.search.searchers): "exact" is a blocked matrix product over
            the keys; "auto", "scann", "routed" and "faiss" look as far as these neighbors need, which a sample of the
            queries tells, and further where an exclusion leaves few; "tfidf" and "bm25" are lexical; "exact+tfidf"
            fuses both; "tfidf>continuation" has a second stage.
        embedder: needed only if it embeds queries otherwise than keys; None loads the one the manifest names. One that
            is given keeps the search in this process.
        executor, workers: who does the work, see `retro.retrieval.executors.opening.open_executor`.

    Chunks with fewer neighbors are filled with -1, those of removed documents with nothing else. Distances are squared
    L2, or -score of a lexical index. The same table is opened if it is there already; one that was interrupted is taken
    up again.
    Raises ValueError if the two stores have different embedders or tokenizers.
    """
    queries = queries or store
    index = _resolved(store, index)
    _check(store, queries, k, exclude, uses_keys=not goes_by_words(index))
    settings = {"k": k, "exclude": exclude, "index": index}
    folder = _folder(store, queries, settings)
    clear_abandoned(folder, store.path)
    if (folder / "neighbors.json").is_file():
        try:
            table = _open(folder, k)
            table.verify()
            return table
        except ValueError as error:
            log.warning("computing the table again: %s", error)
    _check_on_disk(store, queries)
    check_no_links(store.path, "neighbors")
    with shared_with_tasks(embedder):
        run_join(Join(store, queries, settings, folder, embedder), executor, workers, progress)
    try:
        _check_on_disk(store, queries)
    except ValueError:
        delete(folder, store.path)
        raise
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
        record = load_record(file, _FIELDS)
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
    first, separator, second = index.partition(">")
    kinds = parse_kind(first, is_keyless(store))
    return "+".join(kind if kind in lexical.KINDS else resolve_kind(kind) for kind in kinds) + separator + second


def _check(store: Store, queries: Store, k: int, exclude: str, uses_keys: bool) -> None:
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude must be one of {', '.join(EXCLUDE)}, not {exclude!r}")
    check_k(k)
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


def _check_on_disk(store: Store, queries: Store) -> None:
    store.check_on_disk()
    queries.check_on_disk()


def _folder(store: Store, queries: Store, settings: dict[str, Any]) -> Path:
    name = stable_hash({**settings, "store": store.fingerprint, "queries": queries.fingerprint})[:16]
    return store.path / "neighbors" / name


def _open(folder: Path, k: int) -> NeighborTable:
    record = load_record(folder / "neighbors.json", _FIELDS)
    rows, distances = (open_array(folder, f"{name}.npy", record["files"]) for name in ("rows", "distances"))
    return NeighborTable(*(whole.view(lambda array: array[:, :k]) for whole in (rows, distances)), record, folder)
