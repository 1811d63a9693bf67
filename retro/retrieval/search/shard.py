"""One shard of a distributed search: an actor with a store opened on its node, and the parts of it that it searches."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from retro.common.records import load_record
from retro.retrieval.search import lexical
from retro.retrieval.search.dense import Segment, check_segment, drop_copies, open_segment
from retro.retrieval.search.engines.routed import open_groups
from retro.retrieval.search.exact import Hits, as_hits, exact_search, merge, no_hits, rescore
from retro.retrieval.search.placement import ShardAssignment
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import open_reranker
from retro.retrieval.search.segments import ShardRange
from retro.retrieval.store.store import Store

Visited = tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"], Float64[np.ndarray, "q c"]]


class ShardActor:
    """What an actor is. Raises ValueError where the store is another one."""

    def __init__(self, store: str, fingerprint: str, parts: dict[str, ShardAssignment]) -> None:
        import torch  # noqa: F401  (takes its time: now, not in the first search)

        self.store = Store.open(store)
        if self.store.fingerprint != fingerprint:
            raise ValueError(f"{store} is another store here, or has been changed; open the search again")
        self._tokenizer = None
        self._parts = {name: self._open(name, part) for name, part in parts.items()}

    def _open(self, name: str, part: ShardAssignment) -> Any:
        own = [folder for *_, folder in part.segments]
        if name in lexical.KINDS or name.startswith(">"):
            self._tokenizer = self.store.tokenizer
        if name in lexical.KINDS:
            return lexical.build_lexical(self.store, name, own=own)
        return open_reranker(self.store, name[1:], own) if name.startswith(">") else PartIndex(self.store, part)

    def kinds(self) -> list[str]:
        """What it searches; answered when it is open."""
        return sorted(self._parts)

    def search_words(
        self, name: str, asked: dict[str, Any], k: int, excluded: list[set[int]] | None
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Rows and scores of the k best of its part of a lexical index."""
        return self._parts[name].search(self._queries(asked), k, excluded)[:2]

    def search_keys(
        self, name: str, keys: Float32[np.ndarray, "q d"], k: int, excluded: Int64[np.ndarray, "q w"] | None
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Rows and scores of the k nearest of its whole segments and its ranges; `excluded`: see `Index`."""
        return self._parts[name].search(keys, k, excluded)[:2]

    def visit(
        self, name: str, folder: str, keys: np.ndarray, lists: Int64[np.ndarray, "q l"], considered: int
    ) -> Visited:
        """See `PartIndex.visit`."""
        return self._parts[name].visit(folder, keys, lists, considered)

    def scores(self, name: str, asked: dict[str, Any], rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
        """The scores that a second stage gives rows which it has here."""
        return self._parts[name].scores(self._queries(asked), rows)

    def _queries(self, asked: dict[str, Any]) -> Queries:
        return Queries(self._tokenizer, asked.get("texts"), asked.get("tokens"))


class PartIndex:
    """Nearest keys of a part: the rows of its ranges, segments and lists, and no others."""

    def __init__(self, store: Store, part: ShardAssignment) -> None:
        self.store, self.ranges = store, part.ranges
        self.segments = [open_segment(store, _recorded(store, *segment)) for segment in part.segments]
        self.lists = {name: self._open_lists(groups, first, stop, name) for first, stop, name, groups in part.lists}

    def _open_lists(self, groups: list[int], *named: Any) -> Segment:
        shards = _recorded(self.store, *named)
        check_segment(shards, checksums=False)
        engine = open_groups(shards.folder, shards.record, groups)
        return Segment(self.store, shards, engine)

    def search(self, queries: Float32[np.ndarray, "q d"], k: int, excluded: np.ndarray | None = None) -> Hits:
        """The k nearest rows of the ranges and whole segments; `excluded`: see `Index`."""
        rows, distances = no_hits(len(queries), k)
        for segment in self.segments:
            rows, distances = merge(rows, distances, *segment.search(queries, k, excluded), k)
        for part in self.ranges:
            found, scores, _ = exact_search(self.store, queries, k, excluded, rows=part)
            rows, distances = merge(rows, distances, found, -scores.astype(np.float64), k)
        return as_hits(rows, distances)

    def visit(
        self, name: str, queries: Float32[np.ndarray, "q d"], lists: Int64[np.ndarray, "q l"], considered: int
    ) -> Visited:
        """What lists of a segment (-1: of other shards) have for queries: distances of codes, the nearest first; store
        rows, -1 for none, for those removed and for a second copy; and their squared distances by the stored keys."""
        segment = self.lists[name]
        distances, local = segment.engine.visit(queries, lists, considered)
        order = np.lexsort((local, distances), axis=1)
        distances, local = np.take_along_axis(distances, order, 1), np.take_along_axis(local, order, 1)
        rows = segment.store_rows(local)
        drop_copies(rows, local)  # which have the same code, so the same distance
        return distances, rows, rescore(self.store, queries, rows)


def _recorded(store: Store, first: int, stop: int, name: str) -> ShardRange:
    folder = store.path / "index" / name
    return ShardRange(first, stop, folder, load_record(folder / "index.json"))
