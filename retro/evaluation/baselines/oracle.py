"""Neighbors chosen by the text that they should help to predict: an upper bound for any retriever, no method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from retro.evaluation.baselines.sample import Sample
from retro.text.overlap import common_runs

if TYPE_CHECKING:
    from retro.retrieval import Retriever

_BLOCK_CHUNKS = 32


def oracle_rows(
    sample: Sample, lexical: Retriever, k: int, num_candidates: int, retrieved_len: int
) -> Int[np.ndarray, "c k"]:
    """For each chunk C_u the k rows whose [N, F] has most in common with C_{u+1}, -1 for the last chunk of a window.

    Candidates: what `lexical` finds for C_{u+1} itself, and the chunk before each of them, which has it as its
    continuation; none from a document of the same id. First by the longest run of tokens in common, then by how many
    of the tokens of C_{u+1} occur, then by rank.
    """
    data, store = sample.data, lexical.store
    chunks = np.flatnonzero(np.diff(data.documents, append=-1) == 0)  # those with a next one
    rows = np.full((len(data.tokens), k), -1, np.int64)
    for start in range(0, len(chunks), _BLOCK_CHUNKS):
        block = chunks[start : start + _BLOCK_CHUNKS]
        names = [{data.document_ids[window]} for window in data.documents[block]]
        count = min(num_candidates, lexical.index.num_rows)
        found = lexical(data.tokens[block + 1], count, exclude_documents=names, mask=data.mask[block + 1]).ids
        candidates = _with_the_chunks_before(store, found)
        values, value_mask = store.values(candidates, retrieved_len)
        order = _ranked(data.tokens[block + 1], values, data.mask[block + 1], value_mask)[:, :k]
        rows[block, : order.shape[1]] = np.take_along_axis(candidates, order, axis=1)
    return rows


def _with_the_chunks_before(store, rows: Int[np.ndarray, "q c"]) -> Int[np.ndarray, "q c2"]:
    """Each row and the one before it in its document, no row twice: what comes again is -1."""
    before = np.maximum(rows, 1) - 1
    same = (rows > 0) & (store.document_rows(before) == store.document_rows(np.maximum(rows, 0)))
    both = np.stack([np.where(same, before, -1), rows], axis=-1).reshape(len(rows), -1)
    for line in both:
        _, first = np.unique(line, return_index=True)
        again = np.ones(len(line), bool)
        again[first] = False
        line[again] = -1
    return both


def _ranked(
    targets: Int[np.ndarray, "q m"],
    values: Int[np.ndarray, "q c r"],
    target_mask: Bool[np.ndarray, "q m"],
    value_mask: Bool[np.ndarray, "q c r"],
) -> Int[np.ndarray, "q c"]:
    """Candidates in order; those without any token last."""
    runs = common_runs(targets, values, target_mask, value_mask).lengths
    shared = np.zeros_like(runs)
    for q, (target, real) in enumerate(zip(targets, target_mask, strict=True)):
        for c, (value, there) in enumerate(zip(values[q], value_mask[q], strict=True)):
            shared[q, c] = np.isin(target[real], value[there]).sum() if there.any() else -1
    return np.lexsort((-shared, -runs), axis=-1)  # stable: equal ones by rank
