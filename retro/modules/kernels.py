"""Which kernel of attention runs where, and those that need PyTorch's FlexAttention.

    CPU                   blocks of plain products or the fused kernel; packed documents one by one
    GPU                   the fused kernel; packed documents by a mask, relative positions by a bias, of all pairs
    GPU, torch.compile    the same for plain attention; FlexAttention for packed documents and relative positions

FlexAttention (Dong et al. 2024) leaves out the blocks of pairs that a mask closes, and adds relative logits to the
scores while they are in registers. Outside of torch.compile it would build all scores in memory.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RELATIVE_QUERIES = 512  # whose relative logits [b, h, 512, keys] are in memory at a time
_MIN_HEAD_DIM = 16  # of FlexAttention


def has_fixed_shapes(x: Tensor) -> bool:
    """Whether no shape may depend on values: in a graph, and where reading a value makes the host wait for a GPU."""
    return torch.compiler.is_compiling() or x.device.type != "cpu"


def reads_values(x: Tensor) -> bool:
    """Whether a look at a value of x is cheap; it is not in a graph, nor in training on a GPU, which never waits."""
    return not (torch.compiler.is_compiling() or x.is_meta or (x.device.type != "cpu" and torch.is_grad_enabled()))


def refuse(wrong: Bool[Tensor, ""], sentence: str) -> None:
    """ValueError where `wrong` is true; where no value is read a RuntimeError, as soon as it is met."""
    if not reads_values(wrong):
        torch._assert_async(~wrong, sentence)
    elif wrong:
        raise ValueError(sentence)


def uses_flex(x: Tensor, head_dim: int) -> bool:
    """Whether attention on the device of x goes by FlexAttention where plain attention would not do."""
    return x.device.type == "cuda" and torch.compiler.is_compiling() and head_dim >= _MIN_HEAD_DIM


class QueryBlock(NamedTuple):
    """Queries start .. stop - 1 of causal self-attention, which attend keys 0 .. stop - 1 as `mask` allows."""

    start: int
    stop: int
    mask: BlockMask


def query_blocks(
    x: Float[Tensor, "b n d"], document_ids: Int[Tensor, "b n"] | None, num_queries: int
) -> tuple[QueryBlock, ...]:
    """Causal self-attention inside documents, `num_queries` at a time; the same for every layer."""
    return tuple(_query_block(x, document_ids, start, num_queries) for start in range(0, x.shape[1], num_queries))


def _query_block(x: Tensor, document_ids: Tensor | None, start: int, num_queries: int) -> QueryBlock:
    def may_attend(b, h, i, j):
        is_earlier = i + start >= j
        return is_earlier if document_ids is None else is_earlier & (document_ids[b, i + start] == document_ids[b, j])

    stop = min(start + num_queries, x.shape[1])
    rows = None if document_ids is None else x.shape[0]
    return QueryBlock(start, stop, create_block_mask(may_attend, rows, None, stop - start, stop, x.device))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Float[Tensor, "b h i dh"]:
    """softmax(Q K^T / sqrt(dh)) V of the pairs that `mask` allows."""
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def relative_attention(
    content: Float[Tensor, "b h i dh"],
    positional: Float[Tensor, "b h i dh"],
    k: Float[Tensor, "b g j dh"],
    v: Float[Tensor, "b g j dh"],
    table: Float[Tensor, "h dh t"],
    query_index: Int[Tensor, " i"],
    key_index: Int[Tensor, " j"],
    mask: Bool[Tensor, "#b 1 #i j"] | BlockMask | None,
) -> Float[Tensor, "b h i dh"]:
    """softmax((Q_c K^T + S) / sqrt(dh)) V, with S_ij = Q_p,i . table[query_index_i - key_index_j].

    Q_p table [b, h, i, t] is computed again in the backward pass, for which only the result is kept.
    """
    given = content.to(v.dtype), positional, k, v, table, query_index, key_index, mask
    return checkpoint(_relative, *given, use_reentrant=False, context_fn=_KEEP_RESULT, preserve_rng_state=False)


def _relative(content, positional, k, v, table, query_index, key_index, mask) -> Tensor:
    logits = (positional * positional.shape[-1] ** -0.5) @ table
    every = mask.expand(len(content), 1, content.shape[2], k.shape[2]) if isinstance(mask, Tensor) else None

    def score(score, b, h, i, j):
        score = score + logits[b, h, i, query_index[i] - key_index[j]]
        return score if every is None else torch.where(every[b, 0, i, j], score, float("-inf"))

    blocks = mask if isinstance(mask, BlockMask) else None
    return flex_attention(content, k, v, score, blocks, enable_gqa=content.shape[1] != k.shape[1])


def _keep_flex(_, op, *args, **kwargs) -> CheckpointPolicy:
    is_flex = op is torch.ops.higher_order.flex_attention
    return CheckpointPolicy.MUST_SAVE if is_flex else CheckpointPolicy.PREFER_RECOMPUTE


_KEEP_RESULT = partial(create_selective_checkpoint_contexts, _keep_flex)
