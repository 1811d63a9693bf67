"""A datastore as a retriever of LlamaIndex. Needs `pip install "retro-lm[llama-index]"`."""

from __future__ import annotations

from typing import Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from retro.retrieval.retriever import passages


class LlamaIndexRetriever(BaseRetriever):
    """The k nearest chunks of a text, each with what follows it, as LlamaIndex's nodes.

    Arguments:
        retriever: a `Retriever` or `RemoteRetriever`.
        k: default: the retriever's.
    """

    def __init__(self, retriever: Any, k: int | None = None, **given: Any) -> None:
        self.retriever, self.k = retriever, k
        super().__init__(**given)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = passages(self.retriever, query_bundle.query_str, self.k)
        return [NodeWithScore(node=TextNode(id_=n, text=text, metadata=about), score=s) for n, text, s, about in found]
