"""kNN-LM: the reader's own states over the store's text as keys, the next tokens as values.

    p(y) = (1 - lambda) p_LM(y) + lambda p_kNN(y)
    p_kNN(y) ~ sum of exp(-d / T) over those of the k nearest keys whose value is y

d is the squared L2 distance. Keys are the last hidden states, which the output embeddings are given. Text is read in
windows inside a document, each starting with the last token of the one before.

Source: Khandelwal et al. 2020. Differs: their keys are the inputs of the last feed-forward network, which not every
architecture has as a place of its own; faiss holds the keys as they are, not quantised.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp
from tqdm.auto import tqdm

from retro.evaluation.data import window_start
from retro.evaluation.scorer import Ids, score_tokens
from retro.retrieval.search.index import FAISS_FLAT_ROWS

if TYPE_CHECKING:
    from retro.retrieval import Store

PROBES = 32  # lists of an inverted file that are searched, as in the paper
_BLOCK_QUERIES = 1024


@dataclass(frozen=True)
class TokenStore:
    """Keys and values of tokens, and an index over the keys less their mean (distances are the same, and exact).

    spread: the expected squared distance of two keys, the unit of temperatures.
    """

    index: Any
    values: Int[np.ndarray, " n"]
    center: Float[np.ndarray, " d"]
    spread: float
    kind: str
    build_seconds: float

    @property
    def num_bytes(self) -> int:
        """float32 keys, int64 values and, in an inverted file, an int64 id each."""
        ids = 0 if self.kind == "exact" else 8
        return len(self.values) * (4 * len(self.center) + 8 + ids)

    @property
    def flops_of_search(self) -> int:
        """Of one query: two for each number compared, in an inverted file of lists of equal lengths."""
        keys = len(self.values)
        if self.kind != "exact":
            lists = self.index.nlist
            keys = lists + keys * min(self.index.nprobe, lists) // lists
        return 2 * keys * len(self.center)

    def search(
        self, queries: Float[np.ndarray, "t d"], k: int, progress: bool = False
    ) -> tuple[Float[np.ndarray, "t k"], Int[np.ndarray, "t k"]]:
        """Squared distances of the k nearest keys, ascending, and their values; inf and -1 where there are fewer."""
        distances = np.full((len(queries), k), np.inf, np.float32)
        values, depth = np.full((len(queries), k), -1, np.int64), min(k, len(self.values))
        blocks = range(0, len(queries), _BLOCK_QUERIES)
        for start in tqdm(blocks, desc="searching keys", unit="block", disable=not progress or None):
            part = slice(start, start + _BLOCK_QUERIES)
            found, ids = self.index.search(np.ascontiguousarray(queries[part] - self.center, np.float32), depth)
            values[part, :depth] = np.where(ids >= 0, self.values[np.maximum(ids, 0)], -1)
            distances[part, :depth] = np.where(ids >= 0, np.maximum(found, 0), np.inf)
        return distances, values


@dataclass(frozen=True)
class KnnChoice:
    """k, T (in units of the store's spread) and lambda, and the bits a token cost with them where they were chosen."""

    k: int
    temperature: float
    weight: float
    bits_per_token: float = math.nan


def build_token_store(
    reader: Any,
    store: Store,
    window_len: int,
    num_tokens: int | None = None,
    excluded: Sequence[str] = (),
    seed: int = 0,
    exact_below: int = FAISS_FLAT_ROWS,
    progress: bool = False,
) -> TokenStore:
    """Read the store's text and index the states.

    Args:
        window_len: Tokens that the reader is given at a time.
        num_tokens: So many, from windows drawn at random; None takes all.
        excluded: Ids of documents that are left out: those that are evaluated.
        exact_below: From so many keys on, an inverted file takes the place of exact search.

    Raises ValueError if no text is left.
    """
    started = time.perf_counter()
    texts = _windows_of(store, window_len, set(excluded))
    if num_tokens is not None:
        texts = _drawn(texts, num_tokens, seed)
    if not texts:
        raise ValueError(f"{store.path} has no text outside the evaluated documents; kNN-LM has nothing to search.")
    places = [np.arange(1, len(text)) for text in texts]
    bar = "keys" if progress else None
    bos = window_start(reader, store.bos_token_id)
    read = score_tokens(reader, texts, places, bos=bos, states=True, logits=False, progress=bar)
    keys = np.concatenate([one.states for one in read])
    values = np.concatenate([text[1:] for text in texts])
    center = keys.mean(0, dtype=np.float64).astype(np.float32)
    keys -= center
    spread = 2 * float(np.square(keys, dtype=np.float64).sum(-1).mean())
    index, kind = _index_of(keys, exact_below, seed)
    return TokenStore(index, values, center, spread, kind, time.perf_counter() - started)


def _windows_of(store: Store, window_len: int, excluded: set[str]) -> list[Ids]:
    """Windows of at least 2 tokens, every token but a document's first being in one that has a token before it."""
    texts = []
    for name, (first, count) in zip(store.document_ids, store.document_spans.tolist(), strict=True):
        if name not in excluded and count:
            ids = np.concatenate(store.token_lists(np.arange(first, first + count)))
            texts += [ids[start : start + window_len] for start in range(0, len(ids) - 1, window_len - 1)]
    return texts


def _drawn(texts: list[np.ndarray], num_tokens: int, seed: int) -> list[np.ndarray]:
    drawn, left = [], num_tokens
    for number in np.random.default_rng(seed).permutation(len(texts)):
        if left <= 0:
            break
        drawn.append(texts[number][: left + 1])
        left -= len(drawn[-1]) - 1
    return drawn


def _index_of(keys: Float[np.ndarray, "n d"], exact_below: int, seed: int) -> tuple[Any, str]:
    import faiss

    width = keys.shape[1]
    if len(keys) < exact_below:
        index = faiss.IndexFlatL2(width)
        index.add(keys)
        return index, "exact"
    lists = max(1, int(4 * math.sqrt(len(keys))))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists)
    sample = np.random.default_rng(seed).permutation(len(keys))[: 64 * lists]
    index.cp.seed = seed
    index.train(keys[np.sort(sample)])
    index.add(keys)
    index.nprobe = PROBES
    return index, "ivf"


def knn_log_p(
    distances: Float[np.ndarray, "t k"],
    values: Int[np.ndarray, "t k"],
    targets: Int[np.ndarray, " t"],
    temperature: float,
) -> Float[np.ndarray, " t"]:
    """log p_kNN of each target, -inf where no key found has its value; NaN where none was found at all."""
    logits = np.where(values >= 0, -distances.astype(np.float64) / temperature, -np.inf)
    of_target = np.where(values == targets[:, None], logits, -np.inf)
    total = logsumexp(logits, axis=-1)
    return np.where(np.isfinite(total), logsumexp(of_target, axis=-1) - np.where(np.isfinite(total), total, 0), np.nan)


def interpolated(
    log_p: Float[np.ndarray, " t"], log_p_knn: Float[np.ndarray, " t"], weight: float
) -> Float[np.ndarray, " t"]:
    """log((1 - lambda) p + lambda p_kNN); p alone where no key was found, and exactly so for lambda = 0."""
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(np.log1p(-weight) + log_p, np.log(weight) + np.nan_to_num(log_p_knn, neginf=-np.inf))
    return np.where(np.isnan(log_p_knn) | (weight == 0), log_p, mixed)


def choose(
    log_p: Float[np.ndarray, " t"],
    distances: Float[np.ndarray, "t k"],
    values: Int[np.ndarray, "t k"],
    targets: Int[np.ndarray, " t"],
    spread: float,
    ks: Sequence[int],
    temperatures: Sequence[float],
    weights: Sequence[float],
) -> KnnChoice:
    """The k, T and lambda of a grid under which the targets cost the fewest bits; the first of equal ones."""
    best = KnnChoice(ks[0], temperatures[0], 0.0, math.inf)
    for k, temperature in itertools.product(ks, temperatures):
        knn = knn_log_p(distances[:, :k], values[:, :k], targets, temperature * spread)
        for weight in weights:
            bits = float(-interpolated(log_p, knn, weight).mean() / math.log(2))
            if bits < best.bits_per_token:
                best = KnnChoice(k, temperature, weight, bits)
    return best
