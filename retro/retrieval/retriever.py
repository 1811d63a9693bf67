"""Queries to neighbors: tokens or text in; rows, tokens [N, F], masks, scores and sources out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from retro.retrieval.embedding.embedder import Embedder
from retro.retrieval.filters.hits import FilteredSearcher, QueryFilters
from retro.retrieval.neighbors import Neighbors, Source, Sources
from retro.retrieval.search.exact import check_k
from retro.retrieval.search.queries import Queries, as_lists
from retro.retrieval.search.searchers import Searcher, goes_by_words, in_measure, measure_of, open_searcher
from retro.retrieval.store.store import Store
from retro.text.chunks import decode_chunks


class Retriever:
    """Nearest chunks of a store for any text or tokens.

    Arguments:
        index: "auto" (the best index of keys built, else exact search), "exact", "scann", "faiss", "tfidf", "bm25",
            several joined by "+", "FIRST>SECOND" to re-rank (see retro.retrieval.search.searchers), or a `Searcher`.
        embedder: None loads the one that the store's manifest names, if the index goes by keys; another one is refused.
        num_neighbors, retrieved_len: k and r where a call does not say otherwise.
        deduplicate: no two neighbors of a query are chunks of the same tokens, nor chunks whose sets of word 13-grams
            have a Jaccard similarity above 0.8; the one of the best score stays.
        decontaminate: how a neighbor [N, F] is told to give the text being read away, one or several of
            "longest_run>=13" (words in a row), "jaccard>=0.8" and "overlap>=0.8" (of word 13-grams; see
            retro.retrieval.filters.decontamination). Such a neighbor is left out.
        against: texts that the neighbors of all queries must not resemble, as those of a test set. Without them, and
            unless a call names the text being read, that is the query itself.
        min_date, max_date, undated, quality, subsample: which documents may answer; see
            `retro.retrieval.filters.FilterSettings`.

    The search is asked for more until k neighbors are left or it has no more to give; what is missing is masked.
    Source of the filters: Shao et al. 2024, MassiveDS.
    """

    def __init__(
        self,
        store: Store | str | Path,
        index: str | Searcher = "auto",
        embedder: Embedder | None = None,
        num_neighbors: int = 2,
        retrieved_len: int = 128,
        *,
        deduplicate: bool = False,
        decontaminate: str | Sequence[str] | None = None,
        against: Sequence[str] | None = None,
        min_date: str | None = None,
        max_date: str | None = None,
        undated: str | None = None,
        quality: Sequence[str] | None = None,
        subsample: Sequence[float | int] | None = None,
    ) -> None:
        if num_neighbors < 1 or retrieved_len < 1:
            raise ValueError(
                f"num_neighbors and retrieved_len must be at least 1, not {num_neighbors} and {retrieved_len}"
            )
        self.store = store if isinstance(store, Store) else Store.open(store)
        self.index: Searcher = open_searcher(self.store, index, embedder) if isinstance(index, str) else index
        self.num_neighbors, self.retrieved_len = num_neighbors, retrieved_len
        filters = QueryFilters(
            deduplicate=deduplicate,
            decontaminate=decontaminate,
            against=against,
            min_date=min_date,
            max_date=max_date,
            undated=undated,
            quality=None if quality is None else list(quality),
            subsample=subsample,
        )
        if filters:
            self.index = FilteredSearcher(self.index, self.store, filters, retrieved_len)
        self._document_rows: dict[str, int] | None = None

    def __call__(
        self,
        queries: Any,
        num_neighbors: int | None = None,
        exclude_documents: Sequence[set[str]] | None = None,
        mask: Bool[np.ndarray, "q m"] | None = None,
        against: Sequence[str] | None = None,
        keys: Float32[np.ndarray, "q d"] | None = None,
    ) -> Neighbors:
        """The k nearest chunks of each query and what follows them.

        Arguments:
            queries: a list of texts, or token ids of the store's tokenizer (a [q, m] array or tensor, or lists);
                special tokens are left out. None where `keys` say all that the search needs.
            exclude_documents: per query, ids of documents that must not be returned.
            mask: True = a real token, where token ids are an array.
            against: per query, the text being read, for a retriever that decontaminates.
            keys: the queries as the store's embedder gives them, where they are known: nothing is embedded then.

        A query without any text has no neighbors, unless its key is given; where k is larger than the store, neighbors
        are missing.
        """
        k = self.num_neighbors if num_neighbors is None else num_neighbors
        check_k(k)
        asked_for = self._queries(queries, mask, keys)
        excluded = self._excluded(exclude_documents, len(asked_for))
        self._check_against(against, len(asked_for))
        rows, scores = self._search(asked_for, k, excluded, against)
        tokens, token_mask = self.store.values(rows, self.retrieved_len)
        return Neighbors(rows, tokens, token_mask, scores, Sources(self.sources, rows.copy()))

    def _search(
        self, queries: Queries, k: int, excluded: list[set[int]] | None, against: Sequence[str] | None
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Rows and scores; queries without text, unless their keys are given, are not asked, nor an empty index."""
        there = min(k, self.index.num_rows)
        asked = np.arange(len(queries))
        if queries.keys is None:
            asked = np.asarray([q for q, text in enumerate(queries.texts) if text.strip()], np.int64)
        read = {} if against is None else {"against": list(against)}
        if 0 < len(asked) == len(queries) and there == k:
            return self.index.search(queries, k, excluded, **read)[:2]
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if len(asked) and there:
            blocked = None if excluded is None else [excluded[q] for q in asked]
            read = {name: [given[q] for q in asked] for name, given in read.items()}
            found = self.index.search(queries[asked], there, blocked, **read)
            rows[asked, :there], scores[asked, :there] = found[:2]
        return rows, scores

    def sources(self, rows: Int64[np.ndarray, "q k"]) -> list[list[Source | None]]:
        """Where rows come from, read together; None for row -1."""
        present, places = np.unique(rows, return_inverse=True)
        real = present[present >= 0]
        documents, of_row = np.unique(self.store.document_rows(real), return_inverse=True)
        fields = self.store.document_fields(documents, ("id", "title", "source", "date"))
        positions = self.store.positions(real).tolist()
        found: list[Source | None] = [None] * (len(present) - len(real))
        for place, position in zip(of_row.tolist(), positions, strict=True):
            name, title, source, date = fields[place]
            found.append(Source(name, title, source, position, date))
        return [[found[place] for place in line] for line in places.reshape(rows.shape).tolist()]

    @property
    def measure(self) -> str:
        """What the scores of `show` are, such as cosine."""
        return measure_of(self.index.kind, self.store.manifest["embedder"])

    def show(self, text: str, num_neighbors: int | None = None) -> list[dict[str, Any]]:
        """The neighbors of one text as records to read: score, source, and the texts of N and of F."""
        return self.records(self([text], num_neighbors))[0]

    def records(self, found: Neighbors) -> list[list[dict[str, Any]]]:
        """The neighbors of each query as `show` gives them; where keys have length 1 the score is their cosine."""
        m, shown = self.store.chunk_len, []
        scores = in_measure(found.scores, self.measure)
        for q, sources in enumerate(found.sources):
            shown.append([])
            for row, source, score, tokens, mask in zip(
                found.ids[q], sources, scores[q], found.tokens[q], found.mask[q], strict=True
            ):
                if source is not None:
                    parts = decode_chunks(self.store.tokenizer, [tokens[:m][mask[:m]], tokens[m:][mask[m:]]])
                    texts = dict(zip(("neighbor", "continuation"), parts, strict=True))
                    shown[-1].append({"row": int(row), "score": float(score), **asdict(source), **texts})
        return shown

    def _check_against(self, against: Sequence[str] | None, num_queries: int) -> None:
        if against is None:
            return
        if not isinstance(self.index, FilteredSearcher) or not self.index.measures:
            raise ValueError(
                "against is given to a retriever that was made without decontaminate; make it with a measure"
            )
        if isinstance(against, str) or len(against) != num_queries:
            raise ValueError(f"against must hold one text per query ({num_queries}), not {len(against)}")

    def _queries(self, queries: Any, mask: Any, keys: Float32[np.ndarray, "q d"] | None) -> Queries:
        if queries is None and (keys is None or mask is not None):
            raise ValueError("queries are missing; give texts or token ids, or keys without a mask")
        lists = None if queries is None else as_lists(queries, mask)
        if keys is not None and lists is not None and len(keys) != len(lists):
            raise ValueError(f"keys must hold one row per query ({len(lists)}), not {len(keys)}")
        if keys is not None and goes_by_words(self.index.kind):
            raise ValueError(f"keys are given to the index {self.index.kind}, which is lexical; give texts")
        if lists and isinstance(lists[0], str):
            return Queries(self.store.tokenizer, texts=lists, keys=keys)
        return Queries(self.store.tokenizer, tokens=lists, keys=keys)

    def _excluded(self, names: Sequence[set[str]] | None, num_queries: int) -> list[set[int]] | None:
        """Ids of excluded documents to document rows; ids that the store does not hold exclude nothing."""
        if names is None:
            return None
        if len(names) != num_queries:
            raise ValueError(f"exclude_documents must hold one set per query ({num_queries}), not {len(names)}")
        if self._document_rows is None:
            self._document_rows = {name: row for row, name in enumerate(self.store.document_ids)}
        return [{self._document_rows[name] for name in wanted if name in self._document_rows} for wanted in names]


def passages(
    retriever: Any, text: str, num_neighbors: int | None = None
) -> list[tuple[str, str, float, dict[str, Any]]]:
    """The neighbors of a text as other libraries take them: name, text [N, F], score, and all that is known beside."""
    found = []
    for hit in retriever.show(text, num_neighbors):
        about = {name: value for name, value in hit.items() if name not in ("neighbor", "continuation")}
        name, text = f"{hit['document_id']}:{hit['position']}", hit["neighbor"] + hit["continuation"]
        found.append((name, text, hit["score"], about | {"measure": retriever.measure}))
    return found
