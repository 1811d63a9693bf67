"""Neighbors of evaluation text: searched once, opened after that, and never those of other text, store or search."""

import json

import numpy as np
import pytest

from retro.evaluation import prepare
from retro.evaluation.neighbors import neighbor_rows
from retro.retrieval import Retriever
from tests.evaluation.conftest import HELD_OUT
from tests.stand_ins import HashingEmbedder

TOKENS = np.arange(3, 27).reshape(3, 8)
MASK = np.ones_like(TOKENS, bool)


@pytest.fixture
def forbid_search(monkeypatch):
    """After forbid_search(), nothing is searched."""

    def forbid():
        monkeypatch.setattr(Retriever, "__call__", lambda *args, **kwargs: pytest.fail("it was searched"))

    return forbid


def test_the_same_question_is_opened_not_searched(planted_retriever, words_tokenizer, tmp_path, forbid_search):
    found = prepare(HELD_OUT, words_tokenizer, 8, planted_retriever, 3, cache=tmp_path)
    again = prepare(HELD_OUT, words_tokenizer, 8, planted_retriever, 12, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "one for 10 neighbors, one for 12"
    forbid_search()
    for num_neighbors, expected in ((3, found), (12, again)):
        opened = prepare(HELD_OUT, words_tokenizer, 8, planted_retriever, num_neighbors, cache=tmp_path)
        assert (opened.rows == expected.rows).all() and (opened.overlap == expected.overlap).all()


def test_beside_the_store_by_default(planted_store, planted_retriever, forbid_search):
    before = set(planted_store.path.glob("neighbors/*"))
    expected = neighbor_rows(planted_retriever, TOKENS, MASK, 4)
    (folder,) = set(planted_store.path.glob("neighbors/*")) - before
    assert json.loads((folder / "queries.json").read_text())["store"] == planted_store.fingerprint
    forbid_search()
    assert (neighbor_rows(planted_retriever, TOKENS, MASK, 4) == expected).all()


@pytest.mark.parametrize("change", ["tokens", "mask", "k", "excluded", "index", "store"])
def test_another_question_is_searched(change, planted_store, planted_retriever, words_store, tmp_path):
    asked = dict(retriever=planted_retriever, tokens=TOKENS, mask=MASK, num_neighbors=2, excluded=["a", "a", "b"])
    neighbor_rows(**asked, cache=tmp_path)
    hidden = MASK.copy()
    hidden[0, -1] = False
    other = {
        "tokens": {"tokens": TOKENS + 1},
        "mask": {"mask": hidden},
        "k": {"num_neighbors": 3},
        "excluded": {"excluded": ["a", "b", "b"]},
        "index": {"retriever": Retriever(planted_store, "tfidf", HashingEmbedder())},
        "store": {"retriever": Retriever(words_store, "exact", HashingEmbedder())},
    }[change]
    neighbor_rows(**asked | other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_kept_if_not_asked_for_or_not_possible(planted_retriever, tmp_path, caplog):
    expected = neighbor_rows(planted_retriever, TOKENS, MASK, 2, cache=False)
    (tmp_path / "file").write_text("")
    rows = neighbor_rows(planted_retriever, TOKENS, MASK, 2, cache=tmp_path / "file")
    assert (rows == expected).all() and "the neighbors are not kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_table_is_searched_again(planted_retriever, tmp_path, caplog):
    expected = neighbor_rows(planted_retriever, TOKENS, MASK, 2, cache=tmp_path)
    (file,) = tmp_path.glob("*/rows.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (neighbor_rows(planted_retriever, TOKENS, MASK, 2, cache=tmp_path) == expected).all()
    assert "searching again" in caplog.text
    caplog.clear()
    assert (neighbor_rows(planted_retriever, TOKENS, MASK, 2, cache=tmp_path) == expected).all() and not caplog.text


class FirstRows:
    """A search of one's own."""

    kind, num_rows, recall = "exact", 5, 1.0

    def search(self, queries, k, excluded=None):
        rows = np.tile(np.arange(k), (len(queries), 1))
        return rows, -rows.astype(np.float32), rows >= 0


def test_a_search_of_ones_own_is_not_kept_and_missing_neighbors_are_none(planted_store, tmp_path):
    rows = neighbor_rows(Retriever(planted_store, FirstRows()), TOKENS, MASK, 7, cache=tmp_path)
    assert rows.tolist() == [[0, 1, 2, 3, 4, -1, -1]] * 3 and not list(tmp_path.iterdir())
