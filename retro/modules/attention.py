"""Multi-head attention, self or cross, in one call of the fused kernel."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules.feed_forward import ResidualLinear
from retro.modules.positions import POSITIONS, RelativePositions, rotate


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
        query_positions: Int[Tensor, " i"] | None = None,
        key_positions: Int[Tensor, " j"] | None = None,
        mask: Bool[Tensor, "b #i j"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b i d"]:
        """Attend `keys` (default: x itself) and read `values` (default: `keys`). Positions default to 0, 1, 2, ...

        `mask` is True where a key may be attended. A query with no such key gets an arbitrary finite result, never
        NaN: the caller discards it. `is_causal` asks for i == j and cannot be combined with `mask`.
        """
        keys = x if keys is None else keys
        values = keys if values is None else values
        query_positions = _count_from_zero(x) if query_positions is None else query_positions
        key_positions = _count_from_zero(keys) if key_positions is None else key_positions
        q = rearrange(self.q_proj(x), "b i (h dh) -> b h i dh", h=self.num_heads)
        k = rearrange(self.k_proj(keys), "b j (h dh) -> b h j dh", h=self.num_key_value_heads)
        v = rearrange(self.v_proj(values), "b j (h dh) -> b h j dh", h=self.num_key_value_heads)
        if self.relative is None:
            q, k = self._rotated(q, query_positions), self._rotated(k, key_positions)
            out = self._fused(q, k, v, _attendable(mask), is_causal)
        else:
            bias = self._relative_bias(q, query_positions, key_positions, _attendable(mask), is_causal)
            out = self._fused(q + self.relative.content_bias[:, None], k, v, bias, False)
        return self.o_proj(rearrange(out, "b h i dh -> b i (h dh)"))

    def _rotated(self, x, positions) -> Tensor:
        """The first `rotary_dim` channels of each head turned by their positions, the rest as they are."""
        turned = rotate(x[..., : self.rotary_dim], positions, self.rope_theta)
        return turned if self.rotary_dim == self.head_dim else torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)

    def _fused(self, q, k, v, mask, is_causal: bool) -> Tensor:
        grouped = self.num_heads != self.num_key_value_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

    def _relative_bias(self, q, query_positions, key_positions, mask, is_causal: bool) -> Tensor:
        if is_causal:
            mask = query_positions[:, None] >= key_positions[None, :]
        bias = self.relative(q, query_positions, key_positions) * self.head_dim**-0.5
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _count_from_zero(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _attendable(mask: Bool[Tensor, "b #i j"] | None) -> Bool[Tensor, "b 1 #i j"] | None:
    """Add the head axis and open the rows in which nothing may be attended: a softmax over nothing is NaN."""
    return None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None]
