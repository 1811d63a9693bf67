"""The paper's mathematics: attention, chunked cross-attention, neighbor encoder, decoder block.

Axes, here and everywhere: b batch, n sequence length, m chunk length, l = n // m chunks, k neighbors, r retrieved
length, h heads, d width (d_enc in the encoder). C_u is chunk u, E_u its encoded neighbors, H_u the decoder's
activations of C_u.
"""

from retro.modules.attention import Attention
from retro.modules.cross_attention import ChunkedCrossAttention
from retro.modules.decoder import DecoderBlock
from retro.modules.encoder import NeighborEncoder
from retro.modules.feed_forward import FeedForward
from retro.modules.loss import linear_cross_entropy

__all__ = [
    "Attention",
    "ChunkedCrossAttention",
    "DecoderBlock",
    "FeedForward",
    "NeighborEncoder",
    "linear_cross_entropy",
]
