"""What retro.retrieval.search.candidates does, compiled by numba: the same sums in the same order."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush, heapreplace
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
def candidates(
    starts, postings, weights, documents, query_starts, terms, times, blocked_starts, blocked, sums, chunks
):  # fmt: skip
    """Fill `chunks` [q, c] with those that the terms find, in order of chunks.

    blocked: ascending for each query. sums: zeros, one for each chunk, which they are again in the end.
    """
    for q in range(len(chunks)):
        own, room = slice(query_starts[q], query_starts[q + 1]), 0
        for term in terms[own]:
            room += starts[term + 1] - starts[term]
        touched, num_touched = np.empty(room, np.int32), 0
        for term, weight in zip(terms[own], times[own]):  # noqa: B905
            for place in range(starts[term], starts[term + 1]):
                chunk = postings[place]
                total = sums[chunk]
                touched[num_touched] = chunk  # is overwritten unless it is new: quicker than a branch
                num_touched += total == 0
                sums[chunk] = total + weights[place] * weight
        own_blocked = blocked[blocked_starts[q] : blocked_starts[q + 1]]
        _highest(touched[:num_touched], sums, documents, own_blocked, chunks[q])


@compiled
def _highest(touched, sums, documents, blocked, best):
    """Fill `best` with chunks of the highest sums outside blocked documents, equal sums by chunk; clear all sums."""
    heap, least = [(np.float32(0), 0) for _ in range(0)], np.float32(0)  # the worst of the best is on top
    for chunk in touched:
        total = sums[chunk]
        sums[chunk] = 0
        if total < least or total == 0:
            continue
        at = np.searchsorted(blocked, documents[chunk])
        if at < len(blocked) and blocked[at] == documents[chunk]:
            continue
        if len(heap) < len(best):
            heappush(heap, (total, -chunk))
        elif (total, -chunk) > heap[0]:
            heapreplace(heap, (total, -chunk))
        if len(heap) == len(best):
            least = heap[0][0]
    for at, (_, negative) in enumerate(heap):
        best[at] = -negative
    best[: len(heap)].sort()


@compiled
def score_chunks(
    chunk_starts, chunk_terms, chunk_counts, idf, norms, raw, is_tfidf, query_starts, terms, times, chunks
):  # fmt: skip
    """The sums of the terms that query and chunk share, in ascending order; the query's are in a hash table."""
    scores, size = np.zeros(chunks.shape, np.float32), 1 << 12
    while size < 4 * np.append(np.diff(query_starts), 0).max():
        size *= 2
    table = np.empty(size, np.int32)
    for q in range(len(chunks)):
        own = terms[query_starts[q] : query_starts[q + 1]]
        own_times = times[query_starts[q] : query_starts[q + 1]]
        table[:] = -1
        for number, term in enumerate(own):
            table[_place(table, own, term)] = number
        for c, chunk in enumerate(chunks[q]):
            if chunk < 0:
                continue
            total, norm = np.float32(0), norms[chunk]
            for place in range(chunk_starts[chunk], chunk_starts[chunk + 1]):
                term = chunk_terms[place]
                number = table[_place(table, own, term)]
                if number >= 0:
                    value = raw[chunk_counts[place]]
                    weight = value * idf[term] / norm if is_tfidf else idf[term] * (value / (norm + value))
                    total += weight * own_times[number]
            scores[q, c] = total
    return scores


@compiled
def _place(table, terms, term):
    """Where a hash table of the numbers of terms has one of them, or has room for it."""
    at = term & (len(table) - 1)
    while table[at] >= 0 and terms[table[at]] != term:
        at = (at + 1) & (len(table) - 1)
    return at
