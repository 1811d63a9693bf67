"""The tokens in a row that a chunk shares with its neighbors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class CommonRuns(NamedTuple):
    """The longest common run of a chunk with each of its neighbors; 0 tokens where nothing is shared."""

    lengths: Int[np.ndarray, "c k"]
    starts: Int[np.ndarray, "c k"]  # in the chunk
    neighbor_starts: Int[np.ndarray, "c k"]


def longest_common_run(
    chunks: Int[np.ndarray, "c m"],
    neighbors: Int[np.ndarray, "c k r"],
    chunk_mask: Bool[np.ndarray, "c m"],
    neighbor_mask: Bool[np.ndarray, "c k r"],
) -> Int[np.ndarray, " c"]:
    """Length of the longest token substring that a chunk shares with any one of its neighbors. Exact.

    Source: RETRO, section 2.6.
    """
    return common_runs(chunks, neighbors, chunk_mask, neighbor_mask).lengths.max(1, initial=0)


def common_runs(
    chunks: Int[np.ndarray, "c m"],
    neighbors: Int[np.ndarray, "c k r"],
    chunk_mask: Bool[np.ndarray, "c m"],
    neighbor_mask: Bool[np.ndarray, "c k r"],
) -> CommonRuns:
    """The longest token substring that a chunk shares with each of its neighbors, and where it starts in both. Exact.

    The textbook recurrence run(i, j) = run(i - 1, j - 1) + 1 where the tokens agree, over all pairs at once. Among runs
    of one length the first to end in the chunk, then the first in the neighbor: what is maximized at each j is
    run (m + 1) + m - i, in 16 bits where they hold it.
    """
    m = chunks.shape[1]
    kind = np.int16 if (m + 1) ** 2 < 2**15 else np.int32
    a, b = np.where(chunk_mask, chunks, -1).astype(np.int32), np.where(neighbor_mask, neighbors, -2).astype(np.int32)
    runs, best = np.zeros((*b.shape[:2], b.shape[2] + 1), kind), np.zeros(b.shape, kind)
    same, coded = np.empty(b.shape, bool), np.empty(b.shape, kind)
    for i in range(m):
        np.equal(a[:, i, None, None], b, out=same)
        runs[..., 1:] = (runs[..., :-1] + 1) * same
        np.multiply(runs[..., 1:], m + 1, out=coded)
        np.maximum(best, np.add(coded, m - i, out=coded), out=best)
    at = best.argmax(-1)
    lengths, left = np.divmod(np.take_along_axis(best, at[..., None], -1)[..., 0].astype(np.int64), m + 1)
    shared = lengths > 0
    return CommonRuns(lengths, (m - left + 1 - lengths) * shared, (at + 1 - lengths) * shared)
