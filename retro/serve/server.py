"""Opens a model's stores and listens."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retro.provenance import check_store, own_index
from retro.retrieval import Retriever, Store
from retro.retrieval.indexing.lexical import KINDS
from retro.retrieval.indexing.search import embedder_of, is_keyless, parse_kind
from retro.retrieval.remote import RemoteRetriever, is_url
from retro.serve.engine import Engine

if TYPE_CHECKING:
    from fastapi import FastAPI

API_KEY = "RETRO_API_KEY"
logger = logging.getLogger(__name__)


def open_stores(given: Sequence[str], model_folder: str, model: Any, index: str = "auto") -> dict[str, Retriever]:
    """Retrievers by the name of their store, in the order given: PATH (called as its folder), the address of a
    retrieval server (called as its host), or NAME=PATH.

    Stores of the same embedder share it. Raises ValueError for a name given twice and a store that the model cannot
    read.
    """
    stores: dict[str, Retriever] = {}
    embedders: dict[str, Any] = {}
    for place in given:
        name, _, path = place.rpartition("=")
        name = name or (urlsplit(path).netloc if is_url(path) else Path(path).resolve().name)
        if name in stores:
            raise ValueError(f"two stores are called {name}; call one of them otherwise, --store NAME=PATH.")
        remote = RemoteRetriever(path) if is_url(path) else None
        store = Store.open(path) if remote is None else remote.store
        check_store(model_folder, store)
        stores[name] = _retriever(store, own_index(model_folder, store, index), embedders) if remote is None else remote
        stores[name].retrieved_len = getattr(model.config, "retrieved_len", 2 * store.chunk_len)
    return stores


def _retriever(store: Store, index: str, embedders: dict[str, Any]) -> Retriever:
    embedder = None
    if any(part not in KINDS for part in parse_kind(index.partition(">")[0], is_keyless(store))):
        embedder = embedders.get(store.embedder_fingerprint) or embedder_of(store)
        embedders[store.embedder_fingerprint] = embedder
    return Retriever(store, index, embedder)


def read_api_key(file: str | None) -> str | None:
    """The bearer token: the file's content, else that of the environment's RETRO_API_KEY; None if there is neither."""
    key = os.environ.get(API_KEY) if file is None else Path(file).read_text(encoding="utf-8", errors="replace").strip()
    if key is None:
        return None
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"the token in {file or API_KEY} is empty or not ASCII without spaces; write another.")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host} port {port} ({error}); give another --host or --port.") from None


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_app(engine: Engine, name: str, host: str, port: int, api_key: str | None) -> tuple[FastAPI, socket.socket]:
    """The application and the socket it shall listen on."""
    from retro.serve.app import create_app

    bound = listen(host, port)
    return create_app(engine, name, api_key, names_of(bound, host, api_key)), bound


def names_of(bound: socket.socket, host: str, api_key: str | None) -> list[str] | None:
    """The names by which a server without a token may be called on its own machine; None if any will do.

    Warns of one that others can reach and that asks for no token.
    """
    local = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
    if not local and api_key is None:
        logger.warning("anyone who reaches %s may ask, and read the stores; give --api-key-file.", host)
    names = dict.fromkeys([f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"])
    return list(names) if local and api_key is None else None


def run(app: FastAPI, bound: socket.socket, grace_seconds: float) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what has begun, for at most `grace_seconds`."""
    import uvicorn

    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=max(1, round(grace_seconds)))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after its shutdown, which is a good end
    uvicorn.Server(config).run(sockets=[bound])
