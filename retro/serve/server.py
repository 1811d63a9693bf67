"""Opens a model's stores and listens."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retro.provenance import check_store, own_index
from retro.retrieval import Retriever, Store
from retro.retrieval.remote.client import RemoteRetriever, is_url
from retro.retrieval.search.lexical import KINDS
from retro.retrieval.search.searchers import embedder_of, is_keyless, parse_kind
from retro.serve.engine import GenerationEngine
from retro.web.listening import listen, names_of

if TYPE_CHECKING:
    from fastapi import FastAPI


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


def serve_app(
    engine: GenerationEngine, name: str, host: str, port: int, api_key: str | None
) -> tuple[FastAPI, socket.socket]:
    """The application and the socket it shall listen on."""
    from retro.serve.app import create_app

    bound = listen(host, port)
    return create_app(engine, name, api_key, names_of(bound, host, api_key)), bound
