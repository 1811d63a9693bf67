"""Mixtures, nearest keys, oracle neighbors and costs: cases computed by hand and slow loops."""

import math

import numpy as np
import pytest
import torch

from retro.evaluation import prepare
from retro.evaluation.baselines import costs, knn
from retro.evaluation.baselines.ensembles import log_weights, sequence_mixture, token_mixture
from retro.evaluation.baselines.oracle import oracle_rows
from retro.evaluation.baselines.sample import check_targets, draw_sample
from retro.retrieval import Retriever
from tests.evaluation.conftest import HELD_OUT


def test_mixtures_by_hand():
    """Two documents, weights 3/4 and 1/4; of a vocabulary of two they give the tokens read .9 and .5, or .2 and .8."""
    weights = log_weights(np.array([[2 * math.log(3), 0.0]]), np.ones((1, 2), bool), temperature=2.0)
    np.testing.assert_allclose(np.exp(weights), [[0.75, 0.25]])
    log_p, span = np.log([[0.9, 0.2], [0.5, 0.8]]), np.zeros(2, int)
    np.testing.assert_allclose(np.exp(token_mixture(log_p, weights, span)), [0.725, 0.575])
    whole = 0.75 * 0.9 * 0.5 + 0.25 * 0.2 * 0.8
    np.testing.assert_allclose(np.exp(sequence_mixture(log_p, weights, span)), [0.725, whole / 0.725])


def test_a_document_that_is_missing_has_no_weight():
    weights = log_weights(np.array([[1.0, 5.0], [0.0, 0.0]]), np.array([[True, False], [True, True]]), 1.0)
    np.testing.assert_allclose(np.exp(weights), [[1, 0], [0.5, 0.5]])


def test_a_sequence_mixture_equals_its_definition():
    """Spans of 3, 1 and 4 tokens: the sum over a span is the log of the mixture of whole-span probabilities."""
    generator = np.random.default_rng(0)
    spans = np.repeat([0, 1, 2], [3, 1, 4])
    log_p = np.log(generator.random((8, 3)))
    weights = log_weights(generator.normal(size=(3, 3)), np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], bool), 0.7)
    mixed = sequence_mixture(log_p, weights, spans)
    for span in range(3):
        products = [math.exp(log_p[spans == span, d].sum()) for d in range(3)]
        assert math.exp(mixed[spans == span].sum()) == pytest.approx(np.dot(np.exp(weights[span]), products))


def test_far_below_what_floats_hold():
    log_p, weights = np.array([[-4000.0, -4001.0]]), np.log([[0.5, 0.5]])
    expected = -4000 + math.log(0.5 + 0.5 * math.exp(-1))
    assert token_mixture(log_p, weights, np.zeros(1, int)) == pytest.approx([expected])
    assert token_mixture(np.full((1, 2), -np.inf), weights, np.zeros(1, int)) == -np.inf


def test_nearest_keys_by_hand():
    """Keys at distance 0, 2 and 4, T = 2: weights 1, 1/e, 1/e^2; the first and the last have the value 7."""
    distances, values = np.array([[0.0, 2.0, 4.0]] * 3), np.array([[7, 8, 7]] * 3)
    total = 1 + math.exp(-1) + math.exp(-2)
    log_p = knn.knn_log_p(distances, values, np.array([7, 8, 9]), temperature=2.0)
    np.testing.assert_allclose(np.exp(log_p), [(1 + math.exp(-2)) / total, math.exp(-1) / total, 0])
    mixed = knn.interpolated(np.log([0.5, 0.3, 0.2]), log_p, 0.25)
    np.testing.assert_allclose(np.exp(mixed), 0.75 * np.array([0.5, 0.3, 0.2]) + 0.25 * np.exp(log_p))
    assert np.exp(mixed).sum() == pytest.approx(1)


def test_without_weight_or_keys_only_the_lm_speaks():
    log_p = np.log(np.random.default_rng(0).random(5))
    assert np.array_equal(knn.interpolated(log_p, np.full(5, -3.0), 0.0), log_p)
    none = knn.knn_log_p(np.full((5, 2), np.inf), np.full((5, 2), -1), np.arange(5), 1.0)
    assert np.array_equal(knn.interpolated(log_p, none, 0.5), log_p)


def test_the_grid_finds_what_was_planted():
    """The nearest key is always right, the others never: one neighbor, and as much weight as there is."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 50, 40)
    values = np.stack([targets, targets + 100, targets + 200], axis=1)
    distances = np.tile([1.0, 1.1, 1.2], (40, 1))
    best = knn.choose(np.full(40, -4.0), distances, values, targets, 2.0, (1, 3), (0.1, 1.0), (0.0, 0.5, 0.9))
    assert (best.k, best.weight) == (1, 0.9)
    assert best.bits_per_token == pytest.approx(-math.log2(0.1 * math.exp(-4) + 0.9))
    wrong = knn.choose(np.full(40, -4.0), distances, values + 1, targets, 2.0, (1, 3), (0.1, 1.0), (0.0, 0.5, 0.9))
    assert wrong.weight == 0 and wrong.bits_per_token == pytest.approx(4 / math.log(2))


@pytest.mark.parametrize("exact_below", [10**9, 1])
def test_keys_of_the_store_against_one_document_at_a_time(exact_below, make_lm, planted_store):
    """Windows of 16 tokens of a store, each read alone: keys, values, distances and their order by brute force."""
    lm, excluded = make_lm(), planted_store.document_ids[:3]
    store = knn.build_token_store(lm, planted_store, 16, excluded=excluded, exact_below=exact_below)
    if exact_below == 1:
        store.index.nprobe = store.index.nlist
    keys, values = [], []
    for first, count in planted_store.document_spans[3:].tolist():
        ids = np.concatenate(planted_store.token_lists(np.arange(first, first + count)))
        for start in range(0, len(ids) - 1, 15):
            window = torch.from_numpy(ids[start : start + 16])
            with torch.no_grad():
                keys.append(lm.model(window[None]).last_hidden_state[0, :-1].double().numpy())
            values.append(window[1:].numpy())
    keys, values = np.concatenate(keys), np.concatenate(values)
    assert np.array_equal(store.values, values) and store.kind == ("exact" if exact_below > 1 else "ivf")
    queries = np.random.default_rng(0).normal(size=(5, keys.shape[1])).astype(np.float32)
    distances = np.square(queries[:, None] - keys).sum(-1)
    order = np.argsort(distances, axis=1)[:, :6]
    found, labels = store.search(queries, 6)
    np.testing.assert_allclose(found, np.take_along_axis(distances, order, 1), rtol=1e-4)
    assert np.array_equal(labels, values[order])
    pairs = np.square(keys[:, None] - keys).sum(-1)
    assert store.spread == pytest.approx(pairs.mean(), rel=1e-4)


def test_a_part_of_the_keys(make_lm, planted_store):
    parts = [knn.build_token_store(make_lm(), planted_store, 16, num_tokens=100, seed=seed) for seed in (0, 0, 1)]
    assert [len(part.values) for part in parts] == [100] * 3
    assert np.array_equal(parts[0].values, parts[1].values) and not np.array_equal(parts[0].values, parts[2].values)
    with pytest.raises(ValueError, match="kNN-LM has nothing to search"):
        knn.build_token_store(make_lm(), planted_store, 16, excluded=planted_store.document_ids)


def longest_run(a: list, b: list) -> int:
    return max(
        (
            n
            for n in range(1, len(a) + 1)
            for i in range(len(a) - n + 1)
            for j in range(len(b))
            if a[i : i + n] == b[j : j + n]
        ),
        default=0,
    )


def test_oracle_neighbors_are_the_best_of_the_whole_store(planted_store, words_tokenizer):
    """With every chunk a candidate, none has a longer run in common with the next chunk; a copy has all of it."""
    sample = draw_sample(prepare(HELD_OUT[:2], words_tokenizer, 8), 32, 16)
    rows = oracle_rows(sample, Retriever(planted_store, "tfidf"), 2, 10**6, 16)
    values, mask = planted_store.values(np.arange(planted_store.num_chunks), 16)
    texts = [value[real].tolist() for value, real in zip(values, mask, strict=True)]
    last = np.diff(sample.data.documents, append=-1) != 0
    assert (rows[last] == -1).all() and (rows[~last] >= 0).all()
    for chunk in np.flatnonzero(~last):
        target = sample.data.tokens[chunk + 1, : sample.data.lens[chunk + 1]].tolist()
        runs = [longest_run(target, text) for text in texts]
        found = [runs[row] for row in rows[chunk]]
        assert found == sorted(runs, reverse=True)[:2]
        if sample.data.documents[chunk] == 0 and len(target) == 8:
            assert found[0] == 8, "the planted copy"


def test_the_sample(words_tokenizer):
    """All windows score every token once; so many of each document are the same for the same seed."""
    data = prepare(HELD_OUT, words_tokenizer, 8)
    every = draw_sample(data, 32, 16)
    assert len(every.targets) == data.scored.sum() and every.data.bytes_of_chunk.sum() == data.bytes_of_chunk.sum()
    some, again, other = (draw_sample(data, 32, 16, 1, seed) for seed in (0, 0, 1))
    assert np.array_equal(np.bincount(some.document_of_window), np.ones(len(HELD_OUT)))
    assert np.array_equal(some.targets, again.targets) and not np.array_equal(some.targets, other.targets)
    bits = some.chunk_scores(np.full(len(some.targets), -math.log(2))).bits
    assert np.array_equal(bits, some.data.scored.sum(1))
    parts = every.parts()
    assert [len(np.unique(part.data.documents)) for part in parts] == np.bincount(every.document_of_window).tolist()
    assert np.array_equal(np.concatenate([part.targets for part in parts]), every.targets)
    bits = np.random.default_rng(0).normal(size=len(every.targets))
    of_parts = np.split(bits, np.cumsum([len(part.targets) for part in parts])[:-1])
    of_chunks = [part.chunk_scores(one).bits for part, one in zip(parts, of_parts, strict=True)]
    assert np.array_equal(np.concatenate(of_chunks), every.chunk_scores(bits).bits)
    assert np.array_equal(
        np.concatenate([part.data.tokens for part in parts]),
        every.data.tokens[np.concatenate([part.numbers for part in parts])],
    )
    assert [part.by_document.document_ids for part in parts] == [[document.id] for document in HELD_OUT]
    with pytest.raises(AssertionError, match="other tokens"):
        check_targets(some, some.targets[::-1])
    with pytest.raises(ValueError, match="stride is 32 and window_len 32"):
        draw_sample(data, 32, 32)


# Costs


def counted(run) -> int:
    with torch.no_grad():
        return costs.counted_flops(run)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_flops_of_a_plain_lm(architecture):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    own = dict(n_embd=16, n_layer=2, n_head=2) if architecture == "gpt2" else {**sizes, "intermediate_size": 24}
    config = AutoConfig.for_model(architecture, **{**own, "vocab_size": 50})
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(20)[None]
    assert costs.lm_flops(lm, 20, 20) == pytest.approx(counted(lambda: lm(ids)), rel=0.002)
    assert costs.lm_flops(lm, 20, 5) == pytest.approx(counted(lambda: lm(ids, logits_to_keep=5)), rel=0.002)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("layers", [{}, {"encoder_hidden_size": 32, "encoder_shares_embeddings": True}])
def test_flops_of_a_retro(k, layers, make_model, make_batch):
    model = make_model(**layers)
    batch = make_batch(model, 22, b=1, k=max(k, 1))
    given = batch if k else {"input_ids": batch["input_ids"]}
    assert costs.retro_flops(model, 22, 22, k) == pytest.approx(counted(lambda: model(**given)), rel=1e-6)


def test_the_store_that_is_needed(planted_retriever, planted_store):
    sizes = {path.name: path.stat().st_size for path in (planted_store.path / "shards" / "00000").iterdir()}
    assert costs.text_bytes(planted_store) == sum(sizes.values()) - sizes["keys.npy"]
    assert costs.index_bytes(planted_retriever.index, planted_store) == sizes["keys.npy"]
    lexical = Retriever(planted_store, "tfidf").index
    on_disk = sum(path.stat().st_size for folder in lexical.folders for path in folder.iterdir())
    assert costs.index_bytes(lexical, planted_store) == on_disk and costs.search_flops(lexical, 8) == 0
    assert costs.search_flops(planted_retriever.index, 8) == 2 * planted_store.num_chunks * planted_store.key_dim
