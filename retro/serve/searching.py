"""The searches of one store: each has an end, and a store that fails is spared for a while."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any

from retro.web.errors import ApiError
from retro.web.worker import Worker

_FIRST_REST, _LONGEST_REST = 1.0, 32.0  # seconds
logger = logging.getLogger(__name__)


class StoreSearch(Worker):
    """A retriever whose searches run in a thread of their own, one at a time; a context in which that thread runs.

    A search that is late is left behind. Behind it, and after one whose store could not be reached, a circuit breaker
    (Nygard, Release It!) refuses all others: for a second first, then for ever longer until one succeeds.

    Arguments:
        name: of the store, for errors.
        seconds: that a search may take.
    """

    def __init__(self, name: str, retriever: Callable[..., Any], seconds: float) -> None:
        super().__init__(f"retro-serve-search-{name}")
        self.name, self.retriever, self.seconds = name, retriever, seconds
        self._latest: Future[Any] = Future()
        self._left_behind: Future[Any] | None = None
        self._rest, self._again_at = 0.0, 0.0

    def __exit__(self, *error: object) -> None:
        """A search that runs is left behind."""
        self._close(0)
        self._latest.cancel()

    @property
    def is_down(self) -> bool:
        """Whether searches are refused."""
        hangs = self._left_behind is not None and not self._left_behind.done()
        return hangs or time.monotonic() < self._again_at

    def check(self) -> None:
        """Raises ApiError 503 while the store is spared, and at shutdown."""
        if self._closed:
            raise ApiError(503, "the server is shutting down.", code="shutting_down")
        if self.is_down:
            said = f"the store {self.name} does not answer at present; try again later, or another store."
            raise ApiError(503, said, "retro.store", "store_down", _retry_after(self._again_at - time.monotonic()))

    def __call__(self, queries: Any, **options: Any) -> Any:
        """What the retriever finds; ApiError 504 if it is late, 503 if it cannot be reached or is spared."""
        self.check()
        asked: Future[Any] = Future()
        with self._changed:
            self._latest = asked
            self._waiting.append((asked, partial(self.retriever, queries, **options)))
            self._changed.notify_all()
        try:
            error = asked.exception(self.seconds)
        except futures.TimeoutError:
            self._left_behind, error = asked, TimeoutError(f"nothing was found in {self.seconds:g} seconds")
        except futures.CancelledError:  # at shutdown
            self.check()
            raise
        if isinstance(error, OSError):
            raise self._failed(error) from error
        self._rest = 0.0
        return asked.result()

    def _failed(self, error: OSError) -> ApiError:
        self._rest = min(max(2 * self._rest, _FIRST_REST), _LONGEST_REST)
        self._again_at = time.monotonic() + self._rest
        logger.warning("the store %s is spared for %g seconds: %s", self.name, self._rest, error)
        if isinstance(error, TimeoutError):
            said = f"the store {self.name} has not answered in {self.seconds:g} seconds; try again later."
            return ApiError(504, said, "retro.store", "store_late")
        said = f"the store {self.name} cannot be reached, as the server's log says; try again later."
        return ApiError(503, said, "retro.store", "store_down", _retry_after(self._rest))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                asked, search = self._waiting.pop()
            with suppress(InvalidStateError):  # cancelled meanwhile
                try:
                    found = search()
                except BaseException as error:
                    asked.set_exception(error)
                else:
                    asked.set_result(found)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
