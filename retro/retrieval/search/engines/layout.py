"""What every engine has: the layout of a segment, and what must be told of an engine to add it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.search.exact import blocks
from retro.retrieval.search.segments import StoreRows
from retro.retrieval.store.store import Store

FEW_ROWS = 1000  # too few to train codes on
BLOCK_BYTES = 1 << 24  # of keys read at a time


@dataclass(frozen=True)
class IndexLayout:
    """How the keys of one segment are held.

    lists: leaves of ScaNN's tree, or inverted lists; 0 = every row is compared, or there is a graph.
    block: dimensions of one code: of an AH block or a PQ code; 0 where keys are not cut into blocks.
    bits: of a PQ code.
    soar: whether each row is in two of them.
    """

    engine: str
    codes: str
    lists: int = 0
    block: int = 0
    bits: int = 0
    soar: bool = False


@dataclass(frozen=True)
class Work:
    """How the codes of a segment are made: trained on a uniform sample of so many rows, drawn by a seed; and who does
    what can be shared out, see `retro.retrieval.executors.opening.open_executor`."""

    training_sample: int
    seed: int = 0
    executor: str = "local"
    workers: int | None = 1


@runtime_checkable
class IndexEngine(Protocol):
    """candidates: the `wanted` local rows that the engine takes for the nearest, or all that it `considered` where it
    cannot order them well; -1 where there are fewer. lists: how many it visits, of an engine that has lists."""

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]: ...


@runtime_checkable
class CountedEngine(Protocol):
    """An engine that knows how long its lists are; of others the mean is taken. rows_compared: in the lists that a
    search of each query visits."""

    def rows_compared(self, queries: Float32[np.ndarray, "q d"], lists: int) -> Int64[np.ndarray, " q"]: ...


class EngineKind:
    """All that is known of an engine by its name.

    A new one gives `module`, `codes`, `remedy`, `layout`, `write`, `open` and `code_bytes`; the rest has defaults.

    module: the one that it needs.
    codes: what may stand behind its name, as in "faiss:ivf-pq".
    remedy: how to install it.
    format_version: of its files; segments of another one are built again.
    settings: names of its own; None is the default by the number of rows.
    training_sample: rows that it is trained on, where nobody names another number.
    most_rows: of a segment, where nobody names another number; ScaNN peaks at about twice the float size.
    extends: whether `extend` can write a longer segment from one that is there.
    searched: the one of these that fixes how many lists a search visits; "" of an engine without lists.
    """

    module: str
    codes: tuple[str, ...]
    remedy: str
    format_version: int = 2
    settings: tuple[str, ...] = ()
    searched: str = ""
    training_sample: int = 100_000
    most_rows: int = 30_000_000
    extends: bool = False

    def layout(self, settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
        """The layout for a segment of so many rows: what the settings name, and where they leave it open its own
        choice. keys_fit: whether whole keys may stay in memory."""
        raise NotImplementedError

    def write(self, layout: IndexLayout, store: Store, rows: StoreRows, folder: Path, work: Work) -> None:
        """Write the codes of the keys of some store rows into a folder."""
        raise NotImplementedError

    def extend(self, layout: IndexLayout, base: Path, store: Store, rows: StoreRows, folder: Path, work: Work) -> bool:
        """Write the codes of a segment with more rows than that in `base`, of which those that are still there come
        first; False, with nothing written, where the engine cannot, or should not."""
        return False

    def open(self, layout: IndexLayout, folder: Path) -> IndexEngine:
        """The engine of a folder that `write` wrote and whose files were checked."""
        raise NotImplementedError

    def code_bytes(self, layout: IndexLayout, width: int) -> float:
        """Bytes that a search reads of each row it compares, by which tuning weighs one effort against another."""
        raise NotImplementedError

    def row_bytes(self, layout: IndexLayout, width: int) -> float:
        """Bytes of memory that a row takes."""
        return self.code_bytes(layout, width)

    def memory_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """Bytes of memory that a segment takes, or of mapped files that are read wherever it is searched."""
        return rows * self.row_bytes(layout, width) + 4.0 * layout.lists * width

    def peak_bytes(self, layout: IndexLayout, rows: int, width: int, training_sample: int) -> float:
        """Memory that building a segment takes at its peak: here all its keys in float32, and what it holds."""
        return 3.0 * BLOCK_BYTES + rows * (4.0 * width + self.row_bytes(layout, width))

    def file_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """Bytes that the files of a segment take."""
        return rows * self.row_bytes(layout, width)

    def is_exact(self, layout: IndexLayout) -> bool:
        """Whether the rows of the lists that are searched are ordered by whole keys, so that more candidates than are
        wanted find nothing more."""
        return False

    def has_copy(self, layout: IndexLayout) -> bool:
        """Whether the engine orders candidates by a copy of the keys that it holds beside the codes."""
        return False


def key_blocks(store: Store, rows: StoreRows) -> Iterator[tuple[slice, np.ndarray]]:
    """The keys of some rows, some at a time, and where they stand among them."""
    for start, stop in blocks(0, len(rows), max(BLOCK_BYTES // (4 * store.key_dim), 1)):
        yield slice(start, stop), store.keys(rows[start:stop])
