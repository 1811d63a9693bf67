"""Sweeps: each place is what a measurement of its own gives; shares of a datastore are nested and searched exactly."""

import json

import numpy as np
import pytest

from retro.common.files import write_result
from retro.evaluation import (
    ScoringSettings,
    bits_per_byte,
    sweep_datastore,
    sweep_models,
    sweep_neighbors,
    sweep_tokens,
    table_text,
)
from retro.evaluation.plots import check_plot, plot_leakage, plot_sweep
from retro.evaluation.sweeps import Subsample, checkpoints_of
from retro.evaluation.tables import tables_of, write_csv
from retro.retrieval import Retriever
from tests.evaluation.conftest import HELD_OUT
from tests.stand_ins import HashingEmbedder

SCORING = ScoringSettings(window_len=64, stride=32, cache=False)


def plain(model, retriever, k, **given):
    return bits_per_byte(model, HELD_OUT, retriever, k, scoring=ScoringSettings(64, 32), **given)


def test_neighbors(pointer, make_lm, planted_retriever):
    """12 neighbors are more than it was fitted for; k = 0 is OFF."""
    result = sweep_neighbors(pointer, HELD_OUT, planted_retriever, (12, 0, 2, 2), make_lm(), SCORING)
    assert [point["num_neighbors"] for point in result["curve"]] == [0, 2, 12]
    for point in result["curve"]:
        expected = plain(pointer, planted_retriever, point["num_neighbors"] or 1)
        column = "retro_on" if point["num_neighbors"] else "retro_off"
        assert point["bpb"] == pytest.approx(expected["bpb"][column])
        assert [point["low"], point["high"]] == pytest.approx(expected["interval"][column])
        assert point["bpb_little_overlap"] == pytest.approx(expected["bpb_little_overlap"][column])
        assert point["gain"] == pytest.approx(1 - expected["bpb"][column] / expected["bpb"]["retro_off"])
    assert result["references"]["lm"]["bpb"] == pytest.approx(result["references"]["retro_off"]["bpb"], abs=1e-6)
    with pytest.raises(ValueError, match=r"k is swept over \[0\]; give at least one k above 0"):
        sweep_neighbors(pointer, HELD_OUT, planted_retriever, (0,))
    with pytest.raises(ValueError, match="the model reads no neighbors"):
        sweep_neighbors(make_lm(), HELD_OUT, planted_retriever)


def test_shares_are_nested_and_about_as_large_as_they_say(planted_store):
    smaller, larger, other = (Subsample(planted_store, *drawn) for drawn in ((0.3, 0), (0.6, 0), (0.6, 1)))
    assert set(smaller.searchable_rows) < set(larger.searchable_rows) < set(planted_store.searchable_rows)
    assert set(larger.searchable_rows) != set(other.searchable_rows)
    chosen = set(planted_store.document_rows(larger.searchable_rows).tolist())
    assert len(chosen) == larger.sampled_documents
    kept = planted_store.document_rows(planted_store.searchable_rows)
    assert np.isin(kept, list(chosen)).sum() == len(larger.searchable_rows), "whole documents"


def test_fingerprints_tell_shares_apart(planted_store):
    prints = [Subsample(planted_store, *drawn).fingerprint for drawn in ((0.5, 0), (0.5, 1), (0.6, 0))]
    assert len({*prints, planted_store.fingerprint}) == 4
    assert Subsample(planted_store, 1.0, 1).fingerprint == planted_store.fingerprint


@pytest.mark.parametrize("kind", ["exact", "tfidf"])
def test_a_share_is_searched_exactly(kind, planted_store):
    """The ranking of the whole store without the other documents (weights of words depend on the store, so that only
    which documents are found is compared for them)."""
    part = Subsample(planted_store, 0.4, 0)
    texts = [document.text[:30] for document in HELD_OUT]
    found = Retriever(part, kind, HashingEmbedder())(texts, 5, [set()] * len(texts)).ids
    assert np.isin(found[found >= 0], part.searchable_rows).all()
    if kind == "exact":
        whole = Retriever(planted_store, kind, HashingEmbedder())(texts, len(planted_store.searchable_rows)).ids
        for line, ranking in zip(found, whole, strict=True):
            assert line.tolist() == ranking[np.isin(ranking, part.searchable_rows)][:5].tolist()


def test_datastore(pointer, make_lm, planted_store, planted_retriever):
    result = sweep_datastore(
        pointer, HELD_OUT, planted_store, (0.3, 1.0), 2, 2, make_lm(), embedder=HashingEmbedder(), scoring=SCORING
    )
    assert [(point["share"], point["seed"]) for point in result["points"]] == [(0.3, 0), (0.3, 1), (1.0, 0)]
    first, second, whole = (point["bpb"] for point in result["points"])
    assert whole == pytest.approx(plain(pointer, planted_retriever, 2)["bpb"]["retro_on"])
    part = Subsample(planted_store, 0.3, 1)
    expected = plain(pointer, Retriever(part, "exact", HashingEmbedder()), 2)
    assert second == pytest.approx(expected["bpb"]["retro_on"])
    small, large = result["curve"]
    assert small["bpb"] == pytest.approx((first + second) / 2) and small["std"] == pytest.approx(
        abs(first - second) / 2
    )
    assert [small["low"], small["high"]] == sorted([first, second])
    assert large["chunks"] == len(planted_store.searchable_rows) and large["draws"] == 1
    assert set(result["references"]) == {"retro_off", "lm"}
    empty = sweep_datastore(
        pointer, HELD_OUT, planted_store, (1e-9,), 1, 2, embedder=HashingEmbedder(), scoring=SCORING
    )
    assert empty["points"][0]["chunks"] == 0
    assert empty["points"][0]["bpb"] == pytest.approx(empty["references"]["retro_off"]["bpb"], abs=1e-6)
    with pytest.raises(ValueError, match=r"the shares are \[nan\], draws 3"):
        sweep_datastore(pointer, HELD_OUT, planted_store, (float("nan"),), embedder=HashingEmbedder())
    with pytest.raises(ValueError, match=r"the shares are \[0.0\], draws 3; give shares above 0"):
        sweep_datastore(pointer, HELD_OUT, planted_store, (0.0,))


def test_models(pointer, make_lm, make_model, words_tokenizer, planted_retriever):
    retro = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
    models = [("retro", retro), ("pointer", pointer), ("lm", make_lm())]
    result = sweep_models(iter(models), HELD_OUT, planted_retriever, 2, SCORING)
    counts = [sum(p.numel() for p in model.parameters()) for _, model in models]
    assert [(point["model"], point["column"]) for point in result["points"]] == [
        (name, column)
        for _, name in sorted(zip(counts, ("retro", "pointer", "lm"), strict=True))
        for column in (("lm",) if name == "lm" else ("retro_off", "retro_on"))
    ]
    for point in result["points"]:
        model = dict(models)[point["model"]]
        assert point["bpb"] == pytest.approx(plain(model, planted_retriever, 2)["bpb"][point["column"]])
    with pytest.raises(ValueError, match="there is no model to measure"):
        sweep_models([], HELD_OUT, planted_retriever)


def test_tokens(make_model, make_lm, words_tokenizer, planted_retriever, tmp_path):
    """Two checkpoints as training writes them."""
    models = {}
    for step in (10, 5):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        models[step * 100] = make_model(seed=step, vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16)
        models[step * 100].save_pretrained(folder)
        (folder / "state.json").write_text(json.dumps({"step": step, "tokens": step * 100}))
    result = sweep_tokens(tmp_path, HELD_OUT, planted_retriever, 2, make_lm(), SCORING)
    assert [(point["tokens"], point["column"]) for point in result["points"]] == [
        (tokens, column) for tokens in (500, 1000) for column in ("retro_off", "retro_on")
    ]
    for point in result["points"]:
        expected = plain(models[point["tokens"]], planted_retriever, 2)["bpb"][point["column"]]
        assert point["bpb"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="holds no checkpoints"):
        checkpoints_of(tmp_path / "checkpoints")


@pytest.fixture
def swept():
    """A sweep over k = 0, 1 whose gain has no interval, as of one document."""
    values = {"bpb": 2.0, "low": 1.5, "high": 2.5, "gain": 0.25, "gain_low": float("nan"), "gain_high": float("nan")}
    points = [{"num_neighbors": k, "column": "retro_on", **values} for k in (0, 1)]
    return {
        **{"sweep": "neighbors", "x": "num_neighbors", "xlabel": "k", "points": points, "curve": points, "band": "95%"},
        **{"references": {"lm": {"bpb": 3.0, "low": 2.0, "high": 4.0}}, "documents": 1, "bytes": 1000},
    }


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures(swept, ending, tmp_path):
    plot_sweep(swept, tmp_path / f"sweep{ending}")
    points = [
        {"alpha": a, "chunks": 3, "bpb": {"lm": 1.0}, "interval": {"lm": [0.5, 2.0]}, "gain": {}} for a in (0.5, 1.0)
    ]
    plot_leakage({"points": points, "documents": 2, "num_neighbors": 2}, tmp_path / f"leakage{ending}")
    heads = {(tmp_path / f"{name}{ending}").read_bytes()[:4] for name in ("sweep", "leakage")}
    assert heads == {{".png": b"\x89PNG", ".svg": b"<?xm", ".pdf": b"%PDF"}[ending]}


def test_the_data_beside_a_picture(swept, tmp_path):
    write_csv(tmp_path / "a.csv", tables_of(swept)[0].data)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "what,num_neighbors,column,bpb,low,high,gain,gain_low,gain_high"
    assert lines[1] == "point,0,retro_on,2.0,1.5,2.5,0.25,,"
    assert lines[-1] == "reference,,lm,3.0,2.0,4.0,,,"
    write_result(tmp_path / "a.json", swept)
    assert json.loads((tmp_path / "a.json").read_text())["points"][0]["gain_low"] is None
    assert "2.0000" in table_text(swept) and "25.00%" in table_text(swept)


def test_pictures_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.gif'; let it end in .png, .svg or .pdf"):
        check_plot(tmp_path / "a.gif")
