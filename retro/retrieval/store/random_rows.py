"""Random rows of a store: a control, and always the same for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from retro.retrieval.store.store import Store


_ATTEMPTS = 16


def random_rows(
    store: Store,
    rows: Int[np.ndarray, "*c"],
    documents: Int[np.ndarray, "*c"],
    num_neighbors: int,
    seed: int,
) -> Int[np.ndarray, "*c k"]:
    """k searchable rows of `store` per chunk, uniform, a pure function of (seed, row), never of the chunk's document.

    documents: the store's document row of each chunk, -1 if the chunk is not of this store. A draw that still hits the
    chunk's document after 16 attempts is -1 (a store of one document has no other).
    """
    candidates = store.searchable_rows
    if not len(candidates):
        return np.full((*rows.shape, num_neighbors), -1)
    counters = rows[..., None] * num_neighbors + np.arange(num_neighbors)  # [..., k]
    drawn = np.full(counters.shape, -1, np.int64)
    for attempt in range(_ATTEMPTS):
        rolled = candidates[hash64(counters, seed, attempt) % np.uint64(len(candidates))]
        drawn = np.where((drawn < 0) & (store.document_rows(rolled) != documents[..., None]), rolled, drawn)
    return drawn


def hash64(counters: np.ndarray, seed: int, attempt: int) -> np.ndarray:
    """Uniform 64-bit numbers from counters: splitmix64's finalizer, keyed by a SeedSequence."""
    key, stride = np.random.SeedSequence([seed, attempt]).generate_state(2, np.uint64)
    x = counters.astype(np.uint64) * (stride | np.uint64(1)) + key  # wraps modulo 2^64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
