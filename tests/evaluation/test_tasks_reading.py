"""Contexts and continuations: every log-probability against forward passes token by token, and what is read."""

import numpy as np
import pytest
import torch

from retro.evaluation.settings import ReaderSettings
from retro.evaluation.tasks.examples import Example, aligned
from retro.evaluation.tasks.metrics import exact_match, f1, holds_answer, normalize_answer
from retro.evaluation.tasks.reading import Reader, open_reader
from tests.stand_ins import words


@pytest.fixture
def retro_lm(words_tokenizer):
    from retro import RetroConfig, RetroForCausalLM

    torch.manual_seed(3)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=16)
    config = RetroConfig(vocab_size=len(words_tokenizer), cca_layers=[1, 2], initializer_range=0.4, **sizes)
    return RetroForCausalLM(config).eval()


@pytest.fixture(params=["retro", "fitted"])
def model(request, retro_lm, pointer):
    return {"retro": retro_lm, "fitted": pointer}[request.param]


@pytest.fixture
def examples():
    """Contexts shorter than a chunk, of whole chunks, and in between; continuations over one and two chunk borders."""
    draw = np.random.default_rng(5)
    sizes = [(5, 2), (8, 1), (11, 3), (16, 12), (23, 9), (30, 20)]
    return [Example(draw.integers(3, 60, s), draw.integers(3, 60, t)) for s, t in sizes]


def token_by_token(model, retriever, context, continuation, of):
    """Each token's log-probability and whether it is the most likely, by one forward pass over all tokens before it."""
    m, ids = 8, np.concatenate([context, continuation])
    log_probs, greedy = [], []
    for end in range(len(context), len(ids)):
        given = {"input_ids": torch.from_numpy(ids[None, :end])}
        known = ids[:end] if of == "text" else context
        chunks = [known[start : start + m] for start in range(0, len(known) - m + 1, m)]
        if retriever is not None and chunks:
            found = retriever(np.stack(chunks), 2)
            ids_, mask = (torch.zeros(1, end // m, 2, 16, dtype=kind) for kind in (torch.long, torch.bool))
            ids_[0, : len(chunks)] = torch.from_numpy(found.tokens)
            mask[0, : len(chunks)] = torch.from_numpy(found.mask)
            given |= {"neighbor_ids": ids_, "neighbor_mask": mask}
        with torch.no_grad():
            row = model(**given).logits[0, -1].double().log_softmax(-1)
        log_probs.append(row[ids[end]].item())
        greedy.append(row.argmax().item() == ids[end])
    return np.array(log_probs), np.array(greedy)


@pytest.mark.parametrize("of", ["context", "text"])
@pytest.mark.parametrize("retrieval", ["off", "on"])
def test_scores_equal_forward_passes_token_by_token(model, words_tokenizer, words_retriever, examples, retrieval, of):
    given = dict(retriever=words_retriever, num_neighbors=2, cache=False)
    reader = Reader(model=model, tokenizer=words_tokenizer, retrieval=retrieval, batch_size=4, **given)
    for example, found in zip(examples, reader.score(examples, of), strict=True):
        retriever = words_retriever if retrieval == "on" else None
        log_probs, greedy = token_by_token(model, retriever, example.context, example.continuation, of)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=2e-5)
        assert (found.greedy == greedy).all() and found.right == greedy.all()
        assert found.num_read == (2 if retrieval == "on" and len(example.context) >= 8 else 0)


def test_neighbors_matter_and_random_ones_are_others(model, words_tokenizer, words_retriever, examples):
    reader = Reader(model=model, tokenizer=words_tokenizer, retriever=words_retriever, retrieval="on", cache=False)
    assert list(reader.columns()) == ["retro_off", "retro_on", "retro_on_random"]
    sums = {c: [one.log_prob for one in r.score(examples)] for c, r in reader.columns().items()}
    assert sums["retro_on"][0] == pytest.approx(sums["retro_off"][0], abs=1e-5), "no whole chunk, nothing to read"
    for i in range(1, len(examples)):
        assert len({round(values[i], 4) for values in sums.values()}) == 3


def test_alignment_puts_the_end_of_the_context_at_a_chunk_border(retro_lm, words_tokenizer, words_retriever):
    given = dict(model=retro_lm, tokenizer=words_tokenizer, retriever=words_retriever, cache=False)
    on = Reader(**given, retrieval="on", align="end")
    example = on.pair(words(13, seed=1), " w5 w6")
    assert len(example.context) == 16 and (example.context[:3] == words_tokenizer.eos_token_id).all()
    expected = token_by_token(retro_lm, words_retriever, example.context, example.continuation, "context")
    np.testing.assert_allclose(on.score([example])[0].log_probs, expected[0], atol=2e-5)
    assert (aligned(np.arange(16), 8, 1) == np.arange(16)).all()
    start = Reader(**given).pair(words(13, seed=1), " w5 w6")
    assert len(start.context) == 13 and (start.continuation == example.continuation).all()


def test_a_long_context_is_cut_by_whole_chunks_where_neighbors_are_read(retro_lm, words_tokenizer, words_retriever):
    draw = np.random.default_rng(0)
    example = Example(draw.integers(3, 60, 45), draw.integers(3, 60, 3))
    given = dict(model=retro_lm, tokenizer=words_tokenizer, retriever=words_retriever, cache=False, max_len=30)
    for retrieval, kept in (("off", 28), ("on", 21)):  # 45 + 3 - 1 - 30 = 17 too many; 24 in whole chunks
        found = Reader(**given, retrieval=retrieval).score([example])[0]
        retriever = words_retriever if retrieval == "on" else None
        expected = token_by_token(retro_lm, retriever, example.context[-kept:], example.continuation, "context")
        np.testing.assert_allclose(found.log_probs, expected[0], atol=2e-5)
    with pytest.raises(ValueError, match="larger max_len"):
        Reader(**given).score([Example(example.context, draw.integers(3, 60, 31))])


def test_completions_equal_a_loop_without_cache(model, words_tokenizer):
    """Passages are the neighbors of the last whole chunk of the prompt, whatever the prompts beside it."""
    draw = np.random.default_rng(2)
    prompts = [draw.integers(3, 60, n) for n in (16, 8, 24)]
    passages = [(draw.integers(3, 60, (2, 16)), np.arange(16) < draw.integers(1, 17, (2, 1))) for _ in prompts]
    reader = Reader(model=model, tokenizer=words_tokenizer, batch_size=2)
    written = reader.complete(prompts, 6, passages=passages)
    for prompt, (ids, mask), text in zip(prompts, passages, written, strict=True):
        own = prompt.tolist()
        for _ in range(6):
            shape = (1, len(own) // 8, 2, 16)
            given = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
            place = len(prompt) // 8 - 1
            given[0][0, place], given[1][0, place] = torch.from_numpy(ids), torch.from_numpy(mask)
            with torch.no_grad():
                own.append(model(torch.tensor([own]), given[0], given[1]).logits[0, -1].argmax().item())
            if own[-1] == words_tokenizer.eos_token_id:
                break
        assert text == words_tokenizer.decode(own[len(prompt) :], skip_special_tokens=True)
    stopped = reader.complete(prompts, 6, stop=[written[0].split()[1]], passages=passages)
    assert stopped[0].split() == written[0].split()[:1]


def test_nothing_is_searched_twice_and_overlapping_neighbors_are_left_out(pointer, words_tokenizer, words_store):
    from retro.retrieval import Retriever
    from tests.stand_ins import HashingEmbedder

    retriever = Retriever(words_store, embedder=HashingEmbedder(), retrieved_len=16)
    text = words_store.text(np.arange(words_store.document_spans[5, 0], words_store.document_spans[5].sum()))
    given = dict(model=pointer, tokenizer=words_tokenizer, retriever=retriever, retrieval="on", cache=False)
    context, last = " ".join(text)[:-3], "w1"
    example = Reader(**given).pair(context, f" {last}", text=f"{context} {last}")
    named = Reader(**given).pair(context, f" {last}", name="d5")
    first = words_store.document_spans[5, 0]
    rows, without, clean = (
        reader._rows([one], "context")[0]
        for reader, one in (
            (Reader(**given), example),
            (Reader(**given), named),
            (Reader(**given, decontaminate=True), example),
        )
    )
    assert rows[0, 0] == first, "the copy of the context"
    own = words_store.document_rows(np.maximum(without, 0)) == 5
    assert not (own & (without >= 0)).any()
    assert (clean[0] != first).all() and (clean >= 0).sum() < (rows >= 0).sum()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retrieval": "sometimes"}, "choose one of off, on, random"),
        ({"retrieval": "on"}, "without a retriever"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_readers_refuse(options, said, retro_lm, words_tokenizer):
    with pytest.raises(ValueError, match=said):
        Reader(model=retro_lm, tokenizer=words_tokenizer, **options)
    with pytest.raises(ValueError, match="give one of start, end"):
        ReaderSettings(align="middle")


def test_a_plain_lm_reads_no_neighbors(make_lm, words_tokenizer, words_retriever, words_store):
    with pytest.raises(ValueError, match="reads no neighbors"):
        Reader(model=make_lm(), tokenizer=words_tokenizer, retriever=words_retriever, retrieval="on")
    assert list(Reader(model=make_lm(), tokenizer=words_tokenizer).columns()) == ["lm"]
    with pytest.raises(ValueError, match="without a tokenizer"):
        open_reader(make_lm())
    with pytest.raises(ValueError, match="is empty"):
        Reader(model=make_lm(), tokenizer=words_tokenizer).pair("w1 w2", "  ")


# What needs no model


def test_the_normalisation_of_squad_by_hand():
    assert normalize_answer("The  Cat's\tan hat!") == "cats hat"
    assert exact_match("14 December, 1972", ["14 december 1972"]) == 1 and exact_match("1972", ["December 1972"]) == 0
    assert exact_match("the", ["1972", "a"]) == 1, "articles alone are nothing on both sides"
    assert f1("in the December 1972", ["14 December 1972 UTC", "Dec 1972"]) == pytest.approx(2 * 2 / (3 + 4))
    assert f1("a b b", ["b b b"]) == pytest.approx(2 * 2 / (2 + 3))
    assert f1("moon", ["sun"]) == 0 and f1("the", ["an"]) == 1 and f1("", ["sun"]) == 0
    assert holds_answer("It was in the (Nineteen) seventies.", ["nineteen seventies"])
    assert not holds_answer("It was nineteenth", ["nineteen"]) and not holds_answer("anything", ["the"])
