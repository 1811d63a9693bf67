"""The baselines: every one a distribution, equal to a slow loop, over the same tokens; the table and the command."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from retro.cli import main
from retro.evaluation import prepare, score
from retro.evaluation.baselines import METHODS, BaselineSettings, measure_baselines
from retro.evaluation.baselines.bench import BaselineEvaluator
from retro.evaluation.baselines.methods import plan_methods, resolved
from retro.evaluation.baselines.sample import draw_sample
from retro.evaluation.tables import table_text, tables_of
from retro.text.documents import Document
from tests.evaluation.conftest import HELD_OUT
from tests.evaluation.test_commands import made  # noqa: F401 (a fixture)
from tests.stand_ins import words, write_jsonl

PROMPTED = ["prepend", "replug", "rag_token", "rag_sequence"]
VALIDATION = [Document(f"validation {i}", words(60, seed=950 + i, vocabulary=100)) for i in range(2)]
SMALL = dict(window_len=32, stride=16, knn_ks=(2, 8), knn_weights=(0.3,), knn_temperatures=(0.1,))


@pytest.fixture
def pointer(make_lm):
    """The RETRO-fit of a tiny LM whose every layer matters: what stands far before a token changes its probability."""
    from retro.retrofit import retrofit

    lm = make_lm()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = retrofit(lm, chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        model.form.gate.opening.fill_(2.0)
    return model


@pytest.fixture
def make_bench(pointer, planted_retriever):
    """make_bench(k=2, positions=None, **settings): over the planted store, with a RETRO-fit and its base."""

    def make(k=2, positions=None, **given) -> BaselineEvaluator:
        pointer.base.config.max_position_embeddings = positions or 2048
        settings = resolved(BaselineSettings(**{**SMALL, **given}), planted_retriever, pointer.base, k)
        return BaselineEvaluator(pointer, pointer.base, planted_retriever, settings, [d.id for d in HELD_OUT])

    return make


@pytest.fixture
def sample(words_tokenizer):
    return draw_sample(prepare(HELD_OUT[:2], words_tokenizer, 8), 32, 16, 2)


@pytest.fixture
def tuning(words_tokenizer):
    return draw_sample(prepare(VALIDATION, words_tokenizer, 8), 32, 16)


def with_every_last_token(words_tokenizer):
    """As many windows as there are tokens, all the same but for the last scored one, which is each token once."""
    count = len(words_tokenizer)
    data = prepare([Document(f"copy {i}", HELD_OUT[0].text) for i in range(count)], words_tokenizer, 8)
    sample, texts = draw_sample(data, 32, 16, 1), []
    same = draw_sample(prepare([Document("copy", HELD_OUT[0].text)], words_tokenizer, 8), 32, 16)
    window, places = same.texts[1], same.places[1]
    for token in range(count):
        texts.append(window.copy())
        texts[-1][places[-1]] = token
    tokens = np.tile(window.reshape(4, 8), (count, 1))
    documents = np.repeat(np.arange(count), 4)
    ones = np.ones_like(tokens)
    whole = dict(tokens=tokens, documents=documents, lens=8 * ones[:, 0], num_bytes=ones, scored=ones.astype(bool))
    return replace(sample, data=replace(data, **whole), texts=texts, places=[places] * count)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "retro_on_random"])  # each window's is another
def test_every_method_is_a_distribution(name, make_bench, words_tokenizer, tuning):
    """The probabilities of all tokens that could stand in one place sum to 1."""
    sample = with_every_last_token(words_tokenizer)
    found = make_bench(temperature=0.5).run(name, sample, tuning)
    last = np.cumsum([len(places) for places in sample.places]) - 1
    assert np.array_equal(found.targets[last], np.arange(len(words_tokenizer)))
    assert np.exp(found.log_p[last]).sum() == pytest.approx(1, abs=1e-5)
    assert np.exp(found.log_p[last]).std() > 0


def next_token(lm, ids) -> torch.Tensor:
    """log p of what follows, read alone."""
    with torch.no_grad():
        return lm(torch.as_tensor(np.asarray(ids))[None]).logits[0, -1].double().log_softmax(-1)


def slowly(bench: BaselineEvaluator, sample, stride: int, positions=None):
    """For each target: log p with each document in front and with all of them, and the scores, one token at a time."""
    m, apart, together, scores = 8, [], [], []
    for window, (text, places) in enumerate(zip(sample.texts, sample.places, strict=True)):
        for place in places:
            begin = place // stride * stride
            end = min(begin + stride, places[-1] + 1)
            query = text[max(0, begin - bench.settings.query_len) : begin].tolist()
            documents, of_query = [[]], [0.0]
            if query:
                found = bench.retriever([query], 2, exclude_documents=[{sample.data.document_ids[window]}])
                documents = [
                    [t for t in tokens[mask].tolist() if t > 1]
                    for tokens, mask in zip(found.tokens[0], found.mask[0], strict=True)
                ]
                of_query = found.scores[0].tolist()

            def log_p(front, begin=begin, end=end, place=place, text=text):
                room = begin if positions is None else positions - len(front) - (end - begin)
                context = text[max(0, begin - room) : place].tolist()
                return float(next_token(bench.reader, front + context)[text[place]])

            apart.append([log_p(document) for document in documents])
            together.append(log_p([t for document in reversed(documents) for t in document]))
            scores.append(of_query)
    assert m % stride == 0
    return apart, together, scores


@pytest.mark.parametrize(("stride", "query_len", "positions"), [(8, 8, None), (4, 6, None), (8, 12, 44)])
def test_prompts_against_one_token_at_a_time(stride, query_len, positions, make_bench, sample):
    bench = make_bench(2, positions, retrieval_stride=stride, query_len=query_len, prompt_neighbors=2, temperature=0.3)
    apart, together, scores = slowly(bench, sample, stride, positions)
    np.testing.assert_allclose(bench.run("prepend", sample).log_p, together, rtol=1e-4)
    for name, temperature in (("replug", 0.3), ("rag_token", 1.0)):
        if name == "rag_token":
            apart, _, scores = slowly(bench, sample, 8, positions)
        expected = []
        for log_p, of_query in zip(apart, scores, strict=True):
            weights = np.exp(np.asarray(of_query) / temperature)
            expected.append(math.log(np.dot(weights / weights.sum(), np.exp(log_p))))
        np.testing.assert_allclose(bench.run(name, sample).log_p, expected, rtol=1e-4)


def test_rag_sequence_against_whole_chunks(make_bench, sample):
    """Over each chunk the sum is that of products of token probabilities, weighed by documents."""
    bench = make_bench()
    apart, _, scores = slowly(bench, sample, 8)
    found = bench.run("rag_sequence", sample).log_p
    chunks = np.concatenate([100 * window + places // 8 for window, places in enumerate(sample.places)])
    for chunk in np.unique(chunks):
        at = np.flatnonzero(chunks == chunk)
        weights = np.exp(np.asarray(scores[at[0]]))
        products = np.exp(np.sum([apart[t] for t in at], axis=0))
        assert found[at].sum() == pytest.approx(math.log(np.dot(weights / weights.sum(), products)), rel=1e-4)


def test_one_document_is_one_document(make_bench, sample):
    """REPLUG and both RAGs with one document are in-context retrieval; with two, REPLUG at T = 1 is RAG-token."""
    bench = make_bench(1)
    prepended = bench.run("prepend", sample).log_p
    for name in PROMPTED[1:]:
        np.testing.assert_allclose(bench.run(name, sample).log_p, prepended, rtol=1e-9)
    two = {name: make_bench(2).run(name, sample).log_p for name in PROMPTED}
    np.testing.assert_allclose(two["replug"], two["rag_token"], rtol=1e-12)
    assert np.abs(two["rag_token"] - two["rag_sequence"]).max() > 1e-4
    assert np.abs(two["rag_token"] - two["prepend"]).max() > 1e-4


def test_replug_chooses_its_temperature(make_bench, sample, tuning):
    bench = make_bench(replug_temperatures=(0.1, 1.0, 10.0))
    found = bench.run("replug", sample, tuning)
    bits = {t: make_bench(temperature=t).run("replug", tuning).log_p.sum() for t in (0.1, 1.0, 10.0)}
    best = max(bits, key=bits.get)
    assert found.chosen["temperature"] == best and found.chosen["on_validation"]
    np.testing.assert_allclose(found.log_p, make_bench(temperature=best).run("replug", sample).log_p)


def test_knn_against_one_token_at_a_time(make_bench, sample, tuning):
    """Every key of the store compared with every state, without an index."""
    bench = make_bench(knn_ks=(6,), knn_weights=(0.4,), knn_temperatures=(0.05,))
    found, lm, store = bench.run("knn_lm", sample, tuning), bench.reader, bench.store
    keys, values = [], []
    for first, count in store.document_spans.tolist():
        ids = np.concatenate(store.token_lists(np.arange(first, first + count)))
        for start in range(0, len(ids) - 1, 31):
            window = torch.from_numpy(ids[start : start + 32])
            with torch.no_grad():
                keys.append(lm.model(window[None]).last_hidden_state[0, :-1].double())
            values += window[1:].tolist()
    keys, spread = torch.cat(keys), found.chosen["spread"]
    expected = []
    for text, places in zip(sample.texts, sample.places, strict=True):
        for place in places:
            with torch.no_grad():
                state = lm.model(torch.from_numpy(text[None, :place])).last_hidden_state[0, -1].double()
            nearest, order = (keys - state).square().sum(-1).sort()
            weights = (-nearest[:6] / (0.05 * spread)).softmax(0)
            right = sum(float(w) for w, i in zip(weights, order[:6], strict=True) if values[i] == text[place])
            expected.append(math.log(0.6 * float(next_token(lm, text[:place])[text[place]].exp()) + 0.4 * right))
    np.testing.assert_allclose(found.log_p, expected, rtol=2e-3, atol=1e-3)
    assert len(np.unique(found.log_p > bench.run("lm", sample).log_p)) == 2


def test_no_weight_is_the_lm(make_bench, sample, tuning):
    bench = make_bench(knn_weights=(0.0,))
    assert np.array_equal(bench.run("knn_lm", sample, tuning).log_p, bench.run("lm", sample).log_p)


@pytest.mark.parametrize("name", ["lm", "retro_off", "retro_on"])
def test_equals_what_evaluate_scores(name, make_bench, sample, planted_store):
    bench = make_bench()
    rows = bench._rows(sample, bench.retriever)
    model = bench.reader if name == "lm" else bench.model
    retrieval = "on" if name == "retro_on" else "off"
    expected = score(model, replace(sample.data, rows=rows), retrieval, planted_store, window_len=32, stride=16)
    scores = sample.chunk_scores(bench.run(name, sample).log_p)
    np.testing.assert_allclose(scores.bits, expected.bits, rtol=1e-4, atol=1e-4)


def test_all_windows_are_the_whole_text(pointer, planted_retriever):
    settings = BaselineSettings(("lm", "retro_on"), windows_per_document=0, **SMALL)
    result = measure_baselines(pointer, HELD_OUT, planted_retriever, settings=settings)
    data = prepare(HELD_OUT, planted_retriever.store.tokenizer, 8, planted_retriever, 2)
    expected = {"lm": score(pointer.base, data, window_len=32, stride=16)}
    expected["retro_on"] = score(pointer, data, "on", planted_retriever.store, window_len=32, stride=16)
    for row in result["rows"]:
        assert row["bpb"] == pytest.approx(expected[row["method"]].bits_per_byte(data), rel=1e-5)
    little = expected["retro_on"].bits_per_byte(data, data.overlap_ratio <= 0.125)
    assert result["rows"][1]["bpb_little_overlap"] == pytest.approx(little, rel=1e-5, nan_ok=True)
    assert result["tokens"] == data.scored.sum() and result["bytes"] == data.bytes_of_chunk.sum()


def test_the_whole_table(pointer, planted_retriever):
    settings = BaselineSettings(windows_per_document=1, retrieval_stride=4, **SMALL)
    result = measure_baselines(pointer, HELD_OUT, planted_retriever, None, VALIDATION, settings)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS) and result["windows"] == len(HELD_OUT) == result["documents"]
    assert rows["lm"]["change"] == 0 and rows["retro_off"]["change"] == pytest.approx(0, abs=1e-6)
    assert rows["retro_on_oracle"]["bpb"] < rows["retro_on_random"]["bpb"]
    assert len({round(row["bpb"], 6) for row in rows.values()}) >= len(METHODS) - 1, "only RETRO[OFF] is as another"
    tokens = result["tokens"]
    searches = {name: row["searches_per_1000_tokens"] * tokens / 1000 for name, row in rows.items()}
    assert searches["knn_lm"] == pytest.approx(tokens) and searches["lm"] == searches["retro_on_random"] == 0
    assert searches["rag_token"] == searches["retro_on"] < searches["prepend"] == searches["replug"]
    assert rows["prepend"]["flops_per_1000_tokens"] > rows["retro_on"]["flops_per_1000_tokens"]
    assert rows["retro_on"]["store_bytes"] > rows["retro_on_random"]["store_bytes"] > rows["lm"]["store_bytes"] == 0
    assert rows["knn_lm"]["chosen"]["weight"] == 0.3 and result["settings"]["retrieval_stride"] == 4
    printed = table_text(result)
    assert all(row["label"] in printed and f"{row['bpb']:.4f}" in printed for row in rows.values())
    assert {"low", "change_high", "chosen_k"} <= {name for row in tables_of(result)[0].data for name in row}


def test_what_cannot_run_is_left_out_or_refused(make_model, make_lm, planted_retriever, words_tokenizer):
    retro = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    names = lambda model, reader, given=None: plan_methods(  # noqa: E731
        resolved(BaselineSettings(given), planted_retriever, reader, 2), model, reader, planted_retriever, None
    )
    assert names(retro, None) == [name for name in METHODS if name.startswith("retro")]
    assert names(None, make_lm()) == ["lm", *PROMPTED] and names(retro, make_lm(), ("replug",)) == ["lm", "replug"]
    for model, reader, given, message in [
        (None, make_lm(), ("retro_on",), r"RETRO\[ON\] \(retro_on\) needs a model that reads neighbors; give a RETRO"),
        (retro, None, ("prepend",), r"in-context, prepended \(prepend\) needs a plain LM"),
        (retro, make_lm(), ("knn_lm",), r"kNN-LM \(knn_lm\) needs validation documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            names(model, reader, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(methods=("replugg",)), "replugg: unknown method; did you mean replug?"),
        (dict(temperature=0.0), "a temperature is 0.0; give numbers above 0"),
        (dict(knn_weights=(0.5, 1.0)), "give numbers from 0 to below 1"),
        (dict(query_len=0), "query_len is 0; give at least 1"),
        (dict(retrieval_stride=3), "retrieval_stride is 3; it must divide the chunk length 8"),
        (dict(num_neighbors=2, prompt_neighbors=3), "prompt_neighbors is 3, more than the 2 neighbors"),
        (dict(num_neighbors=10**6), "num_neighbors is 1000000; the store has"),
        (dict(stride=32, window_len=32), "stride is 32 and window_len 32"),
    ],
)
def test_settings_that_do_not_fit(given, message, pointer, planted_retriever):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        measure_baselines(pointer, HELD_OUT[:1], planted_retriever, settings=BaselineSettings(**given))


def test_models_that_do_not_fit(pointer, make_lm, make_model, planted_retriever, words_tokenizer):
    measure = lambda *given, **named: measure_baselines(given[0], HELD_OUT[:1], planted_retriever, *given[1:], **named)  # noqa: E731
    with pytest.raises(ValueError, match="two plain LMs; leave one out"):
        measure(make_lm(), make_lm())
    with pytest.raises(ValueError, match="the reader reads neighbors itself; give a plain LM"):
        measure(pointer, pointer)
    with pytest.raises(ValueError, match="1 of the validation documents, planted among them, are evaluated too"):
        measure(pointer, validation=HELD_OUT[:1])
    with pytest.raises(ValueError, match="retrieved_len is 16 in the retriever, 24 in the model"):
        measure(make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=24))
    with pytest.raises(ValueError, match="the reader has 61 embeddings, the store's tokenizer 103 tokens"):
        measure(pointer, make_model(cca_layers=[]))
    pointer.base.config.max_position_embeddings = 32
    with pytest.raises(ValueError, match="leave no room for the text in the reader's 32 positions"):
        measure(pointer, settings=BaselineSettings(prompt_neighbors=2))


def test_the_command(made, tmp_path, capsys):  # noqa: F811
    records = [{"id": "v0", "text": words(40, seed=200, vocabulary=100)}]
    validation = write_jsonl(tmp_path / "validation.jsonl", records)
    argv = ["baselines", made["retro"], "--store", made["store"], "--data", made["heldout"], "--reader", made["lm"]]
    files = ["--json", str(tmp_path / "result.json"), "--csv", str(tmp_path / "result.csv")]
    asked = ["--methods", "retro_on", "replug", "knn_lm", "--knn-tokens", "200", "--window", "32"]
    assert main([*argv, *asked, "--validation", validation, *files]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["lm", "retro_on", "replug", "knn_lm"]
    assert result["rows"][-1]["chosen"]["tokens"] == 200 and result["validation"] == [validation]
    assert f"{result['rows'][1]['bpb']:.4f}" in capsys.readouterr().out
    assert len(list(csv.DictReader((tmp_path / "result.csv").open()))) == 4


REFUSED = {
    "a method that is none": (["--methods", "replugg"], 'Did you mean "replug"?'),
    "no validation": (["--reader", "{lm}", "--methods", "knn_lm"], "needs validation documents"),
    "no reader": (["--methods", "prepend"], "needs a plain LM"),
    "a reader of another tokenizer": (["--reader", "{other}"], "tokenizer"),
    "a table nowhere": (["--csv", "{empty}/nowhere/a.csv"], "make it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(case, made, capsys):  # noqa: F811
    argv, said = REFUSED[case]
    given = ["baselines", "{retro}", "--store", "{store}", "--data", "{heldout}", *argv]
    assert main([argument.format(**made) for argument in given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retro: error: ") and said in error
