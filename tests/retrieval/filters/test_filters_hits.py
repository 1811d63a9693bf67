"""Neighbors that are left out: against loops over the whole ranking, with every kind of search."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from retro.cli import main
from retro.evaluation.neighbors import neighbor_rows
from retro.retrieval import BuildSettings, Retriever, build_store
from retro.retrieval.filters import DateFilter, drawn
from retro.retrieval.filters.hits import FilteredSearcher, QueryFilters
from retro.retrieval.search.index import build_index
from retro.retrieval.search.queries import Queries
from tests.retrieval.filters.test_filters import gram_set, measured
from tests.stand_ins import HashingEmbedder, words, write_jsonl

KINDS = ("exact", "tfidf", "exact+tfidf", "scann")
M, R = 16, 32  # chunks of 16 words: four 13-grams


def changed(text, places, word="w99"):
    """The text with some of its words replaced."""
    return " ".join(word if place in places else old for place, old in enumerate(text.split()))


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """40 texts of 20 words or more, and a copy of each second one: of these, some whole, some with the last word of
    the first chunk replaced (Jaccard 0.6), so that they are none."""
    folder = tmp_path_factory.mktemp("hits")
    texts = [words(20 + i % 40, seed=i) for i in range(40)]
    copies = [text if i % 4 == 0 else changed(text, [M - 1]) for i, text in enumerate(texts) if i % 2 == 0]
    dates = [None, "2015", "2015-06", "2015-06-30", "2021-01-01T00:00:00", "recently"]
    records = [
        {"id": f"d{i}", "text": text, "date": dates[i % 6], "score": i % 5 / 4} for i, text in enumerate(texts + copies)
    ]
    inputs = [write_jsonl(folder / "in.jsonl", records)]
    settings = BuildSettings(str(folder / "store"), inputs, "words", chunk_len=M, min_chunk_len=2, index="none")
    store = build_store(settings, HashingEmbedder(), tokenizer)
    if find_spec("scann"):
        build_index(store, "scann")
    return store


@pytest.fixture(scope="module")
def make(store):
    def make(kind="exact", **filters):
        if kind == "scann":
            pytest.importorskip("scann")
        return Retriever(store, kind, HashingEmbedder(), retrieved_len=R, **filters)

    return make


def queries_of(store, count=6):
    """Texts that are not in the store, but near to what is."""
    rows = np.linspace(0, store.num_chunks - 1, count).astype(int)
    return [changed(text, [0, 3]) for text in store.text(rows)]


def text_of(store, row, length=None):
    ids, mask = store.values(np.array([row]), length or store.chunk_len)
    return store.tokenizer.decode(ids[0][mask[0]], skip_special_tokens=True)


def jaccard(store, one, other):
    a, b = (gram_set(text_of(store, row), 13) for row in (one, other))
    return len(a & b) / len(a | b) if a | b else 0.0


def expected(make, kind, queries, k, keeps, excluded=None):
    """The whole ranking, filtered by hand: keeps(query, row, rows kept before)."""
    plain = make(kind)
    found = plain(queries, plain.index.num_rows, exclude_documents=excluded)
    rows = np.full((len(queries), k), -1)
    for q, line in enumerate(found.ids):
        kept = []
        for row in line[line >= 0].tolist():
            if len(kept) < k and keeps(q, row, kept):
                kept.append(row)
        rows[q, : len(kept)] = kept
    return rows


def unique(store):
    def keeps(q, row, kept):
        same = (store.chunks(np.array([row])) == store.chunks(np.array(kept, int))).all(1) if kept else np.zeros(0)
        return not same.any() and all(jaccard(store, row, other) <= 0.8 for other in kept)

    return keeps


@pytest.mark.parametrize("kind", KINDS)
def test_k_unique_texts_from_a_store_of_copies(kind, make, store):
    queries = queries_of(store)
    found = make(kind, deduplicate=True)(queries, 10)
    if kind != "exact+tfidf":  # what is fused depends on how many are asked for
        np.testing.assert_array_equal(found.ids, expected(make, kind, queries, 10, unique(store)))
    for line in found.ids:
        chunks = [tuple(store.chunks(np.array([row]))[0]) for row in line]
        assert (line >= 0).all() and len(set(chunks)) == 10
        assert all(jaccard(store, a, b) <= 0.8 for n, a in enumerate(line) for b in line[:n])
    plain = make(kind)(queries, 10)
    assert any(len({tuple(c) for c in store.chunks(line)}) < 10 for line in plain.ids), "there are copies to leave out"
    assert (np.diff(found.scores, axis=1) <= 0).all() and (found.ids[:, 0] == plain.ids[:, 0]).all()


def test_near_copies_are_one_and_less_near_ones_are_two(make, tmp_path, tokenizer):
    text = words(200, 3)
    near, far = changed(text, [0]), changed(text, [60, 140])  # of 188 grams 1 and 26 are others
    records = [{"id": name, "text": t} for name, t in (("a", text), ("near", near), ("far", far), ("b", words(200, 4)))]
    settings = BuildSettings(
        str(tmp_path / "s"), [write_jsonl(tmp_path / "x.jsonl", records)], "words", chunk_len=256, index="none"
    )
    store = build_store(settings, HashingEmbedder(), tokenizer)
    found = Retriever(store, "exact", HashingEmbedder(), deduplicate=True)([text], 4)
    names = [source and source.document_id for source in found.sources[0]]
    assert jaccard(store, 0, 1) == pytest.approx(187 / 189) and jaccard(store, 0, 2) == pytest.approx(162 / 214)
    assert names == ["a", "far", "b", None] and found.ids[0, 3] == -1 and not found.mask[0, 3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "filters",
    [
        {"max_date": "2015-06-30"},
        {"min_date": "2015", "max_date": "2015", "undated": "keep"},
        {"subsample": (0.2, 3)},
        {"quality": ["score>=0.5", "extra.score<1"]},
    ],
    ids=str,
)
def test_documents_are_chosen_before_the_best_k(kind, filters, make, store):
    names = store.document_ids
    records = [store.document(row) for row in range(store.num_documents)]
    if "subsample" in filters:
        passing = drawn(names, *filters["subsample"])
    elif "quality" in filters:
        passing = np.asarray([0.5 <= record.extra["score"] < 1 for record in records])
    else:
        chosen = DateFilter(filters.get("min_date"), filters["max_date"], filters.get("undated", "drop"))
        passing = np.asarray([chosen.verdict(record) is None for record in records])
    assert 0 < passing.sum() < len(names)
    queries = queries_of(store)
    excluded = [{names[int(np.flatnonzero(passing)[0])]}] * len(queries)
    found = make(kind, **filters)(queries, 6, exclude_documents=excluded)
    ids = found.ids[found.ids >= 0]
    owners = store.document_rows(ids)
    assert passing[owners].all() and np.flatnonzero(passing)[0] not in owners
    if kind != "exact+tfidf":
        keeps = lambda q, row, kept: passing[store.document_rows(np.array([row]))[0]]  # noqa: E731
        np.testing.assert_array_equal(found.ids, expected(make, kind, queries, 6, keeps, excluded))
    assert (found.mask.any(-1) == (found.ids >= 0)).all() and np.isneginf(found.scores[found.ids < 0]).all()


@pytest.mark.parametrize("measure", ["longest_run>=13", "jaccard>=0.2", "overlap>=0.5"])
def test_neighbors_that_give_the_text_away_are_left_out(measure, make, store):
    queries = queries_of(store)
    read = [text_of(store, row, R) for row in np.linspace(0, store.num_chunks - 1, 6).astype(int)]
    name, threshold = measure.split(">=")

    def clean(texts):
        return lambda q, row, kept: measured(text_of(store, row, R), texts(q), 13)[name] < float(threshold)

    given = make("exact", decontaminate=measure)(queries, 6, against=read)
    np.testing.assert_array_equal(given.ids, expected(make, "exact", queries, 6, clean(lambda q: read[q])))
    own = make("exact", decontaminate=[measure])(read, 6)
    np.testing.assert_array_equal(own.ids, expected(make, "exact", read, 6, clean(lambda q: read[q])))
    assert (own.ids[:, 0] != make("exact")(read, 6).ids[:, 0]).any(), "the best neighbor of a text is itself"
    fixed = make("exact", decontaminate=measure, against=read)(queries, 6)
    both = lambda q, row, kept: all(clean(lambda _, t=t: t)(q, row, kept) for t in read)  # noqa: E731
    np.testing.assert_array_equal(fixed.ids, expected(make, "exact", queries, 6, both))


def test_either_measure_is_enough(make, store):
    def found(**filters):
        retriever = make(**filters)
        return set(retriever([text_of(store, 0, R)], retriever.index.num_rows).ids[0].tolist()) - {-1}

    one, other = "longest_run>=15", "jaccard>=0.2"
    assert found(decontaminate=[one, other]) == found(decontaminate=one) & found(decontaminate=other) < found()


def test_all_filters_at_once(make, store):
    queries = queries_of(store, 2)
    found = make(
        deduplicate=True, decontaminate="longest_run", max_date="2016", subsample=(0.8, 1), quality=["score>0"]
    )(queries, 60)
    passing = drawn(store.document_ids, 0.8, 1)
    alone, dates = unique(store), DateFilter(max_date="2016")

    def keeps(q, row, kept):
        document = int(store.document_rows(np.array([row]))[0])
        record = store.document(document)
        clean = measured(text_of(store, row, R), queries[q], 13)["longest_run"] < 13
        chosen = passing[document] and record.extra["score"] > 0 and dates.verdict(record) is None
        return chosen and clean and alone(q, row, kept)

    np.testing.assert_array_equal(found.ids, expected(make, "exact", queries, 60, keeps))
    assert (found.ids == -1).any(), "some have fewer than 60"


class Ranked:
    """A search of which the whole answer is given."""

    kind, recall = "exact", 1.0

    def __init__(self, ranking, num_rows):
        self.ranking, self.num_rows, self.asked = ranking, num_rows, []

    def search(self, queries, k, excluded=None):
        self.asked.append(k)
        rows = np.full((len(queries), k), -1, np.int64)
        rows[:, : min(k, len(self.ranking))] = self.ranking[:k]
        scores = np.where(rows >= 0, -np.arange(k), -np.inf).astype(np.float32)
        return rows, scores, rows >= 0


@pytest.mark.parametrize("num_found", [0, 1, 5, 50, 200])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_more_is_asked_for_until_k_are_left_or_there_is_no_more(k, num_found, store):
    draw = np.random.default_rng(k + num_found)
    num_rows = store.num_chunks
    inner = Ranked(draw.permutation(num_rows)[:num_found], num_rows)
    searcher = FilteredSearcher(inner, store, QueryFilters(subsample=(0.1, 0)), R)
    rows, scores, mask = searcher.search(Queries(store.tokenizer, texts=["w1", "w2"]), k)
    passing = drawn(store.document_ids, 0.1, 0)[store.document_rows(inner.ranking)]
    places = np.flatnonzero(passing)[:k]
    for line in range(2):
        assert rows[line].tolist() == inner.ranking[places].tolist() + [-1] * (k - len(places))
        assert scores[line][: len(places)].tolist() == (-places).tolist() and mask[line].sum() == len(places)
    assert inner.asked == sorted(inner.asked) and inner.asked[-1] <= num_rows
    if num_found < 2 * k + 8:
        assert len(inner.asked) == 1, "a search that gave fewer than it was asked for has no more"


def test_however_often_more_is_asked_for_a_query_is_embedded_once(store):
    class Counting(HashingEmbedder):
        asked = 0

        def embed(self, texts, is_query=False):
            self.asked += len(texts)
            return super().embed(texts, is_query)

    embedder = Counting()
    retriever = Retriever(store, "exact", embedder, subsample=(0.02, 0))
    assert (retriever(queries_of(store), 5).ids[:, -1] == -1).all() and embedder.asked == 6


def test_a_search_knows_its_filters_and_tables_are_kept_apart(make, store, tmp_path):
    tokens = store.chunks(np.arange(3))
    mask = tokens != store.pad_token_id
    retrievers = [
        make(),
        make(deduplicate=True),
        make(max_date="2015"),
        make(max_date="2016"),
        make(subsample=(0.5, 0)),
        make(subsample=(0.5, 1)),
        make(decontaminate="jaccard"),
        make(decontaminate="jaccard>=0.7"),
        make(decontaminate="jaccard", against=["a b"]),
        make(decontaminate="jaccard", against=["a c"]),
        make(quality=["score>0"]),
        Retriever(store, "exact", HashingEmbedder(), retrieved_len=M, decontaminate="jaccard"),
    ]
    assert len({retriever.index.kind for retriever in retrievers}) == len(retrievers)
    for _ in range(2):
        found = [neighbor_rows(retriever, tokens, mask, 5, cache=tmp_path) for retriever in retrievers]
        assert len(list(tmp_path.iterdir())) == len(retrievers)
    assert (found[0] != found[1]).any() and (found[1] == make(deduplicate=True)(tokens, 5, mask=mask).ids).all()
    own = Retriever(store, Ranked(np.arange(5), 5), deduplicate=True)
    neighbor_rows(own, tokens, mask, 2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(retrievers), "what a search of one's own finds is not known"


def test_a_query_without_text_and_queries_by_tokens(make, store):
    retriever = make(deduplicate=True, decontaminate="longest_run", max_date="2020", undated="keep")
    assert (retriever(["", " "], 3).ids == -1).all() and retriever([], 3).ids.shape == (0, 3)
    rows = np.array([0, 4])
    by_tokens = retriever([ids.tolist() for ids in store.token_lists(rows)], 4).ids
    np.testing.assert_array_equal(by_tokens, retriever(store.text(rows), 4).ids)
    found = retriever(["", store.text(rows)[0]], 4, against=["x", "y"])
    assert (found.ids[0] == -1).all() and found.ids[1, 0] == 0


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"against": ["a"]}, "against is given without decontaminate"),
        ({"decontaminate": "jaccard", "against": "a"}, "against must be a list of texts, not one text"),
        ({"decontaminate": "cosine"}, "'cosine' is no measure of resemblance"),
        ({"min_date": "soon"}, "min_date must be a year, month or day"),
        ({"min_date": ""}, "min_date is empty"),
        ({"undated": "keep"}, "undated is given without min_date or max_date"),
        ({"subsample": (2.0, 0)}, "subsample must be a share"),
        ({"quality": ["score"]}, "the quality rule 'score' is not"),
    ],
)
def test_filters_that_mean_nothing_are_refused(filters, message, make):
    with pytest.raises(ValueError, match=message):
        make(**filters)


def test_texts_read_are_for_a_retriever_that_decontaminates(make):
    for retriever in (make(), make(deduplicate=True)):
        with pytest.raises(ValueError, match="made without decontaminate"):
            retriever(["w1"], against=["w1"])
    for wrong in (["a", "b"], "a"):
        with pytest.raises(ValueError, match="one text per query"):
            make(decontaminate="jaccard")(["w1"], against=wrong)


def test_the_command_line_filters_too(store, tmp_path, capsys):
    asked = ["search", str(store.path), text_of(store, 0), "--index", "tfidf", "--k", "8"]
    file = tmp_path / "found.json"
    given = ["--deduplicate", "--min-date", "2015", "--quality", "score>0", "--subsample", "0.9", "1"]
    assert main([*asked, *given, "--decontaminate", "longest_run>=14", "--json", str(file)]) == 0
    filters = dict(deduplicate=True, min_date="2015", quality=["score>0"], subsample=(0.9, 1))
    retriever = Retriever(store, "tfidf", decontaminate="longest_run>=14", **filters)
    found = json.loads(file.read_text())
    assert [hit["row"] for hit in found["neighbors"]] == retriever([text_of(store, 0)], 8).ids[0].tolist()
    assert found["index"].startswith("tfidf; deduplicate, longest_run>=14, min_date=2015, score>0, subsample=0.9/1 (")
    capsys.readouterr()
    for wrong, message in (
        ([*asked, "--undated", "keep"], "undated is given without min_date or max_date"),
        ([*asked, "--quality", "score"], "the quality rule 'score' is not"),
        (["generate", "run", "x", "--no-retrieval", "--min-date", "2015"], "--min-date means nothing beside"),
    ):
        assert main(wrong) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
