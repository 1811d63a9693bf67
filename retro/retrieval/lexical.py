"""Nearest chunks by the words they share: BM25 and hashed TF-IDF bigrams, as two weightings of one sparse matrix.

    "tfidf"   tokens and pairs of tokens in 2^24 buckets, log(1 + count) x idf, chunks of length 1. Source: Chen et al.
              2017 (DrQA). Differs: terms are the tokenizer's ids, not words, and chunks are normalised; of the
              4-grams of the next chunk of PowerShell-Docs, 2 neighbors then held 23.3% instead of 21.0%.
    "bm25"    words, as bm25s cuts and weighs them (Lucene's variant, k1 = 1.5, b = 0.75)

index/<hash>/    postings.npy (chunk of each posting), weights.npy, starts.npy (of each term), rows.npy (store rows),
                 terms.npy (buckets in use) or words.json, index.json
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from retro.retrieval.files import (
    check_files,
    folder_record,
    folder_written_aside,
    load_json,
    open_npy,
    save_json,
    save_npy,
    stable_hash,
)
from retro.retrieval.index import Hits, check_searchable
from retro.retrieval.queries import Queries
from retro.retrieval.store import Store

log = logging.getLogger(__name__)

KINDS = ("bm25", "tfidf")
BUCKETS = 1 << 24
_BLOCK_QUERIES = 64
_BLOCK_ROWS = 1 << 18


class LexicalIndex:
    """A sparse matrix of term weights, [terms, chunks] by term; the score of a chunk is its product with the query."""

    def __init__(self, store: Store, folder: Path, record: dict[str, Any]) -> None:
        self.store, self.folder, self.record = store, folder, record
        self.kind: str = record["kind"]
        self.num_rows: int = record["rows"]
        self.recall = 1.0
        self._rows = open_npy(folder / "rows.npy")
        self._documents = store.document_rows(self._rows)
        self._matrix = _sparse(
            *(open_npy(folder / f"{name}.npy") for name in ("weights", "postings", "starts")), width=self.num_rows
        )
        self._vocabulary = _vocabulary(folder, self.kind)

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """The k chunks of the largest score above 0 outside the excluded document rows; equal scores by row.

        Rows [q, k] (-1 where fewer share a term), scores (-inf there) and mask.
        """
        terms = self._vocabulary.terms(queries)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)

        def search_block(start: int) -> None:
            block = _counts(terms[start : start + _BLOCK_QUERIES], self._matrix.shape[0])
            if self.kind == "tfidf":
                block.data = np.log1p(block.data) * self._vocabulary.idf[block.indices]
            found = block @ self._matrix
            for q in range(found.shape[0]):
                part = slice(found.indptr[q], found.indptr[q + 1])
                blocked = set() if excluded is None else excluded[start + q]
                best, values = self._best(found.indices[part], found.data[part], k, blocked)
                rows[start + q, : len(best)], scores[start + q, : len(best)] = best, values

        with ThreadPoolExecutor(_num_threads()) as pool:
            list(pool.map(search_block, range(0, len(terms), _BLOCK_QUERIES)))
        return rows, scores, rows >= 0

    def _best(
        self, columns: np.ndarray, scores: np.ndarray, k: int, blocked: set[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        allowed = scores > 0
        if blocked:
            allowed &= ~np.isin(self._documents[columns], list(blocked))
        columns, scores = columns[allowed], scores[allowed]
        if len(scores) > k:
            close = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
            columns, scores = columns[close], scores[close]
        order = np.lexsort((columns, -scores))[:k]
        return self._rows[columns[order]], scores[order]


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_lexical(store: Store, kind: str) -> LexicalIndex:
    """Build the index of a store's searchable rows, or open the same one if it is there already."""
    folder = store.path / "index" / stable_hash({"kind": kind, "store": store.fingerprint})[:16]
    if (folder / "index.json").is_file():
        try:
            return _open(store, folder)
        except ValueError as error:
            log.warning("building the index again: %s", error)
            shutil.rmtree(folder)
    _write(store, kind, folder)
    return _open(store, folder)


def _open(store: Store, folder: Path) -> LexicalIndex:
    record = load_json(folder / "index.json")
    check_files(folder, record["files"], checksums=False)
    return LexicalIndex(store, folder, record)


def _write(store: Store, kind: str, folder: Path) -> None:
    rows = store.searchable_rows
    check_searchable(store)
    try:
        folder.parent.mkdir(exist_ok=True)
        with folder_written_aside(folder) as aside:
            _write_files(store, kind, rows, aside)
    except PermissionError as error:
        raise ValueError(
            f"{store.path} has no {kind} index and cannot be written ({error.strerror}); "
            f"build it where it can be, with `retro build --index {kind}`"
        ) from None


def _write_files(store: Store, kind: str, rows: np.ndarray, folder: Path) -> None:
    {"tfidf": _write_tfidf, "bm25": _write_bm25}[kind](store, rows, folder)
    save_npy(folder / "rows.npy", rows)
    record = {"kind": kind, "store": store.fingerprint, "rows": len(rows)}
    save_json(folder / "index.json", {**record, "files": folder_record(folder)})


def _write_tfidf(store: Store, rows: np.ndarray, folder: Path) -> None:
    """Weights log(1 + count) idf, divided by the chunk's length."""
    found = [_chunk_terms(store, rows, start) for start in range(0, len(rows), _BLOCK_ROWS)]
    chunks, buckets, counts = (np.concatenate(part) for part in zip(*found, strict=True))
    terms, of_term, frequency = np.unique(buckets, return_inverse=True, return_counts=True)
    idf = np.log((len(rows) - frequency + 0.5) / (frequency + 0.5)).clip(min=0).astype(np.float32)
    weights = np.log1p(counts.astype(np.float32)) * idf[of_term]
    lengths = np.sqrt(np.bincount(chunks, np.square(weights), minlength=len(rows)))
    weights /= np.maximum(lengths, 1e-9)[chunks]
    order = np.argsort(of_term, kind="stable")  # by term; within a term chunks ascend
    order = order[weights[order] > 0]  # a term of half the chunks says nothing
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_term[order], minlength=len(terms)))])
    _save(folder, weights[order], chunks[order], starts)
    save_npy(folder / "terms.npy", terms)
    save_npy(folder / "idf.npy", idf)


def _chunk_terms(store: Store, rows: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunk (index into rows), bucket and count of every term of a block of chunks, by chunk."""
    tokens = Queries(store.tokenizer, tokens=store.token_lists(rows[start : start + _BLOCK_ROWS])).tokens
    buckets = [_buckets(ids) for ids in tokens]
    chunks = np.repeat(np.arange(len(tokens)), [len(b) for b in buckets])
    unique, counts = np.unique(chunks * BUCKETS + np.concatenate(buckets), return_counts=True)
    return start + unique // BUCKETS, unique % BUCKETS, counts


def _buckets(ids: Int64[np.ndarray, " t"]) -> Int64[np.ndarray, " terms"]:
    """The buckets of a text's tokens and pairs of tokens: the high bits of a multiplicative hash."""
    single = ids.astype(np.uint64) + np.uint64(1)
    pairs = single[:-1] * np.uint64(0x9E3779B97F4A7C15) + single[1:]
    mixed = np.concatenate([single, pairs]) * np.uint64(0xD6E8FEB86659FD93)  # wraps modulo 2^64
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(40)).astype(np.int64)


def _write_bm25(store: Store, rows: np.ndarray, folder: Path) -> None:
    bm25s = _bm25s()
    model = bm25s.BM25()
    words = bm25s.tokenize(store.text(rows), stopwords=None, show_progress=False)
    if not any(words.ids):
        raise ValueError(f"{store.path} has no word of two letters or more for bm25 to index; use tfidf")
    model.index(words, show_progress=False)
    ordered = sorted(model.vocab_dict, key=model.vocab_dict.get)
    _save(folder, *(model.scores[name] for name in ("data", "indices", "indptr")))
    save_json(folder / "words.json", ordered)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ValueError("the index bm25 needs bm25s, which is not installed; pip install retro-lm[eval]") from None
    return bm25s


def _save(folder: Path, weights: np.ndarray, postings: np.ndarray, starts: np.ndarray) -> None:
    save_npy(folder / "weights.npy", weights.astype(np.float32))
    save_npy(folder / "postings.npy", postings.astype(np.int32))
    save_npy(folder / "starts.npy", starts.astype(np.int64))


def _sparse(weights: np.ndarray, postings: np.ndarray, starts: np.ndarray, width: int) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((weights, postings, starts), shape=(len(starts) - 1, width))


def _counts(terms: list[np.ndarray], width: int) -> Any:
    """How often each query has each term, sparse [q, width]."""
    from scipy.sparse import csr_matrix

    found = [np.unique(of_query, return_counts=True) for of_query in terms]
    starts = np.cumsum([0] + [len(unique) for unique, _ in found])
    unique, counts = (np.concatenate(part) for part in zip(*found, strict=True))
    return csr_matrix((counts.astype(np.float32), unique, starts), shape=(len(terms), width))


class _Buckets:
    """Which row of the matrix a bucket is."""

    def __init__(self, folder: Path):
        self.buckets, self.idf = open_npy(folder / "terms.npy"), np.asarray(open_npy(folder / "idf.npy"))

    def terms(self, queries: Queries) -> list[Int64[np.ndarray, " t"]]:
        return [self._known(_buckets(ids)) for ids in queries.tokens]

    def _known(self, buckets: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(self.buckets, buckets), len(self.buckets) - 1)
        return places[self.buckets[places] == buckets]


class _Words:
    """Which row of the matrix a word is."""

    def __init__(self, folder: Path):
        self.places = {word: place for place, word in enumerate(load_json(folder / "words.json"))}

    def terms(self, queries: Queries) -> list[Int64[np.ndarray, " t"]]:
        words = _bm25s().tokenize(queries.texts, stopwords=None, return_ids=False, show_progress=False)
        return [np.asarray([self.places[w] for w in of_query if w in self.places], np.int64) for of_query in words]


def _vocabulary(folder: Path, kind: str) -> _Buckets | _Words:
    return _Buckets(folder) if kind == "tfidf" else _Words(folder)
