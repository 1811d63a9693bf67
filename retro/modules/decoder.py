"""The decoder block: FFW(ATTN(H)), and FFW(CCA(ATTN(H), E)) in the layers of P."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules.attention import Attention, Past
from retro.modules.cross_attention import ChunkedCrossAttention
from retro.modules.feed_forward import FeedForward


class DecoderBlock(nn.Module):
    """Three pre-norm residual steps that the model calls in order: attend, read (layers of P only), feed_forward.

    They are separate, since E is encoded from what `attend` gives in the first layer of P.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        attention: dict,
        feed_forward: dict,
        cross_attention: dict | None,
        norm_eps: float,
    ):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, **attention)
        self.cross_attention = None
        if cross_attention is not None:
            self.cross_attention_norm = nn.RMSNorm(dim, eps=norm_eps)
            self.cross_attention = ChunkedCrossAttention(dim, **cross_attention)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.feed_forward = FeedForward(dim, inner_dim, **feed_forward)

    def forward(self, step: str, *given) -> Float[Tensor, "b n d"]:
        """One of the three steps by name: hooks of accelerate and FSDP hang on `forward`."""
        return getattr(self, step)(*given)

    def attend(self, h: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n n"] | None) -> Float[Tensor, "b n d"]:
        """H + ATTN(H), causal; `mask` (True = may attend, causality included) replaces the plain causal mask."""
        return h + self.attention(self.attention_norm(h), mask=mask, is_causal=mask is None)

    def extend(self, h: Float[Tensor, "b n d"], past: Past, layer: int) -> Float[Tensor, "b n d"]:
        """H + ATTN(H) of new tokens, which attend all so far."""
        return h + self.attention.extend(self.attention_norm(h), past, layer)

    def read(
        self,
        h: Float[Tensor, "b n d"],
        encoded: Float[Tensor, "b l k r c"],
        neighbor_mask: Bool[Tensor, "b l k r"],
        document_ids: Int[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n d"]:
        """H + CCA(H, E)."""
        return h + self.cross_attention(self.cross_attention_norm(h), encoded, neighbor_mask, document_ids)

    def read_held(
        self, h: Float[Tensor, "b n d"], reader: Callable[[ChunkedCrossAttention, Tensor], Tensor]
    ) -> Float[Tensor, "b n d"]:
        """H + CCA(H, E) of new tokens, where a cache holds what CCA reads."""
        return h + reader(self.cross_attention, self.cross_attention_norm(h))

    def feed(self, h: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """H + FFW(H)."""
        return h + self.feed_forward(self.feed_forward_norm(h))
