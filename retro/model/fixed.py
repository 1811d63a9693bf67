"""Steps of one token in tensors that keep their shapes and places: what torch.compile and CUDA graphs ask for.

    host    `RetroCache.plan`: which rows complete a chunk, and its neighbors    before the step, from what it knows
    device  the model over a FixedStep, which reads nothing back                 a graph, another for new neighbors

All b rows stand in every tensor. Neighbors that only some rows need are encoded for all and taken where `takes` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import StaticCache

from retro.model.step import CachedStep
from retro.modules.attention import PastKeyValues, attendable
from retro.modules.cross_attention import ChunkedCrossAttention
from retro.modules.positions import rotary_table


class FixedRows:
    """What a RetroCache holds, as fixed steps read and write it in place; its names are the cache's.

    positions: of each row's next token. padding: columns before its first real token. rows, tables: the cache's own.
    """

    def __init__(
        self,
        chunk_len: int,
        attention: StaticCache,
        rows: dict[str, Tensor],
        tables: dict,
        padding: Int[Tensor, " b"],
        length: int,
    ):
        self.chunk_len, self.attention, self.rows, self.tables = chunk_len, attention, rows, tables
        self.padding, self.positions = padding, length - padding
        self.every_row = torch.arange(len(padding), device=padding.device)
        for x in (*rows.values(), *(x for _, x in tables.values()), padding, self.positions, self.every_row):
            torch._dynamo.mark_static_address(x)

    def past_key_values(self, head_dim: int, theta: float) -> PastKeyValues:
        """What self-attention needs: keys up to each row's new token, past its padding."""
        size, columns = self.attention.get_max_length(), self.positions + self.padding
        keys, column = torch.arange(size, device=columns.device), columns[:1]
        mask = (keys <= column) & (keys >= self.padding[:, None])
        rotary = tuple(x[0] for x in rotary_table(column, head_dim, theta))
        return PastKeyValues(self.attention.update, column, rotary, attendable(mask[:, None]), False, self.tables)

    def end(self, input_ids: Int[Tensor, "b 1"]) -> None:
        """Go on to the next token."""
        if "tokens" in self.rows:
            self.record("tokens", input_ids, None, self.rows["tokens"].shape[1])
        self.positions.add_(1)

    def record(self, name: str, x: Shaped[Tensor, "b 1 *d"], step: FixedStep | None, size: int) -> None:
        ring = self.rows[name]
        ring.index_put_((self.every_row.to(ring.device), (self.positions % size).to(ring.device)), x[:, 0].to(ring))

    def before(self, name: str, x: Tensor, step: FixedStep, count: int) -> Shaped[Tensor, "b c d"]:
        ring = self.rows[name]
        places = (self.positions[:, None] + torch.arange(-count, 0, device=self.positions.device)) % ring.shape[1]
        return ring[self.every_row[:, None].to(ring.device), places.to(ring.device)].to(x)

    def conditions(self, h: Float[Tensor, "b 1 d"], step: FixedStep) -> Float[Tensor, "b m d"]:
        """The last m states. Of a row whose chunk is complete they are H_u, since the ring then begins with it."""
        self.record("hidden", h, step, self.chunk_len)
        return self.rows["hidden"].to(h)

    def hold(self, name: str, new: Shaped[Tensor, "b *s"], step: FixedStep) -> None:
        held = self.rows[name]
        takes = step.takes.to(held.device).view(-1, *[1] * (held.ndim - 1))
        held.copy_(torch.where(takes, new.to(held), held))

    def read(
        self, name: str, step: FixedStep, cca: ChunkedCrossAttention, h: Float[Tensor, "b 1 d"]
    ) -> Float[Tensor, "b 1 d"]:
        names = (f"{name}.keys", f"{name}.values")
        if step.found:
            for part, x in zip(names, cca.keys_and_values(step.encoded.to(h.device)), strict=True):
                self.hold(part, x, step)
        m, keys, values = self.chunk_len, *(self.rows[part] for part in names)
        mask = attendable(self.rows["mask"].flatten(1)[:, None]).to(h.device)
        positions = ((self.positions + 1) % m + m - 1)[:, None].to(h.device)
        out = cca.attend(h, keys, values, mask, positions, self.tables)
        return out.masked_fill(step.unread.to(h.device)[:, None, None], 0.0)


@dataclass
class FixedStep:
    """One real token of each row.

    unread: rows that have nothing to read after it. takes: rows that read new neighbors from it on; None if none does.
    neighbor_ids, neighbor_mask, and of a fit that compares its base's features these: of these rows, nothing in the
    others.
    """

    cache: FixedRows
    unread: Bool[Tensor, " b"]
    takes: Bool[Tensor, " b"] | None = None
    neighbor_ids: Int[Tensor, "b k r"] | None = None
    neighbor_mask: Bool[Tensor, "b k r"] | None = None
    features: Float[Tensor, "b k r d"] | None = None
    encoded: Float[Tensor, "b k r d"] | None = None
    is_decode = True

    @property
    def found(self) -> bool:
        """Whether it brings neighbors."""
        return self.takes is not None

    @property
    def reads(self) -> bool:
        """Whether the cache holds what may be read."""
        return "mask" in self.cache.rows

    def keep_last(self, keep: int) -> None:
        """Nothing: the one token reads what it brings."""


def in_all_rows(step: CachedStep, held: Bool[Tensor, "b k r"] | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Which rows take new neighbors, and these with a place for every row; None where what is held has less room."""
    _, k, r = step.neighbor_ids.shape
    if held is None or k > held.shape[1] or r > held.shape[2]:
        return None
    rows = [chunk.row for chunk in step.found]
    takes = step.neighbor_mask.new_zeros(len(held))
    takes[rows] = True
    filled = [x.new_zeros(held.shape) for x in (step.neighbor_ids, step.neighbor_mask)]
    for into, x in zip(filled, (step.neighbor_ids, step.neighbor_mask), strict=True):
        into[rows, :k, :r] = x
    return takes, *filled
