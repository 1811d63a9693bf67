"""Documents of words, stores with and without a copy of one of them, and a model that can copy."""

import pytest
import torch

from retro.text.documents import Document
from tests.stand_ins import HashingEmbedder, make_store, words

PLANTED = Document("planted", words(60, seed=900, vocabulary=100))
HELD_OUT = [PLANTED, *(Document(f"held {i}", words(60, seed=901 + i, vocabulary=100)) for i in range(4))]


@pytest.fixture(scope="session")
def planted_store(words_tokenizer, tmp_path_factory):
    """20 documents of random words, and under another id a copy of the first held-out one."""
    texts = [words(50, seed=i, vocabulary=100) for i in range(20)] + [PLANTED.text]
    return make_store(tmp_path_factory.mktemp("planted"), texts, words_tokenizer, chunk_len=8)


@pytest.fixture(scope="session")
def planted_retriever(planted_store):
    from retro.retrieval import Retriever

    return Retriever(planted_store, embedder=HashingEmbedder(), retrieved_len=16)


@pytest.fixture
def make_lm(words_tokenizer):
    """make_lm(): always the same tiny LM of words, whose layers say what the token is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        torch.manual_seed(0)
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(words_tokenizer), **sizes)).eval()
        torch.nn.init.normal_(lm.model.embed_tokens.weight)
        return lm

    return make


@pytest.fixture
def pointer(make_lm):
    """That LM RETRO-fitted, its gate opened as training would: it copies where a neighbor reads like the text."""
    from retro.retrofit import retrofit

    model = retrofit(make_lm(), form="pointer", chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        model.form.gate.opening.fill_(2.0)
    return model
