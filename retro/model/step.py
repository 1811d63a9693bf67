"""One forward pass with a cache: which chunks its new tokens complete, and which neighbors they read.

position p        0 1 2 3 | 4 5 6 7 | 8 9      m = 4; positions count from a row's first real token
chunk C_u         1 . . . | 2 . . . | 3 .      complete once its row has u m tokens: `chunks_in`
reads E_u         - - - 1 | 1 1 1 2 | 2 2      u = (p + 1) // m: `chunk_read_at`; C_u+ is `attending_positions`

a step of tokens 4..6   first = 4, length = 3: completes no chunk; all read E_1, which the cache holds
then of token 7         first = 7, length = 1: completes C_2, brings its neighbors, and reads E_2 at once
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from retro.modules.cross_attention import at_least_one


def chunks_in(num_tokens: int, chunk_len: int) -> int:
    """How many whole chunks so many tokens of a row make; a negative number, inside padding, makes none."""
    return max(num_tokens, 0) // chunk_len


def chunk_read_at(position: int, chunk_len: int) -> int:
    """The number u of the chunk whose E_u the token at this position reads; 0 = none."""
    return max(position + 1, 0) // chunk_len


def attending_positions(number: int, chunk_len: int) -> range:
    """The positions of C_u+, which read E_u: from the last token of C_u on."""
    return range(number * chunk_len - 1, number * chunk_len - 1 + chunk_len)


def on_device(values: Any, device: torch.device) -> Tensor:
    """A tensor of the host's values; a GPU's work that is under way is not waited for."""
    return torch.as_tensor(values).to(device, non_blocking=True)


class CompletedChunk(NamedTuple):
    """A chunk that a step completes.

    number: u, from 1, among the chunks of its row. slot: from 0, among those that the step completes in this row, so
    that its neighbors are neighbor_ids[row, slot].
    """

    row: int
    number: int
    slot: int


class AttendingChunks(NamedTuple):
    """The g attending chunks of a step that have something to read.

    source: whose neighbors they read: below b those that the cache holds for row `source`, from b on those of
    `step.found[source - b]`. columns: of their m tokens among the new ones; negative or past the end for those that are
    not new.
    """

    rows: Int[Tensor, " g"]
    source: Int[Tensor, " g"]
    columns: Int[Tensor, "g m"]


@dataclass
class CachedStep:
    """One forward pass over the next tokens of each row: where they stand, and which neighbors they bring.

    first: the position of each row's first new token; negative inside padding.
    held, reading: the number of the chunk whose neighbors each row reads, before and after the step; 0 = none.
    """

    chunk_len: int
    length: int
    first: list[int]
    held: list[int]
    reading: list[int]
    neighbor_ids: Int[Tensor, "c k r"] | None = None  # of the chunks of `found`
    neighbor_mask: Bool[Tensor, "c k r"] | None = None
    found: list[CompletedChunk] = field(default_factory=list)  # completed chunks that have neighbors
    encoded: Float[Tensor, "c k r d"] | None = None  # what the model makes of these

    @cached_property
    def completed(self) -> list[CompletedChunk]:
        """The chunks that the new tokens complete, row by row."""
        m, completed = self.chunk_len, []
        for row, first in enumerate(self.first):
            before, after = chunks_in(first, m), chunks_in(first + self.length, m)
            completed += [CompletedChunk(row, number, number - before - 1) for number in range(before + 1, after + 1)]
        return completed

    @cached_property
    def is_decode(self) -> bool:
        """Whether each row has one new token, and it is real."""
        return self.length == 1 and min(self.first) >= 0

    @property
    def reads(self) -> bool:
        """Whether any of its tokens may have something to read."""
        return any(self.reading) or (not self.is_decode and (any(self.held) or bool(self.found)))

    def set_neighbors(self, neighbor_ids: Int[Tensor, "b l k r"] | None, neighbor_mask: Tensor | None) -> None:
        """Take the neighbors of `completed`, by row and slot; further ones are ignored."""
        if neighbor_ids is None and neighbor_mask is not None:
            raise ValueError("neighbor_mask is given without neighbor_ids.")
        if neighbor_ids is not None:
            self._check(neighbor_ids, neighbor_mask)
        if self.completed and neighbor_ids is not None:
            self._choose(neighbor_ids, neighbor_mask)
        found = {chunk.row: chunk.number for chunk in self.found}
        for chunk in self.completed:
            self.reading[chunk.row] = chunk.number if found.get(chunk.row) == chunk.number else 0

    def _check(self, neighbor_ids: Tensor, neighbor_mask: Tensor | None) -> None:
        needed = max((chunk.slot + 1 for chunk in self.completed), default=0)
        if neighbor_ids.ndim != 4 or neighbor_ids.shape[0] != len(self.first) or neighbor_ids.shape[1] < needed:
            raise ValueError(
                f"neighbor_ids has shape {list(neighbor_ids.shape)}; with a cache it must be [b, l, k, r] = "
                f"[{len(self.first)}, {needed}, k, r], one row for each chunk that these tokens complete."
            )
        if neighbor_mask is not None and neighbor_mask.shape != neighbor_ids.shape:
            raise ValueError(f"neighbor_mask has shape {list(neighbor_mask.shape)}, neighbor_ids another.")

    def _choose(self, neighbor_ids: Tensor, neighbor_mask: Tensor | None) -> None:
        rows, slots = [chunk.row for chunk in self.completed], [chunk.slot for chunk in self.completed]
        ids = neighbor_ids[rows, slots]
        mask = torch.ones_like(ids, dtype=torch.bool) if neighbor_mask is None else neighbor_mask[rows, slots].bool()
        there = [i for i, some in enumerate(mask.flatten(1).any(-1).tolist()) if some]
        self.found = [self.completed[i] for i in there]
        if self.found:
            self.neighbor_ids, self.neighbor_mask = at_least_one(ids[there], mask[there])

    def keep_last(self, keep: int) -> None:
        """Of `found` keep the chunks whose neighbors one of the last `keep` tokens reads."""
        there = [i for i, chunk in enumerate(self.found) if self._is_read(chunk.row, chunk.number, keep)]
        if len(there) < len(self.found):
            self.found = [self.found[i] for i in there]
            self.neighbor_ids, self.neighbor_mask = self.neighbor_ids[there], self.neighbor_mask[there]

    def _is_read(self, row: int, number: int, keep: int) -> bool:
        """Whether one of the row's last `keep` tokens reads E_u, or would if there were more tokens."""
        return attending_positions(number, self.chunk_len)[-1] >= self.first[row] + self.length - keep

    @cached_property
    def query_positions(self) -> Int[Tensor, "*b 1"]:
        """Of a decode step: positions of the tokens in CCA, see `cca_positions`; one for all where it is the same."""
        m = self.chunk_len
        positions = [(first + 1) % m + m - 1 for first in self.first]
        return torch.tensor(positions[:1] if len(set(positions)) == 1 else [[position] for position in positions])

    @cached_property
    def unread(self) -> Bool[Tensor, " b"] | None:
        """Of a decode step: the rows that have nothing to read; None if there is none."""
        return None if all(self.reading) else torch.tensor([not number for number in self.reading])

    def attending_chunks(self, device: torch.device, keep: int | None = None) -> AttendingChunks:
        """The attending chunks that have something to read; with `keep` only those with one of the last tokens."""
        m, b = self.chunk_len, len(self.first)
        found = {(chunk.row, chunk.number): i for i, chunk in enumerate(self.found)}
        chunks = []
        for row, first in enumerate(self.first):
            lowest, highest = chunk_read_at(max(first, 0), m), chunk_read_at(first + self.length - 1, m)
            for number in range(max(lowest, 1), highest + 1):
                column = attending_positions(number, m)[0] - first
                if keep is not None and not self._is_read(row, number, keep):
                    continue
                if (row, number) in found:
                    chunks.append((row, b + found[row, number], column))
                elif number == self.held[row]:
                    chunks.append((row, row, column))
        chunks = torch.tensor(chunks, dtype=torch.long).reshape(-1, 3)
        rows, source, columns = on_device(chunks, device).unbind(-1)
        return AttendingChunks(rows, source, columns[:, None] + torch.arange(m, device=device))

    def scatter(
        self, x: Shaped[Tensor, "g m *d"], chunks: AttendingChunks, keep: int | None = None
    ) -> Shaped[Tensor, "b s *d"]:
        """Values of the attending chunks' tokens at their columns, 0 elsewhere; with `keep` the last columns only."""
        length = self.length if keep is None else keep
        columns = chunks.columns - (self.length - length)
        inside = (columns >= 0) & (columns < length)
        out = x.new_zeros(len(self.first), length, *x.shape[2:])
        out[chunks.rows[:, None].expand_as(columns)[inside], columns[inside]] = x[inside]
        return out
