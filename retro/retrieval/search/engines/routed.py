"""Many small lists behind a router, by faiss: a search visits as many of them however large the store is.

    router    sqrt(lists) groups of centroids      whole, compared with every query
              the centroids of the lists           codes, of the nearest groups
    lists     one for every 32 rows                codes of 4 bits for every 4 dimensions, in registers (fast scan)

Every row is in two lists: that of its nearest centroid, and one whose residual points elsewhere, so that a query which
misses one finds it in the other (source: Sun et al. 2023, SOAR). Centroids come from k-means in two levels, of which
the second is done a group at a time, so that the work grows as rows^1.5 and no step holds the keys; see
`retro.retrieval.search.engines.routing`.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.common.files import load_json
from retro.retrieval.search.engines.faiss import read_index
from retro.retrieval.search.engines.layout import BLOCK_BYTES, FEW_ROWS, HERE, EngineKind, IndexLayout, Work, key_blocks
from retro.retrieval.search.engines.routing import FAISS_FILE, NUM_LISTS_OF_A_ROW, TRAINED, write_lists
from retro.retrieval.store.store import Store

ROWS_OF_A_LIST = 32  # by nearest centroid; the second copies make it twice as many, whole blocks of fast scan
_ID_BYTES = 8
_FEWEST_GROUPS = 16  # that a search looks into
_MOST_GROWTH = 2
_MOST_VISITS = 4  # times the usual number, and the least of it


class RoutedKind(EngineKind):
    """See `EngineKind`."""

    codes = ("pq4", "flat")
    module = "faiss"
    remedy = 'pip install "retro-lm[faiss]"'
    settings = ("lists", "probes")
    searched = "probes"
    training_sample = 1 << 14
    most_rows = 200_000_000
    extends = True

    def layout(self, settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
        """See `choose_layout`."""
        if settings["codes"] == "flat" or (rows < FEW_ROWS and not settings["lists"]):
            return IndexLayout("routed", "flat")
        block = max(size for size in range(1, 5) if width % size == 0)
        lists = min(settings["lists"] or -(-rows // ROWS_OF_A_LIST), rows)
        return IndexLayout("routed", "pq4", lists, block, 4, soar=True)

    def write(
        self,
        layout: IndexLayout,
        store: Store,
        rows: np.ndarray,
        folder: Path,
        training_sample: int,
        seed: int,
        work: Work = HERE,
    ) -> None:
        """See `EngineKind`; the work is a job of tasks, taken up again after a kill."""
        import faiss

        if layout.codes == "flat":
            index = faiss.IndexFlatL2(store.key_dim)
            for _, keys in key_blocks(store, rows):
                index.add(keys)
            faiss.write_index(index, str(folder / FAISS_FILE))
        else:
            write_lists(layout, store, rows, folder, training_sample, seed, work)

    def extend(
        self,
        layout: IndexLayout,
        base: Path,
        kept: np.ndarray,
        store: Store,
        rows: np.ndarray,
        folder: Path,
        work: Work = HERE,
    ) -> bool:
        """See `EngineKind`: as long as there are at most twice the rows that the centroids were made of."""
        if layout.codes == "flat" or len(rows) > _MOST_GROWTH * load_json(base / TRAINED)["rows"]:
            return False
        return write_lists(layout, store, rows, folder, 0, 0, work, (base, kept))

    def open(self, layout: IndexLayout, folder: Path) -> RoutedEngine:
        """See `EngineKind`."""
        return RoutedEngine(layout, folder)

    def code_bytes(self, layout: IndexLayout, width: int) -> float:
        """Code and id, in both lists."""
        if layout.codes == "flat":
            return 4.0 * width
        return NUM_LISTS_OF_A_ROW * (width / layout.block / 2 + _ID_BYTES)

    def peak_bytes(self, layout: IndexLayout, rows: int, width: int, training_sample: int) -> float:
        """The lists twice, while their codes are put in the order of fast scan, and the centroids; or a task's keys."""
        lists = 2 * rows * self.row_bytes(layout, width) + 4.0 * layout.lists * width
        return lists + 24.0 * BLOCK_BYTES

    def file_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """Lists in whole blocks, and what a longer index is made from: centroids, and the lists and code of a row."""
        if layout.codes == "flat":
            return rows * self.row_bytes(layout, width)
        tables = layout.lists * (4.25 * width + 2 * _ID_BYTES) + rows * (
            4 * NUM_LISTS_OF_A_ROW + width / layout.block / 2
        )
        return rows * self.row_bytes(layout, width) * 1.25 + tables

    def is_exact(self, layout: IndexLayout) -> bool:
        """See `EngineKind`."""
        return layout.codes == "flat"


class RoutedEngine:
    """Lists of codes and their router."""

    def __init__(self, layout: IndexLayout, folder: Path) -> None:
        self.layout = layout
        self._index = read_index(folder / FAISS_FILE)
        if layout.codes != "flat":
            import faiss

            self._router = faiss.downcast_index(self._index.quantizer)
            self._mean_distance = load_json(folder / TRAINED)["mean_distance"]

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]:
        """See `IndexEngine`; a row may be there twice.

        A query whose nearest centroid lies as far as a row's does on average visits `lists`; one that lies among few
        rows, and needs more for the same recall, visits more, by the cube of that distance.
        """
        import faiss

        if self.layout.codes == "flat":
            return self._index.search(queries, wanted)[1]
        most = min(_MOST_VISITS * lists, self.layout.lists)
        groups = faiss.SearchParametersIVF(nprobe=groups_visited(most, self.layout.lists))
        distances, visited = self._router.search(queries, most, params=groups)
        if lists < self.layout.lists:
            visits = lists * (np.maximum(distances[:, :1], 0) / self._mean_distance) ** 3
            visited[np.arange(most) >= np.maximum(visits, lists / _MOST_VISITS)] = -1
        twice = NUM_LISTS_OF_A_ROW * considered
        count = twice if twice >= self._index.ntotal else considered  # all there are, of rows that are there twice
        return self._search(np.ascontiguousarray(queries, np.float32), count, visited, distances)

    def _search(self, queries: np.ndarray, count: int, visited: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """As faiss's `search_preassigned`, which takes the number of lists from the index that all threads share."""
        import faiss

        found = np.empty((len(queries), count), np.int64)
        arrays = (queries, visited, distances, np.empty(found.shape, np.float32), found)
        asked, lists, to_lists, to_rows, rows = map(faiss.swig_ptr, arrays)
        params = faiss.SearchParametersIVF(nprobe=visited.shape[1])
        self._index.search_preassigned_c(len(queries), asked, count, lists, to_lists, to_rows, rows, False, params)
        return found

    def rows_compared(self, queries: Float32[np.ndarray, "q d"], lists: int) -> Int64[np.ndarray, " q"]:
        """See `CountedEngine`."""
        import faiss

        if self.layout.codes == "flat":
            return np.full(len(queries), self._index.ntotal)
        groups = faiss.SearchParametersIVF(nprobe=groups_visited(lists, self.layout.lists))
        found = self._index.quantizer.search(queries, lists, params=groups)[1]
        sizes = np.array([self._index.invlists.list_size(number) for number in range(self.layout.lists)])
        return np.where(found < 0, 0, sizes[found]).sum(1)


def groups_visited(visited: int, lists: int) -> int:
    """Groups whose centroids are compared to visit so many lists: those that hold eight times as many."""
    groups = max(isqrt(lists), 1)
    return min(max(-(-8 * visited * groups // lists), _FEWEST_GROUPS), groups)
