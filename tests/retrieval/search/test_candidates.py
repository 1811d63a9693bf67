"""Rare terms that find and all terms that score, by scipy and by numba, against a loop over a dense matrix."""

import sys

import numpy as np
import pytest

import retro.retrieval.search
from retro.retrieval.search import candidates, lexical
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from tests.stand_ins import make_store

K = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """Words of very different frequency, and a document that is there twice: scores that are equal."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{int(w)}" for w in 60 * draw.random(90) ** 3) for _ in range(40)]
    return make_store(tmp_path_factory.mktemp("candidates"), [*texts, texts[0]], tokenizer, min_chunk_len=3)


@pytest.fixture(params=["scipy", "numba"])
def way(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(candidates, "_by_numba", lambda: None)


@pytest.fixture
def few(monkeypatch):
    """A store is large, and budgets so small that they bind."""
    monkeypatch.setattr(candidates, "LARGE", 0)
    for name in ("POSTINGS", "CANDIDATES"):
        monkeypatch.setattr(candidates, name, dict.fromkeys(("tfidf", "bm25"), {"POSTINGS": 60, "CANDIDATES": 5}[name]))
    monkeypatch.setattr(candidates, "LEAST_POSTINGS", 12)
    monkeypatch.setattr(candidates, "CANDIDATES_PER_NEIGHBOR", 1)


def asked(store):
    rows = store.searchable_rows[::2]
    return Queries(store.tokenizer, tokens=store.token_lists(rows)), [{int(d)} for d in store.document_rows(rows)]


def loop(matrix, queried, k, documents, blocked):
    """Chunks and scores of one query over a dense matrix [terms, chunks], as the module's head tells it."""
    sizes = (matrix > 0).sum(1)
    finding, total = [], 0
    for term in sorted(np.flatnonzero(queried), key=lambda term: (sizes[term], term)):
        if total + sizes[term] <= 60 or total < 12:
            finding.append(term)
        total += sizes[term]
    partial, whole = (queried[terms] @ matrix[terms] for terms in (finding, slice(None)))
    allowed = [c for c in np.flatnonzero(partial > 0) if documents[c] not in blocked]
    if len(allowed) < k:
        partial, allowed = whole, [c for c in np.flatnonzero(whole > 0) if documents[c] not in blocked]
    best = sorted(allowed, key=lambda c: (-np.float32(partial[c]), c))[: max(5, k)]
    return sorted(best, key=lambda c: (-np.float32(whole[c]), c))[:k], whole


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_against_a_loop(kind, store, way, few):
    index, (queries, excluded) = build_lexical(store, kind), asked(store)
    (segment,) = index._matrices
    dense, queried = segment._weighed.matrix.toarray().astype(np.float64), segment._queried(queries).toarray()
    rows, scores, mask = index.search(queries, K, excluded)
    num_distinct = 0
    for q, blocked in enumerate(excluded):
        best, whole = loop(dense, queried[q], K, segment._documents, blocked)
        np.testing.assert_allclose(scores[q][mask[q]], whole[best], rtol=1e-5)
        if len(set(np.round(whole[best], 5))) == len(best):
            num_distinct += 1
            assert rows[q][mask[q]].tolist() == segment.segment.store_rows(np.array(best, int)).tolist()
    assert num_distinct > 100
    np.testing.assert_allclose(index.scores(queries, rows)[mask], scores[mask], rtol=1e-6)
    assert (index.scores(queries, np.full_like(rows, -1)) == 0).all()
    none = queries[np.zeros(0, np.int64)]
    assert index.scores(none, rows[:0]).shape == index.search(none, K, [])[0].shape == (0, K)


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_numba_gives_what_scipy_gives(kind, store, few, monkeypatch):
    pytest.importorskip("numba")
    index, (queries, excluded) = build_lexical(store, kind), asked(store)
    found = []
    for way in (candidates._by_numba, lambda: None):
        monkeypatch.setattr(candidates, "_by_numba", way)
        found.append(
            (*index.search(queries, K, excluded), index.scores(queries, np.tile([0, -1, 5], (len(queries), 1))))
        )
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["tfidf", "bm25", "tfidf:exact"])
def test_answers_depend_on_no_query_before_and_on_no_block(kind, store, way, few, monkeypatch):
    index, (queries, excluded) = build_lexical(store, kind), asked(store)
    whole = index.search(queries, K, excluded)
    for name in ("_BLOCK_QUERIES", "_BLOCK_SCORES"):
        monkeypatch.setattr(lexical, name, 7)
    monkeypatch.setattr(lexical, "_CHUNKS_PER_QUERY", 1 << 20)
    for ours, theirs in zip(index.search(queries, K, excluded), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not any(lent.any() for lent in index._matrices[0]._weighed._spare)


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_all_is_found_where_the_budget_is_enough_or_asked_for(kind, store, way, few, monkeypatch):
    queries, excluded = asked(store)
    exact = build_lexical(store, f"{kind}:exact")
    assert exact.kind == f"{kind}:exact" and exact.recall == 1.0
    best = exact.search(queries, K, excluded)
    assert (build_lexical(store, kind).search(queries, K, excluded)[0] != best[0]).any()
    monkeypatch.setattr(candidates, "POSTINGS", {"tfidf": 1 << 20, "bm25": 1 << 20})
    monkeypatch.setattr(candidates, "CANDIDATES", {"tfidf": 1 << 20, "bm25": 1 << 20})
    found = build_lexical(store, kind).search(queries, K, excluded)
    np.testing.assert_allclose(found[1], best[1], rtol=1e-5)
    assert (found[0] == best[0]).mean() > 0.98, "equal but for sums rounded another way"


def test_in_a_small_segment_all_terms_find(store, few, monkeypatch):
    queries, excluded = asked(store)
    best = build_lexical(store, "tfidf:exact").search(queries, K, excluded)
    monkeypatch.setattr(candidates, "LARGE", store.num_searchable + 1)
    for ours, theirs in zip(build_lexical(store, "tfidf").search(queries, K, excluded), best, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    monkeypatch.setattr(candidates, "LARGE", store.num_searchable)
    assert (build_lexical(store, "tfidf").search(queries, K, excluded)[0] != best[0]).any()


def test_where_rare_terms_find_too_few_all_terms_find(store, way, few):
    queries, _ = asked(store)
    many = store.num_searchable
    found, best = (build_lexical(store, kind).search(queries, many) for kind in ("tfidf", "tfidf:exact"))
    np.testing.assert_array_equal(found[2], best[2])
    np.testing.assert_array_equal(np.sort(found[0]), np.sort(best[0]))


def test_blocked_documents_are_found_by_no_query(store, way, few):
    rows, documents = store.searchable_rows, range(store.num_documents)
    queries = Queries(store.tokenizer, texts=[" ".join(store.text(rows))] * 3)
    excluded = [set(documents), set(documents) - {3}, {0, 40}]
    found = [build_lexical(store, kind).search(queries, 4, excluded)[0] for kind in ("tfidf", "tfidf:exact")]
    for one in found:
        assert (one[0] == -1).all() and (store.document_rows(one[1]) == 3).all()
        assert not np.isin(store.document_rows(one[2]), [0, 40]).any()
    np.testing.assert_array_equal(found[0][:2], found[1][:2])


def test_a_numba_that_cannot_be_loaded_is_done_without(store, monkeypatch, caplog):
    pytest.importorskip("numba")
    queries, excluded = asked(store)
    monkeypatch.setattr(candidates, "LARGE", 0)
    want = build_lexical(store, "tfidf").search(queries, K, excluded)
    monkeypatch.setitem(sys.modules, "retro.retrieval.search.compiled", None)
    monkeypatch.delattr(retro.retrieval.search, "compiled", raising=False)
    candidates._by_numba.cache_clear()
    found = build_lexical(store, "tfidf").search(queries, K, excluded)
    candidates._by_numba.cache_clear()
    np.testing.assert_array_equal(found[0], want[0])
    assert "words are searched without numba, which cannot be loaded" in caplog.text


def test_the_recall_of_an_index_is_measured(tmp_path, tokenizer, store, few):
    texts = store.text(store.searchable_rows)
    other = make_store(tmp_path, texts, tokenizer, min_chunk_len=3)
    index, exact = build_lexical(other, "tfidf"), build_lexical(other, "tfidf:exact")
    rows = other.searchable_rows[np.arange(lexical._SAMPLE) * len(other.searchable_rows) // lexical._SAMPLE]
    queries, excluded = Queries(tokenizer, tokens=other.token_lists(rows)), other.document_rows(rows)
    found, best = (one.search(queries, 10, [{int(d)} for d in excluded])[0] for one in (index, exact))
    shares = [len(set(a) & set(b[b >= 0])) for a, b in zip(found.tolist(), best, strict=True)]
    assert index.recall == pytest.approx(sum(shares) / (best >= 0).sum()) and 0.3 < index.recall < 1
