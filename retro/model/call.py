"""One run of a model over new tokens, as its cache sees it: chunks, rows and neighbors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Whole(NamedTuple):
    """A chunk that becomes whole: its row, its number (1-based) in it, its place among those of the row and call."""

    row: int
    number: int
    place: int


class Parts(NamedTuple):
    """The attending chunks of a call that have something to read, g of them.

    source: whose neighbors they read: below b those that row `source` holds, from b on those of `call.found`. columns:
    of their tokens in the call; negative or past its end where they are not of this call.
    """

    rows: Int[Tensor, " g"]
    source: Int[Tensor, " g"]
    columns: Int[Tensor, "g m"]


@dataclass
class ForwardPass:
    """One run of a model over new tokens: where they stand in the chunks of their rows, and which neighbors they bring.

    first: the position of each row's first new token, counted from its first real one; negative inside padding.
    held, reading: the number of the chunk whose neighbors each row reads, before and after; 0 = none.
    """

    chunk_len: int
    length: int
    first: list[int]
    held: list[int]
    reading: list[int]
    neighbor_ids: Int[Tensor, "c k r"] | None = None  # of the chunks of `found`
    neighbor_mask: Bool[Tensor, "c k r"] | None = None
    found: list[Whole] = field(default_factory=list)  # whole chunks that have neighbors
    encoded: Float[Tensor, "c k r d"] | None = None  # what the model makes of these

    @cached_property
    def whole(self) -> list[Whole]:
        """The chunks that become whole, row by row."""
        m, whole = self.chunk_len, []
        for row, first in enumerate(self.first):
            start = max(first, 0) // m + 1
            whole += [Whole(row, u, u - start) for u in range(start, (first + self.length) // m + 1)]
        return whole

    @cached_property
    def is_step(self) -> bool:
        """Whether each row has one new token, and it is real."""
        return self.length == 1 and min(self.first) >= 0

    @property
    def reads(self) -> bool:
        """Whether any of its tokens may have something to read."""
        return any(self.reading) or (not self.is_step and any(self.held))

    def bring(self, neighbor_ids: Int[Tensor, "b l k r"] | None, neighbor_mask: Tensor | None) -> None:
        """Take the neighbors of `whole`, in the order of each row; further ones are ignored."""
        if neighbor_ids is None and neighbor_mask is not None:
            raise ValueError("neighbor_mask is given without neighbor_ids.")
        if neighbor_ids is not None:
            self._check(neighbor_ids, neighbor_mask)
        if self.whole and neighbor_ids is not None:
            self._choose(neighbor_ids, neighbor_mask)
        found = {chunk.row: chunk.number for chunk in self.found}
        for chunk in self.whole:
            self.reading[chunk.row] = chunk.number if found.get(chunk.row) == chunk.number else 0

    def _check(self, neighbor_ids: Tensor, neighbor_mask: Tensor | None) -> None:
        needed = max((chunk.place + 1 for chunk in self.whole), default=0)
        if neighbor_ids.ndim != 4 or neighbor_ids.shape[0] != len(self.first) or neighbor_ids.shape[1] < needed:
            raise ValueError(
                f"neighbor_ids has shape {list(neighbor_ids.shape)}; with a cache it must be [b, l, k, r] = "
                f"[{len(self.first)}, {needed}, k, r], one row for each chunk that these tokens make whole."
            )
        if neighbor_mask is not None and neighbor_mask.shape != neighbor_ids.shape:
            raise ValueError(f"neighbor_mask has shape {list(neighbor_mask.shape)}, neighbor_ids another.")

    def _choose(self, neighbor_ids: Tensor, neighbor_mask: Tensor | None) -> None:
        rows, places = [chunk.row for chunk in self.whole], [chunk.place for chunk in self.whole]
        ids = neighbor_ids[rows, places]
        mask = torch.ones_like(ids, dtype=torch.bool) if neighbor_mask is None else neighbor_mask[rows, places].bool()
        there = [i for i, some in enumerate(mask.flatten(1).any(-1).tolist()) if some]
        self.found = [self.whole[i] for i in there]
        if self.found:
            self.neighbor_ids, self.neighbor_mask = ids[there], mask[there]

    def keep_last(self, keep: int) -> None:
        """Of `found` keep the chunks that one of the last tokens reads."""
        m, there = self.chunk_len, []
        for i, chunk in enumerate(self.found):
            if chunk.number * m + m - 1 > self.first[chunk.row] + self.length - keep:
                there.append(i)
        if len(there) < len(self.found):
            self.found = [self.found[i] for i in there]
            self.neighbor_ids, self.neighbor_mask = self.neighbor_ids[there], self.neighbor_mask[there]

    @cached_property
    def query_positions(self) -> Int[Tensor, "*b 1"]:
        """Of a step: positions of the tokens in CCA; one for all rows where it is the same."""
        m = self.chunk_len
        positions = [(first + 1) % m + m - 1 for first in self.first]
        return torch.tensor(positions[:1] if len(set(positions)) == 1 else [[position] for position in positions])

    @cached_property
    def unread(self) -> Bool[Tensor, " b"] | None:
        """Of a step: the rows that have nothing to read; None if there is none."""
        return None if all(self.reading) else torch.tensor([not number for number in self.reading])

    def parts(self, device: torch.device, keep: int | None = None) -> Parts:
        """The attending chunks that have something to read; with `keep` those with one of the last columns only."""
        m, found = self.chunk_len, {chunk[:2]: i for i, chunk in enumerate(self.found)}
        parts = []
        for row, first in enumerate(self.first):
            for number in range(max((max(first, 0) + 1) // m, 1), (first + self.length) // m + 1):
                column = number * m - 1 - first
                if keep is not None and column + m <= self.length - keep:
                    continue
                if (row, number) in found:
                    parts.append((row, len(self.first) + found[row, number], column))
                elif number == self.held[row]:
                    parts.append((row, row, column))
        rows, source, columns = torch.tensor(parts, dtype=torch.long, device=device).reshape(-1, 3).unbind(-1)
        return Parts(rows, source, columns[:, None] + torch.arange(m, device=device))

    def scatter(self, x: Shaped[Tensor, "g m *d"], parts: Parts, keep: int | None = None) -> Shaped[Tensor, "b s *d"]:
        """Values of the parts' tokens at their columns, 0 elsewhere; with `keep` the last columns only."""
        length = self.length if keep is None else keep
        columns = parts.columns - (self.length - length)
        inside = (columns >= 0) & (columns < length)
        out = x.new_zeros(len(self.first), length, *x.shape[2:])
        out[parts.rows[:, None].expand_as(columns)[inside], columns[inside]] = x[inside]
        return out
