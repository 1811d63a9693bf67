"""Search over shards that live on several nodes: Ray actors, each with a range of rows or some segments of an index.

A query goes to all shards at once; their lists are merged by score, then row. Over exact shards the answer is that of
exact search over the whole store. Over approximate ones it is as good as each shard's own k nearest: merging them loses
nothing, but what a segment has not found is not there. Words (tfidf, bm25) are one shard.

A node that is lost takes its actors along; Ray starts them again on the others, where the store must be seen at the
same path. Until they are open again a query waits, up to its time limit, or, with `partial`, goes without them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from retro.common.extras import check_installed
from retro.common.records import load_record
from retro.retrieval.embedding.embedder import Embedder
from retro.retrieval.search import lexical
from retro.retrieval.search.dense import Segment, open_segment
from retro.retrieval.search.exact import Hits, as_hits, check_k, check_queries, exact_search, merge, no_hits
from retro.retrieval.search.index import served_by
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import (
    FusedSearcher,
    Searcher,
    embedder_of,
    is_keyless,
    open_searcher,
    parse_kind,
    search_excluding,
)
from retro.retrieval.search.segments import ShardRange, num_rows, row_range, uncovered
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.25  # before a lost shard is asked again


class MissingShards(ConnectionError):
    """Shards that have not answered, and why."""


@dataclass(frozen=True)
class ShardAssignment:
    """What one shard holds of one kind of search: ranges of rows that are searched exactly, segments (their first shard
    of the store, the one behind the last, and the folder's name), or all of a lexical index."""

    kind: str
    ranges: list[tuple[int, int]] = field(default_factory=list)
    segments: list[tuple[int, int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"rows {start} to {stop - 1}" for start, stop in self.ranges]
        segments = [f"segment {name} of {self.kind}" for _, _, name in self.segments]
        return ", ".join(rows + segments) or f"all of {self.kind}"


Plan = list[dict[str, ShardAssignment]]  # of each shard, by kind


class ShardedHits(tuple):
    """Rows, scores and mask, as every search gives them, and how many shards they come from."""

    shards_answered: int
    shards_total: int

    def __new__(cls, hits: Hits, answered: int, total: int) -> ShardedHits:
        made = super().__new__(cls, hits)
        made.shards_answered, made.shards_total = answered, total
        return made


# The plan


def plan_shards(store: Store, kind: str, num_shards: int) -> Plan:
    """What each shard holds of a kind of search; kinds joined by "+" are spread over the same shards.

    Exact search is cut into equal ranges of rows; an approximate index into its segments and the rows without one,
    where there may be fewer shards than asked for. Raises ValueError as `open_index` does.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, not {num_shards}")
    shards: Plan = [{} for _ in range(num_shards)]
    names = parse_kind(kind, is_keyless(store))
    for place, name in enumerate(name for name in names if name in lexical.KINDS):
        shards[-1 - place % num_shards][name] = ShardAssignment(name)
    for name in names:
        if name not in lexical.KINDS:
            shard_ranges = served_by(store, name)
            parts = (
                _segment_parts(store, name, shard_ranges, num_shards)
                if shard_ranges
                else _exact_parts(store, num_shards)
            )
            for shard, part in zip(shards, parts, strict=False):
                shard[name] = part
    return [shard for shard in shards if shard]


def _exact_parts(store: Store, num_shards: int) -> list[ShardAssignment]:
    borders = [number * store.num_chunks // num_shards for number in range(num_shards + 1)]
    ranges = [(start, stop) for start, stop in zip(borders[:-1], borders[1:], strict=True) if start < stop]
    return [ShardAssignment("exact", [part]) for part in ranges]


def _segment_parts(store: Store, kind: str, shard_ranges: list[ShardRange], num_shards: int) -> list[ShardAssignment]:
    """Segments, and ranges of shards without one, each to the shard with the fewest rows so far; the largest first."""
    parts = [ShardAssignment(kind) for _ in range(num_shards)]
    loads = [0] * num_shards
    for shards in sorted(
        [*shard_ranges, *uncovered(store, shard_ranges)], key=lambda shards: (-num_rows(store, shards), shards.first)
    ):
        least = loads.index(min(loads))
        loads[least] += num_rows(store, shards)
        if shards.folder is None:
            parts[least].ranges.append(row_range(store, shards))
        else:
            parts[least].segments.append((shards.first, shards.stop, shards.folder.name))
    return [part for part in parts if part.ranges or part.segments]


# One shard


class _PartIndex:
    """Nearest keys of a part: the rows of its ranges and segments, and no others."""

    def __init__(self, store: Store, part: ShardAssignment) -> None:
        self.store, self.kind, self.ranges = store, part.kind, part.ranges
        self.segments: list[Segment] = []
        for first, stop, name in part.segments:
            folder = store.path / "index" / name
            record = load_record(folder / "index.json")
            self.segments.append(open_segment(store, ShardRange(first, stop, folder, record)))
        in_ranges = sum(len(store.searchable_in(*rows)) for rows in part.ranges)
        self.num_rows = in_ranges + sum(segment.num_live for segment in self.segments)

    def search(self, queries: Float[np.ndarray, "q d"], k: int, documents: np.ndarray | None = None) -> Hits:
        """The k nearest rows of each query; `documents`: see `exact_search`, without segments only."""
        rows, distances = no_hits(len(queries), k)
        for segment in self.segments:
            rows, distances = merge(rows, distances, *segment.search(queries, k), k)
        for part in self.ranges:
            found, scores, _ = exact_search(self.store, queries, k, documents, rows=part)
            rows, distances = merge(rows, distances, found, -scores.astype(np.float64), k)
        return as_hits(rows, distances)


class _PartSearcher:
    """The search of a part, by keys."""

    def __init__(self, store: Store, part: ShardAssignment) -> None:
        self.store, self.index = store, _PartIndex(store, part)
        self.kind, self.num_rows, self.recall = part.kind, self.index.num_rows, 1.0

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        keys = check_queries(queries.keys, self.store)
        if excluded is not None and not self.index.segments and all(len(rows) <= 1 for rows in excluded):
            return self.index.search(keys, k, np.asarray([next(iter(rows), -1) for rows in excluded], np.int64))
        return search_excluding(self.index, self.store, keys, k, excluded)


class ShardActor:
    """What an actor is: a store opened on its node, and the parts of it that it searches."""

    def __init__(self, store: str, fingerprint: str, parts: dict[str, dict[str, Any]]) -> None:
        import torch  # noqa: F401  (takes its time: now, not in the first search)

        self.store = Store.open(store)
        if self.store.fingerprint != fingerprint:
            raise ValueError(f"{store} is another store here, or has been changed; open the search again")
        self._tokenizer = self.store.tokenizer if parts.keys() & set(lexical.KINDS) else None
        self._searchers: dict[str, Searcher] = {}
        for name, fields in parts.items():
            part = ShardAssignment(
                fields["kind"], *([tuple(item) for item in fields[key]] for key in ("ranges", "segments"))
            )
            is_lexical = name in lexical.KINDS
            self._searchers[name] = open_searcher(self.store, name) if is_lexical else _PartSearcher(self.store, part)

    def num_rows(self) -> dict[str, int]:
        """The rows that it searches, by kind; answered when it is open."""
        return {name: searcher.num_rows for name, searcher in self._searchers.items()}

    def search(self, name: str, asked: dict[str, Any], k: int, excluded: list[set[int]] | None) -> tuple[Any, Any]:
        """Rows and scores of the k best of a kind, as the searcher of that kind gives them."""
        queries = Queries(self._tokenizer, asked.get("texts"), asked.get("tokens"), asked.get("keys"))
        rows, scores, _ = self._searchers[name].search(queries, k, excluded)
        return rows, scores


# All of them


def open_sharded(
    store: Store,
    kind: str = "exact",
    num_shards: int | None = None,
    embedder: Embedder | None = None,
    timeout: float = 60.0,
    partial: bool = False,
    address: str | None = None,
    actor_options: dict[str, Any] | None = None,
) -> ShardedSearcher:
    """A search whose shards live in Ray actors, spread over the nodes: for `Retriever(store, index=...)`.

    Arguments:
        kind: "exact", an approximate index that is built ("scann", "faiss", "auto": the best one), "tfidf", "bm25", or
            several joined by "+".
        num_shards: None is one for each node.
        embedder: of the queries, as for a Retriever; it stays in this process.
        timeout: seconds that a query may take, waiting for lost shards included.
        partial: answer without the shards that are missing; see `ShardedSearcher`.
        address: of the Ray cluster; None joins the one of RAY_ADDRESS or of this machine, or starts one.
        actor_options: of Ray, for every actor, such as {"memory": 2**34, "num_gpus": 1}.

    Raises ValueError if Ray is not installed, and MissingShards if one cannot be opened within `timeout`.
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be above 0, not {timeout}")
    check_installed("ray", "a sharded search")
    import ray

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    plan = plan_shards(store, kind, len(_nodes(ray)) if num_shards is None else num_shards)
    names = parse_kind(kind, is_keyless(store))
    for name in set(names) & set(lexical.KINDS):
        lexical.build_lexical(store, name)  # here, so that an actor only opens it
    own = None if set(names) <= set(lexical.KINDS) else embedder_of(store, embedder)
    searcher = ShardedSearcher(store, kind, plan, own, timeout, partial, actor_options or {})
    try:
        searcher.wait_until_open()
    except BaseException:
        searcher.close()
        raise
    return searcher


class ShardedSearcher:
    """A `Searcher` over actors; a context that ends them. Made by `open_sharded`; threads may share it.

    `search` returns `ShardedHits`, which say `shards_answered` of `shards_total`; so does the searcher, to those who
    call it through a Retriever. A shard that is missing is an error, MissingShards, which names it; with `partial` it
    is a warning in the log.
    """

    def __init__(
        self,
        store: Store,
        kind: str,
        plan: Plan,
        embedder: Embedder | None,
        timeout: float,
        partial: bool,
        actor_options: dict[str, Any],
    ) -> None:
        self.store, self.plan, self.embedder = store, plan, embedder
        self.timeout, self.partial = timeout, partial
        self.names = parse_kind(kind, is_keyless(store))
        self.kind, self.num_rows = "+".join(self.names), store.num_searchable
        self.recall = _recall(store, self.names)
        self.shards_total = len(plan)
        self._options = {"max_restarts": -1, **actor_options}
        self._place = str(store.path.resolve())
        self._lock, self._latest = threading.Lock(), threading.local()
        self._actors = [self._start(number) for number in range(len(plan))]

    def __enter__(self) -> ShardedSearcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def shards_answered(self) -> int:
        """How many shards answered this thread's searches since this was last read: the fewest of any search."""
        return vars(self._latest).pop("answered", self.shards_total)

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> ShardedHits:
        """The k best rows of each query outside its excluded document rows, merged from all shards.

        Raises MissingShards unless all answer within the time limit, or `partial` is set and one does.
        """
        check_k(k)
        deadline = time.monotonic() + self.timeout
        parts = [_ScatterGather(self, name, deadline) for name in self.names]
        hits = (parts[0] if len(parts) == 1 else FusedSearcher(parts)).search(queries, k, excluded)
        lost = {number: reason for part in parts for number, reason in part.lost.items()}
        answered = self.shards_total - len(lost)
        self._latest.answered = min(answered, getattr(self._latest, "answered", answered))
        if lost:
            log.warning("%s", self.say(lost))
        return ShardedHits(hits, answered, self.shards_total)

    def wait_until_open(self) -> None:
        """Wait until every shard is open; MissingShards names those that are not within the time limit."""
        deadline = time.monotonic() + self.timeout
        lost: dict[int, str] = {}
        self.ask(range(self.shards_total), "num_rows", (), deadline, lost, patient=False)
        if lost:
            raise MissingShards(self.say(lost))

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor)

    def ask(
        self,
        shards: Iterable[int],
        method: str,
        arguments: Sequence[Any],
        deadline: float,
        lost: dict[int, str],
        patient: bool | None = None,
    ) -> dict[int, Any]:
        """The answers of some shards; those that have none until the deadline go to `lost`, with the reason.

        patient: ask a lost shard again until the deadline; None is unless `partial`. Raises the ValueError of a shard.
        """
        import ray

        patient = not self.partial if patient is None else patient
        answers: dict[int, Any] = {}
        waiting = {self._call(number, method, arguments): number for number in shards}
        while waiting:
            left = deadline - time.monotonic()
            done = ray.wait(list(waiting), timeout=max(left, 0))[0]
            for reference in done or list(waiting):
                number = waiting.pop(reference)
                if not done:
                    lost.setdefault(number, f"no answer within {self.timeout:g} seconds")
                    _give_up(ray, reference)
                    continue
                try:
                    answers[number] = ray.get(reference)
                    lost.pop(number, None)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, ValueError):
                        raise ValueError(str(error.cause)) from None
                    lost[number] = _reason(error.cause)
                except ray.exceptions.RayError as error:
                    lost[number] = _reason(error)
                    self._replace_if_dead(ray, number, error)
                    if patient and time.monotonic() + _PAUSE_SECONDS < deadline:
                        time.sleep(_PAUSE_SECONDS)
                        waiting[self._call(number, method, arguments)] = number
        return answers

    def _call(self, number: int, method: str, arguments: Sequence[Any]) -> Any:
        return getattr(self._actors[number], method).remote(*arguments)

    def _start(self, number: int) -> Any:
        import ray
        import ray.util.scheduling_strategies

        nodes = _nodes(ray)  # in turn; where one is gone, any other
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=True)
        options = {"scheduling_strategy": strategy, **self._options}
        parts = {name: asdict(part) for name, part in self.plan[number].items()}
        return ray.remote(ShardActor).options(**options).remote(self._place, self.store.fingerprint, parts)

    def _replace_if_dead(self, ray: Any, number: int, error: Exception) -> None:
        """Start an actor again that Ray has given up, as it does one that could not be opened."""
        if isinstance(error, ray.exceptions.ActorDiedError):
            with self._lock:
                self._actors[number] = self._start(number)

    def say(self, lost: dict[int, str]) -> str:
        """Which shards are missing, and why."""
        named = (f"shard {n} ({'; '.join(map(str, self.plan[n].values()))}): {lost[n]}" for n in sorted(lost))
        return f"{len(lost)} of {self.shards_total} shards are missing: " + "; ".join(named)


class _ScatterGather:
    """One kind of search over the shards that hold some of it, for one call of `ShardedSearcher.search`."""

    def __init__(self, searcher: ShardedSearcher, name: str, deadline: float) -> None:
        self.searcher, self.kind, self.deadline = searcher, name, deadline
        self.lost: dict[int, str] = {}
        self.num_rows, self.recall = searcher.num_rows, searcher.recall

    def search(self, queries: Queries, k: int, excluded: list[set[int]] | None = None) -> Hits:
        import ray

        searcher = self.searcher
        holders = [number for number, parts in enumerate(searcher.plan) if self.kind in parts]
        asked = ray.put(self._asked(queries))
        answers = searcher.ask(holders, "search", (self.kind, asked, k, excluded), self.deadline, self.lost)
        if self.lost and not (searcher.partial and answers):
            raise MissingShards(searcher.say(self.lost))
        rows, distances = no_hits(len(queries), k)
        for number in sorted(answers):
            found, scores = answers[number]
            rows, distances = merge(rows, distances, found, -scores.astype(np.float64), k)
        return as_hits(rows, distances)

    def _asked(self, queries: Queries) -> dict[str, Any]:
        """What a shard needs of the queries."""
        if self.kind in lexical.KINDS:
            return {"texts": queries.texts} if self.kind.startswith("bm25") else {"tokens": queries.tokens}
        keys = queries.embedded(self.searcher.embedder) if queries.keys is None else queries.keys
        return {"keys": check_queries(keys, self.searcher.store)}


def _recall(store: Store, names: list[str]) -> float:
    """The least recall of what serves the kinds, as it was measured."""
    by_words = [lexical.build_lexical(store, name).recall for name in names if name in lexical.KINDS]
    by_keys = [name for name in names if name not in ("exact", *lexical.KINDS)]
    of_segments = [shards.record["recall"]["recall"] for name in by_keys for shards in served_by(store, name)]
    return float(min([1.0, *by_words, *of_segments]))


def _nodes(ray: Any) -> list[str]:
    """The nodes that can run actors."""
    found = ray.nodes()
    able = [node for node in found if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    return sorted(node["NodeID"] for node in able or found)


def _give_up(ray: Any, reference: Any) -> None:
    """Take back a call that nobody waits for any more, if its actor has not begun it."""
    with suppress(Exception):
        ray.cancel(reference)


def _reason(error: BaseException | None) -> str:
    """One line: the first, or, of an actor that could not be opened, the last, which is its own error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]
