"""Losses of a fitted base, in slices where its output embeddings allow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from retro.common.modes import evaluating, hooked
from retro.modules.loss import SLICE_TOKENS
from retro.retrofit.anatomy import probe_tokens
from retro.retrofit.forms import Mixture

logger = logging.get_logger(__name__)
SLICE_LOGITS = 2**25  # that live at a time: 128 tokens of a vocabulary of 262,144


def head_inputs(base: PreTrainedModel, shorten: bool, **inputs) -> tuple[Tensor, Tensor]:
    """What the base's output embeddings are given, and its logits: with `shorten` those of the first token only."""
    given: list[Tensor] = []

    def keep(module, args):
        given.append(args[0])
        return (args[0][:, :1],) if shorten else None

    with hooked(base.get_output_embeddings().register_forward_pre_hook, keep):
        logits = base(**inputs).logits
    return given[-1], logits


@torch.no_grad()
def head_is_plain(base: PreTrainedModel) -> bool:
    """Whether logits are just hidden states times the output embeddings, as the loss in slices takes them."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    with evaluating(base):
        hidden, logits = head_inputs(base, shorten=False, input_ids=probe_tokens(base), use_cache=False)
        return torch.equal(head(hidden), logits)


def plain_loss(logits: Float[Tensor, "b n v"], targets: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean over the targets, 0 where there is none."""
    targets = targets.to(logits.device).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def mixed_loss(
    mixture: Mixture,
    targets: Int[Tensor, "b n"],
    vocab_size: int,
    logits_of: Callable[[slice], Float[Tensor, "b s v"]],
) -> Float[Tensor, ""]:
    """Mean over the targets, 0 where there is none; logits are asked for in slices of positions."""
    b, n = targets.shape
    step, totals = max(1, min(SLICE_TOKENS, SLICE_LOGITS // vocab_size) // b), []
    for start in range(0, n, step):
        part = targets[:, start : start + step]
        log_p = mixture.log_likelihood(logits_of(slice(start, start + step)), part.clamp(min=0), start).to(part.device)
        totals.append((log_p * (part != -100)).sum())
    return -sum(totals) / (targets != -100).sum().clamp(min=1)


def with_gradient(outputs: ModelOutput, form: nn.Module, has_neighbors: bool) -> ModelOutput:
    """In training, a loss that no new weight had a part in gets gradients of 0, as a batch among others needs them."""
    if form.training and torch.is_grad_enabled() and outputs.loss is not None and not outputs.loss.requires_grad:
        if not has_neighbors:
            logger.warning_once(
                "training without neighbor_ids: the loss is the frozen base's, and no new weight learns"
            )
        outputs.loss = outputs.loss + 0 * sum(p.sum() for p in form.parameters())
    return outputs


def refuse_fused_head(model: nn.Module) -> None:
    """ValueError for a model that a trainer of TRL has patched: its loss is made of the base's hidden states alone."""
    patch = vars(model).get("forward")
    while patch is not None:
        if "fused_lm_head" in (getattr(patch, "__kwdefaults__", None) or ()):
            raise ValueError(
                "a trainer of TRL takes the loss from a model's hidden states, but a RETRO-fitted model copies from "
                "its neighbors only into the logits; train it with transformers' Trainer."
            )
        patch = getattr(patch, "__wrapped__", None)
