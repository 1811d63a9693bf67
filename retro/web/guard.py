"""What every server here does with requests: who may ask, how errors are told, and what happens when clients go."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro.web.errors import ApiError, validation_error

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
T = TypeVar("T")


def answer_errors(app: FastAPI) -> None:
    """Errors as JSON of one sentence; what nobody foresaw says no more than that the log has it."""
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, but no longer than the client does; then it is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HTTPException(499, "the client has gone.")  # nobody reads it
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = validation_error(error.errors())
    elif isinstance(error, HTTPException):
        error = _http_error(request, error)
    return _error(error if isinstance(error, ApiError) else ApiError(500, "the server failed; its log says why."))


def _http_error(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"nothing is at {request.url.path}; /openapi.json has the routes.", code="not_found")
    if error.status_code == 405:
        return ApiError(
            405, f"{request.url.path} does not take {request.method}.", code="method_not_allowed", headers=error.headers
        )
    return ApiError(error.status_code, str(error.detail))


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


class Guard:
    """Around all routes: who may ask, how much, and what browsers may do with the answer."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int, hosts: Sequence[str] | None) -> None:
        self._app, self._api_key, self._max_bytes, self._hosts = app, api_key, max_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        error = self._refusal(scope["path"], Headers(scope=scope))
        answer = self._app if error is None else _error(error)
        await answer(scope, self._limited(receive), send_with_headers)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            return ApiError(403, f"without a token this server answers only as {' or '.join(self._hosts)}.")
        if path.startswith("/v1") and not self._is_allowed(headers.get("authorization", "")):
            return ApiError(401, "the bearer token is missing or wrong.", code="invalid_api_key")
        size = headers.get("content-length", "0")
        return self._too_large() if not size.isdecimal() or int(size) > self._max_bytes else None

    def _is_allowed(self, given: str) -> bool:
        """Takes the same time whatever the token."""
        scheme, _, token = given.partition(" ")
        if self._api_key is None:
            return True
        same = hmac.compare_digest(token.encode("latin-1"), self._api_key.encode("latin-1"))
        return same and scheme.lower() == "bearer"

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._max_bytes} bytes.", code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """Counts a body that does not say its size."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    host = host.lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
