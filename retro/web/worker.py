"""A thread that works off what waits for it."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Worker")


class Worker:
    """A context in which one thread runs `_work`. `_changed` guards `_waiting` and `_closed`, and tells of a change."""

    def __init__(self, thread_name: str) -> None:
        self._waiting: list[Any] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=thread_name, daemon=True)

    def __enter__(self: _Self) -> _Self:
        self._thread.start()
        return self

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def _work(self) -> None:
        """Until `_closed`."""
        raise NotImplementedError

    def _close(self, seconds: float | None = None) -> None:
        """Let the thread end, and wait for it, or for so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
