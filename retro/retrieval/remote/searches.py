"""The queue of searches and the one thread that answers them, those that came meanwhile all at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from retro.retrieval.remote.limits import RetrievalLimits
from retro.retrieval.remote.wire import pack_neighbors
from retro.web.errors import ApiError
from retro.web.worker import Worker

if TYPE_CHECKING:
    from retro.retrieval.neighbors import Neighbors
    from retro.retrieval.retriever import Retriever

_LAST_SECONDS = 1.0  # of a search at shutdown
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PendingSearch:
    """One request: what a Retriever is called with, and where its answer goes."""

    queries: Sequence[str] | Sequence[Sequence[int]]
    num_neighbors: int
    retrieved_len: int
    exclude_documents: Sequence[set[str]] | None = None
    against: Sequence[str] | None = None
    answer: Future[bytes] = field(default_factory=Future)  # packed `Neighbors`

    @property
    def group(self) -> tuple[Any, ...]:
        """Searches of one group are the same search of several requests' queries."""
        is_text = bool(self.queries) and isinstance(self.queries[0], str)
        given = is_text, self.exclude_documents is None, self.against is None
        return self.num_neighbors, self.retrieved_len, *given

    def end(self, answer: bytes = b"", error: Exception | None = None) -> None:
        """Give the answer or an error; whoever comes second changes nothing."""
        with suppress(InvalidStateError):
            if error is None:
                self.answer.set_result(answer)
            else:
                self.answer.set_exception(error)


class SearchQueue(Worker):
    """Searches a retriever for many requests; a context in which its thread runs.

    While one search runs others wait; the next takes the longest waiting one and all of its group that fit into
    `max_batch` queries. A request that fails does so alone.
    """

    def __init__(self, retriever: Retriever, limits: RetrievalLimits) -> None:
        super().__init__("retro-serve-search")
        self.retriever, self.limits = retriever, limits
        self._waiting: list[PendingSearch]
        self._running: list[PendingSearch] = []

    def __exit__(self, *error: object) -> None:
        """End all searches with 503, and leave one that does not end behind."""
        self.stop()
        self._close(_LAST_SECONDS)

    def stop(self) -> None:
        """Take no further searches, and end all with ApiError 503."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            searches = self._running + self._waiting
        for search in searches:
            search.end(error=_closed())

    @property
    def load(self) -> dict[str, int]:
        """How many queries wait and how many are being searched."""
        with self._changed:
            running = sum(len(search.queries) for search in self._running)
            return {"waiting": self._num_waiting(), "running": running}

    def submit(self, search: PendingSearch) -> None:
        """Queue a search; ApiError 429 if its queries do not fit, 503 at shutdown."""
        with self._changed:
            if not self.is_alive:
                raise _closed()
            self._waiting = [other for other in self._waiting if not other.answer.cancelled()]
            if self._num_waiting() + len(search.queries) > self.limits.max_queue:
                raise ApiError(429, "the queue is full; try again in a moment.", code="queue_full")
            self._waiting.append(search)
            self._changed.notify_all()

    def _num_waiting(self) -> int:
        return sum(len(search.queries) for search in self._waiting if not search.answer.cancelled())

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[PendingSearch]:
        """The longest waiting search and those that go with it; none at shutdown."""
        with self._changed:
            self._running = []
            batch: list[PendingSearch] = []
            while not self._closed and not batch:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                batch = [search for search in self._alike() if search.answer.set_running_or_notify_cancel()]
            self._running = batch
            return batch

    def _alike(self) -> list[PendingSearch]:
        """Takes the first search and all of its group that fit off the queue."""
        if self._closed or not self._waiting:
            return []
        alike = [search for search in self._waiting if search.group == self._waiting[0].group]
        sizes = accumulate(len(search.queries) for search in alike)
        taken = [s for s, total in zip(alike, sizes, strict=True) if s is alike[0] or total <= self.limits.max_batch]
        self._waiting = [search for search in self._waiting if search not in taken]
        return taken

    def _answer(self, batch: list[PendingSearch]) -> None:
        """Search for a batch; if that fails, for each request alone."""
        try:
            found, about = self._search(batch)
            first = 0
            for search in batch:
                search.end(pack_neighbors(found[first : first + len(search.queries)], about))
                first += len(search.queries)
        except Exception as error:
            undone = [search for search in batch if not search.answer.done()]
            for search in undone:
                if len(batch) == 1:
                    search.end(error=_as_api_error(error))
                else:
                    self._answer([search])

    def _search(self, batch: list[PendingSearch]) -> tuple[Neighbors, dict[str, int]]:
        """The neighbors of all queries of a batch, and how many shards answered, where there are shards."""
        first, queries = batch[0], [query for search in batch for query in search.queries]
        retriever = copy(self.retriever)
        retriever.retrieved_len = first.retrieved_len
        excluded = None if first.exclude_documents is None else [n for s in batch for n in s.exclude_documents]
        against = {} if first.against is None else {"against": [text for s in batch for text in s.against]}
        found = retriever(queries, first.num_neighbors, exclude_documents=excluded, **against)
        shards = shards_of(retriever)
        return found, {} if shards is None else {"shards_answered": shards.shards_answered}


def shards_of(retriever: Retriever) -> Any:
    """A retriever's sharded search, if it has one: behind filters or not."""
    index = getattr(retriever.index, "inner", retriever.index)
    return index if hasattr(index, "shards_total") else None


def _as_api_error(error: Exception) -> ApiError:
    """What the user can mend is told; of the rest that the log has it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    if isinstance(error, ConnectionError | TimeoutError):
        return ApiError(503, str(error))
    logger.error("a search failed", exc_info=error)
    return ApiError(500, "the search failed; the server's log says why.")


def _closed() -> ApiError:
    return ApiError(503, "the server is shutting down.", code="shutting_down")
