"""Many small lists behind a router, by faiss: a search visits as many of them however large the store is.

    router    sqrt(lists) groups of centroids      whole, compared with every query
              the centroids of the lists           codes, of the nearest groups
    lists     one for every 128 rows               codes of 4 bits for every 2 axes, in registers (fast scan)

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
from jaxtyping import Bool, Float32, Int64

from retro.common.checksums import open_checked
from retro.common.files import open_npy
from retro.common.records import load_record
from retro.retrieval.search.engines.clustering import project
from retro.retrieval.search.engines.faiss import read_index
from retro.retrieval.search.engines.files import (
    LENGTHS,
    LIST_CODES,
    ROUTER_CODEBOOK,
    ROUTER_CODES,
    TRAINED,
    bytes_of_code,
    lengths_of,
)
from retro.retrieval.search.engines.layout import BLOCK_BYTES, FEW_ROWS, EngineKind, IndexLayout, Work, key_blocks
from retro.retrieval.search.engines.packing import BLOCK_ROWS, list_borders, open_lists
from retro.retrieval.search.engines.routing import NUM_LISTS_OF_A_ROW, SAMPLE_OF_GROUP, write_lists
from retro.retrieval.search.segments import StoreRows
from retro.retrieval.store.store import Store

ROWS_OF_A_LIST = 128  # by nearest centroid, and as many second copies: to visit a list costs as much as 100 of its rows
FAISS_FILE = "faiss.index"  # of whole keys
_TABLES = "axes.npy", "groups.npy", "sizes.npy", "codebook.npy", ROUTER_CODEBOOK
_ID_BYTES = 8
_LIST_BYTES = 40  # of tables that an open index has of each list
FEWEST_GROUPS = 16  # that a search looks into
_LISTS_COMPARED = 12  # for each that is visited
_GROUPS_OF_NEAREST = 4  # for the nearest list alone, which tells how many are visited
_MOST_GROWTH = 2
_MOST_VISITS = 4  # times the usual number, and the least of it


class RoutedKind(EngineKind):
    """See `EngineKind`."""

    codes = ("pq4", "flat")
    module = "faiss"
    remedy = 'pip install "retro-lm[faiss]"'
    format_version = 3
    settings = ("lists", "probes")
    searched = "probes"
    training_sample = 1 << 14
    most_rows = 4_000_000_000  # the rows of a segment are counted by 32 bits
    extends = True

    def layout(self, settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
        """See `choose_layout`."""
        if settings["codes"] == "flat" or (rows < FEW_ROWS and not settings["lists"]):
            return IndexLayout("routed", "flat")
        block = max(size for size in range(1, 5) if width % size == 0)
        lists = min(settings["lists"] or -(-rows // ROWS_OF_A_LIST), rows)
        return IndexLayout("routed", "pq4", lists, block, 4, soar=True)

    def write(self, layout: IndexLayout, store: Store, rows: StoreRows, folder: Path, work: Work) -> None:
        """See `EngineKind`; the work is a job of tasks, taken up again after a kill."""
        import faiss

        if layout.codes == "flat":
            index = faiss.IndexFlatL2(store.key_dim)
            for _, keys in key_blocks(store, rows):
                index.add(keys)
            faiss.write_index(index, str(folder / FAISS_FILE))
        else:
            write_lists(layout, store, rows, folder, work)

    def extend(self, layout: IndexLayout, base: Path, store: Store, rows: StoreRows, folder: Path, work: Work) -> bool:
        """See `EngineKind`: as long as there are at most twice the rows that the centroids were made of."""
        if layout.codes == "flat" or len(rows) > _MOST_GROWTH * load_record(base / TRAINED)["rows"]:
            return False
        return write_lists(layout, store, rows, folder, work, base)

    def open(self, layout: IndexLayout, folder: Path) -> RoutedEngine:
        """See `EngineKind`."""
        return RoutedEngine(layout, folder)

    def code_bytes(self, layout: IndexLayout, width: int) -> float:
        """Code and id, in both lists."""
        if layout.codes == "flat":
            return 4.0 * width
        return NUM_LISTS_OF_A_ROW * (width / layout.block / 2 + _ID_BYTES)

    def memory_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """The lists, with a half empty block in each, and the router; and where each list begins."""
        if layout.codes == "flat":
            return rows * self.row_bytes(layout, width)
        filled = rows + layout.lists * BLOCK_ROWS / 2 / NUM_LISTS_OF_A_ROW
        return filled * self.row_bytes(layout, width) + layout.lists * (width / 8 + _ID_BYTES + _LIST_BYTES)

    def peak_bytes(self, layout: IndexLayout, rows: int, width: int, training_sample: int) -> float:
        """What one task holds, and where each list begins; all else lies in files."""
        sample = max(training_sample, SAMPLE_OF_GROUP * isqrt(layout.lists))
        return 24.0 * BLOCK_BYTES + 4.0 * min(sample, rows) * width + _LIST_BYTES * layout.lists

    def file_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """The lists and the router, and the centroids whole, by which rows are assigned that are added."""
        return self.memory_bytes(layout, rows, width) + layout.lists * (2.0 * width - _LIST_BYTES)

    def is_exact(self, layout: IndexLayout) -> bool:
        """See `EngineKind`."""
        return layout.codes == "flat"


class RoutedEngine:
    """Lists of codes and their router, memory-mapped.

    held: the groups whose lists are searched, the others being taken to be empty; None: all.
    """

    def __init__(self, layout: IndexLayout, folder: Path, held: list[int] | None = None) -> None:
        import faiss

        self.layout = layout
        if layout.codes == "flat":
            self._index = read_index(folder / FAISS_FILE)
            return
        self._axes, groups, sizes, codebook, finer = (np.array(open_npy(folder / name)) for name in _TABLES)
        self.groups = groups @ self._axes  # in the space of the keys
        self.lengths, self.group_of_list = lengths_of(folder), np.repeat(np.arange(len(sizes)), sizes)
        self._mean_distance = load_record(folder / TRAINED)["mean_distance"]
        nearest = faiss.IndexFlatL2(groups.shape[1])
        nearest.add(groups)
        owned = None if held is None else np.isin(self.group_of_list, held)
        self._router = open_lists(nearest, finer, folder / ROUTER_CODES, sizes)
        self._router.implem = 11  # one query at a time, into a reservoir
        self._index = open_lists(self._router, codebook, folder / LIST_CODES, self.lengths, owned)

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]:
        """See `IndexEngine`; a row may be there twice."""
        if self.layout.codes == "flat":
            return self._index.search(queries, wanted)[1]
        axes = project(queries, self._axes)
        distances, rows = self._visit(axes, self._route(axes, lists), considered)
        return np.where(are_certain(distances, wanted, considered), rows, -1)

    def route(self, queries: Float32[np.ndarray, "q d"], lists: int) -> Int64[np.ndarray, "q l"]:
        """The lists that each query visits, the nearest first; -1 where it visits fewer than another.

        A query whose nearest centroid lies as far as a row's does on average visits `lists`; one that lies among few
        rows, and needs more for the same recall, visits more, by the cube of that distance.
        """
        return self._route(project(queries, self._axes), lists)

    def _route(self, axes: Float32[np.ndarray, "q a"], lists: int) -> Int64[np.ndarray, "q l"]:
        if lists >= self.layout.lists:
            return self._nearest_lists(axes, lists)[1]
        ratio = np.full(len(axes), 2.0)  # visits the most; so do all queries where keys are alike
        nearest = np.maximum(self._nearest_lists(axes, 1, groups=_GROUPS_OF_NEAREST)[0][:, 0], 0)
        np.divide(nearest, self._mean_distance, out=ratio, where=nearest < 2 * self._mean_distance)
        visits = np.clip(lists * ratio**3, max(lists / _MOST_VISITS, 1), min(_MOST_VISITS * lists, self.layout.lists))
        visits = np.ceil(visits).astype(np.int64)
        visited = np.full((len(axes), visits.max(initial=0)), -1, np.int64)
        steps = np.ceil(2 * np.log2(visits))
        for step in np.unique(steps):  # of queries that visit about as many
            of_step = np.flatnonzero(steps == step)
            most = visits[of_step].max()
            found = self._nearest_lists(axes[of_step], int(most))[1]
            visited[of_step, :most] = np.where(np.arange(most) < visits[of_step, None], found, -1)
        return visited

    def _nearest_lists(
        self, axes: Float32[np.ndarray, "q a"], count: int, groups: int = 0
    ) -> tuple[Float32[np.ndarray, "q l"], Int64[np.ndarray, "q l"]]:
        """Squared distances by the codes of the centroids, and the lists, the nearest first."""
        import faiss

        visited = min(groups, self._router.nlist) or groups_visited(count, self.layout.lists)
        return self._router.search(axes, count, params=faiss.SearchParametersIVF(nprobe=visited))

    def visit(
        self, queries: Float32[np.ndarray, "q d"], lists: Int64[np.ndarray, "q l"], considered: int
    ) -> tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]]:
        """The rows nearest by their codes in the lists of each query, the nearest first (-1 where there are fewer),
        and their distances. A row in two lists is there twice, at the same distance."""
        return self._visit(project(queries, self._axes), lists, considered)

    def _visit(
        self, axes: Float32[np.ndarray, "q a"], lists: Int64[np.ndarray, "q l"], considered: int
    ) -> tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]]:
        import faiss

        total = self._index.ntotal  # of rows that are there twice
        count = total + 1 if NUM_LISTS_OF_A_ROW * considered >= total else considered  # all: the last is none
        distances, rows = np.empty((len(axes), count), np.float32), np.empty((len(axes), count), np.int64)
        lists = np.ascontiguousarray(lists)
        unused = np.zeros(lists.shape, np.float32)
        asked, *pointers = map(faiss.swig_ptr, (axes, lists, unused, distances, rows))
        visited = faiss.SearchParametersIVF(nprobe=lists.shape[1])
        self._index.search_preassigned_c(len(axes), asked, count, *pointers, False, visited)
        distances[rows < 0] = np.inf
        return distances, rows

    def rows_compared(self, queries: Float32[np.ndarray, "q d"], lists: int) -> Int64[np.ndarray, " q"]:
        """See `CountedEngine`."""
        if self.layout.codes == "flat":
            return np.full(len(queries), self._index.ntotal)
        found = self.route(queries, lists)
        return np.where(found < 0, 0, self.lengths[found]).sum(1)


def open_groups(folder: Path, record: dict[str, Any], groups: list[int]) -> RoutedEngine:
    """A routed index of which the lists of some groups alone are searched; only what is read is checked.

    record: of the segment. Raises ValueError for a damaged file.
    """
    layout = IndexLayout(**record["layout"])
    for name in (*_TABLES, ROUTER_CODES, LENGTHS, TRAINED):
        open_checked(folder, name, record["files"]).check()
    file, engine = open_checked(folder, LIST_CODES, record["files"]), RoutedEngine(layout, folder, groups)
    borders = list_borders(engine.lengths, bytes_of_code(folder))
    held = np.isin(engine.group_of_list, groups)
    starts = np.flatnonzero(np.diff(held, prepend=False, append=False)).reshape(-1, 2)
    for first, stop in starts.tolist():
        file.check_bytes(*borders[[first, stop]].tolist())
    return engine


def are_certain(distances: Float32[np.ndarray, "q c"], wanted: int, considered: int) -> Bool[np.ndarray, "q c"]:
    """Which of the candidates of least distance are found in whatever order lists are searched: those nearer than the
    last, unless they are fewer than wanted or half; of rows as far as the last others may have been left out."""
    nearer = distances < distances.max(1, keepdims=True)
    return nearer | (nearer.sum(1, keepdims=True) < min(wanted, considered // 2))


def groups_visited(visited: int, lists: int) -> int:
    """Groups whose centroids are compared to visit so many lists: those that hold twelve times as many."""
    groups = max(isqrt(lists), 1)
    return min(max(-(-_LISTS_COMPARED * visited * groups // lists), FEWEST_GROUPS), groups)
