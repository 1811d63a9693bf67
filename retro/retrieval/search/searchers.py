"""One search over a store, whatever finds the chunks: nearest keys (dense), shared terms (lexical), or both.

A kind is "auto", "exact", "scann" or "faiss" (nearest keys; see retro.retrieval.search.index for their codes), "bm25"
or "tfidf" (lexical; "bm25:exact" and "tfidf:exact" miss nothing), or several joined by "+", as in "exact+tfidf": their
lists are fused by reciprocal rank, the sum over the lists of 1 / (60 + rank). Source: Cormack et al. 2009.

A second stage follows ">": "scann>bm25" orders the best candidates of ScaNN by BM25, "scann>e5-large-v2" by the keys
that another embedder gives their texts (source: Shao et al. 2025, CompactDS), "tfidf>continuation" by how much they
promise to hold of the text to come (see retro.retrieval.search.continuation).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.embedding.embedder import NO_EMBEDDER, Embedder, embedder_from, load_embedder
from retro.retrieval.search import continuation, lexical
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.index import Hits, Index, build_index, check_k, open_index, resolve_kind
from retro.retrieval.search.queries import Queries
from retro.retrieval.store.store import Store

RANK_CONSTANT = 60
_FUSED_DEPTH = 100
_COSINE = "cosine"  # of keys of length 1, whose -squared L2 is 2 cosine - 2
_MEASURES = {kind: {"tfidf": "TF-IDF", "bm25": "BM25"}[kind.removesuffix(lexical.EXACT)] for kind in lexical.KINDS}
_LOADED: WeakValueDictionary[str, Embedder] = WeakValueDictionary()  # by fingerprint


@runtime_checkable
class Searcher(Protocol):
    """search(queries, k, excluded document rows per query) -> store rows [q, k] (-1 = none), scores (higher is closer,
    -inf where none) and mask."""

    kind: str
    num_rows: int
    recall: float  # measured, of approximate indexes against exact search

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits: ...


@runtime_checkable
class Reranker(Protocol):
    """A second stage. scores(queries, rows [q, c]) -> [q, c], higher is better; what it says of row -1 is not used."""

    kind: str

    def scores(self, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]: ...


def open_searcher(
    store: Store,
    kind: str = "auto",
    embedder: Embedder | None = None,
    build: bool = False,
    recall: float | None = None,
    **work: Any,
) -> Searcher:
    """The search of a kind over a store.

    "auto" takes the best index of keys built, else exact search; in a store without keys it is "tfidf". Lexical indexes
    are built when they are first asked for; those of keys only with `build`, where the embedder is loaded only if a
    query comes without its key.

    recall, work: to which `build` tunes the indexes of keys, and who does it (executor, workers); see `build_index`.
    Raises ValueError for an unknown kind, an index that is not built, and one of keys over a store without keys.
    """
    if recall is not None and not build:
        raise ValueError("recall is what an index is tuned to when it is built; leave it out or build the index")
    kind, separator, second = kind.partition(">")
    parts = [_open_part(store, part, embedder, build, recall, work) for part in parse_kind(kind, is_keyless(store))]
    first = parts[0] if len(parts) == 1 else FusedSearcher(parts)
    return RerankedSearcher(first, open_reranker(store, second)) if separator else first


def open_reranker(store: Store, kind: str, own: Collection[str] | None = None) -> Reranker:
    """The second stage of a name: "continuation", "bm25" or "tfidf", with the weights of the whole store, or an
    embedder's name. own: the segments whose chunks can be scored, of a stage that has a lexical index; None is all."""
    scored_by_words(kind)
    if kind == continuation.KIND:
        return continuation.build_continuation(store, own)
    if kind in lexical.KINDS:
        return lexical.build_lexical(store, kind, own=own)
    return EmbedderReranker(store, load_embedder(kind))


def scored_by_words(kind: str) -> str | None:
    """The lexical index that a second stage goes by, None for an embedder; ValueError for what cannot be one."""
    if kind == continuation.KIND:
        return "tfidf"
    if kind in lexical.KINDS:
        return kind
    if not kind or ">" in kind or kind.partition(":")[0] in ("auto", "exact", *ENGINES, *lexical.KINDS):
        raise ValueError(f"behind > there must be continuation, bm25, tfidf or the name of an embedder, not {kind!r}")
    return None


def parse_kind(kind: str, keyless: bool = False) -> list[str]:
    """The parts of a kind; ValueError names one that is unknown, named twice, or wants keys which are not there."""
    if ">" in kind:
        raise ValueError(f"the index {kind!r} has a second stage, which a Retriever can have; name only the first here")
    parts = ["tfidf" if keyless and part == "auto" else part for part in kind.split("+")]
    for part in parts:
        if part not in lexical.KINDS and part != "auto":
            resolve_kind(part)
        if keyless and part not in lexical.KINDS:
            raise ValueError(
                f"the index {part} needs keys, which a store built with the embedder none does not have; "
                "use tfidf or bm25, or build a store with an embedder"
            )
    if len(set(parts)) < len(parts) or sum(part in ("auto", "exact") for part in parts) > 1:
        raise ValueError(f"the index {kind!r} names a kind twice; name each once")
    return parts


def goes_by_words(kind: str) -> bool:
    """Whether a searcher of a kind (its `kind`, filters included) never looks at keys of the store's embedder."""
    first = kind.partition(";")[0].partition(">")[0]
    return set(first.split("+")) <= set(lexical.KINDS)


def measure_of(kind: str, embedder: dict[str, Any]) -> str:
    """What a searcher's scores are, by its kind and by the manifest's record of the embedder that made the keys."""
    first, reranked, second = kind.partition(";")[0].partition(">")
    if reranked:
        return _MEASURES.get(
            second, "odds of holding the text to come" if second == continuation.KIND else "-squared L2"
        )
    if "+" in first:
        return "sum of reciprocal ranks"
    return _MEASURES.get(first, _COSINE if embedder.get("normalize") else "-squared L2")


def in_measure(scores: Any, measure: str) -> Any:
    """A searcher's scores as `measure_of` names them: it gives the cosine of keys as their -squared L2."""
    return 1 + scores / 2 if measure == _COSINE else scores


def approximate_parts(kind: str) -> set[str]:
    """The parts of a kind (a searcher's, filters included) that may miss a chunk, without codes: {"faiss", "tfidf"}."""
    parts = kind.partition(";")[0].partition(">")[0].split("+")
    of_keys = {part.partition(":")[0] for part in parts} & set(ENGINES)
    return of_keys | {part for part in parts if part in lexical.KINDS and not part.endswith(lexical.EXACT)}


def is_keyless(store: Store) -> bool:
    """Whether a store was built without an embedder."""
    return store.manifest["embedder"]["name"] == NO_EMBEDDER


def _open_part(
    store: Store, kind: str, embedder: Embedder | None, build: bool, recall: float | None, work: dict[str, Any]
) -> Searcher:
    if kind in lexical.KINDS:
        return lexical.build_lexical(store, kind, check=build)
    if build:
        return DenseSearcher(store, build_index(store, kind, recall, **work), embedder)
    return DenseSearcher(store, open_index(store, kind), embedder_of(store, embedder))


def _name(part: Any) -> str:
    """What tells a search from others of its kind: its settings, and how far they were tuned."""
    return getattr(part, "name", part.kind)


class DenseSearcher:
    """Nearest keys; score = -squared L2.

    Without an embedder the store's is loaded when a query comes without its key.
    """

    def __init__(self, store: Store, index: Index, embedder: Embedder | None = None) -> None:
        self.store, self.index = store, index
        self.kind, self.num_rows, self.recall = index.kind, index.num_rows, getattr(index, "recall", 1.0)
        self.name, self.folders = _name(index), getattr(index, "folders", [])
        self._embedder = None if embedder is None else embedder_of(store, embedder)

    @property
    def embedder(self) -> Embedder:
        """The store's, checked against its fingerprint."""
        if self._embedder is None:
            self._embedder = embedder_of(self.store)
        return self._embedder

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """The k nearest rows of each query outside its excluded document rows."""
        keys = queries.embedded(self.embedder) if queries.keys is None else queries.keys
        return self.index.search(keys, k, excluded_table(excluded))


class FusedSearcher:
    """Several searches, their lists fused by reciprocal rank; equal sums go to the search named first, then by rank."""

    def __init__(self, parts: list[Searcher]) -> None:
        self.parts = parts
        self.kind = "+".join(part.kind for part in parts)
        self.num_rows = min(part.num_rows for part in parts)
        self.recall = min(part.recall for part in parts)
        self.name, self.folders = (
            "+".join(map(_name, parts)),
            [f for part in parts for f in getattr(part, "folders", [])],
        )

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """The k rows of the largest sum; each search contributes its best 10 k, at least 100."""
        check_k(k)
        depth = min(max(10 * k, _FUSED_DEPTH), self.num_rows)
        lists = [part.search(queries, depth, excluded)[0] for part in self.parts]
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for q in range(len(queries)):
            best = _fused([found[q] for found in lists])[:k]
            rows[q, : len(best)] = [row for row, _ in best]
            scores[q, : len(best)] = [score for _, score in best]
        return rows, scores, rows >= 0


def _fused(lists: list[np.ndarray]) -> list[tuple[int, float]]:
    """Rows and their sums over ranked lists (-1 = none), largest first."""
    sums: dict[int, float] = {}
    for found in lists:
        for rank, row in enumerate(found[found >= 0].tolist(), start=1):
            sums[row] = sums.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(sums.items(), key=lambda item: -item[1])


class RerankedSearcher:
    """The best candidates of a first search, ordered by a second; equal scores keep the order of the first.

    candidates: how many for k neighbors; None is 10 k, at least 50.
    """

    def __init__(self, first: Searcher, second: Reranker, candidates: int | None = None) -> None:
        if candidates is not None:
            check_k(candidates)
        self.first, self.second, self.candidates = first, second, candidates
        self.kind = f"{first.kind}>{second.kind}"
        self.num_rows, self.recall = first.num_rows, first.recall
        self.name = f"{_name(first)}>{_name(second)}, {candidates}"
        self.folders = [folder for stage in (first, second) for folder in getattr(stage, "folders", [])]

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """The k candidates of the best second scores, which are the scores that are returned."""
        check_k(k)
        depth = max(10 * k, 50) if self.candidates is None else max(self.candidates, k)
        rows, _, mask = self.first.search(queries, max(min(depth, self.num_rows), k), excluded)
        scores = np.where(mask, self.second.scores(queries, rows), -np.inf).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(rows, order, 1)
        return rows, np.take_along_axis(scores, order, 1), rows >= 0


class EmbedderReranker:
    """Chunks scored by another embedder than the store's: -squared L2 of the keys it gives the query and their text."""

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder
        self.kind: str = embedder.description["name"]
        self.name = embedder.fingerprint[:16]

    def scores(self, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
        """Every row is embedded once, however many queries it is a candidate of."""
        unique, place = np.unique(np.maximum(rows, 0), return_inverse=True)
        if not len(unique):
            return np.zeros(rows.shape, np.float32)
        keys = self.embedder.embed(self.store.text(unique))
        asked = queries.embedded(self.embedder)
        return -np.square(asked[:, None] - keys[place.reshape(rows.shape)]).sum(2)


def excluded_table(excluded: list[set[int]] | None) -> Int64[np.ndarray, "q w"] | None:
    """The excluded document rows of each query as an index takes them: filled up with -1, None where there are none."""
    if excluded is None or not any(excluded):
        return None
    table = np.full((len(excluded), max(map(len, excluded))), -1, np.int64)
    for line, documents in zip(table, excluded, strict=True):
        line[: len(documents)] = sorted(documents)
    return table


def embedder_of(store: Store, embedder: Embedder | None = None) -> Embedder:
    """The given embedder, or the one that the store's manifest names; refused if its fingerprint is not the store's.

    Searches of one process share what is loaded here.
    """
    if embedder is None and is_keyless(store):
        raise ValueError(f"{store.path} was built without an embedder; use a lexical index, tfidf or bm25")
    if embedder is None:
        embedder = _LOADED.get(store.embedder_fingerprint) or embedder_from(store.manifest["embedder"], store.path)
        _LOADED[embedder.fingerprint] = embedder
    store.check_embedder(embedder)
    return embedder
