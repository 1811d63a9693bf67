"""Callables in place of a Retriever, whose neighbors depend on the query alone."""

import hashlib
import threading

import numpy as np

from retro.retrieval import Neighbors


class RandomNeighbors:
    """Random tokens drawn from a hash of the query; some neighbors short, some missing. Remembers what it was asked."""

    def __init__(self, vocab_size: int, retrieved_len: int = 8):
        self.vocab_size, self.retrieved_len = vocab_size, retrieved_len
        self.asked: list[tuple[int, ...]] = []
        self.threads: set[str] = set()

    def __call__(self, queries, num_neighbors):
        queries = np.asarray(queries, dtype=np.int64)
        self.asked += [tuple(query) for query in queries.tolist()]
        self.threads.add(threading.current_thread().name)
        drawn = [self._draw(query, num_neighbors) for query in queries]
        ids, tokens, lens = (np.stack(x) for x in zip(*drawn, strict=True))
        mask = np.arange(self.retrieved_len) < lens[..., None]
        ids = np.where(lens > 0, ids, -1)
        return Neighbors(ids, tokens, mask, -lens.astype(np.float32), [[None] * num_neighbors for _ in queries])

    def _draw(self, query, k):
        rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(query.tobytes(), digest_size=8).digest(), "little"))
        lens = rng.integers(1, self.retrieved_len + 1, k) * (rng.random(k) > 0.2)
        return rng.integers(0, 10**6, k), rng.integers(3, self.vocab_size, (k, self.retrieved_len)), lens


class Failing(RandomNeighbors):
    """Fails where `fails(query)`."""

    def __init__(self, fails, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fails = fails

    def __call__(self, queries, num_neighbors):
        if any(self.fails(tuple(query)) for query in np.asarray(queries).tolist()):
            raise ConnectionError("the index is away")
        return super().__call__(queries, num_neighbors)
