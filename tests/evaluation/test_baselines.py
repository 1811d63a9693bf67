"""The baselines: every one a distribution, equal to a slow loop, over the same tokens; the table and the command."""

import csv
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from retro.cli import main
from retro.evaluation import prepare, score
from retro.evaluation.baselines import METHODS, BaselineSettings, measure_baselines
from retro.evaluation.baselines.bench import BaselineEvaluator, MethodScores
from retro.evaluation.baselines.methods import PlannedRow, plan_rows, resolved
from retro.evaluation.baselines.prompting import spans_of
from retro.evaluation.baselines.sample import draw_sample
from retro.evaluation.tables import table_text, tables_of
from retro.text.documents import Document
from tests.evaluation.conftest import HELD_OUT
from tests.evaluation.test_commands import made  # noqa: F401 (a fixture)
from tests.stand_ins import words, write_jsonl

PROMPTED = ["prepend", "replug", "rag_token", "rag_sequence"]
WITHOUT_K = ("lm", "retro_off", "knn_lm")
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
    model = retrofit(lm, form="pointer", chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        model.form.gate.opening.fill_(2.0)
    return model


@pytest.fixture
def make_bench(pointer, planted_retriever):
    """make_bench(k=2, positions=None, **settings): over the planted store, with a RETRO-fit and its base."""

    def make(k=2, positions=None, **given) -> BaselineEvaluator:
        pointer.base.config.max_position_embeddings = positions or 2048
        settings = resolved(BaselineSettings(**{**SMALL, **given}), planted_retriever, pointer.base, k)
        excluded = [document.id for document in HELD_OUT]
        return BaselineEvaluator({"fitted": pointer}, pointer.base, planted_retriever, settings, excluded)

    return make


def run(bench, method, sample, tuning=None, k=None):
    """A method with the settings' last k."""
    is_retro = method.startswith("retro")
    ks = bench.settings.num_neighbors if is_retro else bench.settings.prompt_neighbors
    row = PlannedRow(method, "fitted" if is_retro else None, None if method in WITHOUT_K else k or ks[-1])
    return bench.run(row, sample, tuning)


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


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("random")])  # each window's is another
def test_every_method_is_a_distribution(name, make_bench, words_tokenizer, tuning):
    """The probabilities of all tokens that could stand in one place sum to 1."""
    sample = with_every_last_token(words_tokenizer)
    found = run(make_bench(temperature=0.5), name, sample, tuning)
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
    bench = make_bench(2, positions, retrieval_stride=stride, query_len=query_len, temperature=0.3)
    apart, together, scores = slowly(bench, sample, stride, positions)
    np.testing.assert_allclose(run(bench, "prepend", sample).log_p, together, rtol=1e-4)
    for name, temperature in (("replug", 0.3), ("rag_token", 1.0)):
        if name == "rag_token":
            apart, _, scores = slowly(bench, sample, 8, positions)
        expected = []
        for log_p, of_query in zip(apart, scores, strict=True):
            weights = np.exp(np.asarray(of_query) / temperature)
            expected.append(math.log(np.dot(weights / weights.sum(), np.exp(log_p))))
        np.testing.assert_allclose(run(bench, name, sample).log_p, expected, rtol=1e-4)


def test_rag_sequence_against_whole_chunks(make_bench, sample):
    """Over each chunk the sum is that of products of token probabilities, weighed by documents."""
    bench = make_bench()
    apart, _, scores = slowly(bench, sample, 8)
    found = run(bench, "rag_sequence", sample).log_p
    chunks = np.concatenate([100 * window + places // 8 for window, places in enumerate(sample.places)])
    for chunk in np.unique(chunks):
        at = np.flatnonzero(chunks == chunk)
        weights = np.exp(np.asarray(scores[at[0]]))
        products = np.exp(np.sum([apart[t] for t in at], axis=0))
        assert found[at].sum() == pytest.approx(math.log(np.dot(weights / weights.sum(), products)), rel=1e-4)


def test_one_document_is_one_document(make_bench, sample):
    """REPLUG and both RAGs with one document are in-context retrieval; with two, REPLUG at T = 1 is RAG-token."""
    bench = make_bench(1)
    prepended = run(bench, "prepend", sample).log_p
    for name in PROMPTED[1:]:
        np.testing.assert_allclose(run(bench, name, sample).log_p, prepended, rtol=1e-9)
    two = {name: run(make_bench(2), name, sample).log_p for name in PROMPTED}
    np.testing.assert_allclose(two["replug"], two["rag_token"], rtol=1e-12)
    assert np.abs(two["rag_token"] - two["rag_sequence"]).max() > 1e-4
    assert np.abs(two["rag_token"] - two["prepend"]).max() > 1e-4


def test_replug_chooses_its_temperature(make_bench, sample, tuning):
    bench = make_bench(replug_temperatures=(0.1, 1.0, 10.0))
    found = run(bench, "replug", sample, tuning)
    bits = {t: run(make_bench(temperature=t), "replug", tuning).log_p.sum() for t in (0.1, 1.0, 10.0)}
    best = max(bits, key=bits.get)
    assert found.chosen["temperature"] == best and found.chosen["on_validation"]
    np.testing.assert_allclose(found.log_p, run(make_bench(temperature=best), "replug", sample).log_p)


def test_knn_against_one_token_at_a_time(make_bench, sample, tuning):
    """Every key of the store compared with every state, without an index."""
    bench = make_bench(knn_ks=(6,), knn_weights=(0.4,), knn_temperatures=(0.05,))
    found, lm, store = run(bench, "knn_lm", sample, tuning), bench.reader, bench.store
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
    assert len(np.unique(found.log_p > run(bench, "lm", sample).log_p)) == 2


def test_no_weight_is_the_lm(make_bench, sample, tuning):
    bench = make_bench(knn_weights=(0.0,))
    assert np.array_equal(run(bench, "knn_lm", sample, tuning).log_p, run(bench, "lm", sample).log_p)


@pytest.mark.parametrize("name", ["lm", "retro_off", "retro_on"])
def test_equals_what_evaluate_scores(name, make_bench, sample, planted_store):
    bench = make_bench()
    rows, _ = bench._rows(sample, "")
    model = bench.reader if name == "lm" else bench.models["fitted"]
    retrieval = "on" if name == "retro_on" else "off"
    expected = score(model, replace(sample.data, rows=rows), retrieval, planted_store, window_len=32, stride=16)
    scores = sample.chunk_scores(run(bench, name, sample).log_p)
    np.testing.assert_allclose(scores.bits, expected.bits, rtol=1e-4, atol=1e-4)


def test_all_windows_are_the_whole_text(pointer, planted_retriever):
    settings = BaselineSettings(("lm", "retro_on"), windows_per_document=0, **SMALL)
    result = measure_baselines({"fitted": pointer}, HELD_OUT, planted_retriever, settings=settings)
    data = prepare(HELD_OUT, planted_retriever.store.tokenizer, 8, planted_retriever, 2)
    expected = {"lm": score(pointer.base, data, window_len=32, stride=16)}
    expected["retro_on"] = score(pointer, data, "on", planted_retriever.store, window_len=32, stride=16)
    for row in result["rows"]:
        assert row["bpb"] == pytest.approx(expected[row["method"]].bits_per_byte(data), rel=1e-5)
    little = expected["retro_on"].bits_per_byte(data, data.overlap_ratio <= 0.125)
    assert result["rows"][1]["bpb_little_overlap"] == pytest.approx(little, rel=1e-5, nan_ok=True)
    assert result["tokens"] == data.scored.sum() and result["bytes"] == data.bytes_of_chunk.sum()


def test_the_whole_table(pointer, planted_retriever):
    settings = BaselineSettings(tuple(METHODS), (1, 2), (2,), windows_per_document=1, retrieval_stride=4, **SMALL)
    result = measure_baselines({"fitted": pointer}, HELD_OUT, planted_retriever, None, VALIDATION, settings)
    rows = {(row["method"], row["k"]): row for row in result["rows"]}
    expected = {name: [1, 2] if name.startswith("retro_on") else [2] for name in METHODS} | dict.fromkeys(
        WITHOUT_K, [None]
    )
    assert list(rows) == [(name, k) for name in METHODS for k in expected[name]]
    assert result["windows"] == len(HELD_OUT) == result["documents"]
    assert rows["lm", None]["gain"] == [0, 0, 0] and rows["retro_off", None]["gain"][0] == pytest.approx(0, abs=1e-6)
    assert rows["retro_on_oracle", 2]["bpb"] < rows["retro_on_random", 2]["bpb"]
    assert len({round(row["bpb"], 6) for row in rows.values()}) >= len(rows) - 1, "only RETRO[OFF] is as another"
    assert rows["retro_on", 1]["trained_weights"] == pointer.trainable_share()[0]
    tokens = result["tokens"]
    searches = {name: row["searches_per_1000_tokens"] * tokens / 1000 for (name, _), row in rows.items()}
    assert searches["knn_lm"] == pytest.approx(tokens) and searches["lm"] == searches["retro_on_random"] == 0
    assert searches["rag_token"] == searches["retro_on"] < searches["prepend"] == searches["replug"]
    flops = {key: row["flops_per_1000_tokens"] for key, row in rows.items()}
    assert flops["lm", None] == flops["retro_off", None] < flops["retro_on", 1] < flops["retro_on", 2]
    assert flops["retro_on", 2] == flops["retro_on_random", 2] < flops["prepend", 2] < flops["replug", 2]
    store_bytes = {name: row["store_bytes"] for (name, _), row in rows.items()}
    assert store_bytes["retro_on"] > store_bytes["retro_on_random"] > store_bytes["lm"] == 0
    assert rows["knn_lm", None]["chosen"]["weight"] == 0.3 and result["settings"]["retrieval_stride"] == 4
    printed = table_text(result)
    assert all(row["label"] in printed and f"{row['bpb']:.4f}" in printed for row in rows.values())
    assert {"interval_low", "gain_high", "chosen_k"} <= {name for row in tables_of(result)[0].data for name in row}


def test_models_are_compared_over_the_same_tokens(pointer, make_lm, planted_retriever):
    """Alone, beside others, and in whatever order: the same figures; a plain LM beside the reader is a row, too."""
    from retro.retrofit import retrofit

    paper = retrofit(pointer.base, form="paper", cca_layers=[2], chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        for parameter in paper.form.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    settings = BaselineSettings(num_neighbors=(2, 1), windows_per_document=2, **SMALL)
    figures = {}
    for models in ({"a": pointer}, {"b": paper, "c": make_lm(), "a": pointer}):
        found = measure_baselines(models, HELD_OUT, planted_retriever, settings=settings)
        for row in found["rows"]:
            held_against = {"retro_on": {"random", "prompt"}, "prepend": {"random"}}.get(row["method"], set())
            assert row["below"].keys() == held_against
            bpb = {(x["method"], x["model"], x["k"]): x["bpb"] for x in found["rows"]}
            partners = {"random": ("retro_on_random", row["model"]), "prompt": ("prepend", "LlamaForCausalLM")}
            for name in held_against if row["method"] == "retro_on" else ():
                other = bpb[(*partners[name], row["k"])]
                assert row["below"][name]["gain"][0] == pytest.approx(1 - row["bpb"] / other)
        rows = {(row["method"], row["model"], row["k"]): (row["bpb"], *row["gain"]) for row in found["rows"]}
        assert figures.items() <= rows.items()
        figures = rows
    methods = ("retro_on", "retro_on_random")
    assert {(method, name, k) for method in methods for name in "ab" for k in (1, 2)} < figures.keys()
    assert len({figures[method, name, 2][0] for method in methods for name in "ab"}) == 4
    others = [key for key in figures if key[0] == "lm"]
    assert [name for _, name, _ in others] == ["LlamaForCausalLM", "c"] and figures[others[1]][0] > 0
    assert not any(method == "retro_off" and name == "a" for method, name, _ in figures), "it is the reader"
    assert [name for _, name, _ in figures] == ["LlamaForCausalLM", "c", *"bbbb", *"aaaa", *["LlamaForCausalLM"] * 4]


def test_random_neighbors_are_the_same_for_every_reader_and_k(make_bench, sample, monkeypatch):
    """Whatever the parts of the sample, the method and k: each chunk has its own random neighbors."""
    bench, given = make_bench(num_neighbors=(1, 2), prompt_neighbors=(1, 2)), {}
    monkeypatch.setattr(
        bench, "_retro", lambda model, sample, rows: given.setdefault("retro", []).append(rows) or _NONE
    )
    monkeypatch.setattr(
        bench, "_with_prompt", lambda sample, spans, rows: given.setdefault("prompt", []).append(rows) or _NONE
    )
    for part in [*sample.parts(), sample]:
        for k in (1, 2):
            run(bench, "retro_on_random", part, k=k)
            run(bench, "prepend_random", part, k=k)
    retro, prompt = given["retro"], given["prompt"]
    for rows in (retro, prompt):
        np.testing.assert_array_equal(np.concatenate([rows[1], rows[3]]), rows[5])
        assert all(np.array_equal(rows[i], rows[i + 1][:, :1]) for i in (0, 2, 4))
        assert len(np.unique(rows[5])) > 8
    spans = spans_of(sample, 8, 8)
    before = sample.first_chunk[spans.windows] + spans.begins // 8 - 1
    asked = spans.begins > 0
    np.testing.assert_array_equal(prompt[5][asked], retro[5][before[asked]])


_NONE = MethodScores(np.zeros(0), np.zeros(0, int))


def test_near_copies_stand_apart(pointer, planted_retriever):
    """The planted document is one; without it the figures are those of the others alone."""
    settings = BaselineSettings(("lm", "retro_on"), (2,), windows_per_document=0, **SMALL)
    measure = lambda documents: measure_baselines({"a": pointer}, documents, planted_retriever, settings=settings)  # noqa: E731
    every, others, planted = measure(HELD_OUT), measure(HELD_OUT[1:]), measure(HELD_OUT[:1])
    assert (every["near_copies"], others["near_copies"], planted["near_copies"]) == (["planted"], [], ["planted"])
    for row, expected, alone in zip(every["rows"], others["rows"], planted["rows"], strict=True):
        figures = row["without_near_copies"]
        for name, value in figures.items():
            assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-9, nan_ok=True), name
        assert row["bpb"] != pytest.approx(figures["bpb"], rel=1e-3)
        assert "without_near_copies" not in expected and "without_near_copies" not in alone
    first, second = tables_of(every)
    assert second.title.startswith("Without near copies (1), ") and len(second.rows) == 2
    assert second.rows[1][3] == f"{others['rows'][1]['bpb']:.4f}" != first.rows[1][3]
    assert len(tables_of(others)) == 1


def test_gains_and_intervals_against_a_slow_bootstrap(pointer, planted_retriever):
    """Documents drawn anew by hand, both models' bits of each together; once over all chunks, once over few."""
    settings = BaselineSettings(("lm", "retro_on"), (2,), windows_per_document=0, **SMALL)
    row = measure_baselines({"a": pointer}, HELD_OUT, planted_retriever, settings=settings)["rows"][1]
    data = prepare(HELD_OUT, planted_retriever.store.tokenizer, 8, planted_retriever, 2)
    bits = [score(pointer.base, data, window_len=32, stride=16).bits]
    bits.append(score(pointer, data, "on", planted_retriever.store, window_len=32, stride=16).bits)
    for name, chunks in (("gain", data.lens > 0), ("gain_little_overlap", data.overlap / data.lens <= 0.125)):
        base, on = ([one[chunks & (data.documents == d)].sum() for d in range(len(HELD_OUT))] for one in bits)
        draw, gains = random.Random(0), []
        for _ in range(20_000):
            drawn = draw.choices(range(len(HELD_OUT)), k=len(HELD_OUT))
            of_base = sum(base[d] for d in drawn)
            gains += [1 - sum(on[d] for d in drawn) / of_base] if of_base else []
        expected = [1 - sum(on) / sum(base), *np.quantile(gains, [0.025, 0.975])]
        assert row[name] == pytest.approx(expected, abs=0.1 * (expected[2] - expected[1])) and expected[1] < expected[2]


def test_operations_of_base_and_prompt_by_hand(make_bench, words_tokenizer):
    """A window of 32 tokens, of which 16 are scored, alone and behind two documents for each of its two chunks."""
    sample = draw_sample(prepare([Document("long", words(33, seed=7, vocabulary=100))], words_tokenizer, 8), 32, 16)
    bench, whole = make_bench(2), sample
    bench.counted = sample = replace(sample, texts=sample.texts[:1], places=[np.arange(16, 32)])
    matrices, vocab = 2 * (4 * 32 * 32 + 3 * 32 * 16), len(words_tokenizer)  # of two layers: q, k, v, o and the three

    def by_hand(*lengths):
        return sum(2 * matrices * n + 2 * 4 * n**2 * 32 for n in lengths) + 2 * vocab * 32 * 16

    assert run(bench, "lm", sample).flops == pytest.approx(by_hand(31), rel=0.002)
    spans, found = bench._searched(sample, 8)
    texts, places = bench._texts_with_documents(sample, spans, found.rows)
    assert [len(one) for one in places] == [8, 8] and 31 < max(map(len, texts)) <= 32 + 2 * 16
    read = [len(text) - 1 for text in texts]  # what is before the last scored token
    assert run(bench, "prepend", sample).flops == pytest.approx(by_hand(*read), rel=0.002)
    assert run(bench, "lm", whole).flops == 0, "only one sample is counted"


@pytest.mark.parametrize("form", ["pointer", "paper", "joint"])
def test_operations_of_a_form_are_those_of_its_matrices(form, make_lm, make_bench, sample):
    """Whatever a form is: the products of all linear maps that ran, and, besides them, only attention."""
    from retro.retrofit import retrofit

    model, products = retrofit(make_lm(), form=form, chunk_len=8, retrieved_len=16).eval(), []
    bench = make_bench(2)
    bench.models, bench.counted = {"fitted": model}, sample

    def note(linear, given, out):
        products.append(2 * given[0].numel() // linear.in_features * linear.weight.numel())

    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_hook(note)
    counts = []
    for k in (1, 2):
        products.clear()
        found = run(bench, "retro_on", sample, k=k).flops
        of_matrices = sum(products) // 2  # it is read twice, to be timed and to be counted
        assert of_matrices < found < 1.3 * of_matrices
        counts.append(found)
    off = run(bench, "retro_off", sample).flops
    assert off < counts[0] < counts[1]


def test_what_cannot_run_is_left_out_or_refused(make_model, make_lm, planted_retriever, words_tokenizer):
    retro = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)

    def names(model, reader, given=None):
        settings = resolved(BaselineSettings(given), planted_retriever, reader, 2)
        models = {} if model is None else {"retro": model}
        return [row.method for row in plan_rows(settings, models, reader, planted_retriever, None)]

    prompted = ["prepend", "prepend_random"]
    assert names(retro, None) == ["retro_off", "retro_on", "retro_on_random"]
    assert names(None, make_lm()) == ["lm", *prompted] and names(retro, make_lm(), ("replug",)) == ["lm", "replug"]
    assert names(retro, make_lm()) == ["lm", "retro_off", "retro_on", "retro_on_random", *prompted]
    short = make_lm()
    short.config.max_position_embeddings = 24  # of which a neighbor and a chunk leave none
    assert names(retro, short) == ["lm", "retro_off", "retro_on", "retro_on_random"]
    for model, reader, given, message in [
        (None, make_lm(), ("retro_on",), r"RETRO\[ON\] \(retro_on\) needs a model that reads neighbors; give a RETRO"),
        (retro, None, ("prepend",), r"in-context, prepended \(prepend\) needs a plain LM"),
        (retro, short, ("prepend",), r"\(prepend\) needs a plain LM of more than 24 positions; the reader has 24"),
        (retro, make_lm(), ("knn_lm",), r"kNN-LM \(knn_lm\) needs validation documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            names(model, reader, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(methods=("replugg",)), "replugg: unknown method; did you mean replug?"),
        (dict(temperature=0.0), "temperature is 0.0; give a number, above 0"),
        (dict(knn_weights=(0.5, 1.0)), "give a list of values, each a number, at least 0 and below 1"),
        (dict(query_len=0), "query_len is 0; give a whole number, at least 1"),
        (dict(retrieval_stride=3), "retrieval_stride is 3; it must divide the chunk length 8"),
        (dict(num_neighbors=()), "num_neighbors is empty; give a number"),
        (
            dict(prompt_neighbors=(2, 0)),
            r"prompt_neighbors is \(2, 0\); give a list of values, each a whole number, at least 1",
        ),
        (dict(num_neighbors=(10**4,)), "num_neighbors is 10000; the store has"),
        (dict(prompt_neighbors=(1, 10**4)), "prompt_neighbors is 10000; the store has"),
        (dict(stride=32, window_len=32), "stride is 32 and window_len 32"),
    ],
)
def test_settings_that_do_not_fit(given, message, pointer, planted_retriever):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        measure_baselines({"a": pointer}, HELD_OUT[:1], planted_retriever, settings=BaselineSettings(**given))


def test_models_that_do_not_fit(pointer, make_lm, make_model, planted_retriever, words_tokenizer):
    def measure(model, reader=None, **named):
        return measure_baselines({"a": model}, HELD_OUT[:1], planted_retriever, reader, **named)

    with pytest.raises(ValueError, match="the reader reads neighbors itself; give a plain LM"):
        measure(pointer, pointer)
    with pytest.raises(ValueError, match="1 of the validation documents, planted among them, are evaluated too"):
        measure(pointer, validation=HELD_OUT[:1])
    with pytest.raises(ValueError, match="retrieved_len is 16 in the retriever, 24 in a;"):
        measure(make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=24))
    with pytest.raises(ValueError, match="the reader has 61 embeddings, the store's tokenizer 103 tokens"):
        measure(pointer, make_model(cca_layers=[]))
    pointer.base.config.max_position_embeddings = 32
    with pytest.raises(ValueError, match="leave no room for the text in the reader's 32 positions"):
        measure(pointer, settings=BaselineSettings(prompt_neighbors=(2,)))


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
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(case, made, capsys):  # noqa: F811
    argv, said = REFUSED[case]
    given = ["baselines", "{retro}", "--store", "{store}", "--data", "{heldout}", *argv]
    assert main([argument.format(**made) for argument in given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retro: error: ") and said in error
