"""The connections of a server: how many there may be, how long they may take, and how they end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 100  # connections that wait to be taken, and that asyncio takes at once
_SEND_SECONDS = 60.0  # that a client has to send a whole request, and to take some more of an answer
_LAST_SECONDS = 1.0  # that are left for errors to be sent at shutdown
_QUIET_SECONDS = 60.0  # between two warnings that handles are short
logger = logging.getLogger(__name__)


def make_server(app: Any, grace_seconds: float) -> uvicorn.Server:
    """A server of an application whose `state.stop` ends all that has not ended `grace_seconds` after its shutdown."""
    connection = partial(HttpConnection, most=_most_connections(), seconds=_SEND_SECONDS)
    config = uvicorn.Config(app, http=connection, loop="asyncio", backlog=BACKLOG, log_level="info")
    config.timeout_graceful_shutdown = math.ceil(grace_seconds + 2 * _LAST_SECONDS)  # nothing should be left by then
    return HttpServer(config, grace_seconds, app.state.stop)


def _most_connections() -> int:
    """What the handles of this process allow beside those that are open, some of them left to searches and files."""
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    left = (1 << 20 if handles == resource.RLIM_INFINITY else handles) - len(os.listdir("/dev/fd"))
    return max(left - 2 * BACKLOG, left // 2, 1)


class HttpServer(uvicorn.Server):
    """uvicorn's, which neither floods its log when handles are short nor cancels what it could answer."""

    def __init__(self, config: uvicorn.Config, grace_seconds: float, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._grace_seconds, self._stop, self._warned_at = grace_seconds, stop, -math.inf

    async def startup(self, sockets: list[Any] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace_seconds, self._stop)
        loop.call_later(self._grace_seconds + _LAST_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        """Cut what neither sends its request nor takes its answer."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """That handles are short for new connections, which asyncio tries again every second, is said now and then."""
        if not context["message"].startswith("socket.accept() out of system resource"):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._warned_at + _QUIET_SECONDS:
            self._warned_at = time.monotonic()
            logger.warning("new connections have to wait: %s; raise `ulimit -n`", context["exception"])


class HttpConnection(H11Protocol):
    """One connection as uvicorn speaks HTTP/1.1.

    Arguments:
        most: connections at a time; one more is closed.
        seconds: for a whole request to come; also those in which a client takes at least a little of its answer.
    """

    def __init__(self, *args: Any, most: int, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most, self._seconds, self._unsent = most, seconds, 0
        self._request_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._request_timer = _cancelled(self._request_timer)
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._request_timer, self._answer_timer = _cancelled(self._request_timer), _cancelled(self._answer_timer)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(self._seconds, self._check_answer)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_timer = _cancelled(self._answer_timer)

    def _watch_request(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._request_timer = _cancelled(self._request_timer)
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self._seconds, self.transport.abort)

    def _check_answer(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= self._unsent:
            self.transport.abort()
        else:
            self._unsent, self._answer_timer = left, self.loop.call_later(self._seconds, self._check_answer)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
