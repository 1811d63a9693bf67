"""The best chunks of a segment without a look at all that share a term: rare terms find, all terms score.

Nearly all postings belong to terms that are in many chunks and say little. So a query's rarest terms find candidates,
as many terms as have POSTINGS postings together. The best 5 k candidates by these terms alone, at least CANDIDATES, are
scored by all terms, from those of each chunk. So what a query costs hardly grows with the segment, unless all of its
terms are frequent: the rarest is read whole. This is compiled by numba where it is installed
(retro.retrieval.search.compiled); else scipy and numpy do the same. In segments that are not large it would gain
nothing: there all terms find.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from retro.common.checksums import CheckedArray
from retro.retrieval.search.postings import Postings, raw_of, weight_of

log = logging.getLogger(__name__)

LARGE = 1 << 14  # chunks of a segment
POSTINGS = {"tfidf": 1 << 15, "bm25": 1 << 16}
CANDIDATES = {"tfidf": 50, "bm25": 100}
LEAST_POSTINGS, CANDIDATES_PER_NEIGHBOR = 1 << 10, 5


@dataclass(frozen=True)
class Weighed:
    """A segment with the weights of its postings, and what they are weighed by.

    documents: document row of each chunk.
    """

    segment: Postings
    weights: CheckedArray
    idf: Float32[np.ndarray, " terms"]
    norms: Float32[np.ndarray, " c"]
    documents: Int64[np.ndarray, " c"]
    _spare: list[Float32[np.ndarray, " c"]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.segment.kind

    @cached_property
    def by_term(self) -> tuple[np.ndarray, ...]:
        """Where the postings of each term start, their chunks and weights; to be checked, see below."""
        return self.segment.starts, self.segment.postings.unchecked, self.weights.unchecked

    @cached_property
    def by_chunk(self) -> tuple[np.ndarray, ...]:
        """Where the terms of each chunk start, the terms and their counts; to be checked, see below."""
        segment = self.segment
        return segment.chunk_starts, segment.chunk_terms.unchecked, segment.chunk_counts.unchecked

    @cached_property
    def raw(self) -> Float32[np.ndarray, "65536"]:
        return raw_of(self.kind)

    @property
    def is_large(self) -> bool:
        return len(self.norms) >= LARGE

    def check_terms(self, terms: np.ndarray) -> None:
        """Compare checksums of what is read of terms; ValueError names a file that is damaged."""
        starts = self.segment.starts
        for array in (self.segment.postings, self.weights):
            array.check_ranges(starts[terms], starts[terms + 1])

    def check_chunks(self, chunks: np.ndarray) -> None:
        """As `check_terms`, of chunks; -1 is none."""
        chunks, starts = chunks[chunks >= 0], self.segment.chunk_starts
        for array in (self.segment.chunk_terms, self.segment.chunk_counts):
            array.check_ranges(starts[chunks], starts[chunks + 1])

    @cached_property
    def matrix(self) -> Any:
        """The weights by term, sparse [terms, chunks]."""
        from scipy.sparse import csr_matrix

        starts, chunks, weights = self.by_term
        return csr_matrix((weights, chunks, starts), shape=(len(starts) - 1, len(self.norms)))

    @contextmanager
    def zeros(self) -> Iterator[Float32[np.ndarray, " c"]]:
        """One for each chunk, lent to one thread at a time, which leaves zeros."""
        try:
            lent = self._spare.pop()
        except IndexError:
            lent = np.zeros(len(self.norms), np.float32)
        yield lent
        self._spare.append(lent)


def best_chunks(
    segment: Weighed, queried: Any, k: int, blocked: list[set[int]]
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The k best chunks of each query outside its blocked documents, equal scores by chunk, and their scores; -1 and
    -inf of a query whose rare terms find fewer: all of its terms must.

    queried: the weight of each term in each query, sparse [q, terms].
    """
    most = min(max(CANDIDATES[segment.kind], CANDIDATES_PER_NEIGHBOR * k), len(segment.norms))
    found = _candidates(segment, queried, most, blocked)
    found[(found >= 0).sum(1) < k] = -1
    of_all = np.where(found >= 0, score_chunks(segment, queried, found), np.float32(-np.inf))
    order = np.argsort(-of_all, axis=1, kind="stable")[:, :k]
    chunks, scores = np.full((len(found), k), -1, np.int64), np.full((len(found), k), -np.inf, np.float32)
    chunks[:, :most], scores[:, :most] = (np.take_along_axis(of, order, 1) for of in (found, of_all))
    return chunks, scores


def _candidates(segment: Weighed, queried: Any, most: int, blocked: list[set[int]]) -> Int64[np.ndarray, "q c"]:
    """The chunks that the rare terms of each query find, up to `most`, in order of chunks; -1 where there are fewer."""
    finding, found = _finding(segment, queried), np.full((queried.shape[0], most), -1, np.int64)
    segment.check_terms(finding.indices)
    if (compiled := _compiled(segment)) is not None:
        sizes = np.cumsum([0, *map(len, blocked)])
        documents = np.asarray([row for rows in blocked for row in sorted(rows)], np.int64)
        given = finding.indptr.astype(np.int64), finding.indices, finding.data, sizes, documents
        with segment.zeros() as sums:
            compiled.candidates(*segment.by_term, segment.documents, *given, sums, found)
        return found
    sums = finding @ segment.matrix
    for q in range(len(found)):
        part = slice(sums.indptr[q], sums.indptr[q + 1])
        best, _ = highest(sums.indices[part], sums.data[part], most, segment.documents, blocked[q])
        found[q, : len(best)] = np.sort(best)
    return found


def _finding(segment: Weighed, queried: Any) -> Any:
    """The queries with those of their terms alone that find candidates: the rarest, as many as the budget allows, in
    order, so that the best candidates are the first.
    """
    from scipy.sparse import csr_matrix

    starts = segment.segment.starts
    sizes = starts[queried.indices + 1] - starts[queried.indices]
    owners = np.repeat(np.arange(queried.shape[0]), np.diff(queried.indptr))
    order = np.argsort(owners << 32 | sizes, kind="stable")  # by query, then size
    before = np.append(0, np.cumsum(sizes[order]))[:-1]
    before -= np.append(before, 0)[queried.indptr[:-1]][owners]
    fits = before + sizes[order] <= POSTINGS[segment.kind]
    chosen = order[fits | (before < LEAST_POSTINGS)]
    of_query = np.searchsorted(owners[chosen], np.arange(queried.shape[0] + 1))
    return csr_matrix((queried.data[chosen], queried.indices[chosen], of_query), queried.shape)


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
    segment.check_chunks(chunks)
    if (compiled := _compiled(segment)) is not None:
        given = queried.indptr.astype(np.int64), queried.indices, queried.data, np.ascontiguousarray(chunks)
        weighing = segment.idf, segment.norms, segment.raw, segment.kind == "tfidf"
        return compiled.score_chunks(*segment.by_chunk, *weighing, *given)
    scores = np.zeros(chunks.shape, np.float32)
    for q, line in enumerate(chunks):
        part, there = slice(queried.indptr[q], queried.indptr[q + 1]), line >= 0
        scores[q, there] = _scores(segment, queried.indices[part], queried.data[part], line[there])
    return scores


def _compiled(segment: Weighed) -> ModuleType | None:
    return _by_numba() if segment.is_large else None


@cache
def _by_numba() -> ModuleType | None:
    try:
        from retro.retrieval.search import compiled
    except ImportError as error:
        if find_spec("numba") is not None:  # one that does not know this numpy, for example
            log.warning("words are searched without numba, which cannot be loaded: %s", error)
        return None
    return compiled


# By scipy and numpy


def _scores(segment: Weighed, terms: np.ndarray, times: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Summed in the order of the terms, as a product of sparse matrices is."""
    if not len(terms) or not len(chunks):
        return np.zeros(len(chunks), np.float32)
    starts, chunk_terms, chunk_counts = segment.by_chunk
    first = starts[chunks]
    sizes = starts[chunks + 1] - first
    places, owners = _ranges(first, sizes), np.repeat(np.arange(len(chunks)), sizes)
    own = chunk_terms[places]
    at = np.minimum(np.searchsorted(terms, own), len(terms) - 1)
    shared = terms[at] == own
    places, owners, at = places[shared], owners[shared], at[shared]
    raw = segment.raw[chunk_counts[places]]
    weights = weight_of(segment.kind, raw, segment.idf[terms[at]], segment.norms[chunks[owners]])
    scores = np.zeros(len(chunks), np.float32)
    np.add.at(scores, owners, weights * times[at])
    return scores


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)
