"""The routes: OpenAI's, the stores, health, and the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from retro.serve.engine import Engine
from retro.serve.requests import ChatRequest, CompletionRequest, RowMaker
from retro.serve.responses import Answer, gather, stream, submit
from retro.version import __version__
from retro.web.errors import ApiError, declared
from retro.web.guard import Guard, answer_errors, unless_gone

_STREAM = {"application/json": {}, "text/event-stream": {}}
_WRITTEN: dict[int | str, dict[str, Any]] = {200: {"content": _STREAM}, **declared(429, 503, 504)}
STATIC = Path(__file__).parent / "static"


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

    about = {"title": "retro serve", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, lifespan=running, responses=declared(400, 403, 404, 413, 500))
    app.add_middleware(Guard, api_key=api_key, max_bytes=engine.limits.max_request_bytes, hosts=hosts)
    app.include_router(_openai_routes(engine, name), prefix="/v1", responses=declared(401))
    _add_page(app, engine)
    answer_errors(app)
    app.state.stop = engine.stop
    return app


def _openai_routes(engine: Engine, name: str) -> APIRouter:
    routes, maker = APIRouter(), RowMaker(engine)

    @routes.post("/completions", responses=_WRITTEN)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        _check_model(asked.model, name)
        return await _answer(request, asked, Answer(False, name, maker.of_completion(asked), asked.n or 1), engine)

    @routes.post("/chat/completions", responses=_WRITTEN)
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
    counts = {"num_documents": store.num_live_documents, "num_chunks": store.num_live_chunks}
    return {"id": name, "object": "store", **counts, "max_num_neighbors": maker.max_neighbors(name)}


def _add_page(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", responses={503: {"description": "Shutting down"}})
    async def health() -> JSONResponse:
        status = "ok" if engine.is_alive else "shutting down"
        about = {"status": status, **engine.load, "stores_down": engine.stores_down}
        return JSONResponse(about, 200 if engine.is_alive else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))


def _check_model(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, f"this server has no model of that name; its model is {name}.", "model", "model_not_found")
