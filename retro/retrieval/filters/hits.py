"""Neighbors that are kept out of an answer: copies of each other, what gives away the text being read, and documents by
date, fields or share. Any search is wrapped, and asked for more until k are left or it has no more to give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

from retro.common.files import stable_hash
from retro.common.values import check_fields
from retro.retrieval.filters.dates import DateFilter
from retro.retrieval.filters.decontamination import Decontaminator, parse_measures
from retro.retrieval.filters.grams import text_ngrams, word_hashes
from retro.retrieval.filters.records import DocumentFilter
from retro.retrieval.filters.rules import parse_rule
from retro.retrieval.filters.settings import DocumentFilterSettings
from retro.retrieval.filters.subsampling import SubsampleFilter, check_subsample
from retro.text.chunks import decode_chunks
from retro.text.documents import Document

NEAR = 0.8  # two chunks of a greater Jaccard similarity are one
_FETCHED_HITS = 1 << 20  # hits held at a time while the over-fetch grows
_KNOWN_CHUNKS = 1 << 16  # some 2 kB each
_UNKNOWN, _KEPT, _REMOVED = 0, 1, 2


@dataclass(kw_only=True)
class QueryFilters(DocumentFilterSettings):
    """What is kept out of the neighbors of a query.

    Arguments:
        deduplicate: Let no two neighbors of a query be of the same text, or nearly so.
        decontaminate: How a neighbor is told to give the text being read away, one or several of "longest_run>=13"
            (words in a row that both hold), "jaccard>=0.8" and "overlap>=0.8" (over sets of word 13-grams). Such a
            neighbor is left out. Default: none is.
        against: Texts that no neighbor may resemble, as those of a test set. Default: the query itself.
    """

    deduplicate: bool = False
    decontaminate: Sequence[str] | None = None
    against: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self, without=["decontaminate", "against"])
        if self.against is not None and not self.decontaminate:
            raise ValueError("against is given without decontaminate; name a measure such as longest_run>=13")
        if isinstance(self.against, str):
            raise ValueError("against must be a list of texts, not one text; write [text]")
        if self.undated is not None and self.min_date is None and self.max_date is None:
            raise ValueError("undated is given without min_date or max_date; give one of them, or leave undated out")

    def __bool__(self) -> bool:
        named = (self.min_date, self.max_date, self.subsample)
        return bool(self.deduplicate or self.decontaminate or self.quality) or any(x is not None for x in named)

    def __str__(self) -> str:
        """What is done, in words that are the same for the same filters: part of the name of a search."""
        measures = [str(measure) for measure in parse_measures(self.decontaminate)] if self.decontaminate else []
        texts = [] if self.against is None else [f"against={stable_hash(list(self.against))[:8]}"]
        named = {name: getattr(self, name) for name in ("min_date", "max_date", "undated")}
        share = [] if self.subsample is None else ["subsample={:g}/{}".format(*check_subsample(self.subsample))]
        parts = ["deduplicate"] * self.deduplicate + measures + texts
        parts += [f"{name}={value}" for name, value in named.items() if value is not None]
        return ", ".join([*parts, *(rule.text for rule in map(parse_rule, self.quality or ())), *share])

    def of_documents(self) -> list[DocumentFilter]:
        """Those that look at a document's record alone, the quick ones first."""
        found: list[DocumentFilter] = (
            [] if self.subsample is None else [SubsampleFilter(*check_subsample(self.subsample))]
        )
        if self.min_date is not None or self.max_date is not None:
            found.append(DateFilter(self.min_date, self.max_date, self.undated or "drop"))
        return found + [parse_rule(rule) for rule in self.quality or ()]


class FilteredSearcher:
    """A search of which some hits are left out; the others keep order and score, and missing ones are masked.

    The over-fetch doubles, for the queries that need it, until k are left or the inner search has no more.

    inner: any `Searcher`. retrieved_len: tokens of a neighbor [N, F], which is what resembles a text or does not.
    """

    def __init__(self, inner: Any, store: Any, filters: QueryFilters, retrieved_len: int) -> None:
        self.inner, self.store, self.filters, self.retrieved_len = inner, store, filters, retrieved_len
        self.num_rows, self.recall = inner.num_rows, inner.recall
        self.measures = parse_measures(filters.decontaminate) if filters.decontaminate else []
        of_length = f" ({retrieved_len} tokens of each)" if self.measures else ""
        self.kind = f"{inner.kind}; {filters}{of_length}"
        self._of_documents = filters.of_documents()
        self._verdicts = np.full(store.num_documents if self._of_documents else 0, _UNKNOWN, np.int8)
        texts = () if filters.against is None else filters.against
        fixed = [Document(str(number), text) for number, text in enumerate(texts)]
        self._held_out = Decontaminator(fixed, self.measures) if fixed else None

    def search(
        self,
        queries: Any,
        k: int,
        excluded: list[set[int]] | None = None,
        against: Sequence[str] | None = None,
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"], Bool[np.ndarray, "q k"]]:
        """The k nearest rows of each query among those that no filter leaves out.

        against: per query the text being read.
        """
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        read, known = self._texts_read(queries, against), _Chunks(self.store, self.retrieved_len)
        waiting, fetch = np.arange(len(queries)), 2 * k + 8
        while len(waiting):
            fetch = max(min(fetch, self.num_rows), 1)
            size, short = max(_FETCHED_HITS // fetch, 1), []
            for start in range(0, len(waiting), size):
                group = waiting[start : start + size]
                blocked = None if excluded is None else [excluded[q] for q in group]
                some = queries if len(group) == len(queries) else queries[group]  # whose keys are made once
                found = self.inner.search(some, fetch, blocked)
                for q, hits, of_hits, real in zip(group.tolist(), *found, strict=True):
                    kept = self._kept(hits[real], k, read[q], known)
                    rows[q, : len(kept)], scores[q, : len(kept)] = hits[real][kept], of_hits[real][kept]
                    if len(kept) < k and real.all():
                        short.append(q)
            if fetch >= self.num_rows:
                break
            waiting, fetch = np.asarray(short, np.int64), fetch * 2
        return rows, scores, rows >= 0

    def _texts_read(self, queries: Any, against: Sequence[str] | None) -> list[Any]:
        """The hashed words of the text that each query's neighbors must not resemble, None without one."""
        if not self.measures or (against is None and self._held_out is not None):
            return [None] * len(queries)
        return [word_hashes(text) for text in (queries.texts if against is None else against)]

    def _kept(self, rows: np.ndarray, k: int, read: UInt64[np.ndarray, " w"] | None, known: _Chunks) -> list[int]:
        """The places of the first k rows of a list that no filter leaves out."""
        kept: list[int] = []
        places = np.flatnonzero(self._of_kept_documents(rows))
        for start in range(0, len(places), k):
            block = places[start : start + k].tolist()
            known.read(rows[kept + block], self.filters.deduplicate, bool(self.measures))
            for place in block:
                row = int(rows[place])
                if self.filters.deduplicate and any(known.alike(row, int(rows[other])) for other in kept):
                    continue
                if self.measures and self._gives_away(known.words[row], read):
                    continue
                kept.append(place)
                if len(kept) == k:
                    return kept
        return kept

    def _gives_away(self, words: UInt64[np.ndarray, " words"], read: UInt64[np.ndarray, " w"] | None) -> bool:
        if read is not None and any(measure.reached(words, read) for measure in self.measures):
            return True
        return self._held_out is not None and self._held_out.resembles(words)

    def _of_kept_documents(self, rows: np.ndarray) -> np.ndarray:
        """Which rows belong to documents that pass; each document is asked about once."""
        if not self._of_documents:
            return np.ones(len(rows), bool)
        documents = self.store.document_rows(rows)
        for document in np.unique(documents[self._verdicts[documents] == _UNKNOWN]).tolist():
            record = self.store.document(document)
            out = any(one.verdict(record) is not None for one in self._of_documents)
            self._verdicts[document] = _REMOVED if out else _KEPT
        return self._verdicts[documents] == _KEPT


class _Chunks:
    """What the filters need to know of chunks: of those of one search, as long as they are not too many."""

    def __init__(self, store: Any, retrieved_len: int) -> None:
        self.store, self.retrieved_len = store, retrieved_len
        self.words: dict[int, UInt64[np.ndarray, " words"]] = {}  # of [N, F]
        self._tokens: dict[int, bytes] = {}  # of N
        self._grams: dict[int, frozenset[int]] = {}

    def read(self, rows: Int64[np.ndarray, " c"], chunks: bool, values: bool) -> None:
        """Take up rows that are new: the chunks, and what they and their continuation say."""
        if max(len(self._tokens), len(self.words)) > _KNOWN_CHUNKS:
            self.words, self._tokens, self._grams = {}, {}, {}
        new = [row for row in rows.tolist() if row not in (self._tokens if chunks else self.words)]
        if chunks and new:
            tokens = self.store.token_lists(np.asarray(new))
            self._tokens |= {row: ids.tobytes() for row, ids in zip(new, tokens, strict=True)}
            texts = decode_chunks(self.store.tokenizer, tokens)
            self._grams |= {row: frozenset(text_ngrams(text).tolist()) for row, text in zip(new, texts, strict=True)}
        if values and new:
            ids, mask = self.store.values(np.asarray(new), self.retrieved_len)
            texts = decode_chunks(self.store.tokenizer, [own[real] for own, real in zip(ids, mask, strict=True)])
            self.words |= {row: word_hashes(text) for row, text in zip(new, texts, strict=True)}

    def alike(self, one: int, other: int) -> bool:
        """Whether two chunks are the same tokens, or near copies by their words."""
        a, b = self._grams[one], self._grams[other]
        common = len(a & b)
        return self._tokens[one] == self._tokens[other] or common > NEAR * (len(a) + len(b) - common)
