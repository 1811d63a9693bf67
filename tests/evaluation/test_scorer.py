"""One quantity has one figure, whoever asks for it; and what a score is, whatever else is in its batch."""

import math

import numpy as np
import pytest
import torch

from retro.evaluation import bits_per_byte, measure_baselines, measure_leakage, prepare, sweep_neighbors
from retro.evaluation.baselines import BaselineSettings
from retro.evaluation.scorer import joined, score_tokens
from retro.evaluation.sweeps import ScoringSettings
from retro.evaluation.tasks.examples import Example
from retro.evaluation.tasks.reading import Reader
from retro.sampling import token_gains
from tests.evaluation.conftest import HELD_OUT


@pytest.fixture(params=["retro", "pointer", "paper", "joint"])
def model(request, make_model, make_lm, pointer, words_tokenizer):
    from retro.retrofit import retrofit

    if request.param == "retro":
        return make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    if request.param == "pointer":
        return pointer
    torch.manual_seed(1)
    fitted = retrofit(make_lm(), form=request.param, chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        for name, parameter in fitted.form.named_parameters():
            is_open = name.endswith(("gate", "opening"))
            parameter.copy_(torch.ones(()) if is_open else 0.3 * torch.randn_like(parameter))
    return fitted


def test_one_quantity_has_one_figure(model, planted_retriever, words_tokenizer):
    """Bits per byte, leakage, sweep, baselines, tasks and gains over documents that one window holds."""
    window = dict(window_len=64, stride=32)
    scoring = ScoringSettings(**window, cache=False)
    result = bits_per_byte(model, HELD_OUT, planted_retriever, 2, scoring=scoring)
    expected = {column: result["bpb"][column] for column in ("retro_off", "retro_on")}
    assert abs(expected["retro_on"] - expected["retro_off"]) > 1e-4
    same = lambda found: pytest.approx(expected, rel=1e-6) == found  # noqa: E731

    leakage = measure_leakage(model, HELD_OUT, planted_retriever, 2, scoring=scoring, alphas=(1.0,))
    assert same({column: leakage["points"][0]["bpb"][column] for column in expected})
    swept = sweep_neighbors(model, HELD_OUT, planted_retriever, (0, 2), None, scoring)
    assert same(dict(zip(expected, (point["bpb"] for point in swept["points"]), strict=True)))
    settings = BaselineSettings(tuple(expected), num_neighbors=(2,), windows_per_document=0, **window)
    rows = measure_baselines({"model": model}, HELD_OUT, planted_retriever, settings=settings)["rows"]
    assert same({row["method"]: row["bpb"] for row in rows if row["method"] in expected})

    data = prepare(HELD_OUT, words_tokenizer, 8)
    texts = [data.tokens[data.documents == n].reshape(-1)[: len(one.text.split())] for n, one in enumerate(HELD_OUT)]
    reader = Reader(model=model, tokenizer=words_tokenizer, retriever=planted_retriever, num_neighbors=2, cache=False)
    examples = [Example(text[:1], text[1:]) for text in texts]
    found = {c: sum(s.log_prob for s in r.score(examples, of="text")) for c, r in reader.columns().items()}
    to_bpb = -1 / math.log(2) / result["bytes"]
    assert same({column: found[column] * to_bpb for column in expected})

    gains = 0.0
    for text in texts:
        chunks = [text[start : start + 8] for start in range(0, len(text) - 7, 8)]
        gains += sum(token_gains(model, text.tolist(), [planted_retriever(chunk[None], 2) for chunk in chunks])[1:])
    assert gains / result["bytes"] == pytest.approx(expected["retro_off"] - expected["retro_on"], abs=1e-6)


def test_batches_states_and_modes_change_no_score(model, planted_retriever, words_tokenizer):
    """Some tokens, or none, of texts of several lengths: each as if it were alone, and the model is left as it was."""
    draw = np.random.default_rng(4)
    texts = [draw.integers(3, 60, n) for n in (9, 40, 17, 5, 24)]
    places = [np.array([8]), np.array([1, 9, 39]), np.arange(8, 17), np.array([], int), np.array([15, 16, 23])]
    rows = [planted_retriever(np.resize(text, (max(1, len(text) // 8), 8)), 2).ids for text in texts]
    store, parts = planted_retriever.store, list(model.modules())
    model.train()
    parts[-1].eval()
    modes = [part.training for part in parts]
    for given in ((None, None), (rows, store)):
        found = score_tokens(model, texts, places, *given)
        assert [part.training for part in parts] == modes
        assert [len(one.log_probs) for one in found] == [1, 3, 9, 0, 3] and found[0].log_probs.dtype == np.float32
        for i in (0, 1, 2, 4):
            alone = score_tokens(model, [texts[i]], [places[i]], given[0] and [rows[i]], store)[0]
            np.testing.assert_allclose(found[i].log_probs, alone.log_probs, atol=1e-5)
            assert (found[i].greedy == alone.greedy).all()
        one_by_one = score_tokens(model, texts, places, *given, batch_size=1)
        np.testing.assert_allclose(joined(found), joined(one_by_one), atol=1e-5)
    states = score_tokens(model, texts[:3], places[:3], states=True)
    head = model.get_output_embeddings()
    for one, text, at in zip(states, texts, places, strict=False):
        log_p = head(torch.from_numpy(one.states)).log_softmax(-1)[range(len(at)), text[at]]
        np.testing.assert_allclose(one.log_probs, log_p.detach().numpy(), atol=1e-5)
    with pytest.raises(AssertionError, match="nothing predicts a first token"):
        score_tokens(model, texts[:1], [np.array([0, 3])])


def test_no_logits_are_computed_that_none_of_a_text_needs(model, planted_retriever):
    """Of a mixture those from the first that is scored on, else the scored ones alone."""
    draw, shapes, mixes = np.random.default_rng(4), [], getattr(getattr(model, "form", None), "mixes_logits", False)
    texts, places = [draw.integers(3, 60, n) for n in (40, 34)], [np.array([26, 39]), np.array([24, 30, 33])]
    rows = [planted_retriever(np.resize(text, (4, 8)), 2).ids for text in texts]
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(list(out.shape[:2])))
    score_tokens(model, texts, places, rows, planted_retriever.store)
    assert shapes == [[2, 39 - 23] if mixes else [1, 5]]
