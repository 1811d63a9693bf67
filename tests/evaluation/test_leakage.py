"""bpb(alpha): by hand, against the plain figure, and with a planted copy that it must find."""

import numpy as np
import pytest

from retro.evaluation import ChunkScores, EvaluationData, ScoringSettings, bits_per_byte, measure_leakage, prepare
from retro.evaluation.leakage import BANDS, examples_page, leakage_points, marked
from retro.evaluation.tables import table_text, tables_of
from retro.text.documents import Document
from tests.evaluation.conftest import HELD_OUT, PLANTED

ON_AND_OFF = {"retro_off": np.array([10.0, 20, 30, 40]), "retro_on": np.array([10.0, 10, 30, 4])}


def points_of(num_bytes, overlap, documents, alphas):
    """Of four chunks of 1,000 tokens in two documents, all bytes of a chunk in its first token."""
    wide = np.zeros((4, 1000), int)
    wide[:, 0] = num_bytes
    nothing, of_documents = np.zeros((4, 1), int), np.zeros(2, int)
    given = dict(rows=nothing, leak_rows=nothing, overlap=np.asarray(overlap), document_ids=["a", "b"])
    given |= dict(tokens=wide, lens=np.full(4, 1000), num_bytes=wide, scored=wide > 0, documents=np.asarray(documents))
    data = EvaluationData(**given, words=of_documents, line_ends=of_documents)
    scores = {column: ChunkScores(bits, 0.0) for column, bits in ON_AND_OFF.items()}
    return leakage_points(scores, data, alphas)


def test_points_by_hand():
    """Four chunks of two documents; the last one is a copy, which RETRO[ON] has for a tenth of the bits."""
    first, second, last = points_of([5, 10, 10, 20], [100, 125, 500, 1000], [0, 0, 1, 1], (0.125, 0.5, 1.0))
    assert [point["chunks"] for point in (first, second, last)] == [2, 3, 4]
    assert [point["bytes"] for point in (first, second, last)] == [15, 25, 45]
    assert [point["documents"] for point in (first, second, last)] == [1, 2, 2]
    assert first["bpb"] == pytest.approx({"retro_off": 30 / 15, "retro_on": 20 / 15})
    assert second["bpb"] == pytest.approx({"retro_off": 60 / 25, "retro_on": 50 / 25})
    assert last["bpb"] == pytest.approx({"retro_off": 100 / 45, "retro_on": 54 / 45})
    assert last["gain"]["retro_off"] == pytest.approx([1 - 54 / 100, 1 / 3, 1 - 34 / 70])  # of document 0 and 1 alone
    assert last["interval"]["retro_off"] == pytest.approx([2, 7 / 3])  # 30 / 15 and 70 / 30


def test_chunks_without_text_are_not_counted():
    (point,) = points_of([5, 10, 0, 20], [0, 0, 0, 0], [0, 0, 1, 1], (0.125,))
    assert point["chunks"] == 3


@pytest.fixture
def result(pointer, make_lm, planted_retriever):
    return measure_leakage(pointer, HELD_OUT, planted_retriever, 2, make_lm(), ScoringSettings(64))


def test_a_planted_copy_is_found_with_its_last_short_chunk(planted_retriever, words_tokenizer):
    data = prepare(HELD_OUT, words_tokenizer, 8, planted_retriever)
    planted = data.documents == 0
    assert (data.overlap_ratio[planted] == 1).all() and data.lens[planted][-1] < 8
    whole = ~planted & (data.lens == 8)
    assert (data.overlap_ratio[whole] < 0.7).all()


def test_a_planted_copy_inflates_the_gain_over_all_chunks_only(result):
    little, everything = result["points"][0], result["points"][-1]
    assert everything["gain"]["retro_off"][0] > 0.05
    assert little["chunks"] >= 10 and abs(little["gain"]["retro_off"][0]) < 0.005
    assert everything["gain"]["retro_on_random"][0] > 0.05, "it is this copy, not any text"


def test_without_the_copy_there_is_no_gain(pointer, planted_retriever):
    result = measure_leakage(pointer, HELD_OUT[1:], planted_retriever, 2, scoring=ScoringSettings(64))
    gain = result["points"][-1]["gain"]
    assert abs(gain["retro_off"][0]) < 0.005


def test_off_equals_the_base_at_every_alpha(result):
    for point in result["points"]:
        assert point["bpb"]["retro_off"] == pytest.approx(point["bpb"]["lm"], abs=1e-6)


def test_the_last_point_is_the_plain_figure(result, pointer, make_lm, planted_retriever):
    plain = bits_per_byte(pointer, HELD_OUT, planted_retriever, 2, make_lm(), ScoringSettings(64))
    assert result["points"][-1]["bpb"] == pytest.approx(plain["bpb"], abs=1e-12)
    assert result["points"][-1]["interval"] == {name: pytest.approx(ends) for name, ends in plain["interval"].items()}
    assert result["points"][0]["bpb"] == pytest.approx(plain["bpb_little_overlap"], abs=1e-12)
    for name in ("bytes", "tokens", "documents", "window_len", "stride", "store_fingerprint", "versions"):
        assert result[name] == plain[name]


def test_a_document_of_the_store_is_named_and_counts_if_asked_for(pointer, planted_store, planted_retriever, caplog):
    own = [Document(planted_store.document_ids[3], planted_store.text(np.arange(*span(planted_store, 3)))[0])]
    hidden = measure_leakage(pointer, [*own, *HELD_OUT[1:]], planted_retriever, 2)
    assert hidden["documents_in_store"] == 1 and "1 evaluation documents have the id" in caplog.text
    shown = measure_leakage(pointer, [*own, *HELD_OUT[1:]], planted_retriever, 2, exclude="none")
    copies = [result["points"][-1]["chunks"] - result["points"][-2]["chunks"] for result in (hidden, shown)]
    assert copies[1] > copies[0]
    with pytest.raises(ValueError, match="exclude is 'all'; choose one of same_document, none"):
        measure_leakage(pointer, own, planted_retriever, exclude="all")


def span(store, document):
    first, count = store.document_spans[document].tolist()
    return first, first + count


def test_examples_mark_the_common_run(result):
    assert result["examples"], "one a band that has a chunk"
    for example in result["examples"]:
        assert example["text"][1].split() == example["neighbor_text"][1].split()
        assert len(example["text"][1].split()) == example["common_tokens"] == round(example["ratio"] * 8)
        source = next(document for document in HELD_OUT if document.id == example["document_id"])
        words = source.text.split()[8 * example["chunk"] :][:8]
        assert "".join(example["text"]).split() == words
    bands = np.searchsorted(BANDS, [example["ratio"] for example in result["examples"]])
    assert len(set(bands.tolist())) == len(bands) and (np.diff(bands) > 0).all()
    assert result["examples"][-1]["document_id"] == PLANTED.id
    assert f"[[{result['examples'][-1]['text'][1]}]]" in examples_page(result)


def test_marked_parts_are_the_text(words_tokenizer):
    ids = words_tokenizer("w1 w2 w3 w4")["input_ids"]
    assert marked(words_tokenizer, np.array(ids), 1, 2) == ["w1", " w2 w3", " w4"]


def test_table_and_rows(result):
    table, rows = table_text(result), tables_of(result)[0].data
    assert f"{result['points'][-1]['bpb']['retro_on']:.4f}" in table and "12.5%" in table
    assert len(rows) == 8 * 4
    (row,) = (row for row in rows if row["alpha"] == 1 and row["column"] == "retro_off")
    assert row["bpb"] == result["points"][-1]["bpb"]["retro_off"]
    assert row["on_is_below"] == result["points"][-1]["gain"]["retro_off"][0]
