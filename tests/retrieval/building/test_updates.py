"""Documents added, removed and deleted from disk: against a dictionary, a fresh build, and killed on the way."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro.common.files import write_lock
from retro.common.records import load_record, save_record
from retro.retrieval import (
    Retriever,
    Store,
    add_documents,
    build_neighbors,
    compact,
    open_neighbors,
    remove_documents,
    verify_store,
)
from retro.retrieval.search.postings import buckets
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import open_searcher
from retro.training.windows import Windows
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl

TEXTS = {f"d{i}": words(5 + 7 * i % 23, seed=i) for i in range(8)}
NEW = {f"n{i}": words(4 + 5 * i % 19, seed=100 + i) for i in range(5)}
KINDS = ("exact", "scann", "faiss", "routed", "tfidf", "bm25")


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    return make_store(tmp_path_factory.mktemp("updates"), list(TEXTS.values()), tokenizer, shard_chunks=12)


@pytest.fixture
def path(built, tmp_path):
    return shutil.copytree(built.path, tmp_path / "store")


def add(path, documents, **given):
    records = [{"id": name, "text": text, "title": f"title of {name}"} for name, text in documents.items()]
    file = write_jsonl(path.parent / f"{hashlib.sha256(json.dumps(records).encode()).hexdigest()[:8]}.jsonl", records)
    return add_documents(path, [file], embedder=HashingEmbedder(), workers=1, **given)


def ids_of(store, text):
    return [*store.tokenizer(text)["input_ids"], store.tokenizer.eos_token_id]


def check_holds(store, texts):
    """What a store gives back is what a dictionary of texts says, in its order; removed rows give nothing."""
    assert [name for name in store.document_ids if name] == list(texts)
    assert store.find_documents(list(texts)) == {n: row for row, n in enumerate(store.document_ids) if n}
    live = np.zeros(store.num_chunks, bool)
    for name, text in texts.items():
        row = store.find_documents([name])[name]
        first, count = store.document_spans[row].tolist()
        rows = np.arange(first, first + count)
        live[rows] = True
        assert (store.document(row).id, store.document(row).first_row) == (name, first)
        assert np.concatenate(store.token_lists(rows)).tolist() == ids_of(store, text)
        np.testing.assert_allclose(store.keys(rows), HashingEmbedder().embed(store.text(rows)), atol=1e-6)
        values, mask = store.values(rows[:1], len(ids_of(store, text)) + 8)
        assert values[mask].tolist() == ids_of(store, text)
    rows = np.arange(store.num_chunks)
    gone = rows[~live]
    np.testing.assert_array_equal(store.is_removed(rows), ~live)
    assert store.searchable_rows.tolist() == rows[live].tolist() and store.num_searchable == live.sum()
    assert store.live_rows(np.arange(store.num_live_chunks)).tolist() == rows[live].tolist()
    assert (store.chunk_lens(gone) == 0).all() and (store.chunks(gone) == store.pad_token_id).all()
    assert not store.values(gone, 9)[1].any() and store.text(gone) == [""] * len(gone)
    counts = store.manifest["counts"]
    assert (counts["documents"], counts["chunks"]) == (len(texts), live.sum())
    assert counts["tokens"] == sum(len(ids_of(store, text)) for text in texts.values())
    assert counts["bytes"] == sum(len(text.encode()) for text in texts.values())
    assert counts["read"] == sum(counts[name] for name in ("kept", "empty", "filtered", "rejected"))
    assert counts["kept"] - counts.get("removed", 0) == len(texts)
    assert verify_store(store, "full")["chunks"] == live.sum()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 30), min_size=1, max_size=4)),
        st.tuples(st.just("compact"), st.just(set())),
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_sequence_of_updates_against_a_dictionary(built, tmp_path_factory, steps):
    path = shutil.copytree(built.path, tmp_path_factory.mktemp("any") / "store")
    texts, number, generations = dict(TEXTS), 0, {built.fingerprint}
    for verb, chosen in steps:
        if verb == "add":
            new = {f"s{number}-{i}": words(3 + 4 * i, seed=number + i) for i in chosen}
            store, number = add(path, new), number + 1
            texts |= new
        elif verb == "remove":
            names = [name for at, name in enumerate(texts) if at in chosen]
            if not names:
                continue
            store = remove_documents(path, names)
            texts = {name: text for name, text in texts.items() if name not in names}
        else:
            before = store.generation if generations != {built.fingerprint} else 1
            store = compact(path)
            assert store.num_chunks == store.num_live_chunks
            if store.generation == before:  # nothing to do
                continue
        check_holds(store, texts)
        assert store.fingerprint not in generations
        generations.add(store.fingerprint)


def test_removed_and_added_again(path):
    remove_documents(path, ["d3", "d0"])
    store = add(path, {"d3": "w1 w2 w3 w4 w5"})
    texts = {name: text for name, text in TEXTS.items() if name not in ("d0", "d3")} | {"d3": "w1 w2 w3 w4 w5"}
    check_holds(store, texts)
    with pytest.raises(ValueError, match="document row 0 was removed"):
        store.document(0)
    check_holds(remove_documents(path, ["d3"]), {name: text for name, text in texts.items() if name != "d3"})


def test_compact_is_a_fresh_build_of_what_is_left(path, tmp_path, tokenizer):
    """One shard of all: byte by byte the shard that a build of the remaining documents writes."""
    manifest = load_record(path / "manifest.json")
    manifest["settings"]["shard_chunks"] = 1000
    save_record(path / "manifest.json", manifest)
    add(path, NEW)
    remove_documents(path, ["d0", "d5", "n4"])
    store = compact(path)
    left = {name: text for name, text in (TEXTS | NEW).items() if name not in ("d0", "d5", "n4")}
    records = [
        {"id": name, "text": text, "title": f"title {name[1:]}", "source": "here"}
        if name in TEXTS
        else {"id": name, "text": text, "title": f"title of {name}"}
        for name, text in left.items()
    ]
    from retro.retrieval import BuildSettings, build_store

    given = {"chunk_len": 4, "min_chunk_len": 1, "index": "none"}
    inputs = [write_jsonl(tmp_path / "left.jsonl", records)]
    fresh = build_store(BuildSettings(str(tmp_path / "fresh"), inputs, "words", **given), HashingEmbedder(), tokenizer)
    assert len(store.shards) == 1 and store.shards[0]["name"] != "00000"
    for name in ("tokens.npy", "chunks.npy", "keys.npy"):
        one, other = store.path / "shards" / store.shards[0]["name"] / name, fresh.path / "shards/00000" / name
        assert one.read_bytes() == other.read_bytes()
    assert store.document_table(0).equals(fresh.document_table(0))
    assert not (store.path / "removed").exists() or not list((store.path / "removed").iterdir())


def test_compact_leaves_whole_shards_alone(path):
    before = Store.open(path)
    assert len(before.shards) > 3
    victim = before.document_ids[before.shards[1]["first_document"]]
    last = before.shards[-1]["name"]
    kept = (path / "shards" / last / "keys.npy").stat().st_mtime_ns
    store = compact(path) if remove_documents(path, [victim]) else None
    assert [r["name"] for r in store.shards][-1] == last and (
        path / "shards" / last / "keys.npy"
    ).stat().st_mtime_ns == kept
    assert sorted(folder.name for folder in (path / "shards").iterdir()) == sorted(r["name"] for r in store.shards)
    again = compact(path)
    assert (again.generation, again.fingerprint) == (store.generation, store.fingerprint)


def test_everything_removed(path, caplog):
    """Every kind of search then finds nothing, and a store of words is as whole as another."""
    for change in (lambda: remove_documents(path, list(TEXTS)), lambda: compact(path)):
        store = change()
        for kind in ("exact", "bm25", "exact+tfidf", "exact>bm25"):
            found = Retriever(store, kind, embedder=HashingEmbedder())(["w1 w2"], num_neighbors=2)
            assert found.ids.tolist() == [[-1, -1]] and not found.mask.any()
        verify_store(store, "full")
        with pytest.raises(ValueError, match="holds no document any more; add some"):
            Retriever(store, "tfidf>continuation", embedder=HashingEmbedder())
    assert "left out" not in caplog.text
    check_holds(store, {})
    assert store.shards == [] and store.key_block(0, 0).shape == (0, 16)
    check_holds(add(path, NEW), NEW)


def test_a_damaged_index_does_not_stop_an_update(path, caplog):
    """It is left out, and `compact` deletes it."""
    open_searcher(Store.open(path), "tfidf", build=True)
    (record,) = [file for file in path.glob("index/*/index.json") if json.loads(file.read_text()).get("shards")]
    record.write_text("{")
    assert remove_documents(path, ["d1"]).generation == 2
    assert add(path, NEW).generation == 3 and "is left out" in caplog.text
    assert compact(path).generation == 4 and not record.exists()


# What is removed is not found, and not there


def secret_store(path):
    """Two documents of words that no other has, d0 in the first shard and one that is added."""
    return add(path, {"secret": "w80 w81 w82 w83 w84 w85 w86 w87 w88 w89 w90"})


@pytest.mark.parametrize("kind", KINDS)
def test_removed_text_is_never_returned(path, kind):
    pytest.importorskip({"scann": "scann", "faiss": "faiss", "routed": "faiss", "bm25": "bm25s"}.get(kind, "numpy"))
    store = secret_store(path)
    asked = ["w80 w81 w82 w83", "w88 w89 w90", TEXTS["d2"]]
    open_searcher(store, kind, HashingEmbedder(), build=True)
    found = Retriever(store, kind, HashingEmbedder())(asked, 6)
    assert "secret" in {source.document_id for line in found.sources for source in line if source}
    for step in (lambda: remove_documents(path, ["secret", "d2"]), lambda: compact(path)):
        store = step()
        open_searcher(store, kind, HashingEmbedder(), build=True)
        retriever = Retriever(store, kind, HashingEmbedder())
        k = store.num_searchable
        found = retriever(asked, k)
        names = {source.document_id for line in found.sources for source in line if source}
        assert names.isdisjoint({"secret", "d2"}) and names
        if kind in ("exact", "scann", "faiss", "routed"):
            assert found.ids.shape == (3, k) and (np.sort(found.ids) == store.searchable_rows).all()


def test_removed_text_is_in_no_file_after_compact(path):
    store = secret_store(path)
    for kind in ("tfidf", "bm25", "scann"):
        open_searcher(store, kind, HashingEmbedder(), build=True)
    build_neighbors(store, 2)
    row = store.find_documents(["secret"])["secret"]
    rows = np.arange(*store.document_spans[row].cumsum())
    stored = np.concatenate(store.token_lists(rows)).astype(store.shard_arrays(0).tokens.dtype)
    traces = [stored[at : at + 4].tobytes() for at in (0, 4, 8)] + [key.tobytes() for key in store.keys(rows)]
    traces += [b'"w80"', b"w80 w81"]

    def files():
        return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "tokenizer" not in file.parts}

    remove_documents(path, ["secret"])
    assert all(any(trace in content for content in files().values()) for trace in traces[:-1])
    store = compact(path)
    assert not [(file, trace) for file, content in files().items() for trace in traces if trace in content]
    names = [store.document_table(number, ["id", "title"]).to_pylist() for number in range(len(store.shards))]
    assert "secret" not in json.dumps(names) and "d7" in json.dumps(names)


def test_removed_text_is_gone_though_an_index_cannot_be_built(path, monkeypatch):
    from retro.retrieval.building import generations as generations_module

    store = secret_store(path)
    open_searcher(store, "tfidf", build=True)
    remove_documents(path, ["secret"])
    old = [path / "shards" / record["name"] for record in store.shards if record["generation"] == 2]
    assert old and all(folder.exists() for folder in old)

    def broken(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(generations_module, "build_lexical", broken)
    with pytest.raises(OSError, match="no space left"):
        compact(path)
    assert not any(folder.exists() for folder in old) and Store.open(path).generation == 4


def old_reader(path):
    """A store opened before a document was removed, and what gives that document away wherever it lies."""
    old = secret_store(path)
    row = old.find_documents(["secret"])["secret"]
    rows = np.arange(*old.document_spans[row].cumsum())
    full = [ids for ids in old.token_lists(rows) if len(ids) == old.chunk_len]
    traces = [key.tobytes() for key in old.keys(rows)] + [b'"w80"']
    traces += [ids.astype(old.shard_arrays(0).tokens.dtype).tobytes() for ids in full]
    traces += [pair.tobytes() for ids in full for pair in buckets(ids).astype(np.int32)[-3:]]
    assert {file.parent.parent.name for file, _ in given_away(path, traces)} == {"shards"}
    remove_documents(path, ["secret"])
    return old, traces


def given_away(path, traces):
    files = [file for file in path.rglob("*") if file.is_file() and "tokenizer" not in file.parts]
    return [(file, trace) for file in files for trace in traces if trace in file.read_bytes()]


def needs(kind):
    pytest.importorskip({"scann": "scann", "faiss": "faiss", "routed": "faiss", "bm25": "bm25s"}.get(kind, "numpy"))


@pytest.mark.parametrize("kind", [*KINDS[1:], "neighbors"])
def test_a_reader_of_an_older_generation_writes_nothing_back(path, kind):
    needs(kind)
    old, traces = old_reader(path)
    store, before = compact(path), contents(path)

    def build(store):
        return build_neighbors(store, 2) if kind == "neighbors" else open_searcher(store, kind, build=True)

    with pytest.raises(ValueError, match="was compacted or built again since it was opened.*open it again"):
        build(old)
    assert contents(path) == before and not given_away(path, traces)
    build(store)
    assert contents(path) != before and not given_away(path, traces)


@pytest.mark.parametrize("kind", ["tfidf", "faiss"])
@pytest.mark.parametrize("moment", ["mkdir", "replace", "rename"])
def test_compact_while_an_older_generation_is_indexed(path, kind, moment, monkeypatch):
    """It comes before the index is begun, between its files, and before it gets its name."""
    needs(kind)
    old, traces = old_reader(path)
    real, calls, left = getattr(os, moment), [], []

    def compacting(source, *args, **kwargs):
        if "/index/.tmp-" in str(source) and not calls:
            calls.append(source)
            compact(path)
            left.extend(given_away(path, traces))
        return real(source, *args, **kwargs)

    monkeypatch.setattr(os, moment, compacting)
    with pytest.raises(ValueError, match="was compacted or built again since it was opened.*open it again"):
        open_searcher(old, kind, build=True)
    assert calls and not left and not given_away(path, traces) and not list(path.glob("index/*"))
    assert open_searcher(Store.open(path), kind, build=True).num_rows and not given_away(path, traces)


def test_compact_between_the_last_look_and_the_name_of_an_index(path, monkeypatch):
    old, traces = old_reader(path)
    real, calls = os.rename, []

    def compacting(source, target, **kwargs):
        if Path(target).parent.name == "index" and not calls:
            calls.append(shutil.copytree(source, path.parent / "copy"))
            assert given_away(calls[0], traces)
            compact(path)
            shutil.copytree(path.parent / "copy", source)
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", compacting)
    with pytest.raises(ValueError, match="was compacted or built again"):
        open_searcher(old, "tfidf")
    assert calls and not given_away(path, traces) and not list(path.glob("index/*"))


def test_compact_after_a_table_of_an_older_generation_was_written(path, monkeypatch):
    from retro.retrieval.building import neighbors

    store, run = Store.open(path), neighbors.run_join
    remove_documents(path, ["d0"])
    store = Store.open(path)
    monkeypatch.setattr(neighbors, "run_join", lambda *args: (run(*args), compact(path)))
    with pytest.raises(ValueError, match="was compacted or built again"):
        build_neighbors(store, 2)
    assert not list(path.glob("neighbors/*"))


def test_what_is_still_there_may_be_indexed_by_an_older_generation(path):
    old, asked = Store.open(path), Queries(Store.open(path).tokenizer, texts=["w1 w2 w3"])
    add(path, NEW)
    remove_documents(path, [old.document_ids[old.shards[1]["first_document"]]])
    assert open_searcher(old, "tfidf").search(asked, 3)[2].all()
    compact(path)
    last = len(old.shards) - 2  # the last one is merged with what was added
    old.check_on_disk([0, last])
    with pytest.raises(ValueError, match="was compacted"):
        old.check_on_disk([0, 1])


def test_an_id_that_is_not_there_is_named_and_nothing_is_written(path):
    before = contents(path)
    with pytest.raises(ValueError, match="holds no document with the id 'nobody' .nor 1 others"):
        remove_documents(path, ["d1", "nobody", "noone"])
    assert contents(path) == before
    assert remove_documents(path, ["d1"]).generation == 2
    assert remove_documents(path, ["d1"]).generation == 2  # as after a kill: it is removed already
    with pytest.raises(ValueError, match="the id 'nobody'"):
        remove_documents(path, ["d1", "nobody"])


def test_an_id_that_is_there_is_not_added_again(path):
    before = contents(path)
    with pytest.raises(ValueError, match="'d1'"):
        add(path, {"x": "w1 w2", "d1": "w3 w4"})
    assert contents(path) == before


def test_another_embedder_is_refused(path):
    file = write_jsonl(path.parent / "x.jsonl", [{"text": "w1"}])
    with pytest.raises(ValueError, match="come from the embedder hashing"):
        add_documents(path, [file], embedder=HashingEmbedder(name="other"))
    with pytest.raises(ValueError, match="chunk_len"):
        add_documents(path, [file], embedder=HashingEmbedder(), chunk_len=8)


def test_ranks_do_not_add(path):
    before = contents(path)
    with pytest.raises(ValueError, match="the executor ranks builds whole stores only; add with local or ray"):
        add(path, NEW, executor="ranks")
    assert contents(path) == before


def test_the_same_addition_twice_is_one(path):
    assert add(path, NEW).fingerprint == add(path, NEW).fingerprint


def test_an_id_that_the_store_holds_is_left_out_where_that_is_asked_for(path):
    with pytest.raises(ValueError, match="the document id 'd1' is in the store already; remove that document first"):
        add(path, {"d1": "w1 w2"})
    store = add(path, {"d1": "w1 w2", "fresh": "w3 w4"}, on_bad="reject")
    counts = store.manifest["updates"][-1]["counts"]
    assert (counts["kept"], counts["rejected"]) == (1, 1) and store.document_ids.count("d1") == 1


def test_held_out_documents_are_asked_for_again(tmp_path, tokenizer):
    """A store built without near-copies of a test set does not take them in by an addition that forgets it."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"id": "h", "text": words(30, seed=5)}])
    store = make_store(tmp_path, list(TEXTS.values()), tokenizer, decontaminate=[held_out])
    leak = {"leak": words(30, seed=5), "other": words(30, seed=6)}
    with pytest.raises(ValueError, match="decontaminate"):
        add(store.path, leak)
    found = add(store.path, leak, decontaminate=[held_out])
    assert "leak" not in found.document_ids and "other" in found.document_ids
    assert found.manifest["counts"]["filtered"] == 1
    assert "leak" in add(store.path, {"leak": words(30, seed=5)}, decontaminate=[]).document_ids


# Copies of what is there


@pytest.fixture(params=["exact", "minhash"])
def deduplicated(request, tmp_path, tokenizer):
    given = {"deduplicate": request.param} | ({"deduplicate_ngram": 3} if request.param == "minhash" else {})
    texts = [words(40, seed=i) for i in range(4)]
    return make_store(tmp_path, texts, tokenizer, shard_chunks=12, **given).path


def test_copies_of_what_the_store_holds_are_left_out(deduplicated, caplog):
    """Also after `compact`, which keeps the signatures, and no longer once the first of them is removed."""
    copies = {"copy1": words(40, seed=1), "copy2": words(40, seed=2), "new": words(40, seed=9)}
    store = add(deduplicated, copies)
    assert store.find_documents(copies) == {"new": 4} and not caplog.records
    left_out = (store.path / "rejects" / "00002" / "filtered.jsonl").read_text().splitlines()
    assert [(r["document_id"], r["kept_id"]) for r in map(json.loads, left_out)] == [("copy1", "d1"), ("copy2", "d2")]
    assert store.manifest["updates"][-1]["counts"]["filtered_by"] == {"deduplicate": 2}
    remove_documents(deduplicated, ["d1", "d0"])
    compact(deduplicated)
    store = add(deduplicated, {"again": words(40, seed=1), "copy3": words(40, seed=3), "copy9": words(40, seed=9)})
    assert list(store.find_documents(["again", "copy3", "copy9"])) == ["again"]
    assert verify_store(store, "full")["documents"] == 4


def test_documents_that_cannot_be_compared_are_counted_in_the_log(path, caplog):
    copy = {"copy": TEXTS["d3"], "other": words(20, seed=77)}
    store = add(path, copy, deduplicate="exact")
    assert store.find_documents(copy) == {"copy": 8, "other": 9}
    assert "8 of the 8 documents of" in caplog.text and "not compared" in caplog.text
    caplog.clear()
    store = add(path, {"another": words(20, seed=77), "fresh": words(20, seed=78)}, deduplicate="exact")
    assert store.find_documents(["another", "fresh"]) == {"fresh": 10} and "8 of the 10 documents" in caplog.text
    manifest = load_record(path / "manifest.json")
    manifest["settings"]["shard_chunks"] = 1000
    save_record(path / "manifest.json", manifest)
    remove_documents(path, ["d0"])
    store = compact(path)  # shards with signatures and without become one
    assert len(store.shards) == 1 and store.document_table(0).column("signature_exact").null_count == 7
    assert add(path, {"x": words(20, seed=78), "y": "w1"}, deduplicate="exact").find_documents(["x", "y"]) == {"y": 10}


def test_another_comparison_than_the_stores_own(tmp_path, tokenizer):
    """What the store's own comparison was told goes with it."""
    given = {"deduplicate": "minhash", "deduplicate_at": 0.9}
    path = make_store(tmp_path, list(TEXTS.values()), tokenizer, **given).path
    add(path, {"a": words(30, seed=50)}, deduplicate="exact")
    add(path, {"b": words(30, seed=51)}, deduplicate="minhash")
    said = [update["settings"] for update in Store.open(path).manifest["updates"]]
    assert said == [{"deduplicate": "exact", "deduplicate_at": None}, {}]


def test_a_removal_between_a_killed_addition_and_its_repetition(deduplicated):
    """The copy of a document that was removed meanwhile is no copy any more, whatever was done before the kill."""
    new = {"copy": words(40, seed=1), "new": words(40, seed=9), "newer": words(40, seed=10)}
    for step in range(8, 60):
        killed_at(step, lambda step=step: add(deduplicated, new))
        if list((deduplicated / "parts").glob("tables-*.json")):
            break
    assert step < 59
    remove_documents(deduplicated, ["d1"])
    assert set(add(deduplicated, new).find_documents(new)) == set(new)


# Killed


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")  # what changes a folder, or makes a change last


def killed_at(step, action):
    """Run `action` in a process that is killed (SIGKILL) before its file operation number `step`."""
    child = os.fork()
    if child == 0:
        in_child(action, lambda number: number == step and os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def number_of_steps(action):
    """File operations of an update, counted in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        in_child(action, lambda number: os.write(writing, b"."))
    os.close(writing)
    with os.fdopen(reading, "rb") as dots:
        count = len(dots.read())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return count


def in_child(action, on_call):
    """Run `action`, with `on_call(number)` before each of its file operations, and end this process."""
    numbers = itertools.count()

    def counted(call):
        def run(*args, **kwargs):
            on_call(next(numbers))
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def contents(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def prepare(path):
    """A store with every kind of leftover that an update may meet: removed documents and an index of words."""
    add(path, {"a": words(9, 1), "b": words(13, 2)})
    remove_documents(path, ["d1", "a"])
    open_searcher(Store.open(path), "tfidf", build=True)
    return path


UPDATES = {
    "add": lambda path: add(path, NEW),
    "remove": lambda path: remove_documents(path, ["d4", "b"]),
    "compact": lambda path: compact(path),
}


@pytest.mark.parametrize("update", UPDATES)
def test_killed_at_any_moment(built, tmp_path, update):
    """The old generation or the new one is whole, and the same command, run again, gives the same bytes."""
    source, action = prepare(shutil.copytree(built.path, tmp_path / "source")), UPDATES[update]
    old = Store.open(source)
    undisturbed = shutil.copytree(source, tmp_path / "undisturbed" / "store")
    new, expected = action(undisturbed), contents(undisturbed)
    counted = shutil.copytree(source, tmp_path / "count" / "store")
    total = number_of_steps(lambda: action(counted))
    assert contents(counted) == expected and total > 5
    seen = set()
    drawn = np.random.default_rng(0).choice(total - 1, 8, replace=False).tolist()
    for step in [*sorted(drawn), total - 1]:
        path = shutil.copytree(source, tmp_path / f"step{step}" / "store")
        killed_at(step, lambda path=path: action(path))
        found = Store.open(path)
        seen.add(found.fingerprint)
        assert found.fingerprint in (old.fingerprint, new.fingerprint)
        assert (
            verify_store(found, "quick")["chunks"]
            == (old if found.generation == old.generation else new).num_live_chunks
        )
        assert action(path).fingerprint == new.fingerprint
        assert contents(path) == expected
    assert seen == {old.fingerprint, new.fingerprint}


# Writers and readers


def test_two_writers_are_kept_apart(path):
    with write_lock(path), pytest.raises(ValueError, match="is being written by another process"):
        remove_documents(path, ["d1"])
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with write_lock(path):
            os.write(tell, b"x")
            signal.pause()
        os._exit(1)
    os.read(ready, 1)
    for update in UPDATES.values():
        with pytest.raises(ValueError, match="is being written by another process"):
            update(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert remove_documents(path, ["d1"]).generation == 2


def everything(store):
    """A hash of all that a reader can see."""
    rows, digest = np.arange(store.num_chunks), hashlib.sha256()
    for part in (*store.values(rows, 12), store.keys(rows), store.document_rows(rows), store.searchable_rows):
        digest.update(np.ascontiguousarray(part).tobytes())
    digest.update(json.dumps([store.document_ids, [store.document(row).title for row in range(8)]]).encode())
    return digest.hexdigest()


def test_open_stores_are_undisturbed(path):
    """In this process and in another: opened before, read for the first time after add, remove and compact."""
    expected = everything(Store.open(path))
    mine, (ready, tell), (answer, say) = Store.open(path), os.pipe(), os.pipe()
    searcher, asked = open_searcher(mine, "tfidf"), Queries(mine.tokenizer, texts=["w1 w2 w3"])
    hits = searcher.search(asked, 3)
    child = os.fork()
    if child == 0:
        theirs = Store.open(path)
        os.write(say, b"open")
        os.read(ready, 1)
        os.write(say, everything(theirs).encode())
        os._exit(0)
    assert os.read(answer, 4) == b"open"
    add(path, NEW)
    remove_documents(path, ["d1", "d5"])
    store = compact(path)
    os.write(tell, b"x")
    assert os.read(answer, 64).decode() == expected
    os.waitpid(child, 0)
    assert everything(mine) == expected and everything(store) != expected
    for one, other in zip(searcher.search(asked, 3), hits, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_reader_that_opens_while_the_store_is_compacted(path, monkeypatch):
    """The manifest it has read names files that are gone: it reads the next one."""
    from retro.retrieval.store import store as module

    remove_documents(path, ["d1"])
    read, times = module.read_manifest, []

    def slow(where):
        manifest = read(where)
        times.append(manifest["generation"])
        if len(times) == 1:
            monkeypatch.setattr(module, "read_manifest", read)
            compact(path)
            monkeypatch.setattr(module, "read_manifest", slow)
        return manifest

    monkeypatch.setattr(module, "read_manifest", slow)
    assert Store.open(path).generation == 3 and times[0] == 2


# What depends on a generation


def test_training_windows_skip_removed_documents(path):
    store = remove_documents(path, ["d0", "d3", "d7"])
    windows = Windows(store, window_len=8)
    batch = windows.batch(np.arange(len(windows)))
    left = [name for name in TEXTS if name not in ("d0", "d3", "d7")]
    documents, ids = batch["document_ids"].reshape(-1).numpy(), batch["input_ids"].reshape(-1).numpy()
    padded = [ids_of(store, TEXTS[name]) for name in left]
    expected = np.concatenate([np.pad(x, (0, -len(x) % 4), constant_values=store.pad_token_id) for x in padded])
    assert ids[documents >= 0].tolist() == expected.tolist()
    assert {store.document(row).id for row in set(documents.tolist()) - {-1}} == set(left)
    fresh = Windows(compact(path), window_len=8)
    again = fresh.batch(np.arange(len(fresh)))
    for name in ("input_ids", "labels"):
        np.testing.assert_array_equal(again[name], batch[name])


def test_neighbor_tables_are_of_one_generation(path):
    store = Store.open(path)
    build_neighbors(store, 2)
    store = remove_documents(path, ["d0"])
    with pytest.raises(ValueError, match="no neighbor table.*write one with `retro neighbors"):
        open_neighbors(store, k=2)
    table = build_neighbors(store, 2)
    found = table.rows[store.searchable_rows]
    assert not store.is_removed(found[found >= 0]).any()
    assert (table.rows[store.is_removed(np.arange(store.num_chunks))] == -1).all()


# The commands


@pytest.fixture
def keyless(tmp_path, tokenizer):
    """A store that needs no embedder, so that the commands can add to it."""
    from retro.retrieval.embedding.embedder import NoEmbedder

    return make_store(tmp_path, list(TEXTS.values()), tokenizer, NoEmbedder(), index="tfidf").path


def test_the_commands(keyless, tmp_path, capsys):
    from retro.cli import main

    new = write_jsonl(tmp_path / "new.jsonl", [{"id": name, "text": text} for name, text in NEW.items()])
    for _ in range(2):  # the same addition, given again, says the same
        assert main(["add", str(keyless), new, "--json", str(tmp_path / "add.json")]) == 0
        assert "read 5 = kept 5 + empty 0 + filtered 0 + rejected 0" in capsys.readouterr().out
        said = json.loads((tmp_path / "add.json").read_text())
        assert said["documents"] == len(TEXTS) + len(NEW) and said["added"]["kept"] == len(NEW)
    (tmp_path / "ids").write_text("d1\n\nn2\n")
    assert main(["remove", str(keyless), "d0"]) == 0
    assert "12 documents" in (said := capsys.readouterr().out) and ", 1 removed document still on disk\n" in said
    assert main(["remove", str(keyless), "--ids", str(tmp_path / "ids")]) == 0
    assert "10 documents" in (said := capsys.readouterr().out) and ", 3 removed documents still on disk\n" in said
    assert main(["compact", str(keyless), "--json", str(tmp_path / "compact.json")]) == 0
    assert json.loads((tmp_path / "compact.json").read_text())["removed_documents"] == 0
    assert main(["verify", str(keyless), "--full"]) == 0
    assert open_searcher(Store.open(keyless), "tfidf").num_rows == Store.open(keyless).num_searchable
    assert main(["remove", str(keyless), "nobody"]) == 2
    assert main(["remove", str(keyless)]) == 2
    assert main(["compact", str(tmp_path)]) == 2
    assert "nobody" in (said := capsys.readouterr().err) and "no id was given" in said and "is not a datastore" in said


# Facts that changed


COUNTRIES = ("Verland", "Ostmark Isles", "Kaledia", "Norravia")
LEADERS = {
    2015: ("Ada Brenn", "Tomas Ilk", "Sela Moor", "Jon Dask"),
    2026: ("Mira Voss", "Pia Renn", "Olu Hart", "Edo Lind"),
}
POPULATIONS = {
    2015: ("3,412,000", "118,400", "27,950,000", "9,010,000"),
    2026: ("3,871,000", "131,900", "31,240,000", "8,655,000"),
}


def page(number, year):
    name = COUNTRIES[number]
    return (
        f"{name}: people and society. The population of {name} was {POPULATIONS[year][number]} ({year} est.).\n"
        f"{name}: government. The head of government of {name} is Prime Minister {LEADERS[year][number]} ({year}).\n"
    )


def test_facts_that_changed(tmp_path):
    """The same questions find the new text once one year's pages are replaced, before and after `compact`."""
    from tests.text.test_chunks import byte_level

    def edition(year):
        pages = [{"id": f"{year}/{name}", "text": page(number, year)} for number, name in enumerate(COUNTRIES)]
        return write_jsonl(tmp_path / f"{year}.jsonl", pages)

    from retro.retrieval import BuildSettings, build_store, load_embedder

    embedder = load_embedder("minilm")
    given = {"chunk_len": 48, "index": "auto"}
    build_store(BuildSettings(str(tmp_path / "store"), [edition(2015)], "t", **given), embedder, byte_level())
    questions = [f"What is the population of {name}?" for name in COUNTRIES]
    questions += [f"Who is the head of government of {name}?" for name in COUNTRIES]

    def share_found(year):
        store, facts = Store.open(tmp_path / "store"), [*POPULATIONS[year], *LEADERS[year]]
        shares = {}
        for kind in ("exact", "tfidf", "bm25"):
            retriever = Retriever(store, kind, embedder)
            shown = [retriever.show(question, 1)[0] for question in questions]
            shares[kind] = np.mean(
                [f in hit["neighbor"] + hit["continuation"] for f, hit in zip(facts, shown, strict=True)]
            )
            assert {hit["document_id"].partition("/")[0] for hit in shown} == {str(year)}
        return shares

    assert share_found(2015)["exact"] >= 0.5
    add_documents(tmp_path / "store", [edition(2026)], embedder=embedder)
    remove_documents(tmp_path / "store", [f"2015/{name}" for name in COUNTRIES])
    before = share_found(2026)
    compact(tmp_path / "store")
    assert share_found(2026) == before and min(before.values()) >= 0.5
