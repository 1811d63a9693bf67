"""Bits per byte: hand-computed cases, windows against a naive reading, and neighbors where they belong."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from retro.evaluation import ScoringSettings, bits_per_byte, prepare, score, table_text
from retro.evaluation.bits import gain, perplexity
from retro.evaluation.data import windows_of
from retro.text.documents import Document
from tests.evaluation.conftest import HELD_OUT

DOCUMENTS = [
    Document("a", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"),
    Document("b", "w3 w4"),
    Document("c", " ".join(f"w{i % 50}" for i in range(45))),
]


class Uniform(torch.nn.Module):
    """Gives every token of the vocabulary the same probability."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, neighbors: int | None = 2):
        super().__init__()
        self.vocab_size = vocab_size
        text = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=64)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        if neighbors:
            self.config.num_neighbors = neighbors

    def forward(self, input_ids, **_):
        return CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, self.vocab_size))


def test_hand_computed(words_tokenizer):
    """The text is w1 .. w10, without bos: 9 tokens are scored, and all bytes but those of w1."""
    data = prepare([DOCUMENTS[0]], words_tokenizer, 4)
    assert data.scored.sum() == 9
    text = DOCUMENTS[0].text
    assert data.bytes_of_chunk.sum() == len(text) - len("w1")
    scores = score(Uniform(32), data)
    assert scores.bits.sum() == pytest.approx(9 * 5)
    assert scores.bits_per_byte(data) == pytest.approx(45 / (len(text) - 2))
    first = np.array([True, False, False])
    assert scores.bits_per_byte(data, first) == pytest.approx(15 / len(" w2 w3 w4"))
    assert math.isnan(scores.bits_per_byte(data, ~np.ones(3, bool)))


def test_perplexity_by_hand(words_tokenizer):
    """10 words, of which 9 are scored at 5 bits each; the text's two newlines are words of their own if asked for."""
    document = Document("a", "w1 w2 w3 w4\nw5 w6  w7 w8 w9 w10\n")
    data = prepare([document], words_tokenizer, 4)
    found = perplexity(score(Uniform(32), data), data)
    assert found["token"] == pytest.approx(32)
    assert found["word"] == pytest.approx(32 ** (9 / 10))
    assert found["word_with_line_ends"] == pytest.approx(32 ** (9 / 12))


def test_gain_by_hand(words_tokenizer):
    """6 bits a token instead of 7 everywhere: a seventh less in every draw of documents."""
    data = prepare(DOCUMENTS, words_tokenizer, 4)
    assert gain(score(Uniform(64), data), score(Uniform(128), data), data) == pytest.approx([1 / 7] * 3)
    few, many = score(Uniform(64), data), score(Uniform(128), data)
    many.bits[0] *= 100  # of a chunk that does not count
    assert gain(few, many, data, chunks=np.arange(len(few.bits)) > 0) == pytest.approx([1 / 7] * 3)


def test_windows_begin_with_the_bos_unless_the_model_is_a_retro_from_scratch(make_lm, make_model, words_tokenizer):
    data, lm, window = prepare(HELD_OUT, words_tokenizer, 8), make_lm(), dict(window_len=16, stride=8)
    with_bos, expected = replace(data, bos=2), np.zeros(len(data.tokens))
    for start, stop, first_new in windows_of(data, 2, 1):
        ids = torch.from_numpy(data.tokens[start:stop].flatten())
        ids[0] = 2
        with torch.no_grad():
            log_p = lm(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        bits = np.r_[0.0, -log_p.numpy() / math.log(2)].reshape(-1, 8)
        for chunk in range(first_new, stop):
            expected[chunk] = bits[chunk - start][data.scored[chunk]].sum()
    np.testing.assert_allclose(score(lm, with_bos, **window).bits, expected, rtol=1e-5)
    retro = make_model(vocab_size=len(words_tokenizer), chunk_len=8)
    assert np.array_equal(score(retro, with_bos, **window).bits, score(retro, data, **window).bits)
    assert not np.allclose(score(lm, data, **window).bits, expected)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (3, 2), (4, 4), (99, 50)])
def test_windows_score_every_chunk_once(window, stride, words_tokenizer):
    data = prepare(DOCUMENTS, words_tokenizer, 4)
    scored = np.zeros(len(data.tokens), int)
    for start, stop, first_new in windows_of(data, window, stride):
        assert start <= first_new < stop <= start + window
        assert len(set(data.documents[start:stop].tolist())) == 1
        scored[first_new:stop] += 1
        if start > 0 and data.documents[start - 1] == data.documents[start]:
            assert first_new - start >= min(window - stride, 1)
    assert (scored == 1).all()


@pytest.mark.parametrize("retrieval", ["off", "on"])
def test_equals_a_naive_reading_of_each_document(retrieval, words_store, words_tokenizer, words_retriever, make_model):
    """One window holds each document: the bits are those of a forward pass over the document alone."""
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    data = prepare(DOCUMENTS, words_tokenizer, 8, words_retriever, 2)
    bits = score(model, data, retrieval, words_store, window_len=64).bits
    for number, document in enumerate(DOCUMENTS):
        ids = torch.tensor([[*words_tokenizer(document.text)["input_ids"], words_tokenizer.eos_token_id]])
        whole = ids.shape[1] // 8
        neighbors = {}
        if retrieval == "on" and whole:
            found = words_retriever(ids[0, : whole * 8].view(whole, 8), 2)
            neighbors = {
                "neighbor_ids": torch.from_numpy(found.tokens)[None],
                "neighbor_mask": torch.from_numpy(found.mask)[None],
            }
        with torch.no_grad():
            logits = model(ids, **neighbors).logits[0, :-2]  # neither the first token nor the end of text is scored
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:-1], reduction="sum") / math.log(2)
        assert bits[data.documents == number].sum() == pytest.approx(expected.item(), rel=1e-5)


def test_strided_windows_give_at_least_the_context_asked_for(words_tokenizer, make_model):
    """A long document in windows of 16 and stride 8: each chunk is scored as in its own window, cut out by hand."""
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, cca_layers=[])
    data = prepare([DOCUMENTS[2]], words_tokenizer, 8)
    bits = score(model, data, window_len=16, stride=8).bits
    ids = torch.tensor([[*words_tokenizer(DOCUMENTS[2].text)["input_ids"], words_tokenizer.eos_token_id]])
    for chunk in range(1, 5):
        window = ids[:, (chunk - 1) * 8 : (chunk + 1) * 8]
        with torch.no_grad():
            logits = model(window).logits[0, 7:-1]
        expected = torch.nn.functional.cross_entropy(logits, window[0, 8:], reduction="sum") / math.log(2)
        assert bits[chunk] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("limit", ["MAX_TOKENS", "MAX_LOGITS", "MAX_NEIGHBOR_TOKENS"])
def test_the_size_of_batches_changes_nothing(
    limit, words_store, words_tokenizer, words_retriever, make_model, monkeypatch
):
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    data = prepare(DOCUMENTS, words_tokenizer, 8, words_retriever, 2)
    expected, rows = score(model, data, "on", words_store, window_len=16).bits, []
    monkeypatch.setattr(f"retro.evaluation.scorer.{limit}", 1)
    model.register_forward_pre_hook(lambda model, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    np.testing.assert_allclose(score(model, data, "on", words_store, window_len=16).bits, expected, rtol=1e-5)
    assert set(rows) == {1}


def test_neighbors_come_from_other_documents(words_store, words_tokenizer, words_retriever):
    known = Document(words_store.document_ids[0], "w1 w2 w3 w4 w5 w6 w7 w8 w9")
    rows = prepare([known], words_tokenizer, 8, words_retriever, 4).rows
    assert (words_store.document_rows(rows[rows >= 0]) != 0).all()


def test_the_whole_result(words_store, words_tokenizer, words_retriever, make_model):
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    result = bits_per_byte(model, DOCUMENTS, words_retriever, baseline=Uniform(64), scoring=ScoringSettings(32))
    assert list(result["bpb"]) == ["lm", "retro_off", "retro_on", "retro_on_random"]
    assert result["documents"] == 3 and result["tokens"] == 9 + 1 + 44
    assert result["bytes"] == sum(len(d.text) for d in DOCUMENTS) - 3 * 2
    assert result["bpb"]["lm"] == pytest.approx(6 * result["tokens"] / result["bytes"])
    assert len({round(value, 6) for value in result["bpb"].values()}) == 4
    assert result["perplexity"]["lm"]["token"] == pytest.approx(64)
    assert result["words"] == 10 + 2 + 45 and result["line_ends"] == 0
    assert result["stride"] == 16 and result["store_fingerprint"] == words_store.fingerprint
    assert all(low <= result["bpb"][column] <= high for column, (low, high) in result["interval"].items())
    assert result["off_below_lm"][0] == pytest.approx(1 - result["bpb"]["retro_off"] / result["bpb"]["lm"])
    little = result["bpb_little_overlap"]
    assert result["gain_little_overlap"]["lm"][0] == pytest.approx(1 - little["retro_on"] / little["lm"], nan_ok=True)
    assert f"{result['perplexity']['retro_on']['word']:.3f}" in table_text(result)
    result["perplexity"]["retro_on"]["word"] = 64_022_175.491
    assert f" {result['perplexity']['retro_on']['token']:.3f}       6.4e+07 " in table_text(result)


def test_a_plain_lm_alone(words_retriever):
    result = bits_per_byte(Uniform(64, neighbors=None), DOCUMENTS, words_retriever)
    assert list(result["bpb"]) == ["lm"] and result["perplexity"]["lm"]["token"] == pytest.approx(64)
    with pytest.raises(ValueError, match="two plain LMs; leave one out"):
        bits_per_byte(Uniform(64, neighbors=None), DOCUMENTS, words_retriever, baseline=Uniform(64))


def test_off_is_the_base_and_on_is_not(pointer, make_lm, planted_retriever):
    result = bits_per_byte(pointer, HELD_OUT, planted_retriever, baseline=make_lm())
    assert result["bpb"]["retro_off"] == pytest.approx(result["bpb"]["lm"], abs=1e-6)
    assert abs(result["bpb"]["retro_on"] - result["bpb"]["lm"]) > 1e-2


def test_a_window_no_longer_than_any_model_reads(words_tokenizer, words_retriever, make_model):
    """The LM of 64 positions sets the default window of both."""
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    assert bits_per_byte(model, DOCUMENTS, words_retriever, baseline=Uniform(64))["window_len"] == 64


def test_refusals(words_tokenizer, words_retriever, make_model):
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8)
    data = prepare(DOCUMENTS, words_tokenizer, 8)
    with pytest.raises(ValueError, match="window_len is 20; it must be a multiple of the chunk length 8"):
        score(model, data, window_len=20)
    with pytest.raises(ValueError, match="stride is 32 and window_len 32, so that"):
        score(model, data, window_len=32, stride=32)
    with pytest.raises(ValueError, match="window_len is 128, more than the 64 positions of the model"):
        score(Uniform(64), data, window_len=128)
    with pytest.raises(ValueError, match="it needs data prepared with a retriever, and store="):
        score(model, data, "on")
    with pytest.raises(ValueError, match="choose one of off, on, random"):
        score(model, data, "sometimes")
    with pytest.raises(ValueError, match="no text to evaluate"):
        prepare([], words_tokenizer, 8)
    with pytest.raises(ValueError, match="no text to evaluate"):
        prepare([Document("a", "")], words_tokenizer, 8)
    with pytest.raises(ValueError, match=r"documents\[1\] is a str; give a Document"):
        prepare(iter([DOCUMENTS[0], "a text"]), words_tokenizer, 8)
    with pytest.raises(ValueError, match="num_neighbors is 3; the data was prepared with 2"):
        prepared = prepare(DOCUMENTS, words_tokenizer, 8, words_retriever, 2)
        score(model, prepared, "on", words_retriever.store, num_neighbors=3)
    with pytest.raises(ValueError, match="num_neighbors is 0; give at least 1"):
        bits_per_byte(model, DOCUMENTS, words_retriever, num_neighbors=0)
    with pytest.raises(ValueError, match="the retriever is a function without a store; text is measured with a Retr"):
        bits_per_byte(model, DOCUMENTS, lambda queries, num_neighbors: None)


def test_the_table_of_the_readme_is_what_is_printed():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    others = ["lm", "retro_off", "retro_on_random"]
    columns = ["lm", "retro_off", "retro_on", "retro_on_random"]
    little = [[-0.009, -0.021, 0.003], [-0.016, -0.023, -0.006], [0.007, 0.001, 0.017]]
    result = {
        **{"documents": 26, "bytes": 378987, "num_neighbors": 2, "chunks": 1560, "chunks_little_overlap": 231},
        "bpb": dict(zip(columns, (1.0431, 1.0457, 0.8927, 1.1039), strict=True)),
        "bpb_little_overlap": dict(zip(columns, (2.07, 2.0569, 2.0891, 2.1038), strict=True)),
        "gain": dict(zip(others, ([0.144, 0.079, 0.22], [0.146, 0.085, 0.22], [0.191, 0.129, 0.265]), strict=True)),
        "gain_little_overlap": dict(zip(others, little, strict=True)),
        "off_below_lm": [-0.002, -0.013, 0.006],
    }
    assert f"```text\n{table_text(result)}\n```" in readme
