"""Text to neighbors: chunks, embedder, store, index, neighbor tables, retriever. Names load on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BuildSettings": "build",
    "build_store": "build",
    "TokenizedDocument": "chunks",
    "tokenize_document": "chunks",
    "tokenizer_fingerprint": "chunks",
    "Embedder": "embedder",
    "load_embedder": "embedder",
    "near_copies": "filters",
    "Index": "index",
    "build_index": "index",
    "open_index": "index",
    "NeighborTable": "neighbors",
    "build_neighbors": "neighbors",
    "open_neighbors": "neighbors",
    "RemoteRetriever": "remote",
    "Neighbors": "retriever",
    "Retriever": "retriever",
    "Source": "retriever",
    "open_sharded": "sharded",
    "Store": "store",
    "add_documents": "updates",
    "compact": "updates",
    "remove_documents": "updates",
    "verify_store": "verifying",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
