"""ScaNN, faiss and routed lists: the keys of a segment as codes in memory, and the candidates that they give.

    codes                        engine  in memory, of a row of d dimensions          searched
    brute                        scann   the key, 4 (d + 1) bytes                     all rows, exactly
    ah                           scann   4 bits for every 2 or more dimensions        all, from 100,000 rows on a tree
    ah-float32 -bfloat16 -int8   scann   the same and a copy of the key, to order candidates by
    flat                         faiss   the key, 4 d bytes                           all rows, exactly
    sq8, pq                      faiss   d bytes; one for every 8 dimensions          all rows
    ivf-flat, ivf-sq8, ivf-pq    faiss   the same and an 8-byte id                    some of the inverted lists
    pq4                          routed  twice 4 bits for every 4 dimensions, an id   some of rows / 128 lists

What is routed stays in its file, memory-mapped. Candidates are local rows; whoever asks re-ranks them by the stored
keys. To add an engine, write a module beside `faiss` with a class that extends `EngineKind`, and name it in `ENGINES`.
"""

from __future__ import annotations

from typing import Any

from retro.retrieval.search.engines.faiss import FAISS_FLAT_ROWS, FaissKind
from retro.retrieval.search.engines.layout import CountedEngine, EngineKind, IndexEngine, IndexLayout, Work
from retro.retrieval.search.engines.routed import RoutedKind
from retro.retrieval.search.engines.scann import ScannKind

__all__ = [
    "ENGINES",
    "FAISS_FLAT_ROWS",
    "ROUTED_ROWS",
    "CountedEngine",
    "EngineKind",
    "IndexEngine",
    "IndexLayout",
    "Work",
    "choose_layout",
    "engine_of",
]

KEYS_IN_MEMORY = 1 << 31  # bytes of keys of a segment above which only codes stay in memory
ENGINES: dict[str, EngineKind] = {"scann": ScannKind(), "faiss": FaissKind(), "routed": RoutedKind()}
ROUTED_ROWS = 200_000  # from which "auto" is "routed"; below it is the first that is installed


def engine_of(layout: IndexLayout) -> EngineKind:
    """The engine of a layout."""
    return ENGINES[layout.engine]


def choose_layout(engine: str, settings: dict[str, Any], rows: int, width: int) -> IndexLayout:
    """The layout for a segment of so many rows: what the settings name, and where they leave it open

        rows from      scann                                    faiss                           routed
        0              brute                                    flat                            flat
        1,000          brute                                    flat                            pq4
        20,000         ah-float32                               flat
        100,000        ah-float32, a tree of sqrt(rows) leaves  ivf-flat, 4 sqrt(rows) inverted lists
        5,000,000      the same, each row in two leaves (SOAR)  ivf-flat
        keys > 2 GiB   ah in place of ah-float32                ivf-pq in place of ivf-flat

    Below 1,000 rows codes that are asked for give way to whole keys, unless leaves or lists are asked for too.
    """
    return ENGINES[engine].layout(settings, rows, width, 4 * rows * (width + 1) <= KEYS_IN_MEMORY)
