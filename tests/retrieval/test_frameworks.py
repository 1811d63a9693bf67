"""A datastore as a retriever of LangChain and of LlamaIndex, against the packages themselves."""

import pytest

from retro.retrieval import Retriever


@pytest.fixture
def retriever(words_store):
    return Retriever(words_store, "tfidf", num_neighbors=3, retrieved_len=16)


def test_langchain(retriever):
    pytest.importorskip("langchain_core")
    from retro.retrieval.langchain import LangChainRetriever

    text = retriever.store.text([0])[0]
    chain = LangChainRetriever(retriever=retriever) | (lambda found: [one.metadata["document_id"] for one in found])
    assert len(chain.invoke(text)) == 3 and chain.invoke(text)[0] == "d0"
    (best,) = LangChainRetriever(retriever=retriever, k=1).invoke(text)
    assert best.page_content.startswith(text) and best.id == "d0:0" and best.metadata["measure"] == "TF-IDF"


def test_llama_index(retriever):
    pytest.importorskip("llama_index.core")
    from retro.retrieval.llama_index import LlamaIndexRetriever

    text = retriever.store.text([0])[0]
    found = LlamaIndexRetriever(retriever).retrieve(text)
    assert len(found) == 3 and found[0].node.get_content().startswith(text) and found[0].score >= found[1].score
    assert (found[0].node_id, found[0].metadata["title"]) == ("d0:0", "title 0")
