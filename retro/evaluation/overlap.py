"""How many tokens in a row a chunk shares with its neighbors."""

import numpy as np
from jaxtyping import Bool, Int


def longest_common_run(
    chunks: Int[np.ndarray, "c m"],
    neighbors: Int[np.ndarray, "c k r"],
    chunk_mask: Bool[np.ndarray, "c m"],
    neighbor_mask: Bool[np.ndarray, "c k r"],
) -> Int[np.ndarray, " c"]:
    """Length of the longest token substring that a chunk shares with any one of its neighbors. Exact.

    The textbook recurrence run(i, j) = run(i - 1, j - 1) + 1 where the tokens agree, over all pairs at once.
    Source: RETRO, section 2.6.
    """
    a = np.where(chunk_mask, chunks, -1)
    b = np.where(neighbor_mask, neighbors, -2)
    runs = np.zeros((*b.shape[:2], b.shape[2] + 1), np.int32)
    longest = np.zeros(len(a), np.int64)
    for i in range(a.shape[1]):
        runs[..., 1:] = np.where(a[:, i, None, None] == b, runs[..., :-1] + 1, 0)
        longest = np.maximum(longest, runs.max((1, 2), initial=0))
    return longest
