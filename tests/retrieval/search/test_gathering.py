"""Shards that answer apart, put together: the answers of one process, without Ray."""

import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from retro.common.files import file_record
from retro.common.records import load_record
from retro.retrieval import Store, build_index, open_sharded, remove_documents
from retro.retrieval.search import lexical, searchers
from retro.retrieval.search.engines.routed import open_groups
from retro.retrieval.search.gathering import MissingShards
from retro.retrieval.search.placement import place_by_similarity, plan_shards
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import open_searcher, parse_kind
from retro.retrieval.search.segments import row_range
from retro.retrieval.search.shard import ShardActor
from retro.retrieval.search.sharded import ShardedSearcher
from tests.stand_ins import HashingEmbedder, make_store, words
from tests.waiting import FOREVER


def bordered_store(folder, tokenizer):
    """Several shards, duplicates on both sides of every border between them."""
    texts = [words(n % 50 + 3, n % 37) for n in range(120)]
    return make_store(folder, texts, tokenizer, shard_chunks=300)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    return bordered_store(tmp_path_factory.mktemp("gathering"), tokenizer)


def queries_of(store, rows):
    return Queries(store.tokenizer, texts=store.text(rows), keys=store.keys(rows))


class InProcess(ShardedSearcher):
    """Shards that are asked without Ray; those of `down` do not answer."""

    def __init__(self, store, kind, num_shards, partial=False):
        self.down, self.asked = set(), []
        embedder = None if set(kind.partition(">")[0].split("+")) <= {"tfidf", "bm25"} else HashingEmbedder()
        super().__init__(store, kind, plan_shards(store, kind, num_shards), embedder, FOREVER, partial, {})

    def _start(self, number):
        return ShardActor(self._place, self.store.fingerprint, self.plan[number])

    def share(self, value):
        return value

    def ask(self, method, asked, deadline, lost, patient=None):
        self.asked.append((method, set(asked)))
        lost |= {number: "it is down" for number in self.down & set(asked)}
        return {n: getattr(self._actors[n], method)(*given) for n, given in asked.items() if n not in lost}


def check_answers(found, expected):
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("num_shards", [1, 3, 12])
def test_exact_shards_answer_as_one(store, num_shards):
    rows = np.arange(0, store.num_chunks, 150)
    asked, own = queries_of(store, rows), [{row} for row in store.document_rows(rows).tolist()]
    local, sharded = open_searcher(store, "exact", HashingEmbedder()), InProcess(store, "exact", num_shards)
    for excluded in (None, own, [{0, 1, *of} for of in own]):
        check_answers(sharded.search(asked, 5, excluded), local.search(asked, 5, excluded))


def test_segments_are_spread_and_shards_without_one_searched_exactly(store, tmp_path):
    pytest.importorskip("faiss")
    folder = shutil.copytree(store.path, tmp_path / "store")
    copy = Store.open(folder)
    index = build_index(copy, "faiss", max_segment_rows=300)
    assert len(index.segments) == 3
    dropped = index.segments[1]
    shutil.rmtree(dropped.folder)
    sharded = InProcess(copy, "faiss", 3)
    held = [part["faiss"] for part in sharded.plan]
    assert [part.ranges for part in held if part.ranges] == [[row_range(copy, dropped.shards)]]
    names = [name for part in held for _, _, name in part.segments]
    assert sorted(names) == sorted(segment.folder.name for segment in index.segments if segment is not dropped)
    asked = queries_of(copy, np.arange(0, copy.num_chunks, 61))
    exact = open_searcher(copy, "exact", HashingEmbedder()).search(asked, 4)  # flat codes of a small store
    check_answers(sharded.search(asked, 4), exact)


@pytest.fixture(scope="module")
def routed(tmp_path_factory, tokenizer):
    """Two segments of lists and a shard that has none; documents were removed after these were made."""
    pytest.importorskip("faiss")
    texts = [words(60, n) for n in range(140)]
    store = make_store(tmp_path_factory.mktemp("routed"), texts, tokenizer, shard_chunks=1050)
    index = build_index(store, "routed", recall=0.7, max_segment_rows=1050)
    assert [segment.layout.codes for segment in index.segments] == ["pq4", "pq4", "flat"]
    shutil.rmtree(index.segments[2].folder)
    return remove_documents(store.path, [f"d{n}" for n in range(0, 80, 7)], index=False)


@pytest.mark.parametrize("num_shards", [1, 3, 12])
def test_lists_in_several_places_give_the_rows_and_scores_of_one(routed, num_shards):
    local, sharded = open_searcher(routed, "routed", HashingEmbedder()), InProcess(routed, "routed", num_shards)
    rows = routed.live_rows(np.arange(0, routed.num_live_chunks, 31))
    queries, documents = queries_of(routed, rows), routed.document_rows(rows).tolist()
    assert sharded.recall == min(segment.record["recall"]["recall"] for segment in local.index.segments) < 1
    for k, excluded in (
        (1, None),
        (10, None),
        (10, [{row} for row in documents]),
        (2, [{row, 1, 2} for row in documents]),
    ):
        check_answers(sharded.search(queries, k, excluded), local.search(queries, k, excluded))
    few, everything = queries[np.arange(3)], routed.num_searchable
    found = sharded.search(few, everything)
    check_answers(found, local.search(few, everything))
    assert found[2].all()
    held = [part for parts in sharded.plan for part in parts["routed"].lists]
    for segment in local.index.segments:
        groups = sorted(group for *_, name, some in held if name == segment.folder.name for group in some)
        assert groups == list(range(len(segment.engine.groups)))
    rows_held = [
        sum(map(len, lists_of(segment).values()))
        for actor in sharded._actors
        for segment in actor._parts["routed"].lists.values()
    ]
    assert sum(rows_held) == 2 * sum(segment.num_rows for segment in local.index.segments)


def lists_of(segment):
    """The rows of the lists that a segment holds."""
    import faiss

    held = segment.engine._index.invlists
    sizes = {number: held.list_size(number) for number in range(held.nlist)}
    return {n: faiss.rev_swig_ptr(held.get_ids(n), size).tolist() for n, size in sizes.items() if size}


def test_a_query_goes_only_to_the_shards_that_own_its_lists(routed):
    """Of the others none is missed when it is down; of these one is named, or the answer is partial."""
    local, sharded = open_searcher(routed, "routed", HashingEmbedder()), InProcess(routed, "routed", 6)
    asked = []
    for row in range(0, 900, 90):
        query, before = queries_of(routed, np.arange(row, row + 1)), len(sharded.asked)
        sharded.down = set()
        expected = sharded.search(query, 3)
        check_answers(expected, local.search(query, 3))
        visits = sharded.asked[before:]
        needed = set().union(*(shards for _, shards in visits))
        asked += [len(shards) for method, shards in visits if method == "visit"]
        sharded.down = set(range(6)) - needed
        check_answers(sharded.search(query, 3), expected)
        visited = set().union(*(shards for method, shards in visits if method == "visit"))
        sharded.down = set(list(visited)[:1])
        with pytest.raises(MissingShards, match=r"1 of 6 shards are missing: shard \d \(.*groups of lists of segment"):
            sharded.search(query, 3)
        sharded.partial = True
        found = sharded.search(query, 3)
        assert (found.shards_answered, sharded.shards_answered) == (5, 5)
        assert found[1][0, 0] <= expected[1][0, 0]
        sharded.partial = False
    assert min(asked) < 6 and np.mean(asked) < 4


def test_a_partial_search_that_must_ask_again_leaves_out_who_is_lost(routed):
    """And keeps what the others have: an exclusion, and more neighbors than a visit finds, take several rounds."""
    sharded = InProcess(routed, "routed", 3, partial=True)
    query = queries_of(routed, np.arange(1))
    sharded.down = {0}
    found = sharded.search(query, 100, [set(range(6, 140))])
    assert len(sharded.asked) > 3 and sum(0 in shards for _, shards in sharded.asked) == 1
    assert found[2].any() and found.shards_answered == 2
    assert not np.isin(routed.document_rows(found[0][found[2]]), np.arange(6, 140)).any()


def test_groups_are_placed_by_similarity_and_balanced_by_rows():
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(4, 8)) * 20
    of = draw.integers(0, 4, 400)
    rows = draw.integers(50, 150, 400)
    placed = place_by_similarity((centers[of] + draw.normal(size=(400, 8))).astype(np.float32), rows, 4)
    loads = np.bincount(placed, rows)
    assert len(loads) == 4 and loads.max() < 1.01 * loads.mean() + 150
    assert np.mean([np.bincount(placed[of == one]).max() / (of == one).sum() for one in range(4)]) > 0.8
    np.testing.assert_array_equal(place_by_similarity(np.zeros((2, 3), np.float32), np.zeros(2, int), 5) < 5, True)


def test_a_shard_reads_and_checks_its_own_lists_alone(routed, tmp_path):
    store = Store.open(shutil.copytree(routed.path, tmp_path / "store"))
    sharded = InProcess(store, "routed", 2)
    first, stop, name, groups = sharded.plan[0]["routed"].lists[0]
    file = store.path / "index" / name / "lists.codes"
    held = bytearray(file.read_bytes())
    record = load_record(file.parent / "index.json")
    kept = open_groups(file.parent, record, groups)
    assert sorted(groups) == sorted(set(kept.group_of_list[list(lists_of(SimpleNamespace(engine=kept)))].tolist()))
    file.write_bytes(held[:-1])
    with pytest.raises(ValueError, match="lists.codes has .* bytes, but .* are recorded"):
        InProcess(store, "routed", 2)
    held[len(held) // 3] ^= 1
    file.write_bytes(held)
    with pytest.raises(ValueError, match="lists.codes is damaged: its checksum"):
        InProcess(store, "routed", 2)
    held[len(held) // 3] ^= 1
    file.write_bytes(bytes(held) + bytes(512))
    record["files"]["lists.codes"] = file_record(file)
    with pytest.raises(ValueError, match="lists.codes has .* bytes, but its lists take"):
        open_groups(file.parent, record, groups)


@pytest.mark.parametrize("kind", ["tfidf", "tfidf:exact", "bm25", "bm25:exact", "exact+tfidf"])
def test_segments_of_words_are_spread(segmented, kind):
    if "bm25" in kind:
        pytest.importorskip("bm25s")
    local, sharded = open_searcher(segmented, kind, HashingEmbedder()), InProcess(segmented, kind, 2)
    words_kind = kind.split("+")[-1]
    assert [len(parts[words_kind].segments) for parts in sharded.plan] == [2, 1]
    rows = np.arange(0, segmented.num_chunks, 41)
    asked, own = queries_of(segmented, rows), [{row} for row in segmented.document_rows(rows).tolist()]
    for excluded in (None, own):
        check_answers(sharded.search(asked, 4, excluded), local.search(asked, 4, excluded))
    assert sharded.recall == pytest.approx(min(local.recall, 1.0))
    matrices = [len(actor._parts[words_kind]._matrices) for actor in sharded._actors]
    assert matrices == [2, 1]


@pytest.mark.parametrize("kind", ["exact>bm25", "tfidf>continuation", "exact+tfidf>tfidf", "exact>its-name"])
def test_the_second_stage_is_scored_where_the_rows_are(segmented, kind, monkeypatch):
    other = HashingEmbedder(24, "its-name")
    monkeypatch.setattr(searchers, "load_embedder", lambda name: {"its-name": other}[name])
    if "bm25" in kind:
        pytest.importorskip("bm25s")
    local, sharded = open_searcher(segmented, kind, HashingEmbedder()), InProcess(segmented, kind, 3)
    assert sharded.kind == local.kind
    asked = queries_of(segmented, np.arange(0, segmented.num_chunks, 29))
    check_answers(sharded.search(asked, 3), local.search(asked, 3))
    assert ("scores", {0, 1, 2}) in sharded.asked
    sharded.partial, sharded.down = True, {0}
    rows, scores, mask = sharded.search(asked, 3)
    assert mask.any() and (rows[~np.isfinite(scores)] == -1).all()


@pytest.fixture(scope="module")
def segmented(store, tmp_path_factory):
    """The store, its words in three segments."""
    copy = Store.open(shutil.copytree(store.path, tmp_path_factory.mktemp("segmented") / "store"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lexical, "MAX_POSTINGS", 2 * copy.chunk_len * 300)
        for kind in ("tfidf", "bm25") if find_spec("bm25s") else ("tfidf",):
            assert len(lexical.build_lexical(copy, kind).segments) == 3
    return copy


def test_words_that_are_one_segment_are_one_shard(store):
    plan = plan_shards(store, "exact+tfidf", 3)
    assert [sorted(parts) for parts in plan] == [["exact"], ["exact"], ["exact", "tfidf"]]


def test_refusals(store):
    with pytest.raises(ValueError, match="num_shards must be at least 1"):
        plan_shards(store, "exact", 0)
    with pytest.raises(ValueError, match="has no scann index|needs a library"):
        plan_shards(store, "scann", 2)
    with pytest.raises(ValueError, match="behind > there must be continuation, bm25, tfidf or the name of an embedder"):
        plan_shards(store, "exact>exact", 2)
    with pytest.raises(ValueError, match="is another store here, or has been changed; open the search again"):
        ShardActor(str(store.path), "0" * 64, {})
    with pytest.raises(ValueError, match=r"timeout must be above 0, not 0\.0"):
        open_sharded(store, timeout=0.0)
    assert [str(part) for parts in plan_shards(store, "exact", 2) for part in parts.values()] == [
        f"rows 0 to {store.num_chunks // 2 - 1}",
        f"rows {store.num_chunks // 2} to {store.num_chunks - 1}",
    ]
    assert parse_kind("exact") == ["exact"]
