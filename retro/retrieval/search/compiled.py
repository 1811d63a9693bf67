"""What retro.retrieval.search.candidates does, compiled by numba: the same sums in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without what checks of types put around it; kept for later processes where there is a place to keep it."""
    function = getattr(function, "__wrapped__", function)
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(nogil=True)(function)


@compiled
def _highest(chunks, sums, most, documents, blocked):
    """The chunks of the highest sums outside blocked documents, equal sums by chunk, in order of chunks: a heap with
    the worst of them on top.
    """
    most = min(most, len(chunks))
    heap, size = np.empty(most, np.int64), 0
    for chunk in chunks:
        if size == most and not _is_worse(sums, heap[0], chunk):
            continue
        at = np.searchsorted(blocked, documents[chunk])
        if sums[chunk] <= 0 or (at < len(blocked) and blocked[at] == documents[chunk]):
            continue
        if size < most:  # from the end upwards
            at, size = size, size + 1
            while at and _is_worse(sums, chunk, heap[(at - 1) // 2]):
                heap[at] = heap[(at - 1) // 2]
                at = (at - 1) // 2
        else:  # from the top downwards
            at = 0
            while 2 * at + 1 < size:
                child = 2 * at + 1
                if child + 1 < size and _is_worse(sums, heap[child + 1], heap[child]):
                    child += 1
                if _is_worse(sums, chunk, heap[child]):
                    break
                heap[at], at = heap[child], child
        heap[at] = chunk
    return np.sort(heap[:size])


@compiled
def _is_worse(sums, chunk, other):
    return sums[chunk] < sums[other] or (sums[chunk] == sums[other] and chunk > other)


@compiled
def _score(chunk_starts, chunk_terms, chunk_counts, idf, norms, raw, is_tfidf, terms, times, chunk):
    """Over the terms that query and chunk share, both in ascending order."""
    total, t, norm = np.float32(0), 0, norms[chunk]
    for place in range(chunk_starts[chunk], chunk_starts[chunk + 1]):
        term = chunk_terms[place]
        while t < len(terms) and terms[t] < term:
            t += 1
        if t == len(terms):
            break
        if terms[t] == term:
            value = raw[chunk_counts[place]]
            weight = value * idf[term] / norm if is_tfidf else idf[term] * (value / (norm + value))
            total += weight * times[t]
    return total


@compiled
def candidates(
    starts, postings, weights, documents, query_starts, terms, times, blocked_starts, blocked, chunks
):  # fmt: skip
    """Fill `chunks` [q, c] with those that the terms find. blocked: ascending for each query."""
    sums = np.zeros(len(documents), np.float32)
    for q in range(len(chunks)):
        own, room = slice(query_starts[q], query_starts[q + 1]), 0
        for term in terms[own]:
            room += starts[term + 1] - starts[term]
        touched, num_touched = np.empty(room, np.int64), 0
        for term, weight in zip(terms[own], times[own]):  # noqa: B905
            for place in range(starts[term], starts[term + 1]):
                chunk = postings[place]
                if sums[chunk] == 0:
                    touched[num_touched] = chunk
                    num_touched += 1
                sums[chunk] += weights[place] * weight
        found = _highest(
            touched[:num_touched],
            sums,
            chunks.shape[1],
            documents,
            blocked[blocked_starts[q] : blocked_starts[q + 1]],
        )
        chunks[q, : len(found)] = found
        for chunk in touched[:num_touched]:
            sums[chunk] = 0


@compiled
def score_chunks(
    chunk_starts, chunk_terms, chunk_counts, idf, norms, raw, is_tfidf, query_starts, terms, times, chunks
):  # fmt: skip
    scores = np.zeros(chunks.shape, np.float32)
    for q in range(chunks.shape[0]):
        own = terms[query_starts[q] : query_starts[q + 1]]
        own_times = times[query_starts[q] : query_starts[q + 1]]
        for c in range(chunks.shape[1]):
            if chunks[q, c] >= 0:
                scores[q, c] = _score(
                    chunk_starts, chunk_terms, chunk_counts, idf, norms, raw, is_tfidf, own, own_times, chunks[q, c]
                )
    return scores
