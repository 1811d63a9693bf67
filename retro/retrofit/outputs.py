"""What a fit gives: which of the base's logits are asked for, and its outputs with the fit's own loss and cache."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from retro.model import RetroCache
from retro.model.padding import Alignment


def last_logits(keep: int | Tensor) -> dict[str, int]:
    """What tells a base to compute logits of the last positions only."""
    return {"logits_to_keep": keep} if isinstance(keep, int) and keep else {}


def output_of(
    outputs, loss, logits, keep: int | Tensor, cache: RetroCache | None = None, rows: Alignment | None = None
) -> CausalLMOutputWithPast:
    """What the base gave, turned back, with this loss, cache, and logits of the positions that were asked for."""
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
    if rows is not None and rows.is_turned:
        states = None if states is None else tuple(map(rows.right, states))
        attentions = None if attentions is None else tuple(map(rows.right_square, attentions))
    return CausalLMOutputWithPast(
        loss=loss,
        logits=None if logits is None else logits[:, kept],
        past_key_values=cache,
        hidden_states=states,
        attentions=attentions,
    )
