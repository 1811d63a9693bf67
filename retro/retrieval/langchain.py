"""A datastore as a retriever of LangChain. Needs `pip install "retro-lm[langchain]"`."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever

from retro.retrieval.retriever import passages


class LangChainRetriever(BaseRetriever):
    """The k nearest chunks of a text, each with what follows it, as LangChain's documents.

    Arguments:
        retriever: a `Retriever` or `RemoteRetriever`.
        k: default: the retriever's.
    """

    retriever: Any
    k: int | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[LangChainDocument]:
        found = passages(self.retriever, query, self.k)
        return [LangChainDocument(page_content=text, id=name, metadata=about) for name, text, _, about in found]
