"""Text to neighbors: chunks, embedder, store, index, neighbor tables, retriever. Names load on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BuildSettings": "building.build",
    "build_store": "building.build",
    "TokenizedDocument": "chunks",
    "tokenize_document": "chunks",
    "tokenizer_fingerprint": "chunks",
    "Embedder": "embedding.embedder",
    "load_embedder": "embedding.embedder",
    "near_copies": "filters",
    "Index": "indexing.index",
    "build_index": "indexing.index",
    "open_index": "indexing.index",
    "NeighborTable": "neighbors",
    "build_neighbors": "neighbors",
    "open_neighbors": "neighbors",
    "RemoteRetriever": "remote",
    "Neighbors": "retriever",
    "Retriever": "retriever",
    "Source": "retriever",
    "open_sharded": "indexing.sharded",
    "Store": "store",
    "add_documents": "building.updates",
    "compact": "building.updates",
    "remove_documents": "building.updates",
    "verify_store": "verifying",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
