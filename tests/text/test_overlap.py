"""The longest common run against brute force."""

import difflib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retro.evaluation import longest_common_run
from retro.text.overlap import common_runs


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


def first_run(a: list[int], b: list[int]) -> tuple[int, int, int]:
    """The length of the longest common run and where it starts in both, the first to end in a, then in b."""
    found = [
        (-length, i + length, j)
        for i in range(len(a))
        for j in range(len(b))
        for length in range(1, 1 + min(len(a) - i, len(b) - j))
        if a[i : i + length] == b[j : j + length]
    ]
    length, end, j = min(found, default=(0, 0, 0))
    return -length, end + length, j


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(tokens, st.lists(tokens, min_size=1, max_size=3), st.integers(0, 4))
def test_the_places_of_runs_equal_brute_force(chunk, found, num_hidden):
    """The first tokens of the chunk may be hidden; neighbors are right-padded."""
    mask = np.arange(len(chunk)) >= num_hidden
    neighbors = np.zeros((1, len(found), 8), int)
    neighbor_mask = np.arange(8) < np.array([len(neighbor) for neighbor in found])[None, :, None]
    for j, neighbor in enumerate(found):
        neighbors[0, j, : len(neighbor)] = neighbor
    lengths, starts, neighbor_starts = common_runs(np.array([chunk]), neighbors, mask[None], neighbor_mask)
    for j, neighbor in enumerate(found):
        length, start, neighbor_start = first_run(chunk[num_hidden:], neighbor)
        expected = (length, start + num_hidden, neighbor_start) if length else (0, 0, 0)
        assert (lengths[0, j], starts[0, j], neighbor_starts[0, j]) == expected


def test_runs_do_not_cross_neighbors_or_padding():
    chunk = np.array([[1, 2, 3, 4]])
    neighbors = np.array([[[9, 1, 2], [3, 4, 0]]])
    mask = np.array([[[True] * 3, [True, True, False]]])
    assert longest_common_run(chunk, neighbors, np.ones_like(chunk, bool), mask).tolist() == [2]
    assert longest_common_run(chunk, neighbors, np.ones_like(chunk, bool), np.zeros_like(mask)).tolist() == [0]


def test_long_chunks_equal_difflib():
    """Beyond what 16 bits hold: runs of up to 300 tokens."""
    generator = np.random.default_rng(0)
    chunk, neighbors = generator.integers(0, 3, 300), generator.integers(0, 3, (3, 400))
    neighbors[1, 50:350], neighbors[2, 7:207] = chunk, chunk[100:]
    mask = np.ones((1, 3, 400), bool)
    lengths, starts, neighbor_starts = common_runs(chunk[None], neighbors[None], mask[:, 0, :300], mask)
    assert lengths[0, 1] == 300 and lengths[0, 2] >= 200
    for j, neighbor in enumerate(neighbors):
        matcher = difflib.SequenceMatcher(None, chunk.tolist(), neighbor.tolist(), autojunk=False)
        assert lengths[0, j] == matcher.find_longest_match().size
        run = chunk[starts[0, j] :][: lengths[0, j]]
        assert (run == neighbor[neighbor_starts[0, j] :][: lengths[0, j]]).all()
