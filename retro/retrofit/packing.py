"""Several documents in one row of a base that has never heard of them.

The ways are tried on the base itself, and the first that keeps documents apart is used: positions that start again in
each document (transformers' own sign of packed rows, which also leaves sliding windows as they are), a mask of
[b, 1, n, n], or both. A base for which none works is refused when packed rows come.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from retro.retrofit.anatomy import probe_tokens, run_probe

WAYS = ("positions", "mask", "both")


def packing_way(base: nn.Module) -> str | None:
    """The way that works, of WAYS: one document is changed, and the other must not move. None: none does."""
    ids = probe_tokens(base).repeat(1, 2)
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, half:].roll(1), ids[:, half:]], dim=1)
    document_ids = (torch.arange(ids.shape[1], device=ids.device) >= half).long()[None]
    for way in WAYS:
        inputs = packed_inputs(base, way, document_ids)
        try:
            one, two = run_probe(base, ids, **inputs), run_probe(base, other, **inputs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        moved = (one.double() - two.double()).abs()
        rounding = 4 * torch.finfo(one.dtype).eps * one.abs().max().item()  # a mixture of experts groups tokens anew
        if moved[:, half:].max() <= min(rounding, moved[:, :half].max() / 20):
            return way
    return None


def packed_inputs(base: nn.Module, way: str | None, document_ids: Int[Tensor, "b n"]) -> dict[str, Any]:
    """What to call the base with, so that tokens attend inside their document only.

    Raises ValueError where the documents of a row cannot be kept apart.
    """
    if way is None:
        raise ValueError(
            f"document_ids holds several documents in a row, and {type(base).__name__} cannot keep them apart; "
            "give each document a row of its own."
        )
    positions = {"position_ids": positions_in_documents(document_ids)}
    if way == "positions":
        return positions
    allowed = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]  # [b, 1, n, n]
    mask = allowed
    if base.config.get_text_config()._attn_implementation != "sdpa":
        mask = torch.zeros_like(allowed, dtype=base.dtype).masked_fill(~allowed, torch.finfo(base.dtype).min)
    return {"attention_mask": mask} if way == "mask" else {"attention_mask": mask, **positions}


def positions_in_documents(document_ids: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """0, 1, 2, ... from the first token of each document; documents are contiguous."""
    every = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return every - every.masked_fill(~starts, 0).cummax(-1).values


def is_packed(document_ids: Int[Tensor, "b n"] | None) -> bool:
    """Whether a row holds more than one document."""
    return document_ids is not None and bool((document_ids != document_ids[:, :1]).any())
