"""Does a RETRO read? Text whose continuation stands in a neighbor, and how much of it the model finds there.

A model that learns nothing from its neighbors is silent about why. Here every answer is known: random tokens, so that
nothing but copying helps, and for each token the place in the neighbors where the next one stands.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retro.common.modes import hooked
from retro.modules.cross_attention import attending_chunks, cca_positions


class CopyingText(NamedTuple):
    """Tokens, neighbors, and for each token the place (of k * r) of the token after it; -1 where it is not copied."""

    input_ids: Int[Tensor, "b n"]
    neighbor_ids: Int[Tensor, "b l k r"]
    places: Int[Tensor, "b n"]

    def to(self, device: torch.device) -> CopyingText:
        """The same on another device."""
        return CopyingText(*(tensor.to(device) for tensor in self))


def copying_text(config: Any, batch_size: int = 2, num_chunks: int = 4, seed: int = 0) -> CopyingText:
    """Text for a model of `config` with k = num_neighbors.

    One neighbor of each chunk but the last holds, somewhere, the last token of the chunk and the half chunk after it.
    Raises ValueError for chunks of one token, of which half is nothing.
    """
    if config.chunk_len < 2:
        raise ValueError("chunk_len is 1; text to copy from needs chunks of 2 tokens or more")
    generator = torch.Generator().manual_seed(seed)
    m, k, r = config.chunk_len, config.num_neighbors, config.retrieved_len
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=generator)  # noqa: E731
    ids = draw(config.vocab_size, batch_size, num_chunks * m)
    neighbors = draw(config.vocab_size, batch_size, num_chunks, k, r)
    places, copied = torch.full(ids.shape, -1), m // 2
    for row in range(batch_size):
        for u in range(num_chunks - 1):
            last, start, which = (u + 1) * m - 1, int(draw(r - copied, 1)), int(draw(k, 1))
            neighbors[row, u, which, start : start + copied + 1] = ids[row, last : last + copied + 1]
            places[row, last : last + copied] = which * r + start + 1 + torch.arange(copied)
    return CopyingText(ids, neighbors, places)


@torch.no_grad()
def attention_on_copies(model: Any, text: CopyingText) -> list[float]:
    """For each layer of P the attention on the token to copy, a mean over heads and over the tokens that are copied.

    A random start gives about 1 / (k r). Raises ValueError for relative positions.
    """
    if model.config.position != "rotary":
        raise ValueError(f"position is {model.config.position!r}; attention is told for rotary positions only")
    read, text = [], text.to(model.device)
    ccas = [layer.cross_attention for layer in model.model.layers if layer.cross_attention is not None]
    with ExitStack() as stack:
        for cca in ccas:
            stack.enter_context(
                hooked(cca.register_forward_pre_hook, lambda cca, given: read.append((cca, *given[:2])))
            )
        model(text.input_ids, text.neighbor_ids)
    return [_on_copies(*given, text.places) for given in read]


def _on_copies(cca: Any, h: Float[Tensor, "b n d"], encoded: Float[Tensor, "c k r e"], places: Tensor) -> float:
    """The weights of all pairs, which no kernel keeps, from what went into CCA."""
    m = cca.chunk_len
    positions, _ = cca_positions(m, encoded.shape[2], device=h.device)
    queries = cca.attention.queries(attending_chunks(h, m).flatten(0, 1), positions)  # [c, h, m, dh]
    keys = cca.keys_and_values(encoded)[0].flatten(2, 3)  # [c, g, kr, dh]
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)  # [c, h, kr, dh]
    weights = (queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5).softmax(-1).mean(1)  # [c, m, kr]
    place = attending_chunks(places[..., None] + 1, m).flatten(0, 1) - 1  # [c, m, 1]
    return weights.gather(-1, place.clamp(min=0))[place >= 0].mean().item()


@torch.no_grad()
def logit_gain(model: Any, text: CopyingText) -> float:
    """How far neighbors raise the logit of the token to copy above those of all tokens, in nats."""
    text = text.to(model.device)
    ids = text.input_ids
    moved = (model(ids, text.neighbor_ids).logits - model(ids).logits)[:, :-1]
    followed = moved.gather(-1, ids[:, 1:, None])[..., 0] - moved.mean(-1)
    return followed[text.places[:, :-1] >= 0].mean().item()
