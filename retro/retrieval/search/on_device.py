"""Keys on a GPU for exact search: as many as fit stay there; the others are read ahead while it computes.

    cell      rows  0 .. B - 1 | B .. 2B - 1 | ...     kept on the device from the first search on, up to a budget
    search    for each cell: products with all queries, the best so far and the new ones -> the best

The device only proposes: nothing comes back before the last cell, then one list of candidates for each query.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retro.retrieval.store.store import Store

_CELL_ROWS = 1 << 18
_SCORES = 1 << 28  # held at a time
_SHARE = 0.5  # of the memory that is free at the first search
_opened: WeakKeyDictionary[Store, dict[torch.device, DeviceKeys]] = WeakKeyDictionary()


@dataclass
class _Cell:
    """The searchable keys of a range of rows; |key|^2 / 2 of each is `halves`."""

    rows: np.ndarray
    documents: np.ndarray
    keys: Float[Tensor, "c d"]
    halves: Float[Tensor, " c"] | None = None
    row_ids: Int[Tensor, " c"] | None = None

    def to(self, device: torch.device) -> _Cell:
        keys, row_ids = (x.to(device, non_blocking=True) for x in (self.keys, torch.from_numpy(self.rows)))
        return _Cell(self.rows, self.documents, keys, keys.square().sum(1) / 2, row_ids)


class DeviceKeys:
    """A store's keys for one device. `budget_bytes` of keys stay on it; None: half of what is free there."""

    def __init__(
        self, store: Store, device: torch.device, budget_bytes: int | None = None, cell_rows: int = _CELL_ROWS
    ) -> None:
        if budget_bytes is None:
            budget_bytes = int(torch.cuda.mem_get_info(device)[0] * _SHARE)
        self.store, self.device, self.budget_bytes, self.cell_rows = store, device, budget_bytes, cell_rows
        self._kept: dict[int, _Cell] = {}

    def candidates(
        self, queries: np.ndarray, width: int, documents: np.ndarray | None, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Of each query the `width` rows among first .. last - 1 of largest q . key - |key|^2 / 2, and these scores.

        Those of its own document, and what there is too little of, have -inf. Third, the largest |key|^2 / 2.
        """
        asked = torch.from_numpy(queries).to(self.device, non_blocking=True)
        best = torch.full((len(queries), width), -torch.inf, device=self.device)
        rows = torch.full((len(queries), width), -1, device=self.device)
        scale, part_len = torch.zeros((), device=self.device), max(_SCORES // self.cell_rows, 1)
        for cell in self._cells(first, last):
            low, high = np.searchsorted(cell.rows, [first, last]).tolist()
            if low == high:
                continue
            keys, halves, row_ids = (x[low:high] for x in (cell.keys, cell.halves, cell.row_ids))
            scale = torch.maximum(scale, halves.max())
            for start in range(0, len(queries), part_len):
                part = slice(start, start + part_len)
                scores = torch.addmm(-halves, asked[part], keys.T)
                if documents is not None:
                    for own, columns in own_rows(documents[part], cell.documents[low:high]):
                        scores[own, columns] = -torch.inf
                top, chosen = scores.topk(min(width, high - low), dim=1)
                top, kept = torch.cat([best[part], top], 1).topk(width, dim=1)
                rows[part] = torch.cat([rows[part], row_ids[chosen]], 1).gather(1, kept)
                best[part] = top
        return rows.cpu().numpy(), best.cpu().numpy(), float(scale)

    def _cells(self, first: int, last: int) -> Iterator[_Cell]:
        """Those of a range of rows, on the device; one that is not there is read while the one before is computed."""
        size = self.cell_rows
        numbers = range(first // size, -(-last // size))
        missing = [number for number in numbers if number not in self._kept]
        with ThreadPoolExecutor(1, "retro-keys") as reader:
            coming: list[Future] = [reader.submit(self._read, number) for number in missing[:1]]
            for number in numbers:
                if number in missing:
                    following = missing[missing.index(number) + 1 :][:1]
                    host = coming.pop().result()
                    coming += [reader.submit(self._read, another) for another in following]
                    cell = host.to(self.device)
                    if sum(kept.keys.nbytes for kept in (*self._kept.values(), cell)) <= self.budget_bytes:
                        self._kept[number] = cell
                    yield cell
                else:
                    yield self._kept[number]

    def _read(self, number: int) -> _Cell:
        start, stop = number * self.cell_rows, min((number + 1) * self.cell_rows, self.store.num_chunks)
        rows, keys = self.store.searchable_in(start, stop), self.store.key_block(start, stop)
        keys = torch.from_numpy(np.ascontiguousarray(keys if len(rows) == stop - start else keys[rows - start]))
        return _Cell(rows, self.store.document_rows(rows), keys.pin_memory() if self.device.type == "cuda" else keys)


def keys_on(store: Store, device: torch.device) -> DeviceKeys:
    """The keys of a store on a device, for as long as the store is in use."""
    by_device = _opened.setdefault(store, {})
    if device not in by_device:
        by_device[device] = DeviceKeys(store, device)
    return by_device[device]


def own_rows(documents: Int[np.ndarray, "q w"], of_rows: Int[np.ndarray, " c"]) -> list[tuple[slice, slice]]:
    """Runs of queries that leave out one document, each with the rows, in ascending order of their documents, that
    belong to it, where there are any."""
    runs = []
    for column in documents.T:
        first = np.flatnonzero(np.diff(column, prepend=-2))
        last = np.append(first[1:], len(column))
        low, high = (np.searchsorted(of_rows, column[first], side) for side in ("left", "right"))
        found = low < high
        borders = zip(*(borders[found].tolist() for borders in (first, last, low, high)), strict=True)
        runs += [(slice(a, b), slice(c, d)) for a, b, c, d in borders]
    return runs
