"""The decoder block: FFW(ATTN(H)), and FFW(CCA(ATTN(H), E)) in the layers of P."""

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from retro.modules.attention import Attention, PastKeyValues
from retro.modules.cross_attention import ChunkedCrossAttention, ReadChunks
from retro.modules.feed_forward import FeedForward
from retro.modules.kernels import QueryBlock
from retro.modules.norm import RMSNorm


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
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, **attention)
        self.cross_attention = None
        if cross_attention is not None:
            self.cross_attention_norm = RMSNorm(dim, eps=norm_eps)
            self.cross_attention = ChunkedCrossAttention(dim, **cross_attention)
        self.feed_forward_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = FeedForward(dim, inner_dim, **feed_forward)

    def forward(self, step: str, *given) -> Float[Tensor, "b n d"]:
        """One of the three steps by name: hooks of accelerate and FSDP hang on `forward`."""
        return getattr(self, step)(*given)

    def attend(
        self,
        h: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n n"] | tuple[QueryBlock, ...] | None = None,
        lengths: tuple[int, ...] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """H + ATTN(H), causal; `mask` (True = may attend, causality included) replaces the plain causal mask.

        lengths: of packed documents, see Attention. rotary: `rotary_table` of the positions, if they are made already.
        """
        x = self.attention_norm(h)
        return h + self.attention(x, None, None, rotary, rotary, mask, mask is None, lengths, range(h.shape[1]))

    def extend(self, h: Float[Tensor, "b n d"], past: PastKeyValues, layer: int) -> Float[Tensor, "b n d"]:
        """H + ATTN(H) of new tokens, which attend all so far."""
        return h + self.attention.extend(self.attention_norm(h), past, layer)

    def read(
        self,
        h: Float[Tensor, "b n d"],
        encoded: Float[Tensor, "c k r e"],
        chunks: ReadChunks,
    ) -> Float[Tensor, "b n d"]:
        """H + CCA(H, E)."""
        return h + self.cross_attention(self.cross_attention_norm(h), encoded, chunks)

    def read_held(
        self, h: Float[Tensor, "b n d"], reader: Callable[[ChunkedCrossAttention, Tensor], Tensor]
    ) -> Float[Tensor, "b n d"]:
        """H + CCA(H, E) of new tokens, where a cache holds what CCA reads."""
        return h + reader(self.cross_attention, self.cross_attention_norm(h))

    def feed(self, h: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """H + FFW(H)."""
        return h + self.feed_forward(self.feed_forward_norm(h))
