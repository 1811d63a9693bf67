"""A retrieval server: the searches of one store over HTTP, for trainers and samplers on other machines.

    GET  /v1/store                       what is served: fingerprints, counts, index, limits
    GET  /v1/store/tokenizer/{name}      a file of the tokenizer
    GET  /v1/store/{array}               searchable_rows, document_ids
    POST /v1/search                      queries to neighbors
    POST /v1/rows                        rows to their values [N, F], to document rows, or to sources
    GET  /health

Requests are JSON, answers of arrays what `retro.retrieval.remote.wire` packs, errors one sentence. `RemoteRetriever` is
the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.responses import JSONResponse, Response

from retro.retrieval.remote.limits import RetrievalLimits
from retro.retrieval.remote.searches import PendingSearch, SearchQueue, shards_of
from retro.retrieval.remote.wire import COUNTS, LIMITS, MEDIA_TYPE, ROW_TOKENS, pack, pack_sources
from retro.retrieval.store.format import read_tokenizer_files
from retro.version import __version__
from retro.web.errors import HALF, MOST, ApiError, declared
from retro.web.guard import Guard, answer_errors, unless_gone

if TYPE_CHECKING:
    from retro.retrieval.retriever import Retriever
    from retro.retrieval.store.store import Store


_PACKED: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {}}}}
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
_Whole = Annotated[int, Field(ge=-MOST, lt=MOST), WithJsonSchema({"type": "integer"})]
_Size = Annotated[_Whole, WithJsonSchema({"type": "integer", "minimum": 1})]  # 0 has a sentence of its own


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    store_fingerprint: str | None = None  # refused if another store is served by now


class SearchRequest(_Request):
    """Texts, or token ids without padding, and what a Retriever is called with."""

    queries: list[str] | list[list[_Whole]]
    num_neighbors: _Size | None = None
    retrieved_len: _Size | None = None
    exclude_documents: list[list[str]] | None = None
    against: list[str] | None = None


class RowsRequest(_Request):
    rows: list[_Whole]
    what: Literal["values", "document_rows", "sources"] = "values"
    retrieved_len: _Size | None = None


def create_retrieval_app(
    retriever: Retriever,
    limits: RetrievalLimits | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application, which searches from its startup to its shutdown.

    Arguments:
        api_key: bearer token that /v1 asks for; None asks for none.
        hosts: names by which the server may be called; None takes any.
    """
    limits = limits or RetrievalLimits()
    queue = SearchQueue(retriever, limits)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        with queue:
            yield

    about = {"title": "retro serve-store", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, lifespan=running, responses=declared(400, 403, 404, 413, 500))
    app.add_middleware(Guard, api_key=api_key, max_bytes=limits.max_request_bytes, hosts=hosts)
    routes = APIRouter(prefix="/v1")
    _add_search(routes, queue)
    _add_store(routes, retriever, limits)
    app.include_router(routes, responses=declared(401))

    @app.get("/health", responses={503: {"description": "Shutting down"}})
    async def health() -> JSONResponse:
        status = "ok" if queue.is_alive else "shutting down"
        return JSONResponse({"status": status, **queue.load}, 200 if queue.is_alive else 503)

    answer_errors(app)
    app.state.stop = queue.stop
    return app


def _about(retriever: Retriever, limits: RetrievalLimits) -> dict[str, Any]:
    """What a client checks at its connection, and what it must know of the store."""
    store, index, shards = retriever.store, retriever.index, shards_of(retriever)
    named = ("tokenizer", "embedder", "chunk_len", "pad_token_id", "format_version", "generation", "counts")
    of_index = {"kind": index.kind, "num_rows": index.num_rows, "recall": float(index.recall)}
    return {
        "library_version": __version__,
        "name": store.path.name,
        "fingerprint": store.fingerprint,
        "manifest": {name: store.manifest[name] for name in named},
        "counts": {name: getattr(store, name) for name in COUNTS},
        "index": of_index | {"shards_total": None if shards is None else shards.shards_total},
        "num_neighbors": retriever.num_neighbors,
        "retrieved_len": retriever.retrieved_len,
        "limits": {name: getattr(limits, name) for name in LIMITS},
    }


def _check_store(asked: str | None, store: Store) -> None:
    if asked not in (None, store.fingerprint):
        raise ApiError(
            409,
            f"this server has another store by now, or another state of it ({store.fingerprint[:12]}, not "
            f"{asked[:12]}); connect again.",
            "store_fingerprint",
            "store_changed",
        )


# Searching


def _add_search(routes: APIRouter, queue: SearchQueue) -> None:
    retriever, limits = queue.retriever, queue.limits

    @routes.post("/search", response_class=Response, responses=_PACKED | declared(409, 429, 503, 504))
    async def search(request: Request, asked: SearchRequest) -> Response:
        _check_store(asked.store_fingerprint, retriever.store)
        wanted = _checked(asked, retriever, limits)
        queue.submit(wanted)
        return Response(await unless_gone(request, _answer(wanted, limits.max_seconds)), media_type=MEDIA_TYPE)


async def _answer(search: PendingSearch, seconds: float) -> bytes:
    """The packed answer; ApiError 504 when time runs out. A search that nobody waits for is not begun."""
    answer = asyncio.wrap_future(search.answer)
    try:
        done, _ = await asyncio.wait({answer}, timeout=seconds)
        if not done:
            raise ApiError(504, f"the search was not done in {seconds:g} seconds; ask for less, or later.")
        return answer.result()
    finally:
        answer.cancel()


def _checked(asked: SearchRequest, retriever: Retriever, limits: RetrievalLimits) -> PendingSearch:
    """The search that a request asks for; ApiError 400 for what this server does not take."""
    k = retriever.num_neighbors if asked.num_neighbors is None else asked.num_neighbors
    r = retriever.retrieved_len if asked.retrieved_len is None else asked.retrieved_len
    num = len(asked.queries)
    _check_range("queries", num, 0, limits.max_queries, " of them")
    _check_range("num_neighbors", k, 1, limits.max_neighbors)
    _check_range("retrieved_len", r, 1, limits.max_retrieved_len)
    if num * k * r > limits.max_answer_tokens:
        said = f"{num} queries x {k} neighbors x {r} tokens are more than {limits.max_answer_tokens}; ask for less."
        raise ApiError(400, said, "queries", "answer_too_large")
    for name in ("exclude_documents", "against"):
        given = getattr(asked, name)
        if given is not None and len(given) != num:
            raise ApiError(400, f"{name} has {len(given)} items for {num} queries; give one for each.", name)
    _check_queries(asked.queries, len(retriever.store.tokenizer), limits)
    excluded = None if asked.exclude_documents is None else [set(names) for names in asked.exclude_documents]
    return PendingSearch(asked.queries, k, r, excluded, asked.against)


def _check_range(name: str, value: int, low: int, high: int, of: str = "") -> None:
    if not low <= value <= high:
        raise ApiError(400, f"{name} is {value}{of}; this server takes {low} to {high}.", name, "out_of_range")


def _check_queries(queries: Sequence[str] | Sequence[Sequence[int]], num_tokens: int, limits: RetrievalLimits) -> None:
    for place, query in enumerate(queries):
        if isinstance(query, str):
            try:
                size, most = len(query.encode()), limits.max_query_bytes
            except UnicodeEncodeError:
                raise ApiError(400, HALF, f"queries.{place}") from None
        else:
            size, most = len(query), limits.max_query_tokens
            if query and not 0 <= min(query) <= max(query) < num_tokens:
                wrong = min(query) if min(query) < 0 else max(query)
                said = f"queries.{place} holds token {wrong}; the store's tokenizer has 0 to {num_tokens - 1}."
                raise ApiError(400, said, f"queries.{place}", "out_of_range")
        if size > most:
            unit = "bytes" if isinstance(query, str) else "tokens"
            said = f"queries.{place} has {size} {unit}; this server takes at most {most}."
            raise ApiError(400, said, f"queries.{place}", "query_too_long")


# The store


def _add_store(routes: APIRouter, retriever: Retriever, limits: RetrievalLimits) -> None:
    store, about = retriever.store, _about(retriever, limits)
    files = read_tokenizer_files(store.path, store.manifest)

    @routes.get("/store")
    async def described() -> dict[str, Any]:
        return about

    @routes.get("/store/tokenizer/{name:path}", response_class=Response, responses=_FILE)
    async def tokenizer(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the tokenizer has no file of that name; it has {', '.join(files)}.")
        return Response(files[name], media_type="application/octet-stream")

    @routes.get("/store/searchable_rows", response_class=Response, responses=_PACKED)
    def searchable_rows() -> Response:
        return Response(pack({}, {"rows": store.searchable_rows}), media_type=MEDIA_TYPE)

    @routes.get("/store/document_ids")
    def document_ids() -> list[str]:
        return store.document_ids

    @routes.post("/rows", response_class=Response, responses=_PACKED | declared(409))
    def rows(asked: RowsRequest) -> Response:
        _check_store(asked.store_fingerprint, store)
        return Response(pack(*_of_rows(retriever, asked, limits)), media_type=MEDIA_TYPE)


def _of_rows(retriever: Retriever, asked: RowsRequest, limits: RetrievalLimits) -> tuple[Any, dict[str, np.ndarray]]:
    """What is asked of rows, as `pack` takes it; ApiError 400 for rows that are not there, and too many."""
    store, is_values = retriever.store, asked.what == "values"
    length = store.chunk_len if asked.retrieved_len is None else asked.retrieved_len
    _check_range("retrieved_len", length, 1, limits.max_retrieved_len)
    _check_range(
        "rows", len(asked.rows), 0, limits.max_answer_tokens // (length if is_values else ROW_TOKENS), " of them"
    )
    least = 0 if asked.what == "document_rows" else -1
    if asked.rows and not least <= min(asked.rows) <= max(asked.rows) < store.num_chunks:
        wrong = min(asked.rows) if min(asked.rows) < least else max(asked.rows)
        raise ApiError(400, f"rows holds {wrong}; the store has {least} to {store.num_chunks - 1}.", "rows")
    rows = np.asarray(asked.rows, np.int64)
    if asked.what == "document_rows":
        return {}, {"document_rows": store.document_rows(rows)}
    if asked.what == "sources":
        return pack_sources(retriever.sources(rows[None])[0]), {}
    tokens, mask = store.values(rows, length)
    return {}, {"tokens": tokens.astype(np.int32), "mask": mask}
