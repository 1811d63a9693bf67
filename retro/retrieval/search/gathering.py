"""What the shards of a distributed search answer to one call, put together as a search of one process would have it."""

from __future__ import annotations

import time
from copy import copy
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from retro.retrieval.search.dense import Segment, check_segment, drop, drop_copies
from retro.retrieval.search.engines.routed import are_certain, open_groups
from retro.retrieval.search.exact import Hits, as_hits, check_queries, merge, no_hits
from retro.retrieval.search.placement import Plan, is_divided
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import excluded_table
from retro.retrieval.search.segments import ShardRange
from retro.retrieval.store.store import Store


class MissingShards(ConnectionError):
    """Shards that have not answered, and why."""


class Call:
    """One call of `ShardedSearcher.search`: who has answered, and who is lost until its deadline.

    A search may ask more than once. A partial one does not ask again who is lost, and as the lost ones may have used
    up its time, it then gives the others a quarter more.

    searcher: a `ShardedSearcher`.
    """

    def __init__(self, searcher: Any) -> None:
        self.searcher, self.deadline = searcher, time.monotonic() + searcher.timeout
        self.lost: dict[int, str] = {}
        self.answered: set[int] = set()

    def ask(self, method: str, asked: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """The answers of shards, by what each is asked; MissingShards unless all answer, or the search is partial."""
        searcher, deadline = self.searcher, self.deadline
        if self.lost:
            deadline = max(deadline, time.monotonic() + searcher.timeout / 4)
        asked = {number: given for number, given in asked.items() if number not in self.lost}
        answers = searcher.ask(method, asked, deadline, self.lost)
        self.answered |= answers.keys()
        if self.lost and not searcher.partial:
            raise MissingShards(searcher.say(self.lost))
        return answers

    def holders(self, name: str) -> list[int]:
        """The shards that have some of a kind."""
        return [number for number, parts in enumerate(self.searcher.plan) if name in parts]


class WordShards:
    """A lexical index over the shards that hold segments of it."""

    def __init__(self, call: Call, name: str) -> None:
        self.call, self.kind = call, name
        self.num_rows, self.recall = call.searcher.num_rows, call.searcher.recall

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """See `LexicalIndex.search`."""
        asked = self.call.searcher.share(words_asked(queries, self.kind))
        given = (self.kind, asked, k, excluded)
        answers = self.call.ask("search_words", dict.fromkeys(self.call.holders(self.kind), given))
        return as_hits(*_merged(answers, len(queries), k))


class KeyShards:
    """Nearest keys over shards: whole segments and ranges there; of lists, those that the router here names."""

    def __init__(self, call: Call, name: str) -> None:
        self.call, self.kind, self.store = call, name, call.searcher.store
        self.num_rows, self.recall = call.searcher.num_rows, call.searcher.recall
        self._parts = {number: call.searcher.plan[number][name] for number in call.holders(name)}
        self._divided = [segment.asking(call) for segment in call.searcher.divided[name]]

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        """See `DenseSearcher.search`."""
        keys = queries.embedded(self.call.searcher.embedder) if queries.keys is None else queries.keys
        keys = check_queries(keys, self.store)
        table = excluded_table(excluded)
        rows, distances = no_hits(len(keys), k)
        whole = [number for number, part in self._parts.items() if part.segments or part.ranges]
        if whole:
            given = (self.kind, self.call.searcher.share(keys), k, table)
            rows, distances = _merged(self.call.ask("search_keys", dict.fromkeys(whole, given)), len(keys), k)
        for segment in self._divided:
            rows, distances = merge(rows, distances, *segment.search(keys, k, table), k)
        return as_hits(rows, distances)


class ScoreShards:
    """A second stage over the shards that have the rows; a row without a shard that answers is scored -inf."""

    def __init__(self, call: Call, kind: str) -> None:
        self.call, self.kind = call, kind

    def scores(self, queries: Queries, rows: Int64[np.ndarray, "q c"]) -> Float32[np.ndarray, "q c"]:
        """See `Reranker`."""
        name, plan = f">{self.kind}", self.call.searcher.plan
        asked, own = self.call.searcher.share(words_asked(queries, self.kind)), {}
        for number in self.call.holders(name):
            there = np.any([(rows >= start) & (rows < stop) for start, stop in plan[number][name].ranges], axis=0)
            if there.any():
                own[number] = there
        given = {number: (name, asked, np.where(there, rows, -1)) for number, there in own.items()}
        scores = np.full(rows.shape, -np.inf, np.float32)
        for number, found in self.call.ask("scores", given).items():
            scores[own[number]] = found[own[number]]
        return scores


def words_asked(queries: Queries, kind: str) -> dict[str, Any]:
    """What a shard needs of queries that go by words or by another embedder."""
    by_tokens = kind == "continuation" or kind.startswith("tfidf")
    return {"tokens": queries.tokens} if by_tokens else {"texts": queries.texts}


def _merged(answers: dict[int, Any], num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows, distances = no_hits(num_queries, k)
    for number in sorted(answers):
        found, scores = answers[number]
        rows, distances = merge(rows, distances, found, -scores.astype(np.float64), k)
    return rows, distances


class DividedSegment(Segment):
    """A segment whose lists are on shards: it is searched as any other, and `scored` asks those that a query visits."""

    def __init__(self, store: Store, shards: ShardRange, kind: str, plan: Plan) -> None:
        check_segment(shards, checksums=False)
        router = open_groups(shards.folder, shards.record, [])
        super().__init__(store, shards, router)
        self._kind, self._call = kind, None
        of_group = np.full(len(router.groups), -1, np.int64)
        for number, parts in enumerate(plan):
            for *_, name, groups in parts[kind].lists if kind in parts else ():
                if name == shards.folder.name:
                    of_group[groups] = number
        self.shard_of_list = np.append(of_group[router.group_of_list], -1)  # and of list -1

    def asking(self, call: Call) -> DividedSegment:
        """The same, for one call."""
        asking = copy(self)
        asking._call = call
        return asking

    def scored(
        self,
        queries: Float32[np.ndarray, "q d"],
        wanted: int,
        considered: int,
        lists: int,
        spans: Int64[np.ndarray, "q w 2"] | None = None,
    ) -> tuple[Int64[np.ndarray, "q c"], Float64[np.ndarray, "q c"]]:
        """See `Segment.scored`: the candidates that all lists in one place would have given."""
        visited = self.engine.route(queries, lists)
        shards, asked, at = self.shard_of_list[visited], {}, {}
        for number in np.unique(shards[shards >= 0]).tolist():
            own = shards == number
            at[number] = np.flatnonzero(own.any(1))
            first = np.argsort(~own, axis=1, kind="stable")[at[number], : own.sum(1).max()]
            of_shard = np.take_along_axis(np.where(own, visited, -1)[at[number]], first, 1)
            asked[number] = (self._kind, self.folder.name, queries[at[number]], of_shard, considered)
        found = no_candidates(len(queries), 1)
        for number, new in sorted(self._call.ask("visit", asked).items()):
            found = _nearest_codes(found, new, at[number])
        codes, rows, distances = found
        rows = np.where(are_certain(codes, wanted, considered), rows, -1)
        order = np.argsort(rows, axis=1)
        rows, distances = np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)
        drop_copies(rows, rows)
        drop(rows, spans)
        return rows, np.where(rows < 0, np.inf, distances)


def no_candidates(num_queries: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, distances = no_hits(num_queries, count)
    return np.full((num_queries, count), np.inf, np.float32), rows, distances


def _nearest_codes(found: Any, new: Any, at: Int64[np.ndarray, " some"]) -> Any:
    """As many candidates as one shard gives, those of the nearest codes, of some queries' two lists."""
    num_queries, count = len(found[0]), new[0].shape[1]
    more = no_candidates(num_queries, count)
    for all_of, some in zip(more, new, strict=True):
        all_of[at] = some
    joined = [np.concatenate(pair, 1) for pair in zip(found, more, strict=True)]
    order = np.lexsort((joined[1], joined[0]), axis=1)[:, :count]
    return tuple(np.take_along_axis(one, order, 1) for one in joined)


def open_divided(store: Store, kind: str, segments: list[ShardRange], plan: Plan) -> list[DividedSegment]:
    """The segments of a kind whose lists are spread over the shards of a plan."""
    return [DividedSegment(store, shards, kind, plan) for shards in segments if is_divided(shards)]
