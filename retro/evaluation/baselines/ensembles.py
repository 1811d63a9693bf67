"""Distributions mixed over documents that a reader was given one at a time.

With p_d(y_i) = p(y_i | d, x, y_<i) for document d in front of the text x, and w_d = softmax over d of score / T:

    REPLUG        p(y_i) = sum_d w_d p_d(y_i)                          anew for every span; T is chosen
    RAG-token     the same formula, a span being a whole chunk and T = 1
    RAG-sequence  p(y_1 .. y_n) = sum_d w_d prod_i p_d(y_i)            y the whole chunk

RAG-sequence is a mixture of sequences, hence, by the chain rule, a mixture of tokens whose weights follow how well each
document has predicted the chunk so far: p(y_i | y_<i) = sum_d w_d prod_{j<i} p_d(y_j) p_d(y_i) / sum_d w_d prod_{j<i}
p_d(y_j). All of them sum to 1 over the vocabulary.

Sources: Shi et al. 2023 (REPLUG), equation 3; Lewis et al. 2020 (RAG), section 2.1. Differs: scores are the index's,
whatever it goes by; REPLUG's are cosines. Reader and retriever are as they are, neither is trained for the other.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import log_softmax, logsumexp


def log_weights(
    scores: Float[np.ndarray, "s k"], present: Bool[np.ndarray, "s k"], temperature: float
) -> Float[np.ndarray, "s k"]:
    """log softmax(score / T) over the documents that are present, -inf for the others. One at least is in each row."""
    return log_softmax(np.where(present, scores / temperature, -np.inf), axis=-1)


def token_mixture(
    log_p: Float[np.ndarray, "t k"], weights: Float[np.ndarray, "s k"], of_target: Int[np.ndarray, " t"]
) -> Float[np.ndarray, " t"]:
    """log sum_d w_d p_d(y_i), from log p_d and the log weights of each token's span."""
    return logsumexp(weights[of_target] + log_p, axis=-1)


def sequence_mixture(
    log_p: Float[np.ndarray, "t k"], weights: Float[np.ndarray, "s k"], of_target: Int[np.ndarray, " t"]
) -> Float[np.ndarray, " t"]:
    """log p(y_i | y_<i) of a mixture of sequences; over a span their sum is log sum_d w_d prod_i p_d(y_i)."""
    through = np.cumsum(log_p, axis=0)
    starts = np.flatnonzero(np.diff(of_target, prepend=-1))  # the tokens of a span stand together
    before = np.concatenate([np.zeros_like(through[:1]), through[:-1]])
    before = before - np.repeat(before[starts], np.diff(np.append(starts, len(log_p))), axis=0)
    weighed = weights[of_target] + before
    return logsumexp(weighed + log_p, axis=-1) - logsumexp(weighed, axis=-1)
