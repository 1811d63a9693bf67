"""Two kinds of position that depend on a distance only: rotary, and Transformer-XL's relative form, the paper's.

Both are told the integer positions of queries and keys; the distance of a pair is `query position - key position`.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

POSITIONS = ("rotary", "relative")


def rotary_table(
    positions: Int[Tensor, "*#b n"], dim: int, theta: float = 10_000.0
) -> tuple[Float[Tensor, "*#b 1 n dim"], Float[Tensor, "*#b 1 n dim"]]:
    """The cosines and signed sines that `apply_rotary` takes, for `dim` channels, even: (cos, cos) and (-sin, sin)."""
    half = dim // 2
    frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None, :, None] * frequencies  # [*b, 1, n, dim/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(
    x: Float[Tensor, "b h n dh"], cos: Float[Tensor, "*rows n dh"], sin: Float[Tensor, "*rows n dh"]
) -> Float[Tensor, "b h n dh"]:
    """Turn channels i and i + dh/2 of x by an angle that grows with the position (Su et al. 2021).

    The product of a rotated query and a rotated key depends on their distance only.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


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
        self,
        q: Float[Tensor, "b h i dh"],
        query_positions: Int[Tensor, "*#b i"],
        key_positions: Int[Tensor, " j"],
        distances: range,
        tables: dict | None = None,
    ) -> Float[Tensor, "b h i j"]:
        """The positional part of the logits, before scaling; arbitrary for pairs whose distance is not in `distances`.

        `tables` keeps R c(distance) from one call to the next.
        """
        logits = (q + self.position_bias[:, None]) @ self.table(distances, tables)  # [b, h, i, t]
        index = query_positions[..., None, :, None] - (key_positions + distances.start)
        return logits.gather(-1, index.clamp(0, len(distances) - 1).expand(*q.shape[:3], -1))

    def table(self, distances: range, tables: dict | None = None) -> Float[Tensor, "h dh t"]:
        """R c(distance) of each distance; what `tables` lacks is made with room to grow."""
        if tables is None or (torch.is_grad_enabled() and self.proj.weight.requires_grad):
            return self._project(distances)
        first, table = tables.get(id(self), (0, None))
        if table is None or distances.start < first or distances.stop > first + table.shape[-1]:
            room = 0 if table is None else table.shape[-1]
            every = range(min(first, distances.start), distances.stop + room)
            first, table = tables[id(self)] = (every.start, self._project(every))
        return table[..., distances.start - first : distances.stop - first]

    def _project(self, distances: range) -> Float[Tensor, "h dh t"]:
        every = torch.arange(distances.start, distances.stop, device=self.proj.weight.device)
        table = self.proj(cosine_vectors(every, self.dim).to(self.proj.weight.dtype))
        return rearrange(table, "t (h dh) -> h dh t", h=self.num_heads)
