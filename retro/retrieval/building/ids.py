"""Which document ids there were before, among very many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro.retrieval.filters import document_hashes


class SeenIds:
    """A set of ids as 64-bit hashes in sorted runs, 8 bytes an id: what it calls new is new, the rest is to be checked.

    A run is merged with the one before it unless that is more than twice as long, so that n ids lie in log2(n) runs.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, names: Sequence[str]) -> list[int]:
        """Take ids in; the places of those whose hash was there before, or is that of an earlier one of `names`."""
        if not names:
            return []
        hashes = document_hashes(names, seed=0)
        order = np.argsort(hashes, kind="stable")
        run = hashes[order]
        seen = np.concatenate([[False], run[1:] == run[:-1]])
        for earlier in self._runs:
            seen |= earlier[np.minimum(np.searchsorted(earlier, run), len(earlier) - 1)] == run
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")  # merges what is sorted
        return np.sort(order[seen]).tolist()
