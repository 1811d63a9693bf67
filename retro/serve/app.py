"""The routes: OpenAI's, the stores, health, and the page."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import retro
from retro.serve.engine import Engine
from retro.serve.errors import ApiError, validation_error
from retro.serve.requests import ChatRequest, CompletionRequest, RowMaker
from retro.serve.responses import Answer, gather, stream, submit, unless_gone

STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(engine: Engine, name: str, api_key: str | None = None, hosts: Sequence[str] | None = None) -> FastAPI:
    """The server as an ASGI application, which runs the engine from its startup to its shutdown.

    Arguments:
        name: of the model.
        api_key: bearer token that /v1 asks for; None asks for none.
        hosts: names by which the server may be called; None takes any. They keep pages of other sites, whose names can
            be made to point here (DNS rebinding), from a server without a token.
    """

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(title="retro serve", version=retro.__version__, lifespan=running, docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, api_key=api_key, max_bytes=engine.limits.max_request_bytes, hosts=hosts)
    app.include_router(_openai_routes(engine, name), prefix="/v1")
    _add_page(app, engine)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


def _openai_routes(engine: Engine, name: str) -> APIRouter:
    routes, maker = APIRouter(), RowMaker(engine)

    @routes.post("/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        _check_model(asked.model, name)
        rows, prompts = maker.of_completion(asked)
        return await _answer(request, asked, Answer(False, name, rows, asked.n or 1, prompts), engine)

    @routes.post("/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        _check_model(asked.model, name)
        return await _answer(request, asked, Answer(True, name, maker.of_chat(asked), asked.n or 1), engine)

    _add_lists(routes, name, _about_model(engine, name, maker), [_about_store(store, maker) for store in engine.stores])
    return routes


async def _answer(request: Request, asked: Any, answer: Answer, engine: Engine) -> Response:
    events = submit(engine, answer.rows)
    if not asked.stream:
        return JSONResponse(await unless_gone(request, gather(answer, events)))
    first = await unless_gone(request, anext(events))  # an error before the first token still has its status
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    parts = stream(answer, first, events, include_usage)
    return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _add_lists(routes: APIRouter, name: str, about_model: dict[str, Any], about_stores: list[dict[str, Any]]) -> None:
    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about_model]}

    @routes.get("/models/{asked:path}")
    async def model(asked: str) -> dict[str, Any]:
        _check_model(asked, name)
        return about_model

    @routes.get("/stores")
    async def stores() -> dict[str, Any]:
        """The datastores to choose from; the first is the default."""
        return {"object": "list", "data": about_stores}


def _about_model(engine: Engine, name: str, maker: RowMaker) -> dict[str, Any]:
    config = engine.model.config
    about = {"chunk_len": config.chunk_len, "num_neighbors": config.num_neighbors, "chat": maker.can_chat}
    about |= {"max_prompt_tokens": maker.max_prompt_tokens, "max_new_tokens": maker.max_new_tokens()}
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "retro", "retro": about}


def _about_store(name: str, maker: RowMaker) -> dict[str, Any]:
    store = maker.engine.stores[name].store
    counts = {"num_documents": store.num_documents, "num_chunks": store.num_chunks}
    return {"id": name, "object": "store", **counts, "max_num_neighbors": maker.max_neighbors(name)}


def _add_page(app: FastAPI, engine: Engine) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.is_alive else "shutting down"
        return JSONResponse({"status": status, **engine.load}, 200 if engine.is_alive else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))


def _check_model(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, f"this server has no model of that name; its model is {name}.", "model", "model_not_found")


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
        return ApiError(405, f"{request.url.path} does not take {request.method}.", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


class _Guard:
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
