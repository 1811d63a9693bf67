"""Neighbor tables: nothing from the same document, nothing lost, nothing invented."""

import numpy as np
import pytest

from retro.retrieval import build_neighbors, open_neighbors
from retro.retrieval import search as search_module
from retro.retrieval.index import build_index, exact_search
from tests.stand_ins import HashingEmbedder, make_store, words


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("neighbors")
    return make_store(folder, [words(n, n) for n in range(1, 60, 3)], tokenizer, min_chunk_len=3)


def oracle(store, k, queries=None, same=True):
    """A loop over all pairs."""
    queries = queries or store
    rows, keys = store.searchable_rows, store.keys(store.searchable_rows)
    names = np.array(store.document_ids)[store.document_rows(rows)]
    table = np.full((queries.num_chunks, k), -1)
    for q in range(queries.num_chunks):
        row = np.array([q])
        own = queries.document_ids[queries.document_rows(row)[0]]
        distances = np.square(keys - queries.keys(row)).sum(1, dtype=np.float64)
        order = [i for i in np.lexsort((rows, distances)) if not same or names[i] != own][:k]
        table[q, : len(order)] = rows[order]
    return table


@pytest.mark.parametrize("exclude", ["same_document", "none"])
def test_table_against_a_loop(store, exclude):
    table = build_neighbors(store, 3, exclude=exclude)
    np.testing.assert_array_equal(table.rows, oracle(store, 3, same=exclude == "same_document"))
    distances = np.square(store.keys(table.rows) - store.keys(np.arange(store.num_chunks))[:, None]).sum(-1)
    np.testing.assert_allclose(table.distances, distances, atol=1e-5)
    assert (np.diff(table.distances, axis=1) >= 0).all()
    table.verify()


def test_opened_again_and_cut_to_k(store):
    table = build_neighbors(store, 4)
    stamp = (table.path / "rows.npy").stat().st_mtime_ns
    assert (build_neighbors(store, 4).path / "rows.npy").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(open_neighbors(store, k=2).rows, table.rows[:, :2])
    assert isinstance(open_neighbors(store, k=2).rows, np.memmap)
    with pytest.raises(ValueError, match="no neighbor table with k >= 50"):
        open_neighbors(store, k=50)


@pytest.mark.parametrize("index", ["exact", "auto", "faiss"])
def test_a_long_book_loses_no_neighbors(tmp_path, tokenizer, index):
    """A book of 10,000 chunks of which every one is nearer to the query than the two other documents."""
    if index == "faiss":
        pytest.importorskip("faiss")
    book = " ".join(["w1 w2 w3 w4"] * 10_000)
    store = make_store(tmp_path, [book, "w5 w6 w7", "w8 w9 w10"], tokenizer)
    assert store.num_chunks == 10_003
    keys = store.keys(np.array([0, 5_000, 10_000]))
    if index == "exact":
        rows = build_neighbors(store, 2).rows[[0, 5_000, 10_000]]
    else:
        engine = build_index(store, index)
        rows = search_module.search_excluding(engine, store, keys, 2, [{0}] * 3)[0]
    assert np.sort(rows, axis=1).tolist() == [[10_001, 10_002]] * 3


class Engine:
    """Exact search that finds only the rows below `seen`, and notes what it was asked."""

    kind = "exact"

    def __init__(self, store, seen):
        self.store, self.seen, self.num_rows, self.asked = store, seen, store.num_chunks, []

    def search(self, queries, k):
        self.asked.append((len(queries), k))
        rows, scores, mask = exact_search(self.store, queries, self.num_rows)
        order = np.argsort(~(mask & (rows < self.seen)), axis=1, kind="stable")[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        mask = (rows >= 0) & (rows < self.seen)
        return np.where(mask, rows, -1), np.where(mask, scores, -np.inf), mask


def test_over_fetch_is_bounded(store, monkeypatch):
    """It stops when the engine has no more to give, and holds few hits at a time; the answers stay the same."""
    rows = np.arange(store.num_chunks)
    keys, own = store.keys(rows), [{row} for row in store.document_rows(rows).tolist()]
    poor = Engine(store, 15)
    found, _, mask = search_module.search_excluding(poor, store, keys, 10, own)
    assert (found < 15).all() and not mask.all() and max(k for _, k in poor.asked) == 18
    expected = search_module.search_excluding(Engine(store, 10**6), store, keys, 60, own)
    monkeypatch.setattr(search_module, "_FETCHED_HITS", 500)
    engine = Engine(store, 10**6)
    found = search_module.search_excluding(engine, store, keys, 60, own)
    assert all(q * k <= 500 for q, k in engine.asked) and len({k for _, k in engine.asked}) > 1
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_missing_neighbors_are_masked(tmp_path, tokenizer):
    store = make_store(tmp_path, [words(40, 1), words(3, 2)], tokenizer)
    for index in ("exact", "auto"):
        table = build_neighbors(store, 3, index=index)
        assert (table.rows[:11, 0] == 11).all() and (table.rows[:11, 1:] == -1).all()
        assert (table.distances[:11, 1:] == np.inf).all() and (table.rows[11] >= 0).all()
        assert table.record["missing"] == 22


def test_through_an_index_as_exact(store):
    pytest.importorskip("faiss")
    exact, approximate = build_neighbors(store, 3), build_neighbors(store, 3, index="faiss")
    assert exact.path != approximate.path
    np.testing.assert_allclose(approximate.distances, exact.distances, atol=1e-5)
    assert open_neighbors(store, k=3).path == exact.path


def test_of_another_store(store, tmp_path, tokenizer):
    queries = make_store(tmp_path, [words(n, n + 1) for n in (9, 30, 2)], tokenizer, name="queries")
    table = build_neighbors(store, 2, queries)
    np.testing.assert_array_equal(table.rows, oracle(store, 2, queries))  # documents of the same id are left out
    assert open_neighbors(store, queries, 2).path == table.path
    with pytest.raises(ValueError, match="no neighbor table"):
        open_neighbors(queries)


def test_refusals(store, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="k = 10000 is larger than the"):
        build_neighbors(store, 10_000)
    with pytest.raises(ValueError, match="k must be at least 1"):
        build_neighbors(store, 0)
    with pytest.raises(ValueError, match="exclude must be one of"):
        build_neighbors(store, 1, exclude="source")
    other = make_store(tmp_path, ["w1 w2"], tokenizer, HashingEmbedder(name="other"))
    with pytest.raises(ValueError, match=r"different embedders: hashing \(.*\) and other \("):
        build_neighbors(store, 1, other)
    longer = make_store(tmp_path, ["w1 w2"], tokenizer, name="longer", chunk_len=8)
    with pytest.raises(ValueError, match="chunks of 4 tokens, .* of 8"):
        build_neighbors(store, 1, longer)


def test_progress_is_in_whole_chunks(store, capsys):
    build_neighbors(store, 7, progress=True)
    assert f"{store.num_chunks}/{store.num_chunks} [" in capsys.readouterr().err


def test_damaged_tables_are_named(store):
    table = build_neighbors(store, 5)
    (table.path / "distances.npy").unlink()
    with pytest.raises(ValueError, match=r"distances\.npy is missing"):
        open_neighbors(store, k=5)
    np.testing.assert_array_equal(build_neighbors(store, 5).rows, table.rows)  # computed again
