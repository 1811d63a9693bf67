"""The routed index: small lists behind a router, built by tasks, extended by what is added."""

import gc
import json
import os
import resource
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks.synthetic import SyntheticKeys, without_last_shards, write_synthetic_store
from retro.common.files import folder_record
from retro.common.records import load_record
from retro.retrieval import Store, build_index, open_index
from retro.retrieval.building.updates import add_documents, remove_documents
from retro.retrieval.building.verify import verify_store
from retro.retrieval.executors import tasks as executor_tasks
from retro.retrieval.search.engines import IndexLayout, Work, routing
from retro.retrieval.search.engines.clustering import principal_axes, project
from retro.retrieval.search.engines.files import read_lists
from retro.retrieval.search.engines.packing import list_borders, open_lists, pack, unpack
from retro.retrieval.search.engines.routed import ROWS_OF_A_LIST
from retro.retrieval.search.engines.routing import Lists, apportion
from retro.retrieval.search.index import exact_search
from retro.retrieval.search.segments import StoreRows
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl

pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path, tokenizer):
    """Of 1,200 chunks, so that it has lists; the tasks are cut small."""
    return make_store(tmp_path, [words(40, seed) for seed in range(120)], tokenizer, shard_chunks=400, min_chunk_len=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(routing, "_BLOCK_ROWS", 200)
    monkeypatch.setattr(routing, "_SPLIT_ROWS", 100)
    monkeypatch.setattr(routing, "_PART_BYTES", 1 << 14)


def files_of(index):
    (segment,) = index.segments
    files = folder_record(segment.folder)
    del files["index.json"]
    return files, segment


def lists_of_rows(segment):
    """The two lists of every row, the nearer one first, and its code."""
    lists, rows, codes = read_lists(segment.folder, 0, segment.layout.lists)
    order = np.argsort(rows, kind="stable")
    assert (rows[order] == np.repeat(np.arange(segment.num_rows), 2)).all()
    np.testing.assert_array_equal(codes[order][::2], codes[order][1::2])
    centroids, of_rows = np.load(segment.folder / "centroids.npy"), lists[order].reshape(-1, 2)
    keys = project(segment.store.keys(segment._rows[:]), np.load(segment.folder / "axes.npy"))
    distances = np.square(keys[:, None] - centroids[of_rows]).sum(-1)
    return np.take_along_axis(of_rows, distances.argsort(axis=1, kind="stable"), 1), codes[order][::2]


@pytest.mark.parametrize("width", [1, 3, 16])
def test_lists_in_a_file_are_those_of_faiss(width, tmp_path):
    """Its own fast scan over lists in memory, some of them empty, gives the same rows and distances."""
    import faiss

    draw = np.random.default_rng(width)
    keys, centroids = (draw.normal(size=(count, width)).astype(np.float32) for count in (900, 30))
    table = faiss.IndexFlatL2(width)
    table.add(centroids)
    memory = faiss.IndexIVFPQFastScan(table, width, 30, width, 4)
    memory.train(keys)
    memory.by_residual = False
    memory.nprobe = 3
    numbers = draw.permutation(900)
    memory.add_with_ids(keys, numbers)
    own = table.search(keys, 1)[1][:, 0]
    codes, order = memory.pq.compute_codes(keys), np.argsort(own, kind="stable")
    lengths = np.bincount(own, minlength=30)
    packed = pack(lengths, numbers[order], codes[order])
    for found, given in zip(unpack(lengths, packed, codes.shape[1]), (numbers[order], codes[order]), strict=True):
        np.testing.assert_array_equal(found, given)
    borders = list_borders(lengths, codes.shape[1])
    assert packed[borders[7] : borders[9]].tolist() == pack(lengths[7:9], *part_of(own, numbers, codes, 7, 9)).tolist()
    packed.tofile(tmp_path / "lists")
    codebook = faiss.vector_to_array(memory.pq.centroids).reshape(width, 16, 1)
    mapped = open_lists(faiss.clone_index(table), codebook, tmp_path / "lists", lengths)
    mapped.nprobe = 3
    for found, expected in zip(mapped.search(keys[:50], 20), memory.search(keys[:50], 20), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="lists has .* bytes, but its lists take .*; build the index again"):
        open_lists(table, codebook, tmp_path / "lists", lengths + 32)


def part_of(own, numbers, codes, first, stop):
    members = np.concatenate([np.flatnonzero(own == number) for number in range(first, stop)])
    return numbers[members], codes[members]


def test_every_row_is_in_the_list_of_its_nearest_centroid_and_in_one_beside(store, monkeypatch):
    """With all groups searched; by a plain loop over all centroids."""
    monkeypatch.setattr(routing, "_GROUPS_SEARCHED", 1000)
    monkeypatch.setattr(routing, "_OF_A_GROUP", 1000)
    _, segment = files_of(build_index(store, "routed", workers=1))
    lists, of_rows = Lists(segment.folder), lists_of_rows(segment)[0].astype(int)
    keys = project(store.keys(segment.live_rows(0, segment.num_rows)), lists.axes)
    assert len(lists.centroids) == segment.layout.lists == lists.sizes.sum() and len(lists.sizes) == len(lists.groups)
    distances = np.square(keys[:, None] - lists.centroids).sum(-1)
    np.testing.assert_allclose(np.take_along_axis(distances, of_rows[:, :1], 1)[:, 0], distances.min(1), atol=1e-5)
    nearest = np.argsort(distances, axis=1)[:, : routing._CANDIDATE_LISTS]
    for row in range(0, len(keys), 37):
        first = of_rows[row, 0]
        along = (keys[row] - lists.centroids[first]) / max(distances[row, first] ** 0.5, 1e-12)
        others = [number for number in nearest[row] if number != first]
        losses = [
            distances[row, number] + routing._SOAR * float((keys[row] - lists.centroids[number]) @ along) ** 2
            for number in others
        ]
        second = distances[row, of_rows[row, 1]]
        second += routing._SOAR * float((keys[row] - lists.centroids[of_rows[row, 1]]) @ along) ** 2
        assert second <= min(losses) + 1e-5


def test_the_files_do_not_depend_on_the_workers_nor_on_kills(store, monkeypatch):
    first, segment = files_of(build_index(store, "routed", workers=1))
    run, left = executor_tasks.run_task, [3]

    def killed(folder, task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(folder, task)

    again = build_store_copy(store, "killed")
    with monkeypatch.context() as patched:
        patched.setattr(executor_tasks, "run_task", killed)
        for tries in range(4):
            left[0] = 3
            with pytest.raises(KeyboardInterrupt):
                build_index(again, "routed", workers=1)
            assert len(list(again.path.glob("index/.job-*/*.json"))) == 3 * (tries + 1)
    with monkeypatch.context() as patched:  # when the lists are joined already
        patched.setattr(routing, "_write_router", lambda folder: killed(folder, None))
        with pytest.raises(KeyboardInterrupt):
            build_index(again, "routed", workers=1)
    assert files_of(build_index(again, "routed", workers=1))[0] == first
    assert not list(again.path.glob("index/.job-*"))
    monkeypatch.setattr(routing, "_LIGHT_ROWS", 0)
    many = files_of(build_index(build_store_copy(store, "many"), "routed", workers=2))[0]
    assert many == first


def build_store_copy(store, name):
    import shutil

    copy = shutil.copytree(store.path, store.path.parent / name, ignore=shutil.ignore_patterns("index"))
    return Store.open(copy)


def test_what_is_added_keeps_the_codes_and_centroids(store, tmp_path):
    before, old = files_of(build_index(store, "routed", workers=1))
    removed = remove_documents(store.path, [store.document(3).id], index=False)
    write_jsonl(tmp_path / "more.jsonl", [{"id": f"new-{n}", "text": words(40, 500 + n)} for n in range(12)])
    grown = add_documents(removed.path, [str(tmp_path / "more.jsonl")], HashingEmbedder(), index=True)
    after, segment = files_of(open_index(grown, "routed"))
    assert segment.record["base"] == old.folder.name and segment.num_rows == grown.num_searchable
    for table in ("axes", "groups", "centroids", "sizes", "codebook"):
        assert after[f"{table}.npy"] == before[f"{table}.npy"]
    kept = np.isin(old.live_rows(0, old.num_rows), segment.live_rows(0, segment.num_rows))
    for mine, others in zip(lists_of_rows(segment), lists_of_rows(old), strict=True):
        np.testing.assert_array_equal(mine[: kept.sum()], others[kept])
    queries = grown.keys(grown.searchable_rows[::5])
    found, true = open_index(grown, "routed").search(queries, 10), exact_search(grown, queries, 10)
    assert float((found[1] >= true[1][:, -1:] - 1e-6).mean()) > 0.9 and not grown.is_removed(found[0]).any()


@pytest.mark.parametrize("cause", ["drift", "growth"])
def test_lists_are_made_anew_where_they_no_longer_fit(store, tmp_path, monkeypatch, cause):
    build_index(store, "routed", workers=1)
    count = 12 if cause == "drift" else 150
    if cause == "drift":
        monkeypatch.setattr(routing, "_DRIFT", 0.01)
    write_jsonl(tmp_path / "more.jsonl", [{"id": f"new-{n}", "text": words(40, 500 + n)} for n in range(count)])
    grown = add_documents(store.path, [str(tmp_path / "more.jsonl")], HashingEmbedder(), index=True)
    _, segment = files_of(open_index(grown, "routed"))
    assert load_record(segment.folder / "trained.json")["rows"] == segment.num_rows == grown.num_searchable
    assert segment.layout.lists == -(-segment.num_rows // ROWS_OF_A_LIST)


@contextmanager
def few_open_files(more):
    """So many more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(soft)) - set(map(int, os.listdir("/dev/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("step", ["build", "add"])
def test_memory_and_open_files_of_a_build_do_not_grow_with_the_rows(step, tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "_BLOCK_ROWS", 1000)
    monkeypatch.setattr(routing, "_SPLIT_ROWS", 4000)
    monkeypatch.setattr(routing, "_PART_BYTES", 1 << 16)
    peaks = {}
    for rows in (4000, 16_000):
        store = write_synthetic_store(tmp_path / str(rows), rows, 32, "float16", chunk_len=2, shard_chunks=rows // 2)
        before, add = without_last_shards(store, 1)
        steps = {rows // 2: lambda: before, rows: add} if step == "add" else {rows: lambda: store}  # noqa: B023
        layout, folders = IndexLayout("routed", "pq4", rows // 64, 4, 4, soar=True), []
        for count, opened in steps.items():
            folders.append(tmp_path / f"{rows}-{count}")
            folders[-1].mkdir()
            np.save(folders[-1] / "rows.npy", np.arange(count, dtype=np.uint32))
            own = StoreRows(0, np.load(folders[-1] / "rows.npy", mmap_mode="r"))
            store = opened()
            gc.collect()
            with few_open_files(15):
                tracemalloc.start()
                assert routing.write_lists(layout, store, own, folders[-1], Work(500, workers=1), *folders[:-1])
                peaks[rows] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
    assert peaks[16_000] < 1.25 * peaks[4000]


def test_axes_keep_what_varies_and_a_key_is_projected_alike_whatever_others_are_with_it():
    draw = np.random.default_rng(0)
    keys = (draw.normal(size=(300, 8)) @ draw.normal(size=(8, 16)) + 5).astype(np.float32)
    axes = principal_axes(keys, 4)
    found = project(keys, axes)
    np.testing.assert_allclose(axes @ axes.T, np.eye(8), atol=1e-5)
    apart, on_axes = (np.square(one[:20, None] - one[20:]).sum(-1) for one in (keys, found))
    np.testing.assert_allclose(on_axes, apart, rtol=1e-4)
    for count in (1, 2, 3, 9, 100):
        np.testing.assert_array_equal(project(keys[7:][:count], axes), found[7:][:count])


def test_the_copies_of_a_key_are_in_the_list_where_it_is_looked_for(tmp_path):
    """Not in one of many whose centroids are alike, the others of which stay empty."""

    class Copied(SyntheticKeys):
        def rows(self, start, stop):
            keys = super().rows(start, stop)
            keys[-start % 4 :: 4] = super().rows(0, 1)
            return keys

    store = write_synthetic_store(tmp_path / "store", 2000, 16, chunk_len=2, keys=Copied(2000, 16))
    (segment,) = build_index(store, "routed", workers=1, lists=80, probes=1, candidates=10).segments
    (nearest,) = segment.engine.route(store.keys(np.array([0])), 1)[0]
    assert segment.engine.lengths[nearest] >= 500 and (segment.engine.lengths > 0).all()


def test_lists_are_shared_out_by_rows():
    assert apportion(np.array([5, 0, 95]), 13).tolist() == [2, 1, 10]
    assert apportion(np.array([0, 0]), 3).sum() == 3


def test_queries_among_few_rows_visit_more_lists(store):
    """By the cube of the distance to the nearest centroid; as faiss's own search of so many lists."""
    import faiss

    _, segment = files_of(build_index(store, "routed", workers=1, lists=40))
    engine, queries = segment.engine, store.keys(store.searchable_rows[::100])
    mean, lists = load_record(segment.folder / "trained.json")["mean_distance"], 4
    visited = engine.route(queries, lists)
    distances, found = engine.visit(queries, visited, 30)
    axes = project(queries, np.load(segment.folder / "axes.npy"))
    nearest = engine._router.search(axes, 1, params=faiss.SearchParametersIVF(nprobe=4))[0][:, 0]
    counts = (visited >= 0).sum(1)
    np.testing.assert_array_equal(counts, np.ceil(np.clip(lists * (np.maximum(nearest, 0) / mean) ** 3, 1, 16)))
    assert len(set(counts)) > 1
    certain = np.where(distances < distances[:, -1:], found, -1)  # of rows as far as the last any may be left out
    np.testing.assert_array_equal(engine.candidates(queries, 10, 30, lists), certain)
    for query, count, rows in zip(axes, counts.tolist(), found, strict=True):
        params = faiss.SearchParametersIVF(nprobe=count, quantizer_params=faiss.SearchParametersIVF(nprobe=100))
        np.testing.assert_array_equal(rows, engine._index.search(query[None], 30, params=params)[1][0])


def test_a_store_with_routed_lists_is_sound_until_a_file_of_theirs_is_changed(store):
    _, segment = files_of(build_index(store, "routed", workers=1))
    verify_store(store, level="full")
    told = json.loads((segment.folder / "trained.json").read_text())
    (segment.folder / "trained.json").write_text(json.dumps(told | {"mean_distance": 2 * told["mean_distance"]}))
    with pytest.raises(ValueError, match="trained.json"):
        verify_store(store)


def test_two_builds_at_once_and_jobs_that_nobody_does(store, tmp_path, monkeypatch):
    refused = []

    def build_again(folder, task, run=executor_tasks.run_task):
        if not refused:
            with pytest.raises(
                ValueError, match="is being written by another process; wait until that is done"
            ) as said:
                build_index(Store.open(store.path), "routed", workers=1)
            refused.append(said)
        return run(folder, task)

    left = store.path / "index" / ".job-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "divide-000000000000.keys.npy").write_bytes(b"keys")
    with monkeypatch.context() as patched:
        patched.setattr(executor_tasks, "run_task", build_again)
        build_index(store, "routed", workers=1)
    assert refused and left.is_dir()
    remove_documents(store.path, [store.document(3).id])
    assert not left.exists()


@pytest.mark.parametrize("keys", ["large", "alike"])
def test_keys_of_any_size(keys, tmp_path, tokenizer):
    import faiss

    class Keys(HashingEmbedder):
        def embed(self, texts, is_query=False):
            found = super().embed(texts)
            return found * np.float32(1e5) if keys == "large" else np.ones_like(found)

    store = make_store(tmp_path, [words(40, seed) for seed in range(120)], tokenizer, Keys(), min_chunk_len=2)
    threads = faiss.omp_get_max_threads()
    _, segment = files_of(build_index(store, "routed", workers=1))
    assert segment.record["recall"]["reached"] and faiss.omp_get_max_threads() == threads
    assert load_record(segment.folder / "trained.json")["mean_distance"] >= 0
