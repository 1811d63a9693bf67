"""A second stage that puts first what holds the text to come; it learns from the store alone which candidates do.

What follows a chunk C_u of the store is known: C_{u+1}. Of the candidates [N, F] that TF-IDF finds for C_u in other
documents, each holds n tokens of C_{u+1}: those that end a run of 4 tokens which both have. A score is linear in what
can be known before C_{u+1} is; the weights are trained so that softmax(scores) over the candidates comes near
softmax(n / 3), by cross-entropy:

    for h = 8, 32, inf    the share of C_u's pairs of tokens that stand in N, weighted by idf, and halved for every h
                          tokens after the pair
    log(1 + a)            a: tokens of the longest run in [N, F] that ends C_u
    log(1 + b)            b: tokens of the longest run in [N, F] that C_u has anywhere
    cosine                of C_u and N by TF-IDF

Source: REPLUG LSR (Shi et al. 2023). Differs: there an embedder is trained, on the likelihood of C_{u+1} with each
candidate. Here no index changes, and n stands for the gain in likelihood, so that no model is needed: of four
candidates the one of the largest n gives a pointer over SmolLM2-135M 96% of the gain of the best one, and weights
learned on its gains were no better (63 held-out windows).

index/<hash>/    index.json: the weights
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64

from retro.common.files import READ_ONLY, stable_hash
from retro.common.records import load_record
from retro.retrieval.search.index import check_searchable
from retro.retrieval.search.lexical import LexicalIndex, build_lexical
from retro.retrieval.search.postings import buckets
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.segments import write_index
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

KIND = "continuation"
HALF_LIVES = (8.0, 32.0, np.inf)  # tokens
CHUNKS, CANDIDATES = 2048, 50  # to learn from
RUN, TEMPERATURE, RIDGE = 4, 3.0, 1e-3
_BLOCK_TOKENS = 1 << 18


class ContinuationReranker:
    """Candidates scored by six weights, which `build_continuation` learns."""

    kind = KIND

    def __init__(self, index: LexicalIndex, weights: Float64[np.ndarray, " f"]) -> None:
        self.store, self.index, self.weights = index.store, index, weights
        self.name = f"{KIND} {stable_hash(weights.tolist())[:16]} of {index.name}"
        self.folders = index.folders

    def scores(self, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
        """Up to a constant of each query, the log-probability of a candidate."""
        return (features(self.index, queries, rows) @ self.weights).astype(np.float32)


def build_continuation(store: Store, own: Collection[str] | None = None) -> ContinuationReranker:
    """The weights, learned unless the store keeps them already; the TF-IDF index is built if it is missing.

    own: the segments of that index whose chunks can be scored, see `LexicalIndex`.
    Raises ValueError for a store of which no candidate holds anything of what follows.
    """
    index = build_lexical(store, "tfidf", own=own)
    folder = store.path / "index" / stable_hash({"kind": KIND, "of": index.name})[:16]
    if (folder / "index.json").is_file():
        return ContinuationReranker(
            index, np.asarray(load_record(folder / "index.json", {"weights": list[float]})["weights"])
        )
    weights = learn(index if own is None else build_lexical(store, "tfidf"))
    try:
        write_index(
            store, folder, lambda aside: {"kind": KIND, "store": store.fingerprint, "weights": weights.tolist()}
        )
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        log.warning("what was learned is not kept in %s: %s", folder, error)
    return ContinuationReranker(index, weights)


# What is known of a candidate


def features(index: LexicalIndex, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float64[np.ndarray, "q c f"]:
    """What the last m tokens of queries have in common with candidates, as listed above; 0 for row -1."""
    store, m = index.store, index.store.chunk_len
    found = np.zeros((*rows.shape, len(HALF_LIVES) + 3))
    asked, pair_weights, norms = _asked(index, queries, m)
    for part in _blocks(*rows.shape, 2 * m):
        values, mask = store.values(rows[part], 2 * m)
        found[part, :, :-1] = _in_common(asked[part], pair_weights[part], np.where(mask, values, -2))
    found[..., -1] = index.scores(queries, rows) / norms[:, None]
    return found


def _asked(
    index: LexicalIndex, queries: Queries, m: int
) -> tuple[Int64[np.ndarray, "q m"], Float64[np.ndarray, "q m h"], Float64[np.ndarray, " q"]]:
    """Tokens, aligned right (-1 = none); the weight of the pair that ends at each, which sum to 1; length by idf."""
    asked, norms = np.full((len(queries), m), -1, np.int64), np.ones(len(queries))
    weights = np.zeros((len(queries), m, len(HALF_LIVES)))
    halved = 0.5 ** (np.arange(m - 1, -1, -1)[:, None] / np.asarray(HALF_LIVES))
    for q, tokens in enumerate(queries.tokens):
        tokens = tokens[-m:]
        asked[q, m - len(tokens) :] = tokens
        idf = index.idf(buckets(tokens))  # of the tokens, then of the pairs
        norms[q] = max(np.linalg.norm(idf), 1e-9)
        if len(tokens) > 1:
            weights[q, 1 - len(tokens) :] = idf[len(tokens) :, None] * halved[1 - len(tokens) :]
    return asked, weights / np.maximum(weights.sum(1, keepdims=True), 1e-9), norms


def _in_common(
    asked: Int64[np.ndarray, "q m"], pair_weights: Float64[np.ndarray, "q m h"], values: Int64[np.ndarray, "q c r"]
) -> Float64[np.ndarray, "q c f"]:
    m, longest = asked.shape[1], np.zeros(values.shape[:2], np.int16)
    shares, ending = np.zeros((*values.shape[:2], pair_weights.shape[2])), longest
    for i, runs in enumerate(_runs(asked, values)):
        ending = runs.max(-1)
        longest = np.maximum(longest, ending)
        shares += (runs[..., :m].max(-1) >= 2)[..., None] * pair_weights[:, None, i]
    return np.concatenate([shares, np.log1p(np.stack([ending, longest], -1, dtype=np.float64))], -1)


def _runs(asked: Int[np.ndarray, "q m"], values: Int[np.ndarray, "q c r"]) -> Iterator[Int[np.ndarray, "q c r"]]:
    """For each token of the queries in turn, the tokens of the common run that ends with it and with each value; in
    one array, which the next token overwrites."""
    asked, values = asked.astype(np.int32), values.astype(np.int32)
    runs = np.zeros((*values.shape[:2], values.shape[2] + 1), np.int16)
    for i in range(asked.shape[1]):
        runs[..., 1:] = (runs[..., :-1] + 1) * (asked[:, i, None, None] == values)
        yield runs[..., 1:]


def _blocks(num_queries: int, num_candidates: int, length: int) -> Iterator[slice]:
    size = max(1, _BLOCK_TOKENS // max(1, num_candidates * length))
    return (slice(start, start + size) for start in range(0, num_queries, size))


# Learning


def learn(index: LexicalIndex) -> Float64[np.ndarray, " f"]:
    """The weights, from up to 2,048 chunks of the store and the 50 nearest of each in other documents."""
    store = index.store
    check_searchable(store)
    drawn = np.unique(np.random.default_rng(0).integers(store.num_live_chunks, size=CHUNKS))
    rows = store.live_rows(drawn)
    rows = rows[rows + 1 < store.num_chunks]
    rows = rows[store.document_rows(rows) == store.document_rows(rows + 1)]
    queries = Queries(store.tokenizer, tokens=store.token_lists(rows))
    count = min(CANDIDATES, index.num_rows)
    candidates, _, present = index.search(queries, count, [{one} for one in store.document_rows(rows).tolist()])
    held = tokens_held(store, rows, candidates)
    of_use = held.max(1, initial=0) > 0
    if not of_use.any():
        raise ValueError(
            f"{store.path} holds nothing to learn {KIND} from: no chunk's candidates hold what follows it; "
            "leave the second stage out"
        )
    return fit(features(index, queries, candidates)[of_use], held[of_use], present[of_use])


def tokens_held(
    store: Store, rows: Int64[np.ndarray, " q"], candidates: Int64[np.ndarray, "q c"]
) -> Int64[np.ndarray, "q c"]:
    """How many tokens of the chunk after each row end a run of 4 tokens that a candidate [N, F] has, too."""
    m, held = store.chunk_len, np.zeros(candidates.shape, np.int64)
    following = np.where(np.arange(m) < store.chunk_lens(rows + 1)[:, None], store.chunks(rows + 1), -1)
    asked = np.concatenate([store.chunks(rows)[:, m - min(m, RUN - 1) :], following], 1)
    for part in _blocks(*candidates.shape, 2 * m):
        values, mask = store.values(candidates[part], 2 * m)
        for i, runs in enumerate(_runs(asked[part], np.where(mask, values, -2)), m - asked.shape[1]):
            held[part] += (i >= 0) & (runs.max(-1) >= RUN)
    return held


def fit(
    x: Float64[np.ndarray, "q c f"], held: Int64[np.ndarray, "q c"], present: Bool[np.ndarray, "q c"]
) -> Float64[np.ndarray, " f"]:
    """The weights of the least cross-entropy of softmax(x w) to softmax(held / 3), over the candidates that are there;
    a small ridge."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    wanted = softmax(np.where(present, held / TEMPERATURE, -np.inf), axis=1)
    mean = np.einsum("qc,qcf->f", wanted, x) / len(x)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_softmax(np.where(present, x @ w, -np.inf), axis=1)
        entropy = -(wanted * np.where(present, log_p, 0)).sum() / len(x)
        gradient = np.einsum("qc,qcf->f", np.exp(log_p), x) / len(x) - mean
        return entropy + RIDGE * w @ w, gradient + 2 * RIDGE * w

    return minimize(loss, np.zeros(x.shape[-1]), jac=True, method="L-BFGS-B").x
