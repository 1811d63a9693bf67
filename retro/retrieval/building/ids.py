"""Which document ids there were before, among very many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro.retrieval.filters import document_hashes


class SeenIds:
    """A set of ids as 64-bit hashes in sorted runs, 12 bytes an id: what it calls new is new, the rest is to check.

    A run is merged with the one before it unless that is more than twice as long, so that n ids lie in log2(n) runs.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, and the number under which each came in

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._runs)

    def add(self, names: Sequence[str], number: int = 0) -> dict[int, set[int]]:
        """Take ids in under a number; the places of those whose hash was there before, or is that of an earlier one of
        `names`, in order, each with the numbers under which it was."""
        if not names:
            return {}
        hashes = document_hashes(names, seed=0)
        order = np.argsort(hashes, kind="stable")
        run, found = hashes[order], {}
        for at in np.flatnonzero(run[1:] == run[:-1]) + 1:
            found.setdefault(int(order[at]), set()).add(number)
        for earlier, numbers in self._runs:
            low, high = (np.searchsorted(earlier, run, side) for side in ("left", "right"))
            for at in np.flatnonzero(high > low):
                found.setdefault(int(order[at]), set()).update(numbers[low[at] : high[at]].tolist())
        self._runs.append((run, np.full(len(run), number, np.int32)))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            merged, numbers = map(np.concatenate, zip(*self._runs[-2:], strict=True))
            order = np.argsort(merged, kind="stable")  # merges what is sorted
            self._runs[-2:] = [(merged[order], numbers[order])]
        return dict(sorted(found.items()))
