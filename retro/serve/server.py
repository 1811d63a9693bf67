"""Opens a model's stores and listens."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retro.loading import load
from retro.retrieval import Retriever
from retro.retrieval.remote.client import is_url
from retro.serve.engine import Engine
from retro.web.listening import listen, names_of

if TYPE_CHECKING:
    from fastapi import FastAPI


def load_with_stores(
    model: Any, places: Sequence[str], index: str = "auto", base: Any = None
) -> tuple[Any, Any, dict[str, Retriever]]:
    """A model, its tokenizer, and retrievers by the name of their store, in the order given.

    model, index, base: see `retro.load`. places: PATH (called as its folder), the address of a retrieval server (called
    as its host), or NAME=PATH.

    Raises ValueError for a name given twice and a store that the model cannot read.
    """
    tokenizer, stores = None, {}
    for place in places:
        name, _, path = place.rpartition("=")
        name = name or (urlsplit(path).netloc if is_url(path) else Path(path).resolve().name)
        if name in stores:
            raise ValueError(f"two stores are called {name}; call one of them otherwise, --store NAME=PATH.")
        how = {"tokenizer": tokenizer, "base": base if tokenizer is None else None}  # the model is loaded once
        model, tokenizer, stores[name] = load(model, path, index=index, **how)
    return model, tokenizer, stores


def serve_app(engine: Engine, name: str, host: str, port: int, api_key: str | None) -> tuple[FastAPI, socket.socket]:
    """The application and the socket it shall listen on."""
    from retro.serve.app import create_app

    bound = listen(host, port)
    return create_app(engine, name, api_key, names_of(bound, host, api_key)), bound
