"""The neighbor encoder: a small bidirectional transformer that reads each neighbor in the light of its chunk."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from retro.modules.attention import Attention
from retro.modules.feed_forward import FeedForward
from retro.modules.norm import RMSNorm


class EncoderBlock(nn.Module):
    """ATTN (bidirectional) -> CA to H_u, in the layers of P_enc -> FFW, each a pre-norm residual."""

    def __init__(
        self, dim: int, inner_dim: int, condition_dim: int | None, attention: dict, feed_forward: dict, norm_eps: float
    ):
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, **attention)
        self.cross_attention = None
        if condition_dim is not None:
            self.cross_attention_norm = RMSNorm(dim, eps=norm_eps)
            self.cross_attention = Attention(dim, context_dim=condition_dim, **attention)
        self.feed_forward_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = FeedForward(dim, inner_dim, **feed_forward)

    def forward(
        self,
        e: Float[Tensor, "b l k r c"],
        neighbor_mask: Bool[Tensor, "b l k r"] | None,
        condition: Float[Tensor, "b l m d"] | None,
        condition_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r c"]:
        b, num_chunks, k, r, _ = e.shape
        alone = rearrange(e, "b l k r c -> (b l k) r c")
        mask = None if neighbor_mask is None else rearrange(neighbor_mask, "b l k r -> (b l k) 1 r")
        alone = alone + self.attention(self.attention_norm(alone), mask=mask)
        e = rearrange(alone, "(b l k) r c -> b l k r c", b=b, l=num_chunks)
        if self.cross_attention is not None:
            e = e + self._read_chunk(self.cross_attention_norm(e), condition, condition_mask)
        return e + self.feed_forward(self.feed_forward_norm(e))

    def _read_chunk(self, e, condition, condition_mask) -> Float[Tensor, "b l k r c"]:
        """Cross-attend H_u. The distance is i' - i, and the same for each neighbor: k is folded into the query axis."""
        b, num_chunks, k, r, _ = e.shape
        out = self.cross_attention(
            rearrange(e, "b l k r c -> (b l) (k r) c"),
            keys=rearrange(condition, "b l m d -> (b l) m d"),
            query_positions=torch.arange(r, device=e.device).repeat(k),
            mask=None if condition_mask is None else rearrange(condition_mask, "b l m -> (b l) 1 m"),
            distances=range(1 - condition.shape[2], r),
        )
        return rearrange(out, "(b l) (k r) c -> b l k r c", b=b, k=k)


class NeighborEncoder(nn.Module):
    """E_u = ENCODER(RET(C_u), H_u): every neighbor of every chunk in parallel, none attending another.

    `cross_attention_layers` is P_enc, 1-based. Differs: H_u is normalised (RMSNorm) before it is read and E before it
    is handed out, since both are residual streams, whose scale grows with depth and differs between models.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        num_layers: int,
        condition_dim: int,
        cross_attention_layers: list[int],
        attention: dict,
        feed_forward: dict,
        norm_eps: float,
    ):
        super().__init__()
        conditions = [condition_dim if i in cross_attention_layers else None for i in range(1, num_layers + 1)]
        blocks = [EncoderBlock(dim, inner_dim, c, attention, feed_forward, norm_eps) for c in conditions]
        self.layers = nn.ModuleList(blocks)
        self.condition_norm = RMSNorm(condition_dim, eps=norm_eps) if any(conditions) else None
        self.norm = RMSNorm(dim, eps=norm_eps)

    def forward(
        self,
        embedded: Float[Tensor, "b l k r c"],
        neighbor_mask: Bool[Tensor, "b l k r"] | None,
        condition: Float[Tensor, "b l m d"],
        condition_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r c"]:
        """Encode embedded neighbor tokens, given H of their chunks; None: all are real.

        What stands at a masked token is arbitrary.
        """
        e = embedded
        h = None if self.condition_norm is None else self.condition_norm(condition)
        for layer in self.layers:
            e = layer(e, neighbor_mask, h, condition_mask)
        return self.norm(e)


def chunks_of(h: Shaped[Tensor, "b n d"], chunk_len: int) -> Shaped[Tensor, "b l m d"]:
    """H_1 .. H_l: the whole chunks of h; the tail of n % m tokens is left out."""
    num_chunks = h.shape[1] // chunk_len
    return rearrange(h[:, : num_chunks * chunk_len], "b (l m) d -> b l m d", l=num_chunks, m=chunk_len)
