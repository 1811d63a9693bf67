"""The best chunks of a segment without a look at all that share a term: rare terms find, all terms score.

Nearly all postings belong to terms that are in many chunks and say little. So a query's rarest terms find candidates,
as many terms as have POSTINGS postings together. The best 5 k candidates by these terms alone, at least CANDIDATES, are
scored by all terms, from those of each chunk. So what a query costs hardly grows with the segment, unless all of its
terms are frequent: the rarest is read whole. In large segments this is compiled by numba where it is installed
(retro.retrieval.search.compiled); else scipy and numpy do the same.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from retro.retrieval.search.postings import Postings, raw_of, weight_of

log = logging.getLogger(__name__)

COMPILED_FROM = 1 << 14  # chunks of a segment, below which numpy is fast enough
POSTINGS = {"tfidf": 1 << 15, "bm25": 1 << 16}
CANDIDATES = {"tfidf": 50, "bm25": 100}
LEAST_POSTINGS, CANDIDATES_PER_NEIGHBOR = 1 << 10, 5


@dataclass(frozen=True)
class Weighed:
    """A segment as plain arrays: the weights of its chunks by term, its counts by chunk and what they are weighed by.

    raw: see `postings.raw_of`. documents: document row of each chunk.
    """

    starts: np.ndarray
    postings: np.ndarray
    weights: np.ndarray
    chunk_starts: np.ndarray
    chunk_terms: np.ndarray
    chunk_counts: np.ndarray
    idf: np.ndarray
    norms: np.ndarray
    raw: np.ndarray
    documents: np.ndarray
    kind: str

    @classmethod
    def of(cls, segment: Postings, weights: Any, idf: Any, norms: Any, documents: Any) -> Weighed:
        by_term = segment.starts, segment.postings, weights
        by_chunk = segment.chunk_starts, segment.chunk_terms, segment.chunk_counts
        arrays = map(np.asarray, (*by_term, *by_chunk, idf, norms, raw_of(segment.kind), documents))
        return cls(*arrays, segment.kind)


def best_chunks(
    segment: Weighed, matrix: Any, queried: Any, k: int, blocked: list[set[int]] | None
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"], Bool[np.ndarray, " q"]]:
    """The k best chunks of each query outside its blocked documents (-1 for none), equal scores by chunk; their
    scores; and which queries their rare terms found too few for, so that all terms must find.

    matrix: the segment's weights by term, sparse [terms, chunks]. queried: the weight of each term in each query,
    sparse [q, terms].
    """
    blocked = [set()] * queried.shape[0] if blocked is None else blocked
    chunks = np.full((queried.shape[0], k), -1, np.int64)
    scores = np.full(chunks.shape, -np.inf, np.float32)
    most = max(CANDIDATES[segment.kind], CANDIDATES_PER_NEIGHBOR * k)
    if (compiled := _compiled(segment)) is not None:
        sizes = np.cumsum([0, *map(len, blocked)])
        documents = np.asarray([row for rows in blocked for row in sorted(rows)], np.int64)
        given = queried.indptr.astype(np.int64), queried.indices, queried.data, sizes, documents
        few = compiled.best_chunks(
            *_fields(segment), *given, POSTINGS[segment.kind], LEAST_POSTINGS, most, chunks, scores
        )
        return chunks, scores, few
    found, few = _finding(segment, queried) @ matrix, np.zeros(len(chunks), bool)
    for q in range(len(chunks)):
        part = slice(found.indptr[q], found.indptr[q + 1])
        best, _ = highest(found.indices[part], found.data[part], most, segment.documents, blocked[q])
        few[q] = len(best) < k
        if not few[q]:
            part = slice(queried.indptr[q], queried.indptr[q + 1])
            of_best = _scores(segment, queried.indices[part], queried.data[part], best)
            chunks[q], scores[q] = highest(best, of_best, k, segment.documents, set())
    return chunks, scores, few


def highest(
    chunks: Int32[np.ndarray, " c"], scores: Float32[np.ndarray, " c"], k: int, documents: Any, blocked: set[int]
) -> tuple[Int32[np.ndarray, " found"], Float32[np.ndarray, " found"]]:
    """The k chunks of the highest scores above 0 outside blocked documents, equal scores by chunk; and the scores."""
    allowed = scores > 0
    if blocked:
        allowed &= ~np.isin(documents[chunks], list(blocked))
    chunks, scores = chunks[allowed], scores[allowed]
    if len(scores) > k:
        close = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        chunks, scores = chunks[close], scores[close]
    order = np.lexsort((chunks, -scores))[:k]
    return chunks[order], scores[order]


def score_chunks(segment: Weighed, queried: Any, chunks: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
    """The score of given chunks for each query; 0 for chunk -1."""
    if (compiled := _compiled(segment)) is not None:
        given = queried.indptr.astype(np.int64), queried.indices, queried.data
        return compiled.score_chunks(*_fields(segment), *given, np.ascontiguousarray(chunks))
    scores = np.zeros(chunks.shape, np.float32)
    for q, line in enumerate(chunks):
        part, there = slice(queried.indptr[q], queried.indptr[q + 1]), line >= 0
        scores[q, there] = _scores(segment, queried.indices[part], queried.data[part], line[there])
    return scores


def _compiled(segment: Weighed) -> ModuleType | None:
    return None if len(segment.norms) < COMPILED_FROM else _by_numba()


@cache
def _by_numba() -> ModuleType | None:
    try:
        from retro.retrieval.search import compiled
    except ImportError as error:
        if find_spec("numba") is not None:  # one that does not know this numpy, for example
            log.warning("words are searched without numba, which cannot be loaded: %s", error)
        return None
    return compiled


def _fields(segment: Weighed) -> tuple[Any, ...]:
    arrays = (getattr(segment, name) for name in Weighed.__dataclass_fields__ if name != "kind")
    return (*arrays, segment.kind == "tfidf")


# By scipy and numpy


def _finding(segment: Weighed, queried: Any) -> Any:
    """The queries with those of their terms alone that find candidates."""
    finding, sizes = queried.copy(), segment.starts[queried.indices + 1] - segment.starts[queried.indices]
    for q in range(queried.shape[0]):
        part = slice(queried.indptr[q], queried.indptr[q + 1])
        order = part.start + np.argsort(sizes[part], kind="stable")
        up_to = np.cumsum(sizes[order])
        finding.data[order[(up_to > POSTINGS[segment.kind]) & (up_to - sizes[order] >= LEAST_POSTINGS)]] = 0
    finding.eliminate_zeros()
    return finding


def _scores(segment: Weighed, terms: np.ndarray, times: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Summed in the order of the terms, as a product of sparse matrices is."""
    if not len(terms) or not len(chunks):
        return np.zeros(len(chunks), np.float32)
    first = segment.chunk_starts[chunks]
    sizes = segment.chunk_starts[chunks + 1] - first
    places, owners = _ranges(first, sizes), np.repeat(np.arange(len(chunks)), sizes)
    own = segment.chunk_terms[places]
    at = np.minimum(np.searchsorted(terms, own), len(terms) - 1)
    shared = terms[at] == own
    places, owners, at = places[shared], owners[shared], at[shared]
    raw = segment.raw[segment.chunk_counts[places]]
    weights = weight_of(segment.kind, raw, segment.idf[terms[at]], segment.norms[chunks[owners]])
    scores = np.zeros(len(chunks), np.float32)
    np.add.at(scores, owners, weights * times[at])
    return scores


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)
