"""The neighbors of evaluation text, kept where they were searched.

neighbors/<hash>/    rows.npy int64 [chunks, k], -1 = none    queries.json: what was asked, of which store
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int, Int64
from tqdm.auto import tqdm

from retro.common.checksums import open_array
from retro.common.files import file_record, save_npy, stable_hash
from retro.common.records import FILES, load_record, save_record
from retro.retrieval.filters.hits import FilteredSearcher
from retro.retrieval.remote.client import RemoteIndex
from retro.retrieval.search.sharded import ShardedSearcher
from retro.retrieval.store.random_rows import random_rows
from retro.version import __version__

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store

log = logging.getLogger(__name__)
_BATCH_CHUNKS = 512


def neighbor_rows(
    retriever: Retriever,
    tokens: Int[np.ndarray, "c m"],
    mask: Bool[np.ndarray, "c m"],
    num_neighbors: int,
    excluded: Sequence[str] | None = None,
    cache: str | Path | bool = True,
    progress: bool = False,
) -> Int64[np.ndarray, "c k"]:
    """The k nearest rows of every chunk, -1 where there are fewer.

    Arguments:
        excluded: for each chunk the id of a document that must not be returned.
        cache: True keeps the rows in the store's `neighbors/`, a path in that folder, False nowhere. They are opened
            instead of searched when tokens, excluded ids, k, store, kind of search and version of the library are the
            same. The rows of a searcher of the caller's own, over shards or behind a server are never kept: what it
            would answer is not known.
    """
    searcher = _unfiltered(retriever.index)
    known = type(searcher).__module__.startswith("retro.") and not isinstance(searcher, RemoteIndex | ShardedSearcher)
    if cache is False or not known:
        return _search(retriever, tokens, mask, num_neighbors, excluded, progress)
    asked = {
        "queries": _digest(np.where(mask, tokens, -1)),
        "excluded": None if excluded is None else stable_hash(list(excluded)),
        "k": num_neighbors,
        "store": retriever.store.fingerprint,
        "search": _search_name(retriever.index),
        "library_version": __version__,
    }
    folder = (retriever.store.path / "neighbors" if cache is True else Path(cache)) / stable_hash(asked)[:16]
    if (folder / "queries.json").is_file():
        try:
            return _open(folder, (len(tokens), num_neighbors))
        except ValueError as error:
            log.warning("searching again: %s", error)
    rows = _search(retriever, tokens, mask, num_neighbors, excluded, progress)
    try:
        _save(folder, rows, asked)
    except OSError as error:
        log.warning("the neighbors are not kept in %s: %s", folder, error)
    return rows


def random_neighbors(store: Store, rows: Int[np.ndarray, "c k"], seed: int) -> Int[np.ndarray, "c k"]:
    """As many neighbors for each chunk, each a random chunk of the store: the control of what was found."""
    numbers = np.arange(len(rows))
    drawn = random_rows(store, numbers, np.full_like(numbers, -1), rows.shape[1], seed)
    return np.where(rows >= 0, drawn, -1)


def _search(retriever, tokens, mask, num_neighbors: int, excluded, progress: bool) -> np.ndarray:
    k = min(num_neighbors, retriever.index.num_rows)
    rows = np.full((len(tokens), num_neighbors), -1, np.int64)
    with tqdm(total=len(tokens), desc="retrieving", unit=" chunks", disable=not progress or None) as bar:
        for start in range(0, len(tokens), _BATCH_CHUNKS):
            part = slice(start, start + _BATCH_CHUNKS)
            names = None if excluded is None else [{name} for name in excluded[part]]
            rows[part, :k] = retriever(tokens[part], k, exclude_documents=names, mask=mask[part]).ids
            bar.update(len(tokens[part]))
    return rows


def _search_name(searcher: Any) -> list[str]:
    """The kind of a search, which names its filters, and the name that tells its indexes and their tuning apart."""
    inner = _unfiltered(searcher)
    return [searcher.kind, getattr(inner, "name", inner.kind)]


def _unfiltered(searcher: Any) -> Any:
    return searcher.inner if isinstance(searcher, FilteredSearcher) else searcher


def _digest(array: np.ndarray) -> str:
    little = np.ascontiguousarray(array, "<i8")
    return hashlib.sha256(repr(little.shape).encode() + little.tobytes()).hexdigest()


def _open(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(
        open_array(folder, "rows.npy", load_record(folder / "queries.json", {"files": FILES})["files"], shape, np.int64)
    )


def _save(folder: Path, rows: np.ndarray, asked: dict[str, Any]) -> None:
    """The record comes last: a folder that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "queries.json").unlink(missing_ok=True)
    save_npy(folder / "rows.npy", rows)
    save_record(folder / "queries.json", {**asked, "files": {"rows.npy": file_record(folder / "rows.npy")}})
