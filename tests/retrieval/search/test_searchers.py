"""A second stage over a first: BM25 or another embedder over the candidates, against loops; exclusions, kinds."""

import numpy as np
import pytest

from retro.retrieval import Retriever, build_index
from retro.retrieval.search import index as index_module
from retro.retrieval.search import searchers
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import EmbedderReranker, RerankedSearcher, open_searcher, parse_kind
from tests.stand_ins import HashingEmbedder, make_store, words

EMBEDDER = HashingEmbedder()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    texts = [words(30, seed, vocabulary=40) for seed in range(40)]
    return make_store(tmp_path_factory.mktemp("search"), texts, tokenizer, EMBEDDER, chunk_len=8, min_chunk_len=3)


@pytest.fixture
def queries(store):
    return Queries(store.tokenizer, texts=store.text(store.searchable_rows[::9]))


@pytest.mark.parametrize("kind", ["bm25", "tfidf"])
def test_candidates_are_ordered_by_words(store, queries, kind):
    """The oracle: the whole list of the lexical index, cut to the candidates; those that share no word come last."""
    pytest.importorskip("bm25s")
    searcher = open_searcher(store, f"exact>{kind}", EMBEDDER)
    first, lexical = open_searcher(store, "exact", EMBEDDER), build_lexical(store, kind)
    own = [{int(row)} for row in store.document_rows(store.searchable_rows[::9])]
    for excluded in (None, own):
        rows, scores, mask = searcher.search(queries, 4, excluded)
        candidates = first.search(queries, 50, excluded)[0]
        every, every_scores, real = lexical.search(queries, len(store.searchable_rows))
        for q in range(len(queries)):
            known = dict(zip(every[q][real[q]].tolist(), every_scores[q][real[q]].tolist(), strict=True))
            order = sorted(enumerate(candidates[q].tolist()), key=lambda item: (-known.get(item[1], 0), item[0]))[:4]
            assert rows[q].tolist() == [row for _, row in order]
            np.testing.assert_allclose(scores[q], [known.get(row, 0) for _, row in order], rtol=1e-5)
        assert mask.all() and searcher.kind == f"exact>{kind}" and searcher.num_rows == len(store.searchable_rows)


def test_candidates_are_ordered_by_another_embedder(store, queries):
    other = HashingEmbedder(dim=24, name="other")
    first = open_searcher(store, "exact+tfidf", EMBEDDER)
    rows, scores, mask = RerankedSearcher(first, EmbedderReranker(store, other), candidates=12).search(queries, 5)
    candidates = first.search(queries, 12)[0]
    for q, text in enumerate(queries.texts):
        keys = other.embed(store.text(candidates[q]))
        distances = np.square(keys - other.embed([text])).sum(1)
        order = np.argsort(distances, kind="stable")[:5]
        np.testing.assert_allclose(scores[q], -distances[order], atol=1e-5)
        assert set(rows[q]) == set(candidates[q][order]) and mask[q].all()


def test_too_few_candidates_are_masked(store, queries):
    pytest.importorskip("bm25s")
    everything = set(range(store.num_documents))
    searcher = open_searcher(store, "exact>bm25", EMBEDDER)
    rows, scores, mask = searcher.search(queries, 60, [everything - {3}] * len(queries))
    count = int((store.document_rows(store.searchable_rows) == 3).sum())
    assert (mask.sum(1) == count).all() and (rows[~mask] == -1).all() and (scores[~mask] == -np.inf).all()
    assert (store.document_rows(rows[mask]) == 3).all() and mask[:, :count].all()
    assert searcher.search(queries[np.arange(0)], 3)[0].shape == (0, 3)


def test_a_retriever_takes_a_second_stage_by_name(store, monkeypatch):
    pytest.importorskip("bm25s")
    text = store.text(store.searchable_rows[:1])
    assert Retriever(store, "exact>bm25", EMBEDDER)(text, 1).ids.tolist() == [[0]]
    other = HashingEmbedder(dim=8, name="other")
    monkeypatch.setattr(searchers, "load_embedder", lambda name: {"its-name": other}[name])
    retriever = Retriever(store, "exact+bm25>its-name", EMBEDDER)
    assert retriever.index.kind == "exact+bm25>other" and retriever(text, 1).ids.tolist() == [[0]]


@pytest.mark.parametrize("kind", ["exact>", "exact>scann", "exact>bm25>tfidf", "exact>faiss:pq"])
def test_second_stages_that_are_none(store, kind):
    with pytest.raises(ValueError, match="behind > there must be continuation, bm25, tfidf or the name of an embedder"):
        open_searcher(store, kind, EMBEDDER)
    with pytest.raises(ValueError, match="has a second stage"):
        parse_kind(kind)


@pytest.mark.parametrize("kind", [kind for kind in ENGINES if index_module._importable(kind)])
def test_recall_is_given_where_an_index_is_built(store, kind):
    searcher = open_searcher(store, f"{kind}+tfidf", EMBEDDER, build=True, recall=0.8)
    assert searcher.parts[0].index.segments[0].record["recall"]["target"] == 0.8
    assert open_searcher(store, kind, EMBEDDER).index.name == build_index(store, kind).name
    with pytest.raises(ValueError, match="leave it out or build the index"):
        open_searcher(store, kind, EMBEDDER, recall=0.8)


def test_a_name_tells_searches_apart(store):
    """By what they search, how far, and with what; the folders are those of all their indexes."""
    faiss = pytest.importorskip("faiss") and "faiss:sq8"
    one = open_searcher(store, f"{faiss}+tfidf>tfidf", EMBEDDER, build=True, recall=0.5)
    other = open_searcher(store, f"{faiss}+tfidf>tfidf", EMBEDDER, build=True, recall=1.0)
    assert one.folders == other.folders and len(one.folders) == 5 and all(folder.is_dir() for folder in one.folders)
    tuned = [searcher.first.parts[0].index.segments[0].effort for searcher in (one, other)]
    assert (one.name == other.name) == (tuned[0] == tuned[1])
    fewer = RerankedSearcher(one.first, one.second, candidates=7)
    wider = RerankedSearcher(one.first, EmbedderReranker(store, HashingEmbedder(9, "nine")))
    assert len({one.name, fewer.name, wider.name, one.first.name}) == 4
