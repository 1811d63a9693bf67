"""Two kinds of position that depend on a distance only: rotary, and Transformer-XL's relative form, the paper's.

Both are told the integer positions of queries and keys; the distance of a pair is `query position - key position`.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

POSITIONS = ("rotary", "relative")


def rotate(
    x: Float[Tensor, "b h n dh"], positions: Int[Tensor, " n"], theta: float = 10_000.0
) -> Float[Tensor, "b h n dh"]:
    """Turn each pair of channels of x by an angle that grows with the position (Su et al. 2021).

    The product of a rotated query and a rotated key depends on their distance only. The head size must be even.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.float()[:, None] * frequencies  # [n, dh/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def cosine_vectors(distances: Int[Tensor, " t"], dim: int) -> Float[Tensor, "t dim"]:
    """Sines and cosines of each distance at geometrically spaced wavelengths (Vaswani et al. 2017)."""
    half = (dim + 1) // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=distances.device, dtype=torch.float32) / half)
    angles = distances.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :dim]


class RelativePositions(nn.Module):
    """Attention logits from the distance: u . k_j + (q_i + v) . R c(i - j), c the cosine vector of the distance.

    R is a learned linear map, u and v learned vectors per head (Dai et al. 2019, section 3.3; RETRO, appendix B).
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.dim = num_heads, dim
        self.proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim))  # u
        self.position_bias = nn.Parameter(torch.zeros(num_heads, head_dim))  # v

    def forward(
        self, q: Float[Tensor, "b h i dh"], query_positions: Int[Tensor, " i"], key_positions: Int[Tensor, " j"]
    ) -> Float[Tensor, "b h i j"]:
        """The positional part of the logits, before scaling."""
        distance = query_positions[:, None] - key_positions[None, :]
        lowest, highest = distance.min(), distance.max()
        every = torch.arange(int(lowest), int(highest) + 1, device=q.device)
        table = self.proj(cosine_vectors(every, self.dim).to(self.proj.weight.dtype))
        table = rearrange(table, "t (h dh) -> h dh t", h=self.num_heads)
        logits = (q + self.position_bias[:, None]) @ table  # [b, h, i, t]
        return logits.gather(-1, (distance - lowest).expand(*q.shape[:3], -1))
