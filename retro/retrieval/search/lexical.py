"""Nearest chunks by the words they share: BM25 and hashed TF-IDF bigrams, as two weightings of one sparse matrix.

    "tfidf"   tokens and pairs of tokens in 2^24 buckets, log(1 + count) x idf, chunks of length 1. Source: Chen et al.
              2017 (DrQA). Differs: terms are the tokenizer's ids, not words, and chunks are normalised; of the
              4-grams of the next chunk of PowerShell-Docs, 2 neighbors then held 23.3% instead of 21.0%.
    "bm25"    words, as bm25s cuts and weighs them (Lucene's variant, k1 = 1.5, b = 0.75)

In large segments rare terms find the candidates, which all terms then score (see retro.retrieval.search.candidates);
"tfidf:exact" and "bm25:exact" look at every chunk that shares a term.

Counts of words are kept in segments, one for the shards that each update added; their weights, which depend on all
chunks, are reckoned anew for each generation: see retro.retrieval.search.postings, which also lists the files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from retro.common.checksums import open_array
from retro.common.files import READ_ONLY, check_files, delete, folder_record, stable_hash
from retro.common.records import FILES, load_record
from retro.common.values import Probability
from retro.retrieval.search.candidates import Weighed, best_chunks, highest, score_chunks
from retro.retrieval.search.index import Hits, check_k, check_searchable
from retro.retrieval.search.postings import (
    BUCKETS,
    EXACT,
    KINDS,
    WEIGHING,
    Postings,
    Terms,
    bucket_terms,
    word_terms,
    write_postings,
    write_weights,
)
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.segments import (
    ShardRange,
    cover,
    find_segments,
    plan_segments,
    row_range,
    write_index,
    write_segment,
)
from retro.retrieval.store.store import Store

__all__ = ["KINDS", "LexicalIndex", "build_lexical"]

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
MAX_POSTINGS = 1 << 31  # of a segment, so that 32 bits number them
_BLOCK_QUERIES = 64
_CHUNKS_PER_QUERY = 1 << 15  # so many queries more share vectors as long as the segment
_BLOCK_SCORES = 1 << 24  # of a block in which all terms are looked up: 128 MB
_SAMPLE = 128
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int32)  # set in each byte
_FIELDS = {"kind": str, "recall": Probability, "segments": list[str], "files": FILES}


class LexicalIndex:
    """Sparse matrices of term weights, [terms, chunks] by term; the score of a chunk is its product with the query.

    own: the names of the segments whose chunks are searched and scored; None is all.
    """

    def __init__(
        self, store: Store, folder: Path, segments: list[Postings], exact: bool, own: Collection[str] | None = None
    ) -> None:
        self.store, self.folder, self.segments, self.exact = store, folder, segments, exact
        self.record: dict[str, Any] = load_record(folder / "index.json", _FIELDS)
        self.kind: str = self.record["kind"] + EXACT * exact
        self.num_rows = store.num_searchable
        self.recall = 1.0 if exact else self.record["recall"]
        self.name = folder.name
        self.folders = [folder, *(segment.folder for segment in segments)]
        files = self.record["files"]
        self._matrices = [
            _Matrix(store, segment, folder, number, files)
            for number, segment in enumerate(segments)
            if own is None or segment.folder.name in own
        ]

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """The k chunks of the largest score above 0 outside the excluded document rows; equal scores by row. On average
        `recall` of them are found; all with `exact`.

        Rows [q, k] (-1 where fewer share a term), scores (-inf there) and mask.
        """
        check_k(k)
        rows, scores = _search(self._matrices, queries, k, excluded, self.exact)
        return rows, scores, rows >= 0

    def scores(self, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
        """The score of given chunks for each query; 0 where they share no term, or the row is -1."""
        found = np.zeros(rows.shape, np.float32)
        for matrix in self._matrices:
            found += matrix.scores(queries, rows)
        return found

    def idf(self, terms: Int64[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
        """Of the buckets of tfidf, over all segments; 0 for those that no chunk has."""
        found = np.zeros(len(terms), np.float32)
        for known, idf in self._idf:
            places = np.minimum(np.searchsorted(known, terms), len(idf) - 1)
            found = np.maximum(found, np.where(known[places] == terms, idf[places], np.float32(0)))
        return found

    @cached_property
    def _idf(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The terms of each segment, and theirs."""
        names = (f"idf-{number:05d}.npy" for number in range(len(self.segments)))
        arrays = [open_array(self.folder, name, self.record["files"]) for name in names]
        return [(np.asarray(one.terms), np.asarray(idf)) for one, idf in zip(self.segments, arrays, strict=True)]


class _Matrix:
    """The weights of one segment."""

    def __init__(self, store: Store, segment: Postings, folder: Path, number: int, files: dict[str, Any]) -> None:
        self.segment = segment
        self.first_row, self.stop_row = row_range(store, segment.shards)
        self._documents = store.document_rows(segment.store_rows(slice(None)))
        names = (f"{name}-{number:05d}.npy" for name in ("weights", "idf", "norms"))
        weights, idf, norms = (open_array(folder, name, files) for name in names)
        self._idf = np.asarray(idf)
        self._weighed = Weighed(segment, weights, self._idf, np.asarray(norms), self._documents)
        self._vocabulary = _Buckets(segment.terms) if segment.kind == "tfidf" else _Words(segment.terms)

    def search(
        self, queries: Queries, k: int, excluded: list[set[int]] | None, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `LexicalIndex.search`, of this segment."""
        queried, weighed = self._queried(queries), self._weighed
        blocked = [set()] * len(queries) if excluded is None else excluded
        chunks = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)

        def by_rare_terms(part: np.ndarray) -> None:
            chunks[part], scores[part] = best_chunks(weighed, queried[part], k, [blocked[q] for q in part])

        def by_all_terms(part: np.ndarray) -> None:
            weighed.check_terms(queried[part].indices)
            found = queried[part] @ weighed.matrix
            for number, q in enumerate(part):
                there = slice(found.indptr[number], found.indptr[number + 1])
                best = highest(found.indices[there], found.data[there], k, self._documents, blocked[q])
                chunks[q, : len(best[0])], scores[q, : len(best[0])] = best

        left, width = np.arange(len(queries)), len(self._documents)
        if weighed.is_large and not exact:
            _in_threads(by_rare_terms, left, max(_BLOCK_QUERIES, width // _CHUNKS_PER_QUERY))
            left = np.flatnonzero(chunks[:, 0] < 0)
        _in_threads(by_all_terms, left, min(_BLOCK_QUERIES, max(_BLOCK_SCORES // max(width, 1), 1)))
        return np.where(chunks < 0, -1, self.segment.store_rows(np.maximum(chunks, 0))), scores

    def scores(self, queries: Queries, rows: np.ndarray) -> np.ndarray:
        """As `LexicalIndex.scores`; 0 for rows of other segments."""
        wanted = np.clip(rows - self.first_row, 0, self.stop_row - self.first_row - 1).astype(np.uint32)
        chunks = np.minimum(np.searchsorted(self.segment.rows, wanted), len(self.segment.rows) - 1)
        is_there = (rows >= self.first_row) & (rows < self.stop_row) & (self.segment.rows[chunks] == wanted)
        return score_chunks(self._weighed, self._queried(queries), np.where(is_there, chunks, -1))

    def _queried(self, queries: Queries) -> Any:
        """The weight of each term in each query, sparse [q, terms]; terms that say nothing are left out."""
        block = _counts(self._vocabulary.terms(queries), len(queries), len(self._idf))
        if self.segment.kind == "tfidf":
            block.data = np.log1p(block.data) * self._idf[block.indices]
        else:
            block.data[self._idf[block.indices] == 0] = 0
        block.eliminate_zeros()
        return block


def _search(
    matrices: list[_Matrix], queries: Queries, k: int, excluded: list[set[int]] | None, exact: bool
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for matrix in matrices:
        rows, scores = _merge(rows, scores, *matrix.search(queries, k, excluded, exact), k)
    return rows, scores


def _recall(store: Store, matrices: list[_Matrix]) -> float:
    """The share of the 10 best chunks of other documents that rare terms find for chunks of the store."""
    rows = store.searchable_rows
    rows = np.asarray(rows[np.arange(min(_SAMPLE, len(rows))) * len(rows) // min(_SAMPLE, len(rows))])
    queries = Queries(store.tokenizer, tokens=store.token_lists(rows))
    excluded = [{int(document)} for document in store.document_rows(rows)]
    found, best = (_search(matrices, queries, 10, excluded, exact)[0] for exact in (False, True))
    return float((found[:, :, None] == best[:, None]).any(1)[best >= 0].mean()) if (best >= 0).any() else 1.0


def _merge(
    rows: np.ndarray, scores: np.ndarray, new_rows: np.ndarray, new_scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of two lists, by score, then row."""
    rows, scores = np.concatenate([rows, new_rows], 1), np.concatenate([scores, new_scores], 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def _in_threads(work: Callable[[np.ndarray], None], numbers: np.ndarray, size: int) -> None:
    """Do the work of blocks of numbers, in as many threads as this process may use."""
    blocks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    if len(blocks) == 1:
        return work(blocks[0])
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, blocks))


# Building


def build_lexical(store: Store, kind: str, check: bool = False, own: Collection[str] | None = None) -> LexicalIndex:
    """Build what is missing or damaged of the index of a store's searchable rows, and open it.

    check: look for damage in all of its files; else only in what opening reads. own: see `LexicalIndex`.
    """
    kind, _, exact = kind.partition(":")
    for last_try in (False, True):
        shard_ranges, folder = _segments(store, kind)
        try:
            for shards in shard_ranges:
                check_files(shards.folder, shards.record["files"], checksums=check)
            segments = [Postings(store, shards) for shards in shard_ranges]
            if not (folder / "index.json").is_file():
                _written(store, kind, lambda: _write_weights(store, kind, segments, folder))  # noqa: B023
            check_files(folder, load_record(folder / "index.json")["files"], checksums=check)
            return LexicalIndex(store, folder, segments, bool(exact), own)
        except ValueError as error:
            damaged = [shards.folder for shards in shard_ranges if _is_damaged(shards.folder)]
            damaged += [folder] if (folder / "index.json").is_file() and _is_damaged(folder) else []
            if last_try or not damaged:
                raise
            log.warning("building the index again: %s", error)
            for one in damaged:
                delete(one, store.path)
    raise AssertionError("the second try returns or raises")


def _is_damaged(folder: Path) -> bool:
    try:
        check_files(folder, load_record(folder / "index.json")["files"], checksums=True)
    except (ValueError, OSError):
        return True
    return False


def _segments(store: Store, kind: str) -> tuple[list[ShardRange], Path]:
    """The segments that serve the store, written where they are missing, and the folder of their weights."""
    if store.num_live_chunks:  # where all were removed, nothing is found
        check_searchable(store)
    settings = {"tokenizer": store.tokenizer_fingerprint}
    there = [
        one
        for one in find_segments(store, kind)
        if one.record["settings"] == settings and one.record["format_version"] == FORMAT_VERSION
    ]
    most = MAX_POSTINGS // (2 * store.chunk_len)
    shard_ranges = []
    for shards in plan_segments(store, cover(store, there), most):
        if shards.folder is None:
            if not len(store.searchable_in(*row_range(store, shards))):
                continue
            shards = _written(store, kind, lambda: _write_segment(store, shards, kind, settings))  # noqa: B023
        shard_ranges.append(shards)
    names = [shards.folder.name for shards in shard_ranges]
    content = {"kind": kind, "format_version": FORMAT_VERSION, "store": store.fingerprint, "segments": names}
    content |= {"weighing": WEIGHING}
    return shard_ranges, store.path / "index" / stable_hash(content)[:16]


def _written(store: Store, kind: str, write: Any) -> Any:
    try:
        return write()
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        raise ValueError(
            f"{store.path} has no {kind} index and cannot be written ({error.strerror}); "
            f"build it where it can be, with `retro build --index {kind}`"
        ) from None


def _write_segment(store: Store, shards: ShardRange, kind: str, settings: dict[str, Any]) -> ShardRange:
    def write(folder: Path, rows: np.ndarray) -> dict[str, Any]:
        write_postings(store, shards, kind, rows, folder)
        return {}

    return write_segment(store, shards, {"format_version": FORMAT_VERSION, "kind": kind, "settings": settings}, write)


def _write_weights(store: Store, kind: str, segments: list[Postings], folder: Path) -> None:
    if segments and not any(len(segment.postings) for segment in segments):
        raise ValueError(f"{store.path} has no word of two letters or more for {kind} to index; use tfidf")

    def write(aside: Path) -> dict[str, Any]:
        write_weights(segments, kind, aside)
        files = folder_record(aside)
        matrices = [_Matrix(store, segment, aside, number, files) for number, segment in enumerate(segments)]
        record = {"kind": kind, "store": store.fingerprint, "rows": store.num_searchable}
        record |= {"recall": _recall(store, matrices)}
        return record | {"segments": [segment.folder.name for segment in segments]}

    write_index(store, folder, write)


# Terms of queries


class _Buckets:
    """Which row of the matrix a bucket is: how many used buckets are before it, by bytes of one bit a bucket."""

    def __init__(self, terms: Int32[np.ndarray, " terms"]) -> None:
        is_used = np.zeros(BUCKETS, bool)
        is_used[terms] = True
        self._bits = np.packbits(is_used, bitorder="little")
        self._before = np.cumsum(_BITS[self._bits], dtype=np.int32) - _BITS[self._bits]

    def terms(self, queries: Queries) -> Terms:
        wanted, owners = bucket_terms(queries.tokens)
        at, bit = wanted >> 3, np.uint8(1) << (wanted & 7).astype(np.uint8)
        bits = self._bits[at]
        is_known = bits & bit > 0
        places = self._before[at] + _BITS[bits & (bit - np.uint8(1))]
        return places[is_known].astype(np.int64), owners[is_known]


class _Words:
    """Which row of the matrix a word is."""

    def __init__(self, words: list[str]) -> None:
        self.places = {word: place for place, word in enumerate(words)}

    def terms(self, queries: Queries) -> Terms:
        words, owners = word_terms(queries.texts)
        places = np.fromiter(map(self.places.get, words, repeat(-1)), np.int64, len(words))
        return places[places >= 0], owners[places >= 0]


def _counts(terms: Terms, num_queries: int, width: int) -> Any:
    """How often each query has each term, sparse [q, width]."""
    from scipy.sparse import csr_matrix

    places, owners = terms
    found, counts = np.unique(owners * width + places, return_counts=True)
    starts = np.searchsorted(found, np.arange(num_queries + 1) * width)
    return csr_matrix((counts.astype(np.float32), found % width, starts), shape=(num_queries, width))
