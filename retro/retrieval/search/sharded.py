"""Search over shards that live on several nodes: Ray actors, each with a part of the rows, segments or lists.

A query goes to the shards that hold what it must look at, and their answers are put together as one process would: in
exact search and by words all shards are asked, in a routed index those that own the lists which its router names (see
retro.retrieval.search.placement). So the answer is that of the same search in one process. By keys, the best
candidates are compared with the stored keys where these lists are.

A node that is lost takes its actors along; Ray starts them again on the others, where the store must be seen at the
same path. Until they are open again a query waits, up to its time limit, or, with `partial`, goes without them.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np

from retro.common.extras import check_installed
from retro.retrieval.embedding.embedder import Embedder
from retro.retrieval.search import lexical
from retro.retrieval.search.exact import Hits, check_k
from retro.retrieval.search.gathering import Call, KeyShards, MissingShards, ScoreShards, WordShards, open_divided
from retro.retrieval.search.index import served_by
from retro.retrieval.search.placement import Plan, plan_shards
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import FusedSearcher, RerankedSearcher, embedder_of, is_keyless, parse_kind
from retro.retrieval.search.shard import ShardActor
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.25  # before a lost shard is asked again


class ShardedHits(tuple):
    """Rows, scores and mask, as every search gives them, and how many shards they come from."""

    shards_answered: int
    shards_total: int

    def __new__(cls, hits: Hits, answered: int, total: int) -> ShardedHits:
        made = super().__new__(cls, hits)
        made.shards_answered, made.shards_total = answered, total
        return made


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
        kind: as for a Retriever: "exact", an approximate index that is built ("routed", "scann", "faiss", "auto": the
            best one), "tfidf", "bm25", several joined by "+", and a second stage behind ">".
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
    names = parse_kind(kind.partition(">")[0], is_keyless(store))
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
        first, _, self.second = kind.partition(">")
        self.names = parse_kind(first, is_keyless(store))
        self.kind = "+".join(self.names) + (f">{self.second}" if self.second else "")
        self.num_rows, self.recall = store.num_searchable, _recall(store, self.names)
        by_keys = [name for name in self.names if name not in lexical.KINDS]
        self.divided = {name: open_divided(store, name, served_by(store, name), plan) for name in by_keys}
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

        Raises MissingShards unless all that are asked answer within the time limit, or `partial` is set and one does.
        """
        check_k(k)
        call = Call(self)
        parts = [(WordShards if name in lexical.KINDS else KeyShards)(call, name) for name in self.names]
        searcher = parts[0] if len(parts) == 1 else FusedSearcher(parts)
        if self.second:
            searcher = RerankedSearcher(searcher, ScoreShards(call, self.second))
        rows, scores, _ = searcher.search(queries, k, excluded)
        if call.lost and not call.answered:
            raise MissingShards(self.say(call.lost))
        rows = np.where(np.isfinite(scores), rows, -1)  # what a second stage that is lost has not scored
        answered = self.shards_total - len(call.lost)
        self._latest.answered = min(answered, getattr(self._latest, "answered", answered))
        if call.lost:
            log.warning("%s", self.say(call.lost))
        return ShardedHits((rows, scores, rows >= 0), answered, self.shards_total)

    def wait_until_open(self) -> None:
        """Wait until every shard is open; MissingShards names those that are not within the time limit."""
        deadline = time.monotonic() + self.timeout
        lost: dict[int, str] = {}
        self.ask("kinds", dict.fromkeys(range(self.shards_total), ()), deadline, lost, patient=False)
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
        method: str,
        asked: dict[int, tuple[Any, ...]],
        deadline: float,
        lost: dict[int, str],
        patient: bool | None = None,
    ) -> dict[int, Any]:
        """The answers of shards, by what each is asked; those that have none until the deadline go to `lost`, and why.

        patient: ask a lost shard again until the deadline; None is unless `partial`. Raises the ValueError of a shard.
        """
        import ray

        patient = not self.partial if patient is None else patient
        answers: dict[int, Any] = {}
        waiting = {self._call(number, method, given): number for number, given in asked.items()}
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
                        waiting[self._call(number, method, asked[number])] = number
        return answers

    def share(self, value: Any) -> Any:
        """A value for several shards, handed over once."""
        import ray

        return ray.put(value)

    def _call(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._actors[number], method).remote(*arguments)

    def _start(self, number: int) -> Any:
        import ray
        import ray.util.scheduling_strategies

        nodes = _nodes(ray)  # in turn; where one is gone, any other
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=True)
        options = {"scheduling_strategy": strategy, **self._options}
        return ray.remote(ShardActor).options(**options).remote(self._place, self.store.fingerprint, self.plan[number])

    def _replace_if_dead(self, ray: Any, number: int, error: Exception) -> None:
        """Start an actor again that Ray has given up, as it does one that could not be opened."""
        if isinstance(error, ray.exceptions.ActorDiedError):
            with self._lock:
                self._actors[number] = self._start(number)

    def say(self, lost: dict[int, str]) -> str:
        """Which shards are missing, and why."""
        named = (f"shard {n} ({'; '.join(map(str, self.plan[n].values()))}): {lost[n]}" for n in sorted(lost))
        return f"{len(lost)} of {self.shards_total} shards are missing: " + "; ".join(named)


def _recall(store: Store, names: list[str]) -> float:
    """The least recall of what serves the kinds, as it was measured."""
    by_words = [lexical.build_lexical(store, name, own=()).recall for name in names if name in lexical.KINDS]
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
