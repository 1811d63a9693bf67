"""BM25, hashed TF-IDF bigrams and fused lists, against loops over words and counts."""

import errno
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import log

import numpy as np
import pytest

from retro.retrieval import BuildSettings, Retriever, Store, build_neighbors, build_store, open_neighbors
from retro.retrieval.search import postings, segments
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import FusedSearcher, open_searcher
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("lexical")
    return make_store(folder, [words(n, n) for n in range(1, 90, 3)], tokenizer, min_chunk_len=3)


def terms(ids):
    ids = [int(i) for i in ids]
    return Counter([*ids, *zip(ids, ids[1:], strict=False)])


def tfidf_oracle(store, query, k, excluded=()):
    """A loop over all chunks, with terms that are not hashed."""
    rows = store.searchable_rows
    chunks = [terms(q) for q in Queries(store.tokenizer, tokens=store.token_lists(rows)).tokens]
    frequency = Counter(term for chunk in chunks for term in chunk)
    idf = {t: max(1e-3, log((len(rows) - n + 0.5) / (n + 0.5))) for t, n in frequency.items()}
    weigh = lambda found: {t: log(1 + n) * idf.get(t, 0.0) for t, n in found.items()}  # noqa: E731
    scores, wanted = [], weigh(terms(query))
    for row, chunk in zip(rows, chunks, strict=True):
        weights = weigh(chunk)
        length = max(sum(w * w for w in weights.values()) ** 0.5, 1e-9)
        score = sum(w * wanted.get(t, 0.0) for t, w in weights.items()) / length
        if score > 0 and int(store.document_rows(np.array([row]))[0]) not in excluded:
            scores.append((-score, int(row)))
    return sorted(scores)[:k]


def test_tfidf_against_a_loop(store):
    index, rows = build_lexical(store, "tfidf"), np.arange(0, store.num_chunks, 3)
    queries = Queries(store.tokenizer, tokens=store.token_lists(rows))
    excluded = [{int(d)} for d in store.document_rows(rows)]
    for blocked in (None, excluded):
        found, scores, mask = index.search(queries, 5, blocked)
        for q, ids in enumerate(queries.tokens):
            expected = tfidf_oracle(store, ids, 5, blocked[q] if blocked else ())
            np.testing.assert_allclose(scores[q][mask[q]], [-s for s, _ in expected], rtol=1e-5)
            kept = [s for s, _ in expected]
            if len(set(np.round(kept, 5))) == len(kept):
                assert found[q][mask[q]].tolist() == [row for _, row in expected]


def test_bm25_against_bm25s(store):
    bm25s = pytest.importorskip("bm25s")
    rows = store.searchable_rows
    oracle = bm25s.BM25()
    oracle.index(bm25s.tokenize(store.text(rows), stopwords=None, show_progress=False), show_progress=False)
    texts = store.text(np.arange(0, store.num_chunks, 4))
    found, scores, mask = build_lexical(store, "bm25").search(Queries(store.tokenizer, texts=texts), 4)
    cut = bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
    for q, of_query in enumerate(cut):
        if not of_query:  # a chunk of nothing but the end of its document
            assert not mask[q].any()
            continue
        expected = oracle.get_scores(of_query)
        best = np.sort(expected)[::-1][:4]
        np.testing.assert_allclose(scores[q][mask[q]], best[best > 0], rtol=1e-5)
        np.testing.assert_allclose(expected[np.searchsorted(rows, found[q][mask[q]])], scores[q][mask[q]], rtol=1e-5)


def test_text_and_tokens_find_the_same(store):
    index, rows = build_lexical(store, "tfidf"), np.arange(5)
    by_tokens = index.search(Queries(store.tokenizer, tokens=store.token_lists(rows)), 3)
    by_text = index.search(Queries(store.tokenizer, texts=store.text(rows)), 3)
    np.testing.assert_array_equal(by_tokens[0], by_text[0])


def test_terms_of_many_texts_are_those_of_each(store):
    """Texts without tokens, with one, and with special ones among others, which are left out."""
    lists = [[], [5], [3, store.tokenizer.eos_token_id, 7, 7], [], [7, 5, 3], [store.tokenizer.eos_token_id]]
    tokens = Queries(store.tokenizer, tokens=lists).tokens
    assert [ids.tolist() for ids in tokens] == [[], [5], [3, 7, 7], [], [7, 5, 3], []]
    found, owners = postings.bucket_terms(tokens)
    for text, ids in enumerate(tokens):
        assert sorted(found[owners == text]) == sorted(postings.buckets(ids))
    assert Queries(store.tokenizer, tokens=[]).tokens == Queries(store.tokenizer, texts=[]).tokens == []


def test_which_row_a_bucket_is(store):
    (matrix,) = build_lexical(store, "tfidf")._matrices
    used = matrix.segment.terms
    ids = np.arange(len(store.tokenizer))
    places, owners = matrix._vocabulary.terms(Queries(store.tokenizer, tokens=[ids, ids[::-1]]))
    for text, of in enumerate(Queries(store.tokenizer, tokens=[ids, ids[::-1]]).tokens):
        wanted = postings.buckets(of)
        assert sorted(used[places[owners == text]]) == sorted(wanted[np.isin(wanted, used)])


def test_nothing_in_common_finds_nothing(store):
    retriever = Retriever(store, "tfidf", num_neighbors=2)
    found = retriever(["zzz-unknown", ""])
    assert (found.ids == -1).all() and not found.mask.any() and found.sources == [[None, None]] * 2


@pytest.mark.parametrize("texts", [["w1 w2 w3", "w5 w6 w7"], ["w1 w2 w3"] * 6 + ["w5 w6 w7"] * 2, ["w1 w2 w3"]])
def test_the_same_text_is_found_however_common_its_terms_are(tmp_path, tokenizer, texts):
    for kind in ("tfidf", "bm25"):
        found = Retriever(make_store(tmp_path, texts, tokenizer), kind)(["w1 w2 w3"], num_neighbors=1)
        assert found.ids.tolist() == [[0]]


class Listed:
    """A search that answers with the lists it was given."""

    kind, num_rows, recall = "listed", 100, 1.0

    def __init__(self, rows):
        self.rows = np.asarray(rows)

    def search(self, queries, k, excluded=None):
        rows = np.pad(self.rows, ((0, 0), (0, k - self.rows.shape[1])), constant_values=-1)
        return rows, np.zeros(rows.shape, np.float32), rows >= 0


def test_reciprocal_rank_by_hand(store):
    """Row 7 is 2nd and 1st, 3 is 1st and unlisted, 5 is 3rd and 2nd: 1/62 + 1/61 > 1/63 + 1/62 > 1/61."""
    fused = FusedSearcher([Listed([[3, 7, 5, -1]]), Listed([[7, 5, -1, 9]])])
    rows, scores, mask = fused.search(Queries(store.tokenizer, texts=["w1"]), 5)
    assert rows[0].tolist() == [7, 5, 3, 9, -1] and mask[0].tolist() == [True] * 4 + [False]
    np.testing.assert_allclose(scores[0, :3], [1 / 62 + 1 / 61, 1 / 63 + 1 / 62, 1 / 61], rtol=1e-6)


def test_lists_are_fused_from_deep_down(store):
    """Row 99 is 60th and 50th of the lists, which is more than the 1st place of one: 1/120 + 1/110 > 1/61."""
    lists = [Listed([[0, *range(200, 258), 99]]), Listed([[*range(300, 349), 99]])]
    assert FusedSearcher(lists).search(Queries(store.tokenizer, texts=["w1"]), 1)[0].tolist() == [[99]]


def test_neighbor_tables_of_every_kind(store):
    tables = {kind: build_neighbors(store, 2, index=kind) for kind in ("exact", "tfidf", "exact+tfidf")}
    own = store.document_rows(np.arange(store.num_chunks))[:, None]
    for kind, table in tables.items():
        assert open_neighbors(store, k=2, index=kind).path == table.path
        present = table.rows >= 0
        assert (store.document_rows(np.maximum(table.rows, 0)) != own)[present].all() and present.any()
    assert open_neighbors(store, k=2).path == tables["exact"].path
    queries = Queries(store.tokenizer, tokens=store.token_lists(np.arange(8)))
    excluded = [{int(d)} for d in own[:8, 0]]
    np.testing.assert_array_equal(
        tables["tfidf"].rows[:8], build_lexical(store, "tfidf").search(queries, 2, excluded)[0]
    )
    with pytest.raises(ValueError, match="--index bm25"):
        open_neighbors(store, k=2, index="bm25")


def test_a_store_without_keys(tmp_path, tokenizer):
    records = [{"id": f"d{n}", "text": words(20 + n, n)} for n in range(12)]
    inputs = [write_jsonl(tmp_path / "in.jsonl", records)]
    settings = BuildSettings(str(tmp_path / "store"), inputs, "words", embedder="none", chunk_len=8, min_chunk_len=3)
    store = build_store(settings, tokenizer=tokenizer)
    assert store.key_dim == 0 and Retriever(store).index.kind == "tfidf"
    assert Retriever(store, num_neighbors=1)([words(9, 3)]).mask.any()
    assert (build_neighbors(store, 2, index="tfidf").rows >= 0).any()
    for refused in (lambda: Retriever(store, "exact"), lambda: build_neighbors(store, 2)):
        with pytest.raises(ValueError, match="the index exact needs keys"):
            refused()
    with pytest.raises(ValueError, match="pooling is given, but embedder is none"):
        build_store(replace(settings, store=str(tmp_path / "other"), pooling="cls"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("tfidf+tfidf", "names a kind twice"),
        ("auto+exact", "names a kind twice"),
        ("exact+hnsw", "not 'hnsw'"),
        ("exact+tfidf:fast", "'tfidf:fast' is unknown; .* tfidf:exact"),
        ("bm25:", "of its engine there are bm25:exact"),
        ("tfidf>bm25:", "behind > there must be"),
    ],
)
def test_refused_kinds(store, kind, reason):
    with pytest.raises(ValueError, match=reason):
        open_searcher(store, kind)


def contents(index):
    return {(f.name, file.name): file.read_bytes() for f in index.folders for file in f.iterdir()}


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_a_lexical_index_is_opened_again_and_a_damaged_one_built_again(store, kind):
    pytest.importorskip("bm25s")
    before = contents(build_lexical(store, kind))
    stamps = {folder: (folder / "index.json").stat().st_mtime_ns for folder in build_lexical(store, kind).folders}
    assert stamps == {folder: (folder / "index.json").stat().st_mtime_ns for folder in stamps}
    for folder in stamps:
        for name in ("weights-00000.npy", "counts.npy", "words.json"):
            if (folder / name).is_file():
                (folder / name).write_bytes(b"")
        assert contents(build_lexical(store, kind)) == before


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_an_index_does_not_depend_on_its_blocks(store, monkeypatch, kind):
    pytest.importorskip("bm25s")
    index = build_lexical(store, kind)
    content = contents(index)
    monkeypatch.setattr(postings, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(postings, "_BLOCK_POSTINGS", 11)
    for folder in index.folders:
        shutil.rmtree(folder)
    assert contents(build_lexical(store, kind)) == content


def test_a_store_without_words(tmp_path, tokenizer):
    pytest.importorskip("bm25s")
    records = [{"id": "a", "text": "? !"}]
    inputs = [write_jsonl(tmp_path / "in.jsonl", records)]
    settings = BuildSettings(str(tmp_path / "s"), inputs, "words", embedder="none", min_chunk_len=1, index="none")
    with pytest.raises(ValueError, match="no word of two letters or more for bm25 to index; use tfidf"):
        build_lexical(build_store(settings, tokenizer=tokenizer), "bm25")


def test_a_store_on_a_disk_that_is_read_only(store, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    copy = Store.open(shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("index")))
    monkeypatch.setattr(segments, "folder_written_aside", refused)
    with pytest.raises(ValueError, match=r"has no tfidf index and cannot be written \(Read-only"):
        build_lexical(copy, "tfidf")


def test_processes_may_build_one_index_at_once(store):
    code = f"from retro.retrieval import Retriever; print(Retriever({str(store.path)!r}, 'tfidf').index.num_rows)"
    for folder in build_lexical(store, "tfidf").folders:
        shutil.rmtree(folder)
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [int(one.communicate()[0]) for one in running] == [len(store.searchable_rows)] * 3


def test_tables_by_words_need_no_embedder(tmp_path, tokenizer):
    embedder = HashingEmbedder()
    embedder.description |= {"query_prefix": "query: ", "passage_prefix": ""}
    made = make_store(tmp_path, [words(20, n) for n in range(5)], tokenizer, embedder)
    assert (build_neighbors(made, 2, index="tfidf").rows >= 0).any()
    with pytest.raises(ValueError, match="embedder of your own"):
        build_neighbors(made, 2)


def test_which_table_is_opened(tmp_path, tokenizer):
    made = make_store(tmp_path, [words(20, n) for n in range(9)], tokenizer)
    by_words, exact = build_neighbors(made, 2, index="tfidf"), build_neighbors(made, 3)
    assert open_neighbors(made, k=2).path == exact.path
    assert open_neighbors(made, k=2, index="tfidf").path == by_words.path
    best = build_neighbors(made, 2, index="auto")
    assert open_neighbors(made, k=2, index="auto").path == best.path
