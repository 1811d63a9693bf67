"""Chunked cross-attention (CCA): each attending chunk reads the encoded neighbors of the chunk before it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from retro.modules.attention import Attention, attendable
from retro.modules.kernels import has_fixed_shapes


def attending_chunks(h: Shaped[Tensor, "b n d"], chunk_len: int) -> Shaped[Tensor, "b l m d"]:
    """Cut h into attending chunks: C_u+ is the last token of C_u and the first m - 1 tokens of C_{u+1}.

        token   0 1 2 3 | 4 5 6 7 | 8 9      m = 4, n = 10, l = 2
        chunk   C_1     | C_2     | (tail)
        attends - - - 1 | 1 1 1 2 | 2 2      so C_1+ = 3..6, C_2+ = 7..10, its last token padding

    The first m - 1 tokens are dropped and the end is padded with zeros. Source: RETRO, Listing 1.
    """
    num_chunks = h.shape[1] // chunk_len
    shifted = h[:, chunk_len - 1 :]
    padded = F.pad(shifted, (0, 0, 0, num_chunks * chunk_len - shifted.shape[1]))
    return rearrange(padded, "b (l m) d -> b l m d", m=chunk_len)


def in_sequence(attended: Shaped[Tensor, "b l m d"], length: int) -> Shaped[Tensor, "b n d"]:
    """Undo `attending_chunks`: put m - 1 zeros back in front and cut to n tokens."""
    m = attended.shape[2]
    flat = rearrange(attended, "b l m d -> b (l m) d")
    return F.pad(flat, (0, 0, m - 1, 0))[:, :length]


def may_read(
    neighbor_mask: Bool[Tensor, "b l k r"], chunk_len: int, document_ids: Int[Tensor, "b n"] | None = None
) -> Bool[Tensor, "b l m"]:
    """Which tokens of each attending chunk may read E_u: some neighbor is there, and C_u is in their document."""
    present = repeat(neighbor_mask.flatten(2).any(-1), "b l -> b l m", m=chunk_len)
    return present if document_ids is None else present & _same_document(document_ids, chunk_len)


def _same_document(document_ids: Int[Tensor, "b n"], chunk_len: int) -> Bool[Tensor, "b l m"]:
    """Which tokens of each attending chunk are in the document of C_u."""
    num_chunks = document_ids.shape[1] // chunk_len
    # documents are contiguous, so that the first token of a chunk decides
    document_of_chunk = document_ids[:, : num_chunks * chunk_len : chunk_len]
    document_of_token = attending_chunks(document_ids[..., None], chunk_len)[..., 0]
    return document_of_token == document_of_chunk[..., None]


class ReadChunks(NamedTuple):
    """The chunks whose neighbors are read, packed, and which tokens read them: the same in every layer of P.

    index: those c of the b * l chunks that have a neighbor; None if all have.
    mask: of their neighbors' tokens; None if all are real.
    readable: which tokens of their attending chunks may read E_u; None if all may.
    """

    index: Int[Tensor, " c"] | None
    mask: Bool[Tensor, "c k r"] | None
    readable: Bool[Tensor, "c m"] | None

    def pack(self, x: Shaped[Tensor, "b l *s"]) -> Shaped[Tensor, "c *s"]:
        """What belongs to these chunks."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, x: Shaped[Tensor, "c m d"], batch_size: int, num_chunks: int) -> Shaped[Tensor, "b l m d"]:
        """Undo `pack`, with zeros in place of the other chunks."""
        if self.index is not None:
            x = x.new_zeros(batch_size * num_chunks, *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, (batch_size, num_chunks))


def read_chunks(
    neighbor_mask: Bool[Tensor, "b l k r"], chunk_len: int, document_ids: Int[Tensor, "b n"] | None = None
) -> ReadChunks:
    """Leave out chunks without any neighbor. If no chunk has one, the first stays, read by nobody.

    So a gradient, though it be 0, always reaches what reads neighbors: data-parallel training waits for it.
    """
    readable = may_read(neighbor_mask, chunk_len, document_ids).flatten(0, 1)
    if has_fixed_shapes(neighbor_mask):
        return ReadChunks(None, neighbor_mask.flatten(0, 1), readable)
    index = neighbor_mask.flatten(2).any(-1).flatten().nonzero()[:, 0]
    nothing = len(index) == 0
    if nothing:
        index = index.new_zeros(1)
    packed = ReadChunks(None if len(index) == len(readable) else index, None, None)
    mask = packed.pack(neighbor_mask)
    every = document_ids is None and not nothing
    return packed._replace(mask=None if mask.all() else mask, readable=None if every else readable[index])


def checked_neighbors(
    neighbor_ids: Int[Tensor, "..."], neighbor_mask: Tensor | None, batch_size: int, length: int, chunk_len: int
) -> tuple[Int[Tensor, "b l k r"], Bool[Tensor, "b l k r"]]:
    """Neighbors given for [b, n] tokens and their mask, all True by default; ValueError for shapes that do not fit.

    Where k is 0 they become one missing neighbor each: see `at_least_one`.
    """
    num_chunks = length // chunk_len
    if neighbor_ids.ndim != 4 or neighbor_ids.shape[:2] != (batch_size, num_chunks):
        raise ValueError(
            f"neighbor_ids has shape {list(neighbor_ids.shape)}; it must be [b, l, k, r] = "
            f"[{batch_size}, {num_chunks}, k, r], one row for each whole chunk of {chunk_len} tokens."
        )
    if neighbor_mask is None:
        neighbor_mask = torch.ones_like(neighbor_ids, dtype=torch.bool)
    if neighbor_mask.shape != neighbor_ids.shape:
        raise ValueError(f"neighbor_mask has shape {list(neighbor_mask.shape)}, neighbor_ids another.")
    return at_least_one(neighbor_ids, neighbor_mask.bool())


def at_least_one(
    neighbor_ids: Int[Tensor, "*s k r"], neighbor_mask: Bool[Tensor, "*s k r"]
) -> tuple[Int[Tensor, "*s k2 r2"], Bool[Tensor, "*s k2 r2"]]:
    """The same with k >= 1 and r >= 2, as what reads neighbors needs; what is filled in is missing, and ids are 0
    where the mask is False, whatever stood there."""
    k, r = neighbor_ids.shape[-2:]
    neighbor_ids = neighbor_ids.masked_fill(~neighbor_mask, 0)
    if k >= 1 and r >= 2:
        return neighbor_ids, neighbor_mask
    missing = (0, max(2 - r, 0), 0, max(1 - k, 0))
    return F.pad(neighbor_ids, missing), F.pad(neighbor_mask, missing)


class ChunkedCrossAttention(nn.Module):
    """CCA(H, E): for each attending chunk one softmax over the k * r tokens of its neighbors.

    Distances are d(i, i') = i - i' + m - 1 for the i-th token of the attending chunk and the i'-th of a neighbor
    (1-based), the same for every neighbor. Tokens that have nothing to read get exactly zero, so that with the
    residual around it CCA is the identity there: the first m - 1 tokens, attending chunks all of whose neighbors are
    missing, and tokens of another document than the chunk's.

    `smeared_keys` lets keys see the token before theirs, within a neighbor: key_in(j) = (1 - s) E(j) + s E(j - 1)
    with s a learned vector per channel (Olsson et al. 2022). Differs: the paper has plain keys.
    """

    def __init__(self, dim: int, context_dim: int, chunk_len: int, smeared_keys: bool = False, **attention):
        super().__init__()
        self.chunk_len = chunk_len
        self.attention = Attention(dim, context_dim=context_dim, **attention)
        self.smear = nn.Parameter(torch.full((context_dim,), 0.7)) if smeared_keys else None

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        encoded: Float[Tensor, "b l k r e"] | Float[Tensor, "c k r e"],
        neighbors: Bool[Tensor, "b l k r"] | ReadChunks,
        document_ids: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """What the neighbors add to h. At least one whole chunk is needed.

        `neighbors` is their mask, or what `read_chunks` gave for all layers; `encoded` is then of its chunks alone.
        """
        chunks = neighbors
        if not isinstance(chunks, ReadChunks):
            chunks = read_chunks(neighbors, self.chunk_len, document_ids)
            encoded = chunks.pack(encoded)
        k, r = encoded.shape[1:3]
        query_positions, _ = cca_positions(self.chunk_len, r, k, h.device)
        keys, values = self.keys_and_values(encoded)
        mask = None if chunks.mask is None else attendable(rearrange(chunks.mask, "c k r -> c 1 (k r)"))
        attending = attending_chunks(h, self.chunk_len)
        out = self.attend(chunks.pack(attending), keys, values, mask, query_positions)
        if chunks.readable is not None:
            out = out.masked_fill(~chunks.readable[..., None], 0.0)
        return in_sequence(chunks.unpack(out, *attending.shape[:2]), h.shape[1])

    def keys_and_values(
        self, encoded: Float[Tensor, "c k r d"]
    ) -> tuple[Float[Tensor, "c h k r dh"], Float[Tensor, "c h k r dh"]]:
        """What `attend` reads of the encoded neighbors of c chunks."""
        k, r = encoded.shape[1:3]
        _, positions = cca_positions(self.chunk_len, r, k, encoded.device)
        flat, smeared = (rearrange(x, "c k r d -> c (k r) d") for x in (encoded, self._keys(encoded)))
        keys, values = self.attention.keys_and_values(smeared, flat, positions)
        return tuple(rearrange(x, "c h (k r) dh -> c h k r dh", k=k) for x in (keys, values))

    def attend(
        self,
        h: Float[Tensor, "c w d"],
        keys: Float[Tensor, "c h k r dh"],
        values: Float[Tensor, "c h k r dh"],
        mask: Bool[Tensor, "c 1 1 kr"] | None,
        query_positions: Int[Tensor, "*#c w"],
        tables: dict | None = None,
    ) -> Float[Tensor, "c w d"]:
        """What w tokens of each of c attending chunks read; see `cca_positions`. Arbitrary where there is no key."""
        k, r = keys.shape[2:4]
        key_positions = None
        if self.attention.relative is not None:
            _, key_positions = cca_positions(self.chunk_len, r, k, h.device)
        keys, values = keys.flatten(2, 3), values.flatten(2, 3)
        distances = range(self.chunk_len - r, 2 * self.chunk_len - 1)
        given = query_positions, key_positions, mask, False, distances, tables
        return self.attention.attend(h, keys, values, *given)

    def _keys(self, encoded: Float[Tensor, "c k r d"]) -> Float[Tensor, "c k r d"]:
        if self.smear is None:
            return encoded
        before = F.pad(encoded[..., :-1, :], (0, 0, 1, 0))
        return torch.lerp(encoded, before, self.smear.to(encoded.dtype))


def cca_positions(
    chunk_len: int, retrieved_len: int, num_neighbors: int = 1, device: torch.device | None = None
) -> tuple[Int[Tensor, " m"], Int[Tensor, " kr"]]:
    """Positions whose differences are the paper's d(i, i') = i - i' + m - 1; the same for each neighbor."""
    queries = torch.arange(chunk_len, device=device) + chunk_len - 1
    return queries, torch.arange(retrieved_len, device=device).repeat(num_neighbors)
