"""The longest common run against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retro.evaluation import longest_common_run


def brute_force(a: list[int], b: list[int]) -> int:
    runs = [
        length
        for i in range(len(a))
        for length in range(1, len(a) - i + 1)
        if any(a[i : i + length] == b[j : j + length] for j in range(len(b)))
    ]
    return max(runs, default=0)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), max_size=7),
            st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=2, max_size=2),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_equals_brute_force(pairs):
    chunks, chunk_mask = np.zeros((len(pairs), 7), int), np.zeros((len(pairs), 7), bool)
    neighbors, mask = np.zeros((len(pairs), 2, 9), int), np.zeros((len(pairs), 2, 9), bool)
    for i, (chunk, found) in enumerate(pairs):
        chunks[i, : len(chunk)], chunk_mask[i, : len(chunk)] = chunk, True
        for j, neighbor in enumerate(found):
            neighbors[i, j, : len(neighbor)], mask[i, j, : len(neighbor)] = neighbor, True
    expected = [max(brute_force(chunk, neighbor) for neighbor in found) for chunk, found in pairs]
    assert longest_common_run(chunks, neighbors, chunk_mask, mask).tolist() == expected


def test_runs_do_not_cross_neighbors_or_padding():
    chunk = np.array([[1, 2, 3, 4]])
    neighbors = np.array([[[9, 1, 2], [3, 4, 0]]])
    mask = np.array([[[True] * 3, [True, True, False]]])
    assert longest_common_run(chunk, neighbors, np.ones_like(chunk, bool), mask).tolist() == [2]
    assert longest_common_run(chunk, neighbors, np.ones_like(chunk, bool), np.zeros_like(mask)).tolist() == [0]
