"""Attention of short sequences on CPUs: plain products over blocks that stay in the cache.

PyTorch's fused kernel for CPUs reaches a tenth of a core's rate over 128 keys and less over fewer, since it hands each
head's small products to the library one by one. Here a block holds as many heads and queries as fit the cache, so that
its products are batched; as in Dao et al. 2022 (FlashAttention) only log(sum(exp)) of each query is kept for backward,
where the scores are computed again. Blocks of causal attention leave out the keys that none of their queries may see.

Forward and backward against the fused kernel (one core of an AMD EPYC, heads of 32, float32; seconds of the latter over
seconds of this): 512 sequences of 128 to themselves 3.3, 256 of 64 to 256 keys 1.9, 32 of 512, causal, 1.4; but
8 of 2,048, causal, 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_QUERIES = 512  # from more on the fused kernel is faster
_MIN_QUERIES = 16  # with fewer, Python's own time shows
_MAX_SCORES = 1 << 20  # of all heads of one row's block: with more the fused kernel is faster, too
_BLOCK_SCORES = 1 << 18  # scores of a block for each thread: 1 MB
_BLOCK_QUERIES, _CAUSAL_BLOCK_QUERIES = 128, 64


def suits_blocks(
    q: Float[Tensor, "b h i dh"], k: Float[Tensor, "b g j dh"], v: Float[Tensor, "b g j dh"], mask: Tensor | None
) -> bool:
    """Whether `blockwise_attention` can take the place of the fused kernel and is faster (measured on 2 cores only)."""
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.float32
        and _MIN_QUERIES <= q.shape[2] <= MAX_QUERIES
        and q.shape[1] == k.shape[1]
        and 0 < q.shape[1] * min(q.shape[2], _BLOCK_QUERIES) * k.shape[2] <= _MAX_SCORES
        and (mask is None or mask.dtype == torch.bool)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def blockwise_attention(
    q: Float[Tensor, "b h i dh"],
    k: Float[Tensor, "b h j dh"],
    v: Float[Tensor, "b h j dh"],
    mask: Bool[Tensor, "#b 1 #i j"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "b h i dh"]:
    """softmax(Q K^T / sqrt(dh)) V; `mask` is True where a key may be attended, and each query has such a key.

    `is_causal` asks for i == j and cannot be combined with `mask`. Can be differentiated once, but not by torch.func
    nor with is_grads_batched.
    """
    return _Blockwise.apply(q, k, v, mask, is_causal)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        heads, result = q.shape[1], q.new_empty(q.shape)
        q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        closed = None if mask is None else ~mask
        out, logsumexp = result.flatten(0, 1), q.new_empty(*q.shape[:2], 1)
        for block in _blocks(q, k, heads, is_causal):
            b, i, j = block
            scores = _scores(q, k, closed, heads, is_causal, *block)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            torch.div(torch.bmm(weights, v[b, j]), total, out=out[b, i])
            logsumexp[b, i] = largest.add_(total.log_())
        ctx.save_for_backward(q, k, v, result, logsumexp, closed)
        ctx.heads, ctx.is_causal = heads, is_causal
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, logsumexp, closed = ctx.saved_tensors
        grad, out = grad.flatten(0, 1), result.flatten(0, 1)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        along_out = (grad * out).sum(-1, keepdim=True)
        for block in _blocks(q, k, ctx.heads, ctx.is_causal):
            b, i, j = block
            weights = _scores(q, k, closed, ctx.heads, ctx.is_causal, *block).sub_(logsumexp[b, i]).exp_()
            of_v[b, j] += torch.bmm(weights.transpose(1, 2), grad[b, i])
            of_scores = torch.bmm(grad[b, i], v[b, j].transpose(1, 2)).sub_(along_out[b, i]).mul_(weights)
            torch.bmm(of_scores, k[b, j], out=of_q[b, i])
            of_k[b, j] += torch.bmm(of_scores.transpose(1, 2), q[b, i])
        of_q *= q.shape[-1] ** -0.5
        return *(x.unflatten(0, (-1, ctx.heads)) for x in (of_q, of_k, of_v)), None, None


def _blocks(q: Tensor, k: Tensor, heads: int, is_causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Which (row, head) pairs, queries and keys to take together: all heads of a row, and of further rows that fit."""
    queries = min(_CAUSAL_BLOCK_QUERIES if is_causal else _BLOCK_QUERIES, q.shape[1])
    pairs = heads * max(1, _BLOCK_SCORES * torch.get_num_threads() // (heads * queries * k.shape[1]))
    for first in range(0, len(q), pairs):
        for start in range(0, q.shape[1], queries):
            stop = min(start + queries, q.shape[1])
            yield slice(first, first + pairs), slice(start, stop), slice(0, stop if is_causal else k.shape[1])


def _scores(
    q: Tensor, k: Tensor, closed: Tensor | None, heads: int, is_causal: bool, b: slice, i: slice, j: slice
) -> Tensor:
    """Scores of a block, -inf where a key may not be attended."""
    scores = torch.bmm(q[b, i], k[b, j].transpose(1, 2))
    if is_causal:
        later = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).triu_(1)
        scores[:, :, i].masked_fill_(later, float("-inf"))
    elif closed is not None:
        rows = slice(b.start // heads, b.stop // heads) if len(closed) > 1 else slice(None)
        part = closed[rows, :, i if closed.shape[2] > 1 else slice(None)]
        scores.unflatten(0, (-1, heads)).masked_fill_(part, float("-inf"))
    return scores
