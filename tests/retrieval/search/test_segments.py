"""Indexes of stores that grow and shrink: which segments are built, what they answer, against exact search and against
fresh stores of the same documents."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from retro.retrieval import Retriever, Store, build_index, build_neighbors, open_index
from retro.retrieval.building.compact import compact
from retro.retrieval.building.updates import add_documents, remove_documents
from retro.retrieval.search import index as index_module
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.index import exact_search
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import open_searcher
from retro.retrieval.search.segments import MAX_SEGMENTS, ShardRange, StoreRows, cover, num_rows, plan_segments
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl

APPROXIMATE = [kind for kind in ENGINES if index_module._importable(kind)]
LISTED = [("scann", {"leaves": 8})] * ("scann" in APPROXIMATE) + [
    (kind, {"lists": 8}) for kind in APPROXIMATE if kind != "scann"
]
EMBEDDER = HashingEmbedder()


def texts(first, last):
    return [words(12 + seed % 17, seed) for seed in range(first, last)]


def add(store, first, last):
    records = [{"id": f"d{i}", "text": text} for i, text in zip(range(first, last), texts(first, last), strict=True)]
    inputs = [write_jsonl(store.path.parent / f"{store.path.name}-{first}.jsonl", records)]
    return add_documents(store.path, inputs, embedder=EMBEDDER, index=False)


def remove(store, *numbers):
    return remove_documents(store.path, [f"d{i}" for i in numbers], index=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory, tokenizer):
    """40 documents in three shards."""
    return make_store(
        tmp_path_factory.mktemp("grows"), texts(0, 40), tokenizer, EMBEDDER, shard_chunks=80, min_chunk_len=2
    )


@pytest.fixture
def store(first, tmp_path):
    return Store.open(shutil.copytree(first.path, tmp_path / "store"))


def folders(store):
    return {file.parent.name for file in store.path.glob("index/*/index.json")}


def share_found(index, store, k=5):
    queries = store.keys(store.searchable_rows[::5])
    found, true = index.search(queries, k), exact_search(store, queries, k)
    assert found[2].all() and set(found[0].ravel()) <= set(store.searchable_rows)
    return float((found[1] >= true[1][:, -1:] - 1e-6).mean())


@pytest.mark.parametrize(("kind", "settings"), LISTED)
def test_only_what_is_added_gets_a_segment(store, kind, settings, caplog):
    build_index(store, kind, **settings)
    before = folders(store)
    grown = add(store, 40, 50)
    index = open_index(grown, kind)
    assert folders(grown) == before and "are searched exactly" in caplog.text
    uncovered = grown.num_searchable - store.num_searchable
    assert sum(len(grown.searchable_in(*part)) for part in index.exact_ranges) == uncovered
    assert share_found(index, grown) > 0.9
    caplog.clear()
    index = build_index(grown, kind, **settings)
    (new,) = folders(grown) - before
    first = 0 if ENGINES[kind].extends else 1
    assert [segment.folder.name for segment in index.segments][first:] == [new] and not index.exact_ranges
    served = [(segment.shards.first, segment.shards.stop) for segment in index.segments]
    assert served == ([(0, 4)] if ENGINES[kind].extends else [(0, 3), (3, 4)])
    assert share_found(index, grown) > 0.9 and "are searched exactly" not in caplog.text
    old = open_index(store, kind)  # a reader of the generation before
    assert [segment.folder.name for segment in old.segments] == sorted(before) and share_found(old, store) > 0.9


@pytest.mark.parametrize(("kind", "settings"), LISTED + [(kind, {}) for kind in APPROXIMATE])
def test_removed_rows_are_never_returned_and_rebuild_nothing(store, kind, settings):
    build_index(store, kind, **settings)
    before = folders(store)
    gone = range(3, 38)
    left = remove(store, *gone)
    index = build_index(left, kind, **settings)
    assert folders(left) == before and index.num_rows == left.num_searchable < store.num_searchable / 5
    queries = store.keys(store.searchable_rows[::3])  # most are keys of what was removed
    for k in (1, 7, index.num_rows):
        rows, scores, mask = index.search(queries, k)
        true = exact_search(left, queries, k)
        assert mask.all() and not left.is_removed(rows).any()
        assert float((scores >= true[1][:, -1:] - 1e-6).mean()) > 0.9
    assert index.search(queries, index.num_rows + 1)[2].sum(1).max() == index.num_rows


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_segment_built_after_a_removal_is_not_taken_for_one_of_all_rows(store, kind):
    old = Store.open(store.path)
    left = remove(store, 5, 6)
    index = build_index(left, kind)
    assert share_found(index, left) > 0.9 and index.segments[0].num_rows == left.num_searchable
    with pytest.raises(ValueError, match="has no .* index for its present state"):
        open_index(old, kind)  # it still has the documents
    fewer = remove(left, 7)
    assert share_found(build_index(fewer, kind), fewer) > 0.9 and len(folders(fewer)) == 1


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_nothing_left_in_a_shard_needs_no_segment(store, kind):
    in_first = store.shards[0]["documents"]
    left = remove(store, *range(in_first))
    index = build_index(left, kind)
    assert share_found(index, left) > 0.9 and not index.exact_ranges
    last = store.shards[-1]
    left = remove(left, *range(last["first_document"], last["first_document"] + last["documents"]))
    assert share_found(open_index(left, kind), left) > 0.9


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_compact_keeps_the_segments_of_shards_that_it_keeps(store, kind):
    build_index(store, kind, max_segment_rows=1, recall=0.9)  # a segment a shard
    assert len(folders(store)) == 3
    remove(store, 0)
    small = compact(store.path)
    index = open_index(small, kind)
    assert not index.exact_ranges and share_found(index, small) > 0.9 and len(index.segments) == len(small.shards)
    assert {segment.record["recall"]["target"] for segment in index.segments} == {0.9}


class Sized(Store):
    """As much of a store as a plan needs."""

    def __init__(self, *rows):
        first = np.cumsum([0, *rows])
        self.manifest = {"shards": [{"first_row": int(f), "rows": n} for f, n in zip(first, rows, strict=False)]}


def test_many_small_segments_are_joined_and_large_ones_left():
    """10,000 rows and then 10 at a time: a ninth segment joins the small ones, and each is joined a few times."""
    rows, there, written = [10_000], [], 0
    for _ in range(100):
        store = Sized(*rows)
        planned = plan_segments(store, there, 50_000)
        written += sum(num_rows(store, one) for one in planned if one.folder is None)
        assert len(planned) <= MAX_SEGMENTS and [one.stop for one in planned[:-1]] == [one.first for one in planned[1:]]
        there = [ShardRange(one.first, one.stop, Path("there")) for one in planned]
        rows.append(10)
    assert there[0].stop == 1 and written < 10_000 + 10 * 100 * 6


def test_segments_hold_whole_shards_up_to_a_size():
    store = Sized(40, 40, 40, 300, 10, 80)
    assert [(one.first, one.stop) for one in plan_segments(store, [], 100)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    planned = plan_segments(store, [ShardRange(1, 3)], 1000)
    assert [(one.first, one.stop) for one in planned] == [(0, 1), (1, 3), (3, 6)]


def test_rows_of_a_segment_are_counted_where_they_lie():
    """In a file of up to 4 billion rows, of which no copy is made."""
    rows = StoreRows(100, np.arange(0, 200_000, 2, dtype=np.uint32))
    spans = np.array([[[100, 105], [0, 0]], [[0, 101], [299, 302]], [[200_090, 2**40], [0, 90]]])
    tracemalloc.start()
    assert [rows.count_to(own) for own in (0, 4, 5, 199_998)] == [1, 3, 3, 100_000]
    assert rows.count_within(spans).tolist() == [3, 2, 5]
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()


def test_the_cover_serves_most_rows_each_once():
    store = Sized(10, 10, 10, 10)
    found = [ShardRange(0, 1), ShardRange(1, 2), ShardRange(0, 2), ShardRange(1, 4), ShardRange(2, 3)]
    assert cover(store, found) == [ShardRange(0, 1), ShardRange(1, 4)]
    assert cover(store, found[:3]) == [ShardRange(0, 2)] and cover(store, []) == []


# Words, and both


def by_name(store, rows):
    """Rows as document ids and positions, which a fresh store shares."""
    documents, positions = store.document_rows(np.maximum(rows, 0)), store.positions(np.maximum(rows, 0))
    names = np.array([[store.document_ids[d] for d in line] for line in documents])
    return [
        [f"{n} {p}" if r >= 0 else "" for n, p, r in zip(*of, strict=True)]
        for of in zip(names, positions, rows, strict=True)
    ]


def fresh(store, tmp_path, tokenizer, numbers):
    """A store of the same documents in the same order, built at once."""
    from retro.retrieval import BuildSettings, build_store

    records = [{"id": f"d{i}", "text": texts(i, i + 1)[0]} for i in numbers]
    inputs = [write_jsonl(tmp_path / "fresh.jsonl", records)]
    settings = BuildSettings(str(tmp_path / "fresh"), inputs, "words", chunk_len=4, min_chunk_len=2, index="none")
    return build_store(settings, EMBEDDER, tokenizer)


KINDS = ["tfidf", "bm25", "exact+tfidf", "exact+bm25", "exact>bm25"] + [f"{kind}+tfidf" for kind in APPROXIMATE]


def test_a_store_that_grew_and_shrank_answers_as_a_fresh_one(store, tmp_path, tokenizer):
    """Of every kind: the same chunks in the same order with the same scores."""
    pytest.importorskip("bm25s")
    for kind in ("tfidf", "bm25", *APPROXIMATE):
        open_searcher(store, kind, EMBEDDER, build=True)
    now = add(remove(add(remove(store, 0, 1, 17), 40, 48), 44), 48, 50)
    other = fresh(now, tmp_path, tokenizer, [i for i in range(50) if i not in (0, 1, 17, 44)])
    asked = other.token_lists(other.searchable_rows[::4])
    excluded = [{int(row)} for row in other.document_rows(other.searchable_rows[::4])]
    there = [{now.document_ids.index(other.document_ids[row]) for row in rows} for rows in excluded]
    for kind in KINDS:
        mine, fresh_one = (open_searcher(one, kind, EMBEDDER, build=True) for one in (now, other))
        for blocked, blocked_there in ((None, None), (excluded, there)):
            rows, scores, mask = mine.search(Queries(now.tokenizer, tokens=asked), 6, blocked_there)
            expected = fresh_one.search(Queries(other.tokenizer, tokens=asked), 6, blocked)
            assert by_name(now, rows) == by_name(other, expected[0]), kind
            np.testing.assert_array_equal(scores, expected[1])
            assert mask.any() and not now.is_removed(rows[mask]).any()


def test_counts_of_words_are_kept_and_weights_reckoned_anew(store):
    build_lexical(store, "tfidf")
    before = folders(store)
    left = remove(store, 4)
    index = build_lexical(left, "tfidf")
    assert index.num_rows == left.num_searchable and len(index.segments) == 1
    assert len(folders(left) - before) == 1 and index.folder.name in folders(left) - before  # weights alone
    (weights,) = index.folder.glob("weights-*.npy")
    chunks = np.load(index.segments[0].folder / "postings.npy")
    gone = left.is_removed(index.segments[0].store_rows(slice(None)))
    assert (np.load(weights)[gone[chunks]] == 0).all() and gone.any()
    grown = add(left, 40, 42)
    assert len(build_lexical(grown, "tfidf").segments) == 2


def test_the_neighbors_of_a_store_that_grew(store, tmp_path, tokenizer):
    """Also through an index of two segments."""
    now = add(store, 40, 44)
    other = fresh(now, tmp_path, tokenizer, range(44))
    for kind in ("exact", "exact+tfidf", *APPROXIMATE):
        table, expected = (build_neighbors(one, 3, index=kind, embedder=EMBEDDER) for one in (now, other))
        np.testing.assert_array_equal(table.rows, expected.rows)


def test_a_retriever_of_an_open_store_sees_its_generation(store):
    retriever = Retriever(store, "exact", embedder=EMBEDDER)
    text = store.text(store.searchable_rows[:1])
    remove(store, 0)
    assert retriever(text, 1).sources[0][0].document_id == "d0"
    now = Retriever(store.path, "exact", embedder=EMBEDDER)
    assert now(text, 1).sources[0][0].document_id != "d0"
