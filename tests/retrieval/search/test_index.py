"""Exact search against a naive oracle; approximate engines: masks, settings, tuned recall, damage."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.synthetic import write_synthetic_store
from retro.common.files import TEMPORARY_PREFIX, _machine
from retro.common.records import load_record, save_record
from retro.planning import index_plan
from retro.retrieval import Store, build_index, open_index
from retro.retrieval.building.updates import remove_documents
from retro.retrieval.search import dense, exact
from retro.retrieval.search import index as index_module
from retro.retrieval.search.dense import TUNED_NEIGHBORS, Effort, QuerySample, Segment, tune
from retro.retrieval.search.engines import ENGINES, EngineKind, IndexLayout, choose_layout
from retro.retrieval.search.index import exact_search, measured_recall, resolve_kind
from retro.retrieval.search.on_device import DeviceKeys
from retro.retrieval.search.segments import ShardRange
from tests.stand_ins import make_store, words

APPROXIMATE = [kind for kind in ENGINES if index_module._importable(kind)]
EVERY_CODE = [f"{kind}:{codes}" for kind in APPROXIMATE for codes in ENGINES[kind].codes]
LISTS = {
    "scann": ("leaves", "leaves_to_search"),
    "faiss": ("lists", "probes"),
    "routed": ("lists", "probes"),
}  # of the engines that have lists


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


def oracle(store, queries, k, excluded=None, rows=None):
    start, stop = rows or (0, store.num_chunks)
    found = np.full((len(queries), k), -1)
    for q, query in enumerate(queries.astype(np.float64)):
        distances = np.square(store.array.astype(np.float32) - query.astype(np.float32)).sum(1, dtype=np.float64)
        distances = distances.astype(np.float32)  # as scores are
        allowed = [r for r in store.searchable_rows if excluded is None or store.documents[r] not in excluded[q]]
        order = sorted((r for r in allowed if start <= r < stop), key=lambda r: (distances[r], r))[:k]
        found[q, : len(order)] = order
    return found


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("block", [1 << 9, 1 << 24])
def test_exact_search_against_the_oracle(monkeypatch, copies, block):
    """Also with 40 copies of every key, where the order of equal distances is by row, however the work is cut."""
    monkeypatch.setattr(exact, "_BLOCK_SCORES", block * 20)
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(2000 // copies, 12)), copies, axis=0).astype(np.float32)
    keys = keys[rng.permutation(len(keys))]
    store = Keys(keys, np.arange(len(keys)) // 7, np.flatnonzero(np.arange(len(keys)) % 10 != 3))
    queries = np.concatenate([keys[:15], rng.normal(size=(4, 12)), 300 + rng.normal(size=(1, 12))]).astype(np.float32)
    excluded = np.array([*np.arange(15) // 7, -1, -1, 4, 5, 6])[:, None] + np.array([0, 3])
    for k in (1, 5):
        np.testing.assert_array_equal(exact_search(store, queries, k)[0], oracle(store, queries, k))
        found = exact_search(store, queries, k, excluded, rows=(100, 1700))
        np.testing.assert_array_equal(found[0], oracle(store, queries, k, excluded, (100, 1700)))
        np.testing.assert_array_equal(found[2], found[0] >= 0)


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("kept", [0, 3, 7])
def test_keys_on_a_device_give_what_exact_search_gives(copies, kept):
    """Also with more copies of a key than there are candidates; cells that fit are read once."""
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(2000 // copies, 12)), copies, axis=0).astype(np.float32)
    store, read = Keys(keys, np.arange(len(keys)) // 7, np.flatnonzero(np.arange(len(keys)) % 10 != 3)), []
    on_device = DeviceKeys(store, torch.device("cpu"), kept * 300 * 12 * 4, cell_rows=300)
    store.key_block = lambda start, stop: read.append(start) or keys[start:stop]
    queries = np.concatenate([keys[:90:6], 300 + rng.normal(size=(1, 12))]).astype(np.float32)
    excluded = np.arange(len(queries))[:, None] - np.array([1, 3])
    for documents, rows in ((None, (0, 2000)), (excluded, (100, 1700)), (None, (5, 17)), (None, (40, 40))):
        found = exact.search_on_device(on_device, queries, 5, documents, rows)
        for one, other in zip(found, exact_search(store, queries, 5, documents, rows), strict=True):
            np.testing.assert_array_equal(one, other)
    read.clear()
    on_device.candidates(queries, 21, None, 0, 2000)
    assert len(read) == 7 - kept
    assert exact.search_on_device(on_device, queries[:0], 5, None, (0, 2000))[0].shape == (0, 5)


def test_exact_search_of_ranges_merged_by_score_is_that_of_the_whole():
    rng = np.random.default_rng(1)
    keys = np.repeat(rng.normal(size=(40, 6)), 10, axis=0).astype(np.float32)
    store = Keys(keys, np.arange(400), np.arange(400))
    parts = [exact_search(store, keys[::9], 7, rows=part) for part in ((0, 0), (0, 130), (130, 131), (131, 400))]
    rows, scores = (np.concatenate([part[i] for part in parts], 1) for i in (0, 1))
    order = np.lexsort((np.where(rows < 0, 1 << 40, rows), -scores), axis=1)[:, :7]
    np.testing.assert_array_equal(np.take_along_axis(rows, order, 1), exact_search(store, keys[::9], 7)[0])
    with pytest.raises(ValueError, match=r"rows must lie in the store's 0 \.\. 400, not 3 \.\. 401"):
        exact_search(store, keys[:1], 1, rows=(3, 401))


def test_exact_search_runs_out():
    store = Keys(np.eye(3, dtype=np.float32), np.array([0, 0, 1]), np.arange(3))
    rows, scores, mask = exact_search(store, np.eye(3, dtype=np.float32)[:1], 3, np.array([[0]]))
    assert rows.tolist() == [[2, -1, -1]] and mask.tolist() == [[True, False, False]]
    assert scores[0, 0] == -2 and (scores[0, 1:] == -np.inf).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    texts = [words(40, seed) for seed in range(60)]
    return make_store(tmp_path_factory.mktemp("index"), texts, tokenizer, shard_chunks=300, min_chunk_len=2)


@pytest.fixture
def copy(store, tmp_path):
    return Store.open(shutil.copytree(store.path, tmp_path / "copy"))


def share_found(found, exact):
    """Of the hits of exact search; of equal scores any will do."""
    return float((found[1] >= exact[1][:, -1:] - 1e-6).mean())


SETTINGS = [(kind, {}) for kind in APPROXIMATE] + [(kind, {"max_segment_rows": 250}) for kind in APPROXIMATE]
SETTINGS += [
    (kind, {name: 8 for name in LISTS.get(kind.split(":")[0], ())[:1]})
    for kind in EVERY_CODE
    if kind.split(":")[1] not in ("brute", "flat")
]
SETTINGS += [("scann", {"leaves": 8, "soar": True})] * ("scann" in APPROXIMATE)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_engines_against_exact_search(copy, kind, settings):
    """Every row comes once, nothing but searchable rows, in the order of exact scores, at the recall that is tuned."""
    index = build_index(copy, kind, **settings)
    queries = copy.keys(np.arange(0, copy.num_chunks, 7))
    found, true = index.search(queries, 10), exact_search(copy, queries, 10)
    assert found[2].all() and set(found[0].ravel()) <= set(copy.searchable_rows)
    assert all(len(set(line)) == 10 for line in found[0].tolist())
    np.testing.assert_array_equal(found[1], -np.sort(-found[1], axis=1))
    assert share_found(found, true) > 0.9 and 0.95 <= index.recall <= 1
    recall = index.segments[0].record["recall"]
    assert recall["k"] == TUNED_NEIGHBORS and recall["reached"]
    assert open_index(copy, kind).name == index.name and index.kind == kind
    assert len(index.segments) == (3 if "max_segment_rows" in settings else 1)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_excluded_documents_are_left_out_and_nothing_else(copy, kind, monkeypatch):
    """One, several or no documents of a query, also where they are nearest and few hits are held at a time."""
    index, queries = build_index(copy, kind, recall=1.0), copy.keys(np.arange(0, copy.num_chunks, 7))
    excluded = copy.document_rows(np.arange(0, copy.num_chunks, 7))[:, None] + np.array([0, 1, 5])
    excluded[excluded >= copy.num_documents] = -1
    excluded[3] = -1
    for table in (excluded, excluded[:, :1], excluded[:, :0]):
        found, true = index.search(queries, 10, table), exact_search(copy, queries, 10, table)
        documents = copy.document_rows(found[0])
        assert found[2].all() and not (documents[:, :, None] == table[:, None]).any()
        assert share_found(found, true) > 0.97
    few = [np.array([[row for row in range(copy.num_documents) if row not in (3, q)]]) for q in (4, 5)]
    table, found = np.concatenate(few), index.search(queries[:2], 100, np.concatenate(few))
    for mine, other in zip(found, exact_search(copy, queries[:2], 100, table), strict=True):
        np.testing.assert_array_equal(mine, other)
    monkeypatch.setattr(dense, "_FOUND", 500)
    for mine, other in zip(index.search(queries[:2], 100, table), found, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_search_ends_with_the_last_row_that_may_be_found(copy, kind, monkeypatch):
    """It does not look for more where excluded documents hold all else, as one that fills a segment does."""
    copy = remove_documents(copy.path, [copy.document(5).id], index=False)
    index, looks = build_index(copy, kind, candidates=10), []
    (segment,) = index.segments
    scored = segment.scored
    monkeypatch.setattr(segment, "scored", lambda *given: looks.append(len(given[0])) or scored(*given))
    queries, everything = copy.keys(np.arange(4)), np.tile(np.arange(copy.num_documents), (4, 1))
    assert not index.search(queries, 3, everything)[2].any() and not looks
    table = np.where(everything == 7, -1, everything)
    table = np.concatenate([table, table[:, 9:]], axis=1)  # some are named twice
    for mine, other in zip(index.search(queries, 50, table), exact_search(copy, queries, 50, table), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_is_the_same_to_the_byte_whenever_it_is_built(copy, kind):
    built = []
    for _ in range(2):
        build_index(copy, kind)
        folder = copy.path / "index"
        built.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        shutil.rmtree(folder)
    assert built[0] == built[1]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_keys_of_any_length_are_ordered_by_distance(tmp_path, tokenizer, kind):
    from tests.stand_ins import HashingEmbedder

    class Long(HashingEmbedder):
        def embed(self, texts, is_query=False):
            return super().embed(texts) * np.array([[1 + len(text) % 5] for text in texts], np.float32)

    store = make_store(tmp_path, [words(40, seed) for seed in range(10)], tokenizer, Long())
    queries = store.keys(np.arange(20))
    index = build_index(store, kind)
    found, true = index.search(queries, 4), exact_search(store, queries, 4)
    if ENGINES[kind].is_exact(index.segments[0].layout):
        np.testing.assert_array_equal(found[0], true[0])
    assert share_found(found, true) > 0.9


@pytest.mark.parametrize("kind", [kind for kind in APPROXIMATE if kind in LISTS])
def test_a_search_that_finds_too_few_is_widened_until_it_has_seen_all(copy, kind):
    few = dict(zip(LISTS[kind], (60, 1), strict=True))
    index, queries = build_index(copy, kind, recall=0.05, **few), copy.keys(np.arange(0, 60, 3))
    first = index.segments[0].attempt(queries, 200, index.segments[0].effort)[0]
    assert (first == -1).any() and (first >= 0).any()
    rows, scores, mask = index.search(queries, 200)
    assert mask.all() and all(len(set(line)) == 200 for line in rows.tolist())
    rows, scores, mask = index.search(queries, index.num_rows + 5)
    np.testing.assert_array_equal(mask.sum(1), index.num_rows)
    assert (rows[~mask] == -1).all() and (scores[~mask] == -np.inf).all()
    assert (np.sort(rows[:, : index.num_rows], axis=1) == copy.searchable_rows).all()


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_queries_that_are_not_finite_are_refused(copy, kind):
    queries, index = copy.keys(np.arange(4)), build_index(copy, kind)
    for value in (np.nan, np.inf, 1e19):
        queries[2, 1] = value
        with pytest.raises(ValueError, match="query row 2 is not finite, or longer than 9e18"):
            index.search(queries, 2)
    with pytest.raises(ValueError, match=r"must be \[q, 16\]"):
        index.search(queries[:, :3], 2)
    with pytest.raises(ValueError, match="k is .*; give a whole number, at least 1"):
        index.search(copy.keys(np.arange(4)), 0)
    assert index.search(queries[:0], 2)[0].shape == (0, 2)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_changed_settings_make_another_folder_and_the_same_reuse_it(copy, kind):
    (folder,) = build_index(copy, kind).folders
    stamp = (folder / "index.json").stat().st_mtime_ns
    assert build_index(copy, kind).folders == [folder]
    assert (folder / "index.json").stat().st_mtime_ns == stamp
    assert build_index(copy, kind, seed=1).folders != [folder]
    with pytest.raises(ValueError, match="no setting 'leafs'"):
        build_index(copy, kind, leafs=3)
    with pytest.raises(ValueError, match="recall must be above 0 and at most 1, not 95.0"):
        build_index(copy, kind, recall=95.0)
    with pytest.raises(ValueError, match=f"codes of {kind} must be one of"):
        build_index(copy, kind, codes="pq5")


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_of_another_state_of_the_store_is_not_opened(copy, tmp_path, tokenizer, kind):
    (folder,) = build_index(copy, kind).folders
    other = make_store(tmp_path, [words(40, 1)], tokenizer, name="other")
    shutil.copytree(folder, other.path / "index" / folder.name)
    with pytest.raises(ValueError, match=f"has no {kind} index for its present state"):
        open_index(other, kind)
    assert open_index(other, "auto").kind == "exact"


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_missing_or_damaged_files_of_an_index_are_named_and_built_again(copy, kind):
    """ScaNN would abort the process."""
    (folder,) = build_index(copy, kind).folders
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    middle = len(content) // 2
    largest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=f"{largest.name} is damaged"):
        open_index(copy, kind)
    assert build_index(copy, kind).folders == [folder] and open_index(copy, kind).folders == [folder]
    largest.unlink()
    with pytest.raises(ValueError, match=f"{largest.name} is missing"):
        open_index(copy, kind)
    assert build_index(copy, kind).folders == [folder] and open_index(copy, kind).folders == [folder]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_of_another_format_is_told_and_built_again(copy, kind, caplog):
    (folder,) = build_index(copy, kind).folders
    record = load_record(folder / "index.json")
    save_record(folder / "index.json", record | {"format_version": 1})
    with pytest.raises(ValueError, match=f"has no {kind} index for its present state"):
        open_index(copy, kind)
    assert f"{folder} has format 1, which this version of the library does not read; build it again" in caplog.text
    assert open_index(copy).kind == "exact"
    assert build_index(copy, kind).folders == [folder] and load_record(folder / "index.json") == record


def test_what_a_killed_build_left_goes(copy):
    left = copy.path / "index" / f"{TEMPORARY_PREFIX}{2**22 + 1}.{_machine()}-0-abc"  # no process has this number
    left.mkdir(parents=True)
    build_index(copy, "faiss")
    assert not left.exists()


def test_of_several_indexes_the_best_is_opened(copy):
    pytest.importorskip("faiss")
    for probes in (2, 1, 60, 3):
        build_index(copy, "faiss", lists=60, probes=probes)
    best = open_index(copy, "faiss")
    assert best.segments[0].record["settings"]["probes"] == 60
    assert measured_recall(copy)["faiss"]["recall"] == best.recall
    build_index(copy, "faiss:ivf-sq8", lists=4, probes=1, recall=0.1)
    assert open_index(copy, "faiss").name == best.name and open_index(copy, "faiss:ivf-sq8").name != best.name


def test_an_index_moves_with_its_store(copy, tmp_path):
    for kind in APPROXIMATE:
        queries = copy.keys(np.arange(5))
        before = build_index(copy, kind).search(queries, 3)[0]
        moved = Store.open(shutil.copytree(copy.path, tmp_path / f"moved_{kind}"))
        shutil.rmtree(copy.path / "index")
        np.testing.assert_array_equal(open_index(moved, kind).search(queries, 3)[0], before)


def test_kinds(monkeypatch):
    with pytest.raises(ValueError, match=f"must be auto, exact, {', '.join(ENGINES)}, tfidf or bm25, not 'hnsw'"):
        resolve_kind("hnsw")
    with pytest.raises(ValueError, match="there are faiss:flat, faiss:sq8"):
        resolve_kind("faiss:ah")
    with pytest.raises(ValueError, match="open it by Retriever\\(store, 'tfidf'\\)"):
        resolve_kind("tfidf")
    monkeypatch.setattr(index_module, "_importable", lambda kind: kind == "exact")
    assert resolve_kind("auto") == "exact"
    with pytest.raises(ValueError, match="pip install scann"):
        resolve_kind("scann:ah")


def test_too_short_chunks_are_not_found(tmp_path, tokenizer):
    texts = [words(8, seed) for seed in range(30)]  # 9 tokens: the third chunk is eos alone, the same in all
    store = make_store(tmp_path, texts, tokenizer, min_chunk_len=2)
    for kind in ("exact", *EVERY_CODE):
        rows, _, mask = build_index(store, kind).search(store.keys(np.array([2, 5])), 10)
        assert mask.all() and (store.chunk_lens(rows) == 4).all()


@pytest.mark.parametrize("kind", EVERY_CODE)
def test_few_rows_and_copies(tmp_path, tokenizer, kind):
    """Three documents of the same text and one of another, whatever codes were asked for."""
    store = make_store(tmp_path, [words(8, 1)] * 3 + [words(4, 2)], tokenizer)
    index = build_index(store, kind)
    rows, scores, mask = index.search(store.keys(np.array([0, 9])), 20)
    assert (mask.sum(1) == store.num_chunks).all()
    assert sorted(rows[0, :3].tolist()) == [0, 3, 6] and (scores[0, :3] == 0).all()
    np.testing.assert_array_equal(scores, exact_search(store, store.keys(np.array([0, 9])), 20)[1])
    one = make_store(tmp_path, [words(3, 1)], tokenizer, name="one")
    assert build_index(one, kind).search(one.keys(np.array([0])), 2)[0].tolist() == [[0, -1]]


# Recall


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """6,000 keys of 32 dimensions in clusters, in two shards."""
    from benchmarks.synthetic import write_synthetic_store

    return write_synthetic_store(tmp_path_factory.mktemp("clustered") / "store", 6000, 32, shard_chunks=3000)


TUNED = {"scann:ah-int8": {"leaves": 64}, "faiss:ivf-pq": {"lists": 64, "training_sample": 3000}}


@pytest.mark.parametrize("kind", [kind for kind in EVERY_CODE if kind in TUNED])
def test_the_recall_that_is_asked_for_is_reached_with_the_least_effort(clustered, kind, caplog):
    store, settings = clustered, TUNED[kind]
    queries = store.keys(np.random.default_rng(5).choice(6000, 200, replace=False))
    true, efforts = exact_search(store, queries, 11), []
    for target in (0.8, 0.99):
        index = build_index(store, kind, recall=target, **settings)
        found = index.search(queries, 11)
        measured = json.loads((index.folders[0] / "index.json").read_text())["recall"]
        assert measured["target"] == target and measured["reached"] and measured["recall"] >= target
        assert share_found((None, found[1][:, 1:]), (None, true[1][:, 1:])) > target - 0.06  # another sample
        efforts.append(index.segments[0].effort)
    assert efforts[0] != efforts[1] and efforts[0].lists <= efforts[1].lists
    assert len(list((store.path / "index").glob("*/index.json"))) <= 2  # tuned again, not built again
    assert build_index(store, kind, **settings).segments[0].record["recall"]["target"] == 0.99
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    least = tune(index.segments[0], 0.8)
    assert Effort(least["lists_searched"], least["candidates"]) == efforts[0]  # the same sample, the same choice


def test_a_recall_that_is_not_reached_is_said(clustered, caplog):
    pytest.importorskip("faiss")
    index = build_index(clustered, "faiss:ivf-flat", recall=0.99, lists=64, probes=1)
    measured = index.segments[0].record["recall"]
    assert not measured["reached"] and measured["recall"] < 0.99 and measured["lists_searched"] == 1
    assert "the recall of 0.99 that was asked for is not reached" in caplog.text


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_recall_does_not_depend_on_the_length_of_keys(scale):
    """A segment that answers with the nine rows after the true one, against a true one."""
    keys = (scale * np.random.default_rng(0).normal(size=(2000, 8))).astype(np.float32)
    store = Keys(keys, np.arange(2000), np.arange(2000))
    store.manifest = {"shards": [{"first_row": 0, "rows": 2000}]}

    class Answering(Segment):
        layout, num_rows = choose_layout("faiss", {"codes": "flat", "lists": None}, 2000, 8), 2000
        num_live = num_rows
        record = {"settings": {"seed": 0, "candidates": None}}

        def __init__(self, answer):
            self.store, self.shards, self.answer = store, ShardRange(0, 1), answer

        def attempt(self, queries, k, effort, fetch=None):
            rows = self.answer(queries, k)
            return rows, exact.rescore(store, queries, rows)

        def live_rows(self, start, stop):
            return np.arange(start, stop)

    def measured(answer):
        return tune(Answering(answer), 0.95)["recall"]

    beside = lambda queries, k: (exact_search(store, queries, 1)[0] + np.arange(k)) % 2000  # noqa: E731
    assert measured(beside) < 0.05
    assert measured(lambda queries, k: exact_search(store, queries, k)[0]) == 1.0


def test_more_candidates_are_tried_where_more_lists_do_not_help():
    """And not all lists, of which a large segment has millions."""

    class Large(Segment):
        layout, num_rows = choose_layout("routed", {"codes": None, "lists": 10_000}, 10**6, 8), 10**6
        record, store = {"settings": {"probes": None, "candidates": None}}, SimpleNamespace(key_dim=8)

        def __init__(self):
            pass

    class Sample(QuerySample):
        def __init__(self):
            self.record, self._known = {}, {}

        def recall(self, effort):
            found = min(effort.candidates / 1200, 1) * min(effort.lists / 60, 1)
            return self._known.setdefault(effort, found)

    sample = Sample()
    found = tune(Large(), 0.95, sample)
    assert (found["lists_searched"], found["candidates"], found["reached"]) == (64, 1280, True)
    assert max(effort.lists for effort in sample._known) < 200


class SortedKind(EngineKind):
    """As little as an engine of one's own must give: whole keys, compared in NumPy."""

    module = "numpy"
    codes = ("plain",)
    remedy = "pip install numpy"

    def layout(self, settings, rows, width, keys_fit):
        return IndexLayout("numpy", "plain")

    def write(self, layout, store, rows, folder, work):
        np.save(folder / "keys.npy", store.keys(rows[:]))

    def open(self, layout, folder):
        return SortedEngine(np.load(folder / "keys.npy"))

    def code_bytes(self, layout, width):
        return 4.0 * width


class SortedEngine:
    def __init__(self, keys):
        self.keys = keys

    def candidates(self, queries, wanted, considered, lists):
        return np.square(queries[:, None] - self.keys).sum(-1).argsort(axis=1)[:, :considered]


def test_an_engine_of_ones_own(copy, monkeypatch):
    """One entry in the table, and it is built, tuned, opened, searched, planned and named."""
    monkeypatch.setitem(ENGINES, "numpy", SortedKind())
    queries = copy.keys(np.arange(0, copy.num_chunks, 7))
    index, true = build_index(copy, "numpy:plain", recall=0.9), exact_search(copy, queries, 4)
    assert index.recall == 1 and index.segments[0].record["recall"]["candidates"] == TUNED_NEIGHBORS
    for found in (index, open_index(copy, "numpy")):
        np.testing.assert_array_equal(found.search(queries, 4)[0], true[0])
    planned, folder = index_plan("numpy", copy.num_searchable, copy.key_dim), index.folders[0]
    assert planned["disk"] == pytest.approx(sum(file.stat().st_size for file in folder.glob("*.npy")), rel=0.05)
    assert planned["peak"] > planned["memory"] == copy.num_searchable * 4 * copy.key_dim
    with pytest.raises(ValueError, match="numpy, tfidf or bm25, not 'nmslib'"):
        resolve_kind("nmslib")


def test_settings_by_size():
    free = {"codes": None, "leaves": None, "soar": None, "lists": None}
    sizes = (5000, 50_000, 400_000, 6_000_000)
    scann = [choose_layout("scann", free, rows, 384) for rows in sizes]
    assert [one.codes for one in scann] == ["brute", "ah-float32", "ah-float32", "ah"]
    assert [one.lists for one in scann] == [0, 0, 632, 2449] and [one.soar for one in scann] == [False] * 3 + [True]
    faiss = [choose_layout("faiss", free, rows, 384) for rows in sizes]
    assert [one.codes for one in faiss] == ["flat", "flat", "ivf-flat", "ivf-pq"]
    bytes_of = lambda what, layout, *given: getattr(ENGINES[layout.engine], what)(layout, *given)  # noqa: E731
    assert bytes_of("row_bytes", faiss[3], 384) == 48 + 8 and faiss[3].bits == 8
    assert bytes_of("row_bytes", scann[3], 384) == 193
    assert bytes_of("row_bytes", scann[1], 384) == 96.5 + 4 * 385
    peak = 48 * 2**20 + 50_000 * (8 * 385 + 193 + 96.5) + 20_000 * 4 * 385
    assert bytes_of("peak_bytes", scann[1], 50_000, 384, 20_000) == peak
    peak = 48 * 2**20 + 6_000_000 * 56 + 4 * 384 * 40 * faiss[3].lists
    assert bytes_of("peak_bytes", faiss[3], 6_000_000, 384, 1000) == peak


@pytest.mark.parametrize("pairs", [1, 5, 1 << 20])
def test_distances_do_not_depend_on_how_many_are_computed_at_a_time(tmp_path, monkeypatch, pairs):
    """To the bit those of one pair after another, whatever the type of the keys and the shards they lie in."""
    store = write_synthetic_store(tmp_path / "store", 300, 24, "float16", shard_chunks=70)
    draw = np.random.default_rng(0)
    queries = draw.normal(size=(9, 24)).astype(np.float32)
    rows = draw.integers(-1, 300, (9, 7))
    monkeypatch.setattr(exact, "_PAIRS", pairs)
    found = exact.rescore(store, queries, rows)
    for q, c in np.ndindex(rows.shape):
        if rows[q, c] < 0:
            assert np.isposinf(found[q, c])
        else:
            key = np.asarray(store.shard_arrays(int(rows[q, c]) // 70).keys[rows[q, c] % 70], np.float32)
            difference = np.square(key - queries[q]).astype(np.float64)
            assert found[q, c] == exact.rescore(store, queries[q : q + 1], rows[q : q + 1, c : c + 1])[0, 0]
            assert found[q, c] == pytest.approx(difference.sum(), rel=1e-7)


@pytest.mark.parametrize(("asked", "gpus"), [(None, [0, 1]), ("cuda:1", [1]), ("cpu", [])])
def test_faiss_searches_where_it_is_asked_to(asked, gpus, tmp_path, monkeypatch):
    """As if faiss-gpu were installed, beside two cards."""
    faiss, moved, set_to = pytest.importorskip("faiss"), [], []
    keys = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    index = faiss.index_factory(8, "IVF4,Flat")
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "faiss.index"))

    class Space:
        def set_index_parameter(self, index, name, value):
            set_to.append(value)
            index.nprobe = value

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", Space, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", lambda one, gpus: moved.extend(gpus) or one, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("RETRO_DEVICE", asked or "")
    engine = ENGINES["faiss"].open(IndexLayout("faiss", "ivf-flat", 4), tmp_path)
    found = engine.candidates(keys[:5], 1, 1, 4)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4] and moved == gpus and set_to == ([4] if gpus else [])
