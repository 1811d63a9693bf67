"""Whether a base's own cache can be relied on: a cached run over a few tokens must give what the whole run gives.

Bases take positions, masks and caches in their own ways, and some lose a part of them without a word. So the ways that
a text is going to need are tried on the base itself, once.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from retro.common.modes import evaluating
from retro.model.step import CachedStep

NUM_TOKENS, NUM_PADDED = 8, 3
# how a text may be given: how many tokens in each call
WAYS = {"at once": (5, 1, 1, 1), "in several calls": (5, 2, 1), "with padding in several calls": (2, 1, 4, 1)}
_tried: WeakKeyDictionary[nn.Module, dict[tuple[type, bool, str], bool]] = WeakKeyDictionary()


def check_cache(base: nn.Module, held: Cache | None, step: CachedStep, start: int, padded: bool) -> None:
    """ValueError if a text that goes on with this step at column `start` does not come out as it should.

    padded: Rows have padding on the left. Caches other than dynamic (None) and static ones are not tried: quantized,
    offloaded, of the base's own.
    """
    kind = DynamicCache if held is None else type(held)
    if (start and step.is_decode) or kind not in (DynamicCache, StaticCache) or getattr(held, "offloading", False):
        return
    way = "at once" if start == 0 else "in several calls" if min(step.first) >= 0 else "with padding in several calls"
    tried = _tried.setdefault(base, {})
    if (kind, padded, way) not in tried:
        tried[kind, padded, way] = _agrees(base, kind, padded, WAYS[way])
    if not tried[kind, padded, way]:
        texts, alone = ("rows of different lengths", ", or each prompt alone") if padded else ("texts", "")
        how = f"given {way}{', with a static cache' if kind is StaticCache else ''}"
        raise ValueError(
            f"{type(base).__name__} does not continue {texts} {how} as it runs them whole; generate with "
            f"use_cache=False{alone}."
        )


@torch.no_grad()
def _agrees(base: nn.Module, kind: type[Cache], padded: bool, pieces: tuple[int, ...]) -> bool:
    vocabulary, device = base.config.get_text_config().vocab_size, base.get_input_embeddings().weight.device
    ids = (torch.arange(2 * NUM_TOKENS, device=device).view(2, -1) * 7 + 3) % vocabulary
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :NUM_PADDED] = 0
    with evaluating(base):
        texts = [row[real][None] for row, real in zip(ids, mask.bool(), strict=True)]
        whole = [base(input_ids=text, use_cache=False).logits[0] for text in texts]
        try:
            cached = _cached_logits(base, ids, mask if padded else None, kind, pieces)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            return False
    return all(_same(logits[-len(row) :], row) for logits, row in zip(cached, whole, strict=True))


def _cached_logits(
    base: Any, ids: Int[Tensor, "b n"], mask: Tensor | None, kind: type[Cache], pieces: tuple[int, ...]
) -> Float[Tensor, "b n v"]:
    fixed = {"max_cache_len": NUM_TOKENS} if kind is StaticCache else {}
    held, logits, stop = kind(config=base.config.get_text_config(decoder=True), **fixed), [], 0
    padding = ids.new_zeros(len(ids)) if mask is None else NUM_TOKENS - mask.sum(-1)
    for length in pieces:
        stop += length
        inputs = base.prepare_inputs_for_generation(
            ids[:, :stop],
            next_sequence_length=length,
            past_key_values=held,
            attention_mask=None if mask is None else mask[:, :stop],
            use_cache=True,
            is_first_iteration=not logits,
        )
        inputs |= positions_of(base, padding, stop - length, length)
        logits.append(base(**inputs, return_dict=True).logits[:, -length:])
    return torch.cat(logits, dim=1)


def positions_of(base: Any, padding: Int[Tensor, " b"], start: int, length: int) -> dict[str, Int[Tensor, "b s"]]:
    """position_ids of columns from `start`, counted from each row's first real token, for a base that takes them."""
    if not _takes_positions(type(base)):
        return {}
    columns = torch.arange(start, start + length, device=padding.device)
    return {"position_ids": (columns - padding[:, None]).clamp(min=0)}


@cache
def _takes_positions(kind: type) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _same(cached: Float[Tensor, "n v"], whole: Float[Tensor, "n v"]) -> bool:
    """Up to rounding, and far less than what tells one token's logits from the next one's."""
    cached, whole, eps = cached.double(), whole.double(), torch.finfo(whole.dtype).eps
    rounding = max(1e-3, 8 * eps) * whole.abs().max()
    return bool((cached - whole).abs().max() <= min(rounding, whole.diff(dim=0).abs().max() / 20))
