"""The rows that read from one store, batch after batch, beside those of other stores."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from retro.serve.rows import Row, RowCancelled
from retro.serve.searching import StoreSearch
from retro.web.errors import ApiError
from retro.web.worker import Worker

_GATHER_SECONDS = 0.02  # how long the first row of a batch waits for others that come at the same moment
logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full."""


class Turn:
    """A lock that goes to whoever has waited longest."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Event] = deque()  # the first of them has the turn
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            self._waiting[0].set()
        mine.wait()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Whoever has the turn lets others have it, and waits to have it again."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Lane(Worker):
    """The rows of one store, or those that read from none; a context in which their thread runs.

    A batch holds rows of one k. Rows that come later wait for the next batch; the longest waiting one is always in it.

    Arguments:
        search: of the store; None: rows that read from none.
        run: continues a batch to its end. Lanes call it one at a time, and pass the turn on while they search.
    """

    def __init__(
        self,
        search: StoreSearch | None,
        run: Callable[[Sequence[Row], Callable[..., Any] | None], None],
        turn: Turn,
        max_batch: int,
        max_queue: int,
    ) -> None:
        super().__init__(f"retro-serve-{'off' if search is None else search.name}")
        self.search, self._run, self._turn = search, run, turn
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: list[Row]
        self.running: list[Row] = []
        self._failure: ApiError | None = None

    def __enter__(self) -> Lane:
        if self.search is not None:
            self.search.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """End all rows and wait for the thread."""
        self.stop()
        if self.search is not None:
            self.search.__exit__()
        self._close()

    def stop(self) -> None:
        """Take no further rows, and end all with `RowCancelled`, whatever they wait for."""
        with self._changed:
            self._closed = True  # from here on no further row runs
            self._changed.notify_all()
            rows = self.running + self._waiting
        for row in rows:
            row.cancelled = True
            row.end("error", RowCancelled())

    @property
    def load(self) -> tuple[int, int]:
        """How many rows wait and how many are being written."""
        with self._changed:
            return len(self._waiting), sum(not row.finished for row in self.running)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows; raises QueueFull if they do not all fit, ApiError if their store is down, RowCancelled at
        shutdown."""
        with self._changed:
            if not self.is_alive:
                raise RowCancelled
            self._drop_cancelled()
            if len(self._waiting) + len(rows) > self._max_queue:
                raise QueueFull
            if self.search is not None:
                self.search.check()
            self._waiting.extend(rows)
            self._changed.notify_all()

    def _drop_cancelled(self) -> None:
        self._waiting = [row for row in self._waiting if not row.cancelled]

    def _work(self) -> None:
        while rows := self._next_batch():
            try:
                if self.search is not None:
                    self.search.check()
                with self._turn:
                    self._run(rows, self._searched if self.search else None)
            except Exception as error:  # one batch's failure is its own; the thread lives on
                told = error if isinstance(error, ApiError) else error.__cause__
                if not isinstance(told, ApiError):
                    logger.exception("a batch of %d rows failed", len(rows))
                for row in rows:
                    row.end("error", told if isinstance(told, ApiError) else error)
            with self._changed:
                self.running, self._failure = [], None

    def _searched(self, queries: Any, **options: Any) -> Any:
        """What the store finds; where it fails, a batch says of all its searches what it says of the first."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._turn.passed_on():
                return self.search(queries, **options)
        except ApiError as error:
            self._failure = error
            raise

    def _next_batch(self) -> list[Row]:
        """The rows that go with the longest waiting one; none at shutdown."""
        with self._changed:
            while not self._closed:
                self._drop_cancelled()
                if len(self._waiting) >= self._max_batch or self._gathered():
                    break
                self._changed.wait(_GATHER_SECONDS if self._waiting else None)
            if self._closed:
                return []
            alike = [row for row in self._waiting if row.group == self._waiting[0].group]
            self.running = alike[: self._max_batch]
            self._waiting = [row for row in self._waiting if row not in self.running]
            return self.running

    def _gathered(self) -> bool:
        return bool(self._waiting) and time.monotonic() >= self._waiting[0].came_at + _GATHER_SECONDS
