"""Text to neighbors: chunks, embedder, store, index, neighbor tables, retriever. Names load on demand."""

from retro.common.lazy import on_demand

_HOME = {
    "BuildSettings": "retro.retrieval.building.settings",
    "build_store": "retro.retrieval.building.build",
    "TokenizedDocument": "retro.text.chunks",
    "tokenize_document": "retro.text.chunks",
    "tokenizer_fingerprint": "retro.text.chunks",
    "Embedder": "retro.retrieval.embedding.embedder",
    "load_embedder": "retro.retrieval.embedding.embedder",
    "near_copies": "retro.retrieval.filters",
    "Index": "retro.retrieval.search.index",
    "build_index": "retro.retrieval.search.index",
    "open_index": "retro.retrieval.search.index",
    "NeighborTable": "retro.retrieval.building.neighbors",
    "build_neighbors": "retro.retrieval.building.neighbors",
    "open_neighbors": "retro.retrieval.building.neighbors",
    "RemoteRetriever": "retro.retrieval.remote.client",
    "Neighbors": "retro.retrieval.neighbors",
    "Retriever": "retro.retrieval.retriever",
    "Source": "retro.retrieval.neighbors",
    "open_sharded": "retro.retrieval.search.sharded",
    "Store": "retro.retrieval.store.store",
    "add_documents": "retro.retrieval.building.updates",
    "compact": "retro.retrieval.building.compact",
    "remove_documents": "retro.retrieval.building.updates",
    "verify_store": "retro.retrieval.building.verify",
}

__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
