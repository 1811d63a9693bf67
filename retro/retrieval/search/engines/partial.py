"""Some lists of a routed index, read from its file without the others; the router is read whole.

head    parameters and router    then, list after list: rows, 8 bytes each; codes, in blocks of 32 rows
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from retro.common.checksums import CheckedFile, open_array, open_checked
from retro.common.pretrained import first_line
from retro.retrieval.search.engines.layout import IndexLayout
from retro.retrieval.search.engines.routed import RoutedEngine
from retro.retrieval.search.engines.routing import FAISS_FILE, LENGTHS_FILE

_READ_BYTES = 1 << 20
_EMPTY = 16  # bytes of a list without rows
_BLOCK_ROWS = 32


def open_lists(folder: Path, record: dict[str, Any], width: int, groups: list[int]) -> RoutedEngine:
    """A routed index of which the lists of some groups alone are filled; only what is read is checked.

    record: of the segment. width: of a key. Raises ValueError for a damaged file, and one of another version of faiss.
    """
    layout, lengths = IndexLayout(**record["layout"]), list_lengths(folder, record)
    file = open_checked(folder, FAISS_FILE, record["files"])
    borders = _borders(layout, file, lengths, width)
    router = _engine(layout, file, borders, np.zeros(len(lengths), bool))
    return _engine(layout, file, borders, np.isin(router.group_of_list, groups)) if groups else router


def list_lengths(folder: Path, record: dict[str, Any]) -> Int64[np.ndarray, " lists"]:
    """The rows of each list."""
    return np.asarray(open_array(folder, LENGTHS_FILE, record["files"]), np.int64)


def _borders(
    layout: IndexLayout, file: CheckedFile, lengths: Int64[np.ndarray, " lists"], width: int
) -> Int64[np.ndarray, " lists+1"]:
    """Where each list begins in the file, and its end."""
    code_bytes = -(-(width // layout.block) // 2)  # of 4 bits, in pairs
    sizes = _EMPTY + 8 * lengths + -(-lengths // _BLOCK_ROWS) * _BLOCK_ROWS * code_bytes
    borders = len(file.bytes) - sizes.sum() + np.append(0, np.cumsum(sizes))
    start = int(borders[0])
    file.check_bytes(0, max(start, 0))
    if start < 36 or file.bytes[start - 36 : start - 24].tobytes() != b"ilbl" + len(lengths).to_bytes(8, "little"):
        raise ValueError(f"{file.path} is not laid out as this version of faiss does; build the index again")
    return borders


def _pieces(file: CheckedFile, borders: np.ndarray, owned: Bool[np.ndarray, " lists"]) -> Iterator[bytes]:
    """The file as if lists that are not owned were empty."""
    yield file.bytes[: borders[0]].tobytes()
    changes = np.flatnonzero(np.diff(owned)) + 1
    for first, stop in zip([0, *changes], [*changes, len(owned)], strict=True):
        if not owned[first]:
            yield bytes(_EMPTY * (stop - first))
            continue
        for low in range(borders[first], borders[stop], _READ_BYTES):
            high = min(low + _READ_BYTES, borders[stop])
            file.check_bytes(low, high)
            yield file.bytes[low:high].tobytes()


def _engine(
    layout: IndexLayout, file: CheckedFile, borders: np.ndarray, owned: Bool[np.ndarray, " lists"]
) -> RoutedEngine:
    import faiss

    pieces, left, failed = _pieces(file, borders, owned), bytearray(), []

    def read(size: int) -> bytes:
        try:
            while len(left) < size and (piece := next(pieces, None)) is not None:
                left.extend(piece)
        except ValueError as error:  # faiss would not hand it on
            failed.append(error)
            return b""
        given = bytes(left[:size])
        del left[:size]
        return given

    try:
        index = faiss.read_index(faiss.BufferedIOReader(faiss.PyCallbackIOReader(read)))
    except RuntimeError as error:
        told = f"{file.path} cannot be read ({first_line(error)}); build the index again"
        raise (failed or [ValueError(told)])[0] from None
    return RoutedEngine(layout, index, file.path.parent)
