"""Neighbor tables: nothing from the same document, nothing lost, nothing invented, whoever did the work."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro.common.checksums import CheckedArray
from retro.common.files import TEMPORARY_PREFIX, _machine, write_lock
from retro.common.records import load_record, save_record
from retro.retrieval import Store, build_neighbors, open_neighbors, remove_documents
from retro.retrieval.building import join
from retro.retrieval.building.sample import share_found
from retro.retrieval.search.index import build_index
from tests.kills import count_calls, killed_at_call
from tests.stand_ins import HashingEmbedder, make_store, words


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("neighbors")
    return make_store(folder, [words(n, n) for n in range(1, 60, 3)], tokenizer, min_chunk_len=3)


def oracle(store, k, queries=None, same=True):
    """A loop over all pairs."""
    queries = queries or store
    rows, keys = store.searchable_rows, store.keys(store.searchable_rows)
    names = np.array(store.document_ids)[store.document_rows(rows)]
    table = np.full((queries.num_chunks, k), -1)
    for q in range(queries.num_chunks):
        row = np.array([q])
        own = queries.document_ids[queries.document_rows(row)[0]]
        distances = np.square(keys - queries.keys(row)).sum(1, dtype=np.float64)
        order = [i for i in np.lexsort((rows, distances)) if not same or names[i] != own][:k]
        table[q, : len(order)] = rows[order]
    return table


@pytest.mark.parametrize("exclude", ["same_document", "none"])
def test_table_against_a_loop(store, exclude):
    table = build_neighbors(store, 3, exclude=exclude)
    np.testing.assert_array_equal(table.rows, oracle(store, 3, same=exclude == "same_document"))
    distances = np.square(store.keys(table.rows[:]) - store.keys(np.arange(store.num_chunks))[:, None]).sum(-1)
    np.testing.assert_allclose(table.distances, distances, atol=1e-5)
    assert (np.diff(table.distances, axis=1) >= 0).all()
    table.verify()


def test_opened_again_and_cut_to_k(store):
    table = build_neighbors(store, 4)
    stamp = (table.path / "rows.npy").stat().st_mtime_ns
    assert (build_neighbors(store, 4).path / "rows.npy").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(open_neighbors(store, k=2).rows, table.rows[:, :2])
    assert isinstance(open_neighbors(store, k=2).rows, CheckedArray)
    with pytest.raises(ValueError, match="no neighbor table with k >= 50"):
        open_neighbors(store, k=50)


@pytest.mark.parametrize("index", ["exact", "auto", "faiss"])
def test_a_long_book_loses_no_neighbors(tmp_path, tokenizer, index):
    """A book of 10,000 chunks of which every one is nearer to the query than the two other documents."""
    if index == "faiss":
        pytest.importorskip("faiss")
    book = " ".join(["w1 w2 w3 w4"] * 10_000)
    store = make_store(tmp_path, [book, "w5 w6 w7", "w8 w9 w10"], tokenizer)
    assert store.num_chunks == 10_003
    keys = store.keys(np.array([0, 5_000, 10_000]))
    if index == "exact":
        rows = build_neighbors(store, 2).rows[[0, 5_000, 10_000]]
    else:
        engine = build_index(store, index)
        rows = engine.search(keys, 2, np.zeros((3, 1), np.int64))[0]
    assert np.sort(rows, axis=1).tolist() == [[10_001, 10_002]] * 3


def test_missing_neighbors_are_masked(tmp_path, tokenizer):
    store = make_store(tmp_path, [words(40, 1), words(3, 2)], tokenizer)
    for index in ("exact", "auto"):
        table = build_neighbors(store, 3, index=index)
        assert (table.rows[:11, 0] == 11).all() and (table.rows[:11, 1:] == -1).all()
        assert (table.distances[:11, 1:] == np.inf).all() and (table.rows[11] >= 0).all()
        assert table.record["missing"] == 22


def test_through_an_index_as_exact(store):
    pytest.importorskip("faiss")
    exact, approximate = build_neighbors(store, 3), build_neighbors(store, 3, index="faiss")
    assert exact.path != approximate.path
    np.testing.assert_allclose(approximate.distances, exact.distances, atol=1e-5)
    assert open_neighbors(store, k=3).path == exact.path


def test_a_join_measures_its_recall_and_looks_further_where_it_is_low(tmp_path, tokenizer):
    """As where the rows of the query's own document are all that is found in the lists for which it was tuned."""
    pytest.importorskip("faiss")
    store = make_store(tmp_path, [words(160, n % 12) + " " + words(160, n) for n in range(24)], tokenizer)
    file = build_index(store, "faiss:ivf-flat").folders[0] / "index.json"
    record = load_record(file)
    save_record(file, record | {"recall": record["recall"] | {"lists_searched": 4}})
    exact, table = build_neighbors(store, 4), build_neighbors(store, 4, index="faiss:ivf-flat")
    shares = share_found(*(found.distances[:].astype(np.float64) for found in (table, exact)))
    assert table.record["scale"]["lists"] > 1 and table.record["sample"] == 1024 < store.num_chunks
    assert table.record["recall"] >= 0.95 and sum(sorted(table.record["recall_of_strata"])[:2]) >= 1.8
    assert len(table.record["recall_of_strata"]) == 10 and abs(shares.mean() - table.record["recall"]) < 0.03
    assert exact.record["recall"] == 1


def test_a_join_looks_no_further_than_it_needs(tmp_path, tokenizer):
    """As where an index is tuned to all lists, or for more neighbors than are asked for."""
    pytest.importorskip("faiss")
    store = make_store(tmp_path, [words(160, n) for n in range(24)], tokenizer)
    file = build_index(store, "faiss:ivf-flat", lists=32).folders[0] / "index.json"
    record = load_record(file)
    save_record(file, record | {"recall": record["recall"] | {"lists_searched": 32, "candidates": 40}})
    table = build_neighbors(store, 2, index="faiss:ivf-flat")
    assert table.record["scale"]["lists"] < 1 and 0.95 <= table.record["recall"] <= 1


def test_the_share_found_counts_neighbors_that_there_are():
    exact = np.array([[1, 2, 3], [1, 2, np.inf], [np.inf] * 3, [1, 1, 1]])
    found = np.array([[1, 3, 4], [2, np.inf, np.inf], [np.inf] * 3, [1, 1, 1]])
    np.testing.assert_allclose(share_found(found, exact), [2 / 3, 1 / 2, np.nan, 1])


def test_of_another_store(store, tmp_path, tokenizer):
    queries = make_store(tmp_path, [words(n, n + 1) for n in (9, 30, 2)], tokenizer, name="queries")
    table = build_neighbors(store, 2, queries)
    np.testing.assert_array_equal(table.rows, oracle(store, 2, queries))  # documents of the same id are left out
    assert open_neighbors(store, queries, 2).path == table.path
    with pytest.raises(ValueError, match="no neighbor table"):
        open_neighbors(queries)


@pytest.mark.parametrize("index", ["exact", "tfidf"])
def test_more_neighbors_than_chunks_are_missing(store, index):
    k = store.num_searchable + 3
    table = build_neighbors(store, k, exclude="none", index=index)
    assert table.rows.shape[1] == k and (table.rows[:, -3:] == -1).all()
    np.testing.assert_array_equal(table.rows[:, :2], build_neighbors(store, 2, exclude="none", index=index).rows)


def test_refusals(store, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="k is .*; give a whole number, at least 1"):
        build_neighbors(store, 0)
    with pytest.raises(ValueError, match="exclude must be one of"):
        build_neighbors(store, 1, exclude="source")
    other = make_store(tmp_path, ["w1 w2"], tokenizer, HashingEmbedder(name="other"))
    with pytest.raises(ValueError, match=r"different embedders: hashing \(.*\) and other \("):
        build_neighbors(store, 1, other)
    longer = make_store(tmp_path, ["w1 w2"], tokenizer, name="longer", chunk_len=8)
    with pytest.raises(ValueError, match="chunks of 4 tokens, .* of 8"):
        build_neighbors(store, 1, longer)


def test_progress_is_in_whole_chunks(store, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for terminals
    build_neighbors(store, 7, progress=True)
    assert f"{store.num_chunks}/{store.num_chunks} [" in capsys.readouterr().err


def test_damaged_tables_are_named(store):
    table = build_neighbors(store, 5)
    (table.path / "distances.npy").unlink()
    with pytest.raises(ValueError, match=r"distances\.npy is missing"):
        open_neighbors(store, k=5)
    np.testing.assert_array_equal(build_neighbors(store, 5).rows, table.rows)  # computed again


# The job


def small_tasks(monkeypatch, queries=8, pairs=512, tasks=4):
    """Cut as if the store were large."""
    monkeypatch.setattr(join, "_TASK_QUERIES", (queries, queries))
    monkeypatch.setattr(join, "_TASK_PAIRS", pairs)
    monkeypatch.setattr(join, "_TASKS", tasks)


def table_bytes(table):
    return [(table.path / name).read_bytes() for name in ("rows.npy", "distances.npy", "neighbors.json")]


@given(st.integers(1, 300_000), st.integers(1, 300_000), st.sampled_from([1 << 10, 1 << 26, 1 << 32]))
def test_a_job_is_cut_into_all_pairs_once(num_queries, num_rows, pairs):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(join, "_TASK_PAIRS", pairs)
        blocks = join.cut(num_queries, num_rows)
    assert [start for (start, _), _ in blocks] == [0, *(stop for (_, stop), _ in blocks[:-1])]
    assert blocks[-1][0][1] == num_queries
    for (start, stop), ranges in blocks:
        assert start < stop <= start + 65_536
        assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])] and ranges[-1][1] == num_rows
        assert all(low < high for low, high in ranges)


@pytest.mark.parametrize("index", ["exact", "faiss", "tfidf", "exact+tfidf"])
def test_bytes_do_not_depend_on_how_the_work_is_cut(store, monkeypatch, index):
    if "faiss" in index:
        pytest.importorskip("faiss")
    whole = build_neighbors(store, 3, index=index)
    kept = table_bytes(whole)
    for cut in ({"tasks": 1}, {"queries": 50, "pairs": 64, "tasks": 12}):
        shutil.rmtree(whole.path)
        small_tasks(monkeypatch, **cut)
        found = build_neighbors(store, 3, index=index, workers=1)
        assert table_bytes(found) == kept
        assert sorted(path.name for path in found.path.iterdir()) == ["distances.npy", "neighbors.json", "rows.npy"]


def test_bytes_do_not_depend_on_the_number_of_workers(store, monkeypatch):
    whole = build_neighbors(store, 3)
    kept = table_bytes(whole)
    shutil.rmtree(whole.path)
    small_tasks(monkeypatch, queries=64)
    assert table_bytes(build_neighbors(store, 3, workers=2)) == kept


def test_an_interrupted_table_is_taken_up_again(store, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kept = table_bytes(build_neighbors(store, 2))
    shutil.rmtree(build_neighbors(store, 2).path)
    small_tasks(monkeypatch, tasks=1)
    search, begun = join.search_block, []

    def stops(spec):
        begun.append(tuple(spec["queries"]))
        if len(begun) == 7:
            raise KeyboardInterrupt
        return search(spec)

    monkeypatch.setattr(join, "search_block", stops)
    with pytest.raises(KeyboardInterrupt):
        build_neighbors(store, 2, workers=1)
    assert not any(file.parent.name == "job" for file in store.path.glob("neighbors/*/neighbors.json"))
    done, begun = begun[:6], [None] * 10  # never seven again
    assert table_bytes(build_neighbors(store, 2, workers=1, progress=True)) == kept
    blocks = [block for block, _ in join.cut(store.num_chunks, store.num_chunks)]
    assert begun[10:] == [block for block in blocks if block not in done] and len(done) == 6
    assert f"{store.num_chunks}/{store.num_chunks} [" in capsys.readouterr().err


def test_another_process_is_kept_out(store):
    table = build_neighbors(store, 2)
    shutil.rmtree(table.path)
    (table.path / "job").mkdir(parents=True)
    with write_lock(table.path / "job"), pytest.raises(ValueError, match="is being written by another process"):
        build_neighbors(store, 2)
    assert build_neighbors(store, 2).path == table.path


def test_a_store_that_changes_meanwhile(tmp_path, tokenizer):
    old = make_store(tmp_path, [words(30, 1), words(20, 2), words(9, 3)], tokenizer)
    remove_documents(old.path, ["d1"])
    with pytest.raises(ValueError, match="was changed while its neighbors were computed; run the same command again"):
        build_neighbors(old, 2)
    table = build_neighbors(Store.open(old.path), 2)
    new = Store.open(old.path)
    np.testing.assert_array_equal(table.rows[~new.is_removed(np.arange(new.num_chunks))], live_rows(new, 2))


def live_rows(store, k):
    """The oracle's table without the chunks of removed documents."""
    return oracle(store, k)[~store.is_removed(np.arange(store.num_chunks))]


def test_removed_documents_duplicates_and_near_ties(tmp_path, tokenizer, monkeypatch):
    """Removed chunks find nothing and are found by nobody; equal and almost equal distances are ordered by row."""
    texts = [words(n, n) for n in range(1, 40, 3)] + [words(12, 4)] * 9 + [f"{words(12, 4)} w{i}" for i in range(9)]
    made = make_store(tmp_path, texts, tokenizer, min_chunk_len=2, shard_chunks=20)
    store = remove_documents(made.path, ["d3", "d9", "d15", "d20"])
    small_tasks(monkeypatch, queries=16, pairs=128, tasks=30)
    table = build_neighbors(store, 6, workers=1)
    removed = store.is_removed(np.arange(store.num_chunks))
    assert removed.any() and (table.rows[removed] == -1).all() and np.isinf(table.distances[removed]).all()
    np.testing.assert_array_equal(table.rows[~removed], live_rows(store, 6))
    assert not np.isin(table.rows, np.flatnonzero(removed)).any()


def test_of_another_store_with_removed_documents(store, tmp_path, tokenizer, monkeypatch):
    """The id of a removed document excludes nothing; the few queries are searched in ranges of rows."""
    made = make_store(tmp_path, [words(n, n + 1) for n in (9, 30, 2, 7)], tokenizer, name="queries")
    queries = remove_documents(made.path, ["d1"])
    small_tasks(monkeypatch, queries=100, pairs=200, tasks=8)
    assert len(join.cut(queries.num_chunks, store.num_chunks)[0][1]) == 8
    live = ~queries.is_removed(np.arange(queries.num_chunks))
    np.testing.assert_array_equal(build_neighbors(store, 2, queries).rows[live], oracle(store, 2, queries)[live])


def test_an_embedder_of_the_callers_own_stays_in_this_process(tmp_path, tokenizer, monkeypatch):
    class Own(HashingEmbedder):
        """Queries are embedded with another word before them."""

        def embed(self, texts, is_query=False):
            asked.append((os.getpid(), is_query))
            return super().embed([f"w{is_query:d} {text}" for text in texts])

    asked, embedder = [], Own()
    embedder.description |= {"query_prefix": "w1 ", "passage_prefix": "w0 "}
    store = make_store(tmp_path, [words(n, n) for n in range(3, 40, 5)], tokenizer, embedder)
    whole = build_neighbors(store, 2, embedder=embedder, exclude="none")
    kept = table_bytes(whole)
    assert (whole.distances > 1e-3).all() and (os.getpid(), True) in asked
    shutil.rmtree(whole.path)
    small_tasks(monkeypatch)
    assert table_bytes(build_neighbors(store, 2, embedder=embedder, exclude="none", workers=3)) == kept
    assert {process for process, _ in asked} == {os.getpid()}
    shutil.rmtree(whole.path)
    with pytest.raises(ValueError, match="an embedder of your own"):
        build_neighbors(store, 2, exclude="none", workers=1)


JOB = """
import sys
from retro.retrieval import Store, build_neighbors
from retro.retrieval.building import join
from retro.retrieval.building.sample import share_found
from tests.kills import die_at_call
join._TASK_QUERIES, join._TASK_PAIRS, join._TASKS = (16, 16), 512, 8
store = Store.open(sys.argv[1])
if len(sys.argv) > 4:
    die_at_call(int(sys.argv[4]), with_group=True)
build_neighbors(store, 4, workers=int(sys.argv[2]), executor=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_with_its_workers(tmp_path, tokenizer, monkeypatch):
    """kill -9 of the process and all its workers, a few times; then the bytes of an undisturbed run."""
    store = make_store(tmp_path, [words(5 + n % 50, n) for n in range(300)], tokenizer)
    whole = build_neighbors(store, 4)
    kept = table_bytes(whole)
    shutil.rmtree(whole.path)
    command, rng, kills = [sys.executable, "-c", JOB, str(store.path), "2", "local"], np.random.default_rng(0), 0
    small_tasks(monkeypatch, 16, 512, 8)
    calls = count_calls(lambda: build_neighbors(store, 4, workers=2))
    shutil.rmtree(store.path / "neighbors")
    while kills < 3:
        done = subprocess.run([*command, str(rng.integers(1, calls))], start_new_session=True)
        if done.returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert done.returncode == 0 and table_bytes(open_neighbors(store, k=4)) == kept
            shutil.rmtree(store.path / "neighbors")
    subprocess.run(command, check=True)
    assert table_bytes(open_neighbors(store, k=4)) == kept


def num_job_files(store):
    try:
        return len(list(store.path.glob("neighbors/*/job/*")))
    except FileNotFoundError:  # the job has just ended
        return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("index", ["exact", "tfidf"])
def test_twenty_kills_at_random_moments(tmp_path, tokenizer, monkeypatch, index):
    """kill -9 from just before the first file to just before the last, each run resumed from what the last one left."""
    small_tasks(monkeypatch)
    store = make_store(tmp_path, [words(5 + n % 30, n) for n in range(60)], tokenizer)
    kept = table_bytes(build_neighbors(store, 4, index=index, workers=1))
    shutil.rmtree(store.path / "neighbors")
    shutil.rmtree(store.path / "index", ignore_errors=True)
    work = lambda: build_neighbors(Store.open(store.path), 4, index=index, workers=1)  # noqa: E731
    calls = count_calls(work)
    shutil.rmtree(store.path / "neighbors")
    draw, kills, left = np.random.default_rng(0), 0, set()
    while kills < 20:
        if killed_at_call(int(draw.integers(1, calls)), work):
            kills += 1
            left.add(num_job_files(store))
        else:
            assert table_bytes(open_neighbors(store, k=4, index=index)) == kept
            shutil.rmtree(store.path / "neighbors")
    assert table_bytes(build_neighbors(store, 4, index=index, workers=1)) == kept
    assert len(left) > 5 and not list(store.path.glob("neighbors/*/job"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_bytes_of_processes(store, workers):
    whole = build_neighbors(store, 4)
    kept = table_bytes(whole)
    shutil.rmtree(whole.path)
    subprocess.run([sys.executable, "-c", JOB, str(store.path), str(workers), "local"], check=True)
    assert table_bytes(open_neighbors(store, k=4)) == kept


@pytest.mark.slow
def test_bytes_of_ranks(store):
    whole = build_neighbors(store, 4)
    kept = table_bytes(whole)
    shutil.rmtree(whole.path)
    command = [sys.executable, "-c", JOB, str(store.path), "3", "ranks"]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3"})
        for rank in (2, 0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert table_bytes(open_neighbors(store, k=4)) == kept


def test_what_a_killed_join_left_goes(store, tmp_path):
    copy = Store.open(shutil.copytree(store.path, tmp_path / "copy"))
    shutil.rmtree(copy.path / "neighbors", ignore_errors=True)
    build_neighbors(copy, 2)
    (record,) = copy.path.glob("neighbors/*/neighbors.json")
    left = record.parent / f"{TEMPORARY_PREFIX}{2**22 + 1}.{_machine()}-0-job"  # no process has this number
    left.mkdir()
    build_neighbors(copy, 2)
    assert not left.exists()
