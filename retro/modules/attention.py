"""Multi-head attention, self or cross, in one call of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules.blockwise import blockwise_attention, suits_blocks
from retro.modules.feed_forward import ResidualLinear
from retro.modules.kernels import QueryBlock, masked_attention, relative_attention, uses_flex
from retro.modules.positions import POSITIONS, RelativePositions, apply_rotary, rotary_table


class PastKeyValues(NamedTuple):
    """What self-attention of new tokens needs of the tokens before them.

    update: takes the keys and values of the new tokens and a layer's index, and gives those of all, [b, h, j, dh].
    positions: of the new tokens, counted as the keys are; rotary: `rotary_table` of them. mask, is_causal: which
    keys may be attended. tables: see RelativePositions.
    """

    update: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    positions: Int[Tensor, " i"]
    rotary_table: tuple[Tensor, Tensor]
    mask: Bool[Tensor, "#b 1 i j"] | None
    is_causal: bool
    tables: dict


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(dh) + positions) V, then W_o. No biases.

    The inner width `num_heads * head_dim` is independent of `dim`. With fewer key / value heads than query heads,
    groups of query heads share one (grouped-query attention). `context_dim` is the width of what is attended; it
    differs from `dim` in cross-attention only. `partial_rotary_factor` is the share of each head's channels that
    rotary positions turn.

    Raises ValueError for an unknown position kind, an odd head size with rotary positions, and query heads that the
    key / value heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        num_key_value_heads: int | None = None,
        context_dim: int | None = None,
        position: str = "rotary",
        rope_theta: float = 10_000.0,
        partial_rotary_factor: float = 1.0,
    ):
        super().__init__()
        kv_heads, context_dim = num_key_value_heads or num_heads, context_dim or dim
        if position not in POSITIONS:
            raise ValueError(f"position is {position!r}; choose one of {', '.join(POSITIONS)}.")
        if num_heads % kv_heads:
            raise ValueError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {num_heads}.")
        if position == "rotary" and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary positions need an even head size.")
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.rope_theta, self.rotary_dim = rope_theta, 2 * int(head_dim * partial_rotary_factor / 2)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=False)
        self.o_proj = ResidualLinear(num_heads * head_dim, dim)
        self.relative = RelativePositions(dim, num_heads, head_dim) if position == "relative" else None

    def forward(
        self,
        x: Float[Tensor, "b i d"],
        keys: Float[Tensor, "b j c"] | None = None,
        values: Float[Tensor, "b j c"] | None = None,
        query_positions: Int[Tensor, " i"] | tuple[Tensor, Tensor] | None = None,
        key_positions: Int[Tensor, " j"] | tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "b #i j"] | tuple[QueryBlock, ...] | None = None,
        is_causal: bool = False,
        lengths: tuple[int, ...] | None = None,
        distances: range | None = None,
    ) -> Float[Tensor, "b i d"]:
        """Attend `keys` (default: x itself) and read `values` (default: `keys`). Positions default to 0, 1, 2, ...

        `mask` is True where a key may be attended. A query with no such key gets an arbitrary finite result, never
        NaN: the caller discards it. `is_causal` asks for i == j and cannot be combined with `mask`. `lengths` are those
        of the documents that lie one after another in the rows of x: each attends to itself alone, causally; so it is
        by `mask` of `query_blocks`. `distances`: see `attend`.
        """
        keys = x if keys is None else keys
        query_positions = _count_from_zero(x) if query_positions is None else query_positions
        key_positions = _count_from_zero(keys) if key_positions is None else key_positions
        k, v = self.keys_and_values(keys, keys if values is None else values, key_positions)
        mask = mask if isinstance(mask, tuple) else attendable(mask)
        return self.attend(x, k, v, query_positions, key_positions, mask, is_causal, distances, lengths=lengths)

    def keys_and_values(
        self,
        keys: Float[Tensor, "b j c"],
        values: Float[Tensor, "b j c"],
        positions: Int[Tensor, "*#b j"] | tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "b h j dh"], Float[Tensor, "b h j dh"]]:
        """What `attend` reads, and a cache may keep: projected, and turned where positions are rotary.

        Positions may be given as `rotary_table` of them.
        """
        k, v = (_split(x, self.num_key_value_heads) for x in (self.k_proj(keys), self.v_proj(values)))
        return k if self.relative is not None else self._rotated(k, positions), v

    def queries(
        self, x: Float[Tensor, "b i d"], positions: Int[Tensor, "*#b i"] | tuple[Tensor, Tensor]
    ) -> Float[Tensor, "b h i dh"]:
        """Projected, and turned where positions are rotary; positions as for `keys_and_values`."""
        q = _split(self.q_proj(x), self.num_heads)
        return q if self.relative is not None else self._rotated(q, positions)

    def attend(
        self,
        x: Float[Tensor, "b i d"],
        k: Float[Tensor, "b h j dh"],
        v: Float[Tensor, "b h j dh"],
        query_positions: Int[Tensor, "*#b i"] | tuple[Tensor, Tensor],
        key_positions: Int[Tensor, " j"] | tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "#b 1 #i j"] | tuple[QueryBlock, ...] | None = None,
        is_causal: bool = False,
        distances: range | None = None,
        tables: dict | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b i d"]:
        """Attend what `keys_and_values` gave. Relative positions need `key_positions`; see them for `tables`.

        `distances` are those of the pairs that may attend, known without a look at positions; default: of positions
        that count from 0. Each query of `mask` has a key that it may attend, see `attendable`; for `lengths` see
        `forward`.
        """
        q = self.queries(x, query_positions)
        if distances is None:
            distances = range(k.shape[2]) if is_causal else range(1 - k.shape[2], q.shape[2])
        if isinstance(mask, tuple):
            out = torch.cat([self._query_block(q, k, v, block) for block in mask], dim=2)
        elif lengths is None:
            out = self._kernel(q, k, v, query_positions, key_positions, mask, is_causal, distances, tables)
        else:
            out = self._inside_documents(q, k, v, lengths)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extend(self, x: Float[Tensor, "b i d"], past: PastKeyValues, layer: int) -> Float[Tensor, "b i d"]:
        """Self-attention of new tokens to all so far, in the layer of this index."""
        positions, key_positions = past.rotary_table, None
        k, v = past.update(*self.keys_and_values(x, x, positions), layer)
        if self.relative is not None:
            positions, key_positions = past.positions, torch.arange(k.shape[2], device=x.device)
        distances = range(k.shape[2])
        return self.attend(x, k, v, positions, key_positions, past.mask, past.is_causal, distances, past.tables)

    def _rotated(self, x: Tensor, positions: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The first `rotary_dim` channels of each head turned by their positions, the rest as they are."""
        dim = self.rotary_dim
        if dim == 0:
            return x
        by = positions if isinstance(positions, tuple) else rotary_table(positions, dim, self.rope_theta)
        return (
            apply_rotary(x, *by)
            if dim == self.head_dim
            else torch.cat([apply_rotary(x[..., :dim], *by), x[..., dim:]], dim=-1)
        )

    def _inside_documents(self, q, k, v, lengths: tuple[int, ...]) -> Float[Tensor, "b h n dh"]:
        """Causal attention of each document to itself, without the pairs that a mask would take away."""
        outs = []
        for document in zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True):
            one = [x.transpose(0, 1)[None] for x in document]  # [1, h, length, dh]
            positions = torch.arange(one[0].shape[2], device=q.device)
            out = self._kernel(*one, positions, positions, None, True, range(len(positions)), None)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs).unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    def _query_block(self, q, k, v, block: QueryBlock) -> Float[Tensor, "b h w dh"]:
        """Attention of some queries to the keys up to theirs."""
        q, k, v = q[:, :, block.start : block.stop], k[:, :, : block.stop], v[:, :, : block.stop]
        if self.relative is None:
            return masked_attention(q, k, v, block.mask)
        positions = torch.arange(block.stop, device=q.device)
        return self._relative(q, k, v, positions[block.start :], positions, block.mask, range(block.stop))

    def _kernel(self, q, k, v, query_positions, key_positions, mask, is_causal: bool, distances, tables) -> Tensor:
        """Attention of heads; q and k are turned already where positions are rotary."""
        if self.relative is None:
            return self._fused(q, k, v, mask, is_causal)
        if not is_causal and q.shape[2] > 1 and uses_flex(q, self.head_dim):
            return self._relative(q, k, v, query_positions, key_positions, mask, distances)
        bias = self._relative_bias(q, query_positions, key_positions, mask, is_causal, distances, tables)
        return self._fused(q + self.relative.content_bias[:, None], k, v, bias, False)

    def _relative(self, q, k, v, query_positions, key_positions, mask, distances: range) -> Tensor:
        """Relative positions without a bias of all pairs."""
        aligned = range(distances.start, distances.start + -(-len(distances) // 8) * 8)  # rows of 16 bytes
        relative = self.relative
        content, positional = (q + bias[:, None] for bias in (relative.content_bias, relative.position_bias))
        queries = query_positions - distances.start
        return relative_attention(content, positional, k, v, relative.table(aligned), queries, key_positions, mask)

    def _fused(self, q, k, v, mask, is_causal: bool) -> Tensor:
        if suits_blocks(q, k, v, mask):
            return blockwise_attention(q, k, v, mask, is_causal)
        grouped = self.num_heads != self.num_key_value_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

    def _relative_bias(self, q, query_positions, key_positions, mask, is_causal: bool, distances, tables) -> Tensor:
        if is_causal:
            mask = query_positions[:, None] >= key_positions[None, :]
        bias = self.relative(q, query_positions, key_positions, distances, tables) * self.head_dim**-0.5
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _split(x: Float[Tensor, "b j d"], heads: int) -> Float[Tensor, "b h j dh"]:
    """b j (h dh) -> b h j dh. Not by einops, whose every call costs as much as a small product: one token feels it."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _count_from_zero(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def attendable(mask: Bool[Tensor, "b #i j"] | None) -> Bool[Tensor, "b 1 #i j"] | None:
    """Add the head axis and open the rows in which nothing may be attended: a softmax over nothing is NaN."""
    return None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None]
