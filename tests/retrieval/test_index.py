"""Exact search against a naive oracle; approximate engines: masks, keys of their folders, measured recall, damage."""

import shutil

import numpy as np
import pytest

from retro.retrieval import Store, build_index, open_index
from retro.retrieval import index as index_module
from retro.retrieval.index import exact_search, measure_recall, rescore, resolve_kind
from tests.stand_ins import make_store, words

APPROXIMATE = [kind for kind in ("scann", "faiss") if index_module._importable(kind)]


class Keys(Store):
    """As much of a store as exact search needs."""

    searchable_rows = None

    def __init__(self, array, documents, searchable_rows):
        self.array, self.documents, self.searchable_rows = array, documents, searchable_rows
        self.num_chunks, self.key_dim = array.shape

    def key_block(self, start, stop):
        return self.array[start:stop]

    def keys(self, rows):
        return self.array[rows]

    def document_rows(self, rows):
        return self.documents[rows]


def oracle(store, queries, k, excluded=None):
    rows = np.full((len(queries), k), -1)
    for q, query in enumerate(queries.astype(np.float64)):
        distances = np.square(store.array.astype(np.float32) - query.astype(np.float32)).sum(1, dtype=np.float64)
        allowed = [r for r in store.searchable_rows if excluded is None or store.documents[r] != excluded[q]]
        order = sorted(allowed, key=lambda r: (distances[r], r))[:k]
        rows[q, : len(order)] = order
    return rows


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("block", [1 << 9, 1 << 24])
def test_exact_search_against_the_oracle(monkeypatch, copies, block):
    """Also with 40 copies of every key, where the order of equal distances is by row, however the work is cut."""
    monkeypatch.setattr(index_module, "_BLOCK_SCORES", block * 20)
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(3000 // copies, 12)), copies, axis=0).astype(np.float32)
    keys = keys[rng.permutation(len(keys))]
    store = Keys(keys, np.arange(len(keys)) // 7, np.flatnonzero(np.arange(len(keys)) % 10 != 3))
    queries = np.concatenate([keys[:15], rng.normal(size=(5, 12)).astype(np.float32)])
    excluded = np.array([*np.arange(15) // 7, -1, -1, 4, 5, 6])
    for k in (1, 5):
        np.testing.assert_array_equal(exact_search(store, queries, k)[0], oracle(store, queries, k))
        found = exact_search(store, queries, k, excluded)
        np.testing.assert_array_equal(found[0], oracle(store, queries, k, excluded))
        np.testing.assert_array_equal(found[2], found[0] >= 0)


def test_exact_search_runs_out():
    store = Keys(np.eye(3, dtype=np.float32), np.array([0, 0, 1]), np.arange(3))
    rows, scores, mask = exact_search(store, np.eye(3, dtype=np.float32)[:1], 3, np.array([0]))
    assert rows.tolist() == [[2, -1, -1]] and mask.tolist() == [[True, False, False]]
    assert scores[0, 0] == -2 and (scores[0, 1:] == -np.inf).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    texts = [words(40, seed) for seed in range(60)]
    return make_store(tmp_path_factory.mktemp("index"), texts, tokenizer, shard_chunks=300, min_chunk_len=2)


@pytest.fixture
def copy(store, tmp_path):
    return Store.open(shutil.copytree(store.path, tmp_path / "copy"))


SETTINGS = {
    "scann": [{}, {"leaves": 8, "leaves_to_search": 8, "reorder": 100}, {"max_part_rows": 250}],
    "faiss": [{}, {"lists": 8, "probes": 8}, {"max_part_rows": 250}],
}


@pytest.mark.parametrize(("kind", "settings"), [(kind, s) for kind in APPROXIMATE for s in SETTINGS[kind]])
def test_engines_against_exact_search(copy, kind, settings):
    index = build_index(copy, kind, **settings)
    queries = copy.keys(np.arange(0, copy.num_chunks, 7))
    found, exact = index.search(queries, 5), exact_search(copy, queries, 5)
    assert found[2].all() and set(found[0].ravel()) <= set(copy.searchable_rows)
    assert np.isclose(found[1], exact[1], atol=1e-5).mean() > 0.9
    assert index.recall == index.record["recall"]["recall"] > 0.9 and index.record["recall"]["k"] == 10
    assert open_index(copy, kind).folder == index.folder


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_keys_of_any_length_are_ordered_by_distance(tmp_path, tokenizer, kind):
    from tests.stand_ins import HashingEmbedder

    class Long(HashingEmbedder):
        def embed(self, texts, is_query=False):
            return super().embed(texts) * np.array([[1 + len(text) % 5] for text in texts], np.float32)

    store = make_store(tmp_path, [words(40, seed) for seed in range(10)], tokenizer, Long())
    queries = store.keys(np.arange(20))
    np.testing.assert_array_equal(build_index(store, kind).search(queries, 4)[0], exact_search(store, queries, 4)[0])


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_hits_that_an_engine_does_not_find_are_masked(copy, kind):
    few = {"scann": {"leaves": 60, "leaves_to_search": 1}, "faiss": {"lists": 60, "probes": 1}}[kind]
    rows, scores, mask = build_index(copy, kind, **few).search(copy.keys(np.arange(50)), 200)
    assert not mask.all() and mask[:, 0].any()
    assert (rows[~mask] == -1).all() and (scores[~mask] == -np.inf).all()
    for line, real in zip(rows, mask, strict=True):
        assert len(set(line[real])) == real.sum()


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_queries_that_are_not_finite_are_refused(copy, kind):
    queries = copy.keys(np.arange(4))
    queries[2, 1] = np.nan
    with pytest.raises(ValueError, match="query row 2 is not finite"):
        build_index(copy, kind).search(queries, 2)
    with pytest.raises(ValueError, match=r"must be \[q, 16\]"):
        build_index(copy, kind).search(queries[:, :3], 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        build_index(copy, kind).search(copy.keys(np.arange(4)), 0)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_changed_settings_make_another_folder_and_the_same_reuse_it(copy, kind):
    one = build_index(copy, kind)
    stamp = (one.folder / "index.json").stat().st_mtime_ns
    assert build_index(copy, kind).folder == one.folder
    assert (one.folder / "index.json").stat().st_mtime_ns == stamp
    assert build_index(copy, kind, seed=1).folder != one.folder
    with pytest.raises(ValueError, match="no setting 'leafs'"):
        build_index(copy, kind, leafs=3)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_of_another_state_of_the_store_is_not_opened(copy, tmp_path, tokenizer, kind):
    index = build_index(copy, kind)
    other = make_store(tmp_path, [words(40, 1)], tokenizer, name="other")
    shutil.copytree(index.folder, other.path / "index" / index.folder.name)
    with pytest.raises(ValueError, match=f"has no {kind} index for its present state"):
        open_index(other, kind)
    assert open_index(other, "auto").kind == "exact"


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_missing_or_damaged_files_of_an_index_are_named(copy, kind):
    """ScaNN would abort the process."""
    index = build_index(copy, kind)
    largest = max((p for p in index.folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{largest.name} is damaged"):
        open_index(copy, kind)
    largest.unlink()
    with pytest.raises(ValueError, match=f"{largest.name} is missing"):
        open_index(copy, kind)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_damaged_index_is_built_again(copy, kind):
    folder = build_index(copy, kind).folder
    next(folder.glob("0*/rows.npy")).unlink()
    assert build_index(copy, kind).folder == folder and open_index(copy, kind).folder == folder


def test_of_several_indexes_the_best_is_opened(copy):
    pytest.importorskip("faiss")
    for probes in (2, 1, 60, 3):
        build_index(copy, "faiss", lists=60, probes=probes)
    assert open_index(copy, "faiss").record["settings"]["probes"] == 60


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_recall_does_not_depend_on_the_length_of_keys(scale):
    """An index that answers with the query itself and the nine rows after it, against a true one."""
    keys = (scale * np.random.default_rng(0).normal(size=(2000, 8))).astype(np.float32)
    store = Keys(keys, np.arange(2000), np.arange(2000))

    class Fixed:
        def search(self, queries, k):
            own = exact_search(store, queries, 1)[0]
            rows = (own + np.arange(k)) % 2000
            return rows, -rescore(store, queries, rows).astype(np.float32), rows >= 0

    class True_:
        def search(self, queries, k):
            rows = exact_search(store, queries, k)[0]
            return rows, -rescore(store, queries, rows).astype(np.float32), rows >= 0

    assert measure_recall(Fixed(), store)["recall"] < 0.05
    assert measure_recall(True_(), store)["recall"] == 1.0


def test_an_index_moves_with_its_store(copy, tmp_path):
    for kind in APPROXIMATE:
        queries = copy.keys(np.arange(5))
        before = build_index(copy, kind).search(queries, 3)[0]
        moved = Store.open(shutil.copytree(copy.path, tmp_path / f"moved_{kind}"))
        shutil.rmtree(copy.path / "index")
        np.testing.assert_array_equal(open_index(moved, kind).search(queries, 3)[0], before)


def test_kinds(monkeypatch):
    with pytest.raises(ValueError, match="must be auto, exact, scann, faiss, tfidf or bm25, not 'hnsw'"):
        resolve_kind("hnsw")
    monkeypatch.setattr(index_module, "_importable", lambda kind: kind == "exact")
    assert resolve_kind("auto") == "exact"
    with pytest.raises(ValueError, match="pip install scann"):
        resolve_kind("scann")


def test_too_short_chunks_are_not_found(tmp_path, tokenizer):
    texts = [words(8, seed) for seed in range(30)]  # 9 tokens: the third chunk is eos alone, the same in all
    store = make_store(tmp_path, texts, tokenizer, min_chunk_len=2)
    for kind in ("exact", *APPROXIMATE):
        rows, _, mask = build_index(store, kind).search(store.keys(np.array([2, 5])), 10)
        assert mask.all() and (store.chunk_lens(rows) == 4).all()
