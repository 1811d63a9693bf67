"""The second stage that learns which candidates hold the text to come: what it counts, learns and keeps, and where."""

import errno
import itertools

import numpy as np
import pytest

from retro import Retriever
from retro.loading import open_retriever
from retro.provenance import own_index, write_provenance
from retro.retrieval import Store, build_neighbors, open_neighbors, remove_documents
from retro.retrieval.search import continuation
from retro.retrieval.search.continuation import HALF_LIVES, build_continuation, features, tokens_held
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.postings import buckets
from retro.retrieval.search.queries import Queries
from tests.retrieval.remote.test_remote import check_same, serving_store
from tests.stand_ins import make_store, words

M = 8
TOPICS = KEYS = 5


def run_of(first, count):
    return " ".join(f"w{i}" for i in range(first, first + count))


def phrases(count):
    """Texts of seven phrases of five words each, out of eleven."""
    drawn = np.random.default_rng(0).integers(0, 11, (count, 7))
    return [" ".join(words(5, seed) for seed in of_text) for of_text in drawn.tolist()]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """Chunks of six words of a topic and two of a key; the key alone, at the end, tells what follows."""
    pairs = itertools.product(range(TOPICS), range(KEYS))
    texts = [f"{run_of(6 * t, 6)} {run_of(30 + 2 * k, 2)} {run_of(40 + k, M)}" for t, k in pairs]
    return make_store(tmp_path_factory.mktemp("continuation"), texts, tokenizer, chunk_len=M, min_chunk_len=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    return make_store(tmp_path_factory.mktemp("written"), phrases(12), tokenizer, chunk_len=M, min_chunk_len=3)


def topics_and_keys(store, found):
    """Of the first neighbors, each of which is a first chunk."""
    documents = store.document_rows(found.ids[:, 0])
    return documents // KEYS, documents % KEYS


def test_it_learns_what_tells_the_text_to_come(store):
    rows = np.flatnonzero(store.positions(np.arange(store.num_chunks)) == 0)
    asked, own = store.token_lists(rows), [{name} for name in store.document_ids]
    topics, keys = np.divmod(np.arange(TOPICS * KEYS), KEYS)
    by_words = topics_and_keys(store, Retriever(store, "tfidf")(asked, 2, own))
    learned = topics_and_keys(store, Retriever(store, "tfidf>continuation")(asked, 2, own))
    assert (by_words[0] == topics).all() and (by_words[1] != keys).all()
    assert (learned[0] != topics).all() and (learned[1] == keys).all()


def test_tokens_held_against_loops(written):
    rows = np.asarray([0, 5, 6, written.num_chunks - 2])
    candidates = np.asarray([[3, 7, -1], [0, 9, 12], [5, -1, 1], [2, 4, 6]])
    held = tokens_held(written, rows, candidates)
    for row, line, found in zip(rows, candidates, held, strict=True):
        [before, after] = written.token_lists(np.asarray([row, row + 1]))
        text = [*before[-3:], *after]
        for candidate, count in zip(line, found, strict=True):
            ids, mask = written.values(np.asarray([candidate]), 2 * M)
            value = ids[0][mask[0]].tolist()
            there = {tuple(value[i : i + 4]) for i in range(len(value) - 3)}
            assert count == sum(tuple(text[i : i + 4]) in there for i in range(len(text) - 3))
    assert held.max() > 0


def test_features_against_loops(written):
    """Queries of a chunk, of one token, of none, and longer than a chunk, of which the end counts."""
    index = build_lexical(written, "tfidf")
    chunk = written.token_lists(np.asarray([2]))[0]
    queries = [chunk, chunk[:1], chunk[:0], np.concatenate([chunk, written.token_lists(np.asarray([9]))[0]])]
    rows = np.asarray([[2, 0, -1], [2, 8, 1], [2, 8, 1], [9, 3, -1]])
    given = Queries(written.tokenizer, tokens=queries)
    found = features(index, given, rows)
    assert not found[rows < 0].any() and not found[2].any()
    for query, line, of_query, of_words in zip(given.tokens, rows, found, index.scores(given, rows), strict=True):
        query = query[-M:].tolist()
        idf = index.idf(buckets(np.asarray(query, np.int64)))
        for row, x, score in zip(line, of_query, of_words, strict=True):
            ids, mask = written.values(np.asarray([row]), 2 * M)
            value, chunk = ids[0][mask[0]].tolist(), ids[0][:M][mask[0][:M]].tolist()
            pairs, there = list(itertools.pairwise(query)), set(itertools.pairwise(chunk))
            for h, share in zip(HALF_LIVES, x, strict=False):
                weights = [idf[len(query) + i] * 0.5 ** ((len(query) - 2 - i) / h) for i in range(len(pairs))]
                both = sum(w for w, pair in zip(weights, pairs, strict=True) if pair in there)
                assert share == pytest.approx(both / max(sum(weights), 1e-9))
            inside = lambda part: any(value[i : i + len(part)] == part for i in range(len(value)))  # noqa: B023, E731
            ends = [n for n in range(1, len(query) + 1) if inside(query[len(query) - n :])]
            runs = [j - i for i in range(len(query)) for j in range(i + 1, len(query) + 1) if inside(query[i:j])]
            assert x[3:5] == pytest.approx(np.log1p([max(ends, default=0), max(runs, default=0)]))
            assert x[5] == pytest.approx(score / max(np.linalg.norm(idf), 1e-9))


def test_what_was_learned_is_kept(store, monkeypatch):
    first = build_continuation(store)
    monkeypatch.setattr(continuation, "learn", None)  # nothing is learned again
    again = build_continuation(Store.open(store.path))
    assert again.name == first.name and again.weights.tolist() == first.weights.tolist()


def test_a_store_that_cannot_be_written(written, monkeypatch, caplog):
    def refuse(*given):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(continuation, "write_index", refuse)
    assert len(build_continuation(written).weights) == 6 and "is not kept" in caplog.text


def test_an_update_learns_anew(tmp_path, tokenizer):
    path = make_store(tmp_path, phrases(12), tokenizer).path
    before = build_continuation(Store.open(path))
    changed = remove_documents(path, ["d2"])
    after = build_continuation(changed)
    assert (
        before.name != after.name
        and (
            changed.document_rows(after.index.search(Queries(changed.tokenizer, texts=[words(5, 2)]), 5)[0]) != 2
        ).all()
    )


def test_the_same_neighbors_everywhere(store, tmp_path):
    """By a Retriever, in the table of `retro neighbors`, from a server, and for a model that was trained with it."""
    kind = "tfidf>continuation"
    rows = np.arange(store.num_chunks)
    retriever = Retriever(store, kind, num_neighbors=2, retrieved_len=2 * M)
    asked = store.token_lists(rows)
    own = [{store.document_ids[document]} for document in store.document_rows(rows)]
    table = build_neighbors(store, 2, index=kind)
    np.testing.assert_array_equal(table.rows, retriever(asked, exclude_documents=own).ids)
    assert open_neighbors(store, k=2, index=kind).path == table.path
    with serving_store(retriever) as url:
        check_same(open_retriever(url, num_neighbors=2, retrieved_len=2 * M)(asked[:4]), retriever(asked[:4]))
    for trained, expected in ((kind, kind), ("exact>continuation", "auto>continuation"), ("exact", "auto")):
        write_provenance(tmp_path, store, trained)
        assert own_index(tmp_path, store) == expected


def test_nothing_to_learn_from(tmp_path, tokenizer):
    texts = [run_of(2 * i, 2) for i in range(3)]
    store = make_store(tmp_path, texts, tokenizer)
    with pytest.raises(ValueError, match="holds nothing to learn continuation from.*leave the second stage out"):
        build_continuation(store)
