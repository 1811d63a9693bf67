"""Building: accounting, equal bytes, refusals that leave nothing, taking up a killed build."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro.common.files import save_npy, write_lock
from retro.common.records import save_record
from retro.retrieval import BuildSettings, Store, build_store, remove_documents
from retro.retrieval.building import build as build_module
from retro.retrieval.building import shards, tasks
from retro.retrieval.building.build import plan_build
from retro.retrieval.embedding.embedder import NoEmbedder
from tests.stand_ins import HashingEmbedder, make_store, make_words_tokenizer, words, write_jsonl


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def settings(tmp_path):
    texts = [words(n, n) for n in (5, 9, 30, 2)]
    inputs = [write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])]
    return BuildSettings(
        str(tmp_path / "store"), inputs, "words", chunk_len=4, min_chunk_len=2, index="none", workers=1
    )


def build(settings, tokenizer, embedder=None, **changes):
    return build_store(replace(settings, **changes), embedder or HashingEmbedder(), tokenizer)


def test_objects_and_streams_of_datasets_give_the_store_of_their_file(settings, tokenizer, monkeypatch):
    """Partitions of a few records each, so that a stream is taken up where it was left."""
    import datasets

    monkeypatch.setattr("retro.retrieval.building.build.PARTITION_BYTES", 50)
    monkeypatch.setattr("retro.retrieval.building.shards.PART_BYTES", 100)
    records = [{"id": f"d{n}", "text": words(5 + n, n)} for n in range(9)]
    write_jsonl(Path(settings.inputs[0]), records)
    rows = datasets.Dataset.from_list(records)
    expected = build(settings, tokenizer)
    for number, given in enumerate((rows, [rows], rows.to_iterable_dataset(num_shards=3))):
        store = build(settings, tokenizer, inputs=given, store=f"{settings.store}-{number}", workers=2)
        assert store.document_ids == expected.document_ids
        np.testing.assert_array_equal(
            store.keys(np.arange(store.num_chunks)), expected.keys(np.arange(expected.num_chunks))
        )
    named = [rows.select(range(4)), rows.select(range(4, 9))]
    assert build(settings, tokenizer, inputs=named, store=f"{settings.store}-two").num_chunks == expected.num_chunks
    with pytest.raises(ValueError, match=r"has the splits train; give one of them, as in dataset\['train'\]"):
        build(settings, tokenizer, inputs=datasets.DatasetDict(train=rows), store=f"{settings.store}-none")


def test_every_record_is_counted(tmp_path, tokenizer):
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": words(50, 1)}])
    lines = [
        json.dumps({"text": words(20, 5)}),
        "",
        json.dumps({"text": "  "}),
        "nonsense",
        json.dumps({"title": "none"}),
        json.dumps({"text": words(50, 1) + " w99"}),
        json.dumps({"text": words(3, 6)}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    store = build_store(
        BuildSettings(
            str(tmp_path / "store"),
            [str(tmp_path / "in.jsonl")],
            "words",
            chunk_len=4,
            min_chunk_len=4,
            on_bad="reject",
            decontaminate=[held_out],
            index="none",
        ),
        HashingEmbedder(),
        tokenizer,
    )
    counts = store.manifest["counts"]
    assert [counts[n] for n in ("read", "kept", "empty", "filtered", "rejected")] == [7, 2, 2, 1, 2]
    assert (counts["documents"], counts["chunks"], counts["tokens"], counts["short_chunks"]) == (2, 7, 25, 1)
    rejected = [json.loads(line) for line in (store.path / "rejects/rejected.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"]) for r in rejected] == [("in.jsonl", 4), ("in.jsonl", 5)]
    (filtered,) = [json.loads(line) for line in (store.path / "rejects/filtered.jsonl").read_text().splitlines()]
    assert filtered["place"] == "in.jsonl:6" and filtered["jaccard"] >= 0.8
    assert (filtered["held_out_id"], counts["filtered_by"]) == ("held.jsonl:1", {"decontaminate": 1})
    assert store.searchable_rows.tolist() == [0, 1, 2, 3, 4, 6]  # 21 tokens: the sixth chunk has one


def test_same_inputs_same_bytes_wherever_they_are(tmp_path, settings, tokenizer):
    one = build(settings, tokenizer)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "in.jsonl").write_bytes(Path(settings.inputs[0]).read_bytes())
    two = build(settings, tokenizer, store=str(tmp_path / "two"), inputs=[str(moved / "in.jsonl")])
    assert files_of(one.path) == files_of(two.path) and one.fingerprint == two.fingerprint


@pytest.mark.parametrize("key_dtype", ["float32", "float16", "bfloat16"])
def test_key_types(settings, tokenizer, key_dtype):
    store = build(settings, tokenizer, key_dtype=key_dtype)
    rows = np.arange(store.num_chunks)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[key_dtype]
    np.testing.assert_allclose(store.keys(rows), HashingEmbedder().embed(store.text(rows)), atol=tolerance)
    stored = np.load(store.path / "shards/00000/keys.npy").dtype
    assert stored == ("uint16" if key_dtype == "bfloat16" else key_dtype)


def test_a_complete_store_is_opened_and_other_settings_are_refused(settings, tokenizer):
    before = files_of(build(settings, tokenizer).path)
    assert files_of(build(settings, tokenizer).path) == before
    with pytest.raises(ValueError, match="complete store built with other chunk_len"):
        build(settings, tokenizer, chunk_len=8)
    with pytest.raises(ValueError, match="other embedder"):
        build(settings, tokenizer, HashingEmbedder(prefix="query:"))
    write_jsonl(Path(settings.inputs[0]), [{"text": "w1 w2"}])
    with pytest.raises(ValueError, match="other inputs"):
        build(settings, tokenizer)
    assert files_of(settings.store) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_unfinished_store_of_other_settings_is_not_thrown_away(settings, tokenizer):
    settings = replace(settings, shard_chunks=4)
    assert killed_at(19, lambda: build(settings, tokenizer)) == 9
    before = files_of(settings.store)
    with pytest.raises(ValueError, match="an unfinished store built with other min_chunk_len"):
        build(settings, tokenizer, min_chunk_len=1)
    assert files_of(settings.store) == before


def between(monkeypatch, action):
    """Do something just before the next build has its lock, as another process may."""
    real, done = build_module.write_lock, []

    def late(folder):
        if not done:
            done.append(True)
            action()
        return real(folder)

    monkeypatch.setattr(build_module, "write_lock", late)


def test_a_store_that_another_process_has_just_built_is_kept(settings, tokenizer, monkeypatch):
    between(monkeypatch, lambda: remove_documents(build(settings, tokenizer).path, ["in.jsonl:2"]))
    store = build(settings, tokenizer)
    assert store.generation == 2 and store.find_documents(["in.jsonl:2"]) == {}


def test_another_store_that_another_process_has_just_built_is_kept(settings, tokenizer, monkeypatch):
    between(monkeypatch, lambda: build(settings, tokenizer, chunk_len=8))
    with pytest.raises(ValueError, match="complete store built with other chunk_len"):
        build(settings, tokenizer)
    assert Store.open(settings.store).chunk_len == 8


def test_work_in_progress_is_left_to_the_process_that_writes(settings, tokenizer):
    """A build that finds the store complete cleans up behind one that was killed, but only if nobody writes."""
    store = build(settings, tokenizer)
    left = store.path / "parts"
    left.mkdir()
    plan = plan_build(settings, tokenizer, HashingEmbedder())
    save_record(left / "job.json", {"identity": shards._identity(plan, None)})
    with write_lock(store.path):
        assert build(settings, tokenizer).fingerprint == store.fingerprint and left.exists()
    assert build(settings, tokenizer).fingerprint == store.fingerprint and not left.exists()
    (store.path / ".tmp-1.x-0-parts").mkdir()  # of one that was killed while it was deleting its work
    assert build(settings, tokenizer).fingerprint == store.fingerprint and not list(store.path.glob(".tmp-*"))
    shutil.copytree(settings.store, left)
    save_record(left / "job.json", {"identity": "of an addition"})
    build(settings, tokenizer)
    assert left.exists()


def test_a_kill_while_clearing_leaves_what_can_be_built_again(settings, tokenizer, monkeypatch):
    Path(settings.inputs[0]).write_text('{"text": "w1"}\n{oops\n')

    class Killed(BaseException):
        pass

    def killed(folder):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "delete", killed)
        with pytest.raises(Killed):
            build(settings, tokenizer)
    write_jsonl(Path(settings.inputs[0]), [{"text": "w1 w2"}])
    assert build(settings, tokenizer).num_documents == 1


def test_an_error_of_the_disk_keeps_what_was_built(settings, tokenizer, monkeypatch):
    settings = replace(settings, shard_chunks=4)
    assert killed_at(19, lambda: build(settings, tokenizer)) == 9
    before = files_of(settings.store)

    def broken(*args, **kwargs):
        raise OSError("input/output error")

    monkeypatch.setattr(tasks, "open_npy", broken)
    with pytest.raises(OSError, match="input/output"):
        build(settings, tokenizer)
    assert files_of(settings.store) == before


def test_progress_counts_the_bytes_read_and_the_chunks_embedded(settings, tokenizer, monkeypatch):
    bars = []

    class Bars(shards._ProgressBars):
        def __init__(self, shown, num_bytes, embeds):
            self.merged_parts, self.steps = [], []
            bars.append((num_bytes, self))

        def merged(self, num_bytes, num_chunks):
            self.merged_parts.append((num_bytes, num_chunks))

        def embedded(self, num_chunks, resumed):
            self.steps.append((num_chunks, resumed))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(shards, "_ProgressBars", Bars)
    write_jsonl(Path(settings.inputs[0]), [{"text": words(4 * 2600, 1)}])
    store = build(settings, tokenizer)
    ((num_bytes, bar),) = bars
    assert num_bytes == Path(settings.inputs[0]).stat().st_size and bar.merged_parts == [(num_bytes, 2601)]
    assert store.num_chunks == 2601 and bar.steps == [(1024, False), (1024, False), (553, False)]


@pytest.mark.parametrize("keys", [True, False])
def test_a_build_without_keys_shows_no_bar_of_embedding(settings, tokenizer, capsys, monkeypatch, keys):
    embedder = HashingEmbedder() if keys else NoEmbedder()
    build_store(replace(settings, store=f"{settings.store}-2"), embedder, tokenizer, progress=True)
    assert capsys.readouterr().err == "", "what is no terminal gets no control codes"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build_store(settings, embedder, tokenizer, progress=True)
    shown = capsys.readouterr().err
    assert "reading:" in shown and ("embedding:" in shown) == keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no document with text"),
        ("\n \n", "no document with text"),
        ('{"text": "w1"}\n{oops\n', r"in\.jsonl:2: the line is not JSON"),
        ('{"title": "w1"}\n', r"in\.jsonl:1: the record has no field 'text'"),
        (b'{"text": "w1"}\n{"text": "\xff"}\n', r"in\.jsonl:2: the line is invalid UTF-8"),
        (
            '{"text": "w1", "id": "a"}\n{"text": "w2", "id": "a"}',
            r"in\.jsonl:2: the document id 'a' is that of in\.jsonl:1 as well; ids must be unique",
        ),
    ],
)
def test_bad_inputs_leave_nothing(settings, tokenizer, content, message):
    Path(settings.inputs[0]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        build(settings, tokenizer)
    assert "\n" not in str(error.value)
    assert not Path(settings.store).exists()


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_ids_that_are_given_twice(settings, tokenizer, monkeypatch, part_bytes):
    """In one part of the inputs or in two: one whose text was read before is a copy, another one is rejected; an id is
    free as long as no document of it is kept."""
    monkeypatch.setattr("retro.retrieval.building.build.PARTITION_BYTES", part_bytes)
    monkeypatch.setattr("retro.retrieval.building.shards.PART_BYTES", part_bytes)
    given = [("a", "w1"), ("b", ""), ("b", "w2"), ("a", "w1"), ("a", "w3"), ("c", "w3"), ("a", "w4"), ("c", "w2")]
    write_jsonl(Path(settings.inputs[0]), [{"id": name, "text": text} for name, text in given])
    store = build(settings, tokenizer, on_bad="reject", deduplicate="exact", min_chunk_len=1)
    counts = store.manifest["counts"]
    assert store.document_ids == ["a", "b", "c"] and counts["filtered_by"] == {"deduplicate": 2}
    assert [counts[name] for name in ("read", "kept", "empty", "filtered", "rejected")] == [8, 3, 1, 2, 2]
    rejected = [json.loads(line) for line in (store.path / "rejects/rejected.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in rejected] == [("in.jsonl", 5), ("in.jsonl", 7)]
    assert "the document id 'a' is that of in.jsonl:1 as well" in rejected[0]["reason"]


@pytest.mark.parametrize(
    ("text", "lost"),
    [("w1 w2", False), ("w1\n\nw2", True), ("w1 \U0001f600", True), ("W1", True), ("w1 </s> w2", True)],
)
def test_a_tokenizer_that_loses_text_is_told_of(settings, tokenizer, caplog, text, lost):
    write_jsonl(Path(settings.inputs[0]), [{"text": words(3, n)} for n in range(40)] + [{"text": text}])
    counts = build(settings, tokenizer).manifest["counts"]
    is_tried = counts["unknown_tokens"] > 0  # beyond the first 32 documents
    said = [record.getMessage() for record in caplog.records if "does not give texts back" in record.getMessage()]
    assert len(said) == (lost and is_tried) and (not said or "in.jsonl:41" in said[0])
    write_jsonl(Path(settings.inputs[0]), [{"text": text}])
    caplog.clear()
    build(settings, tokenizer, store=f"{settings.store}-2")
    assert any("in 1 of 1 documents tried" in record.getMessage() for record in caplog.records) == lost


def test_folders_that_are_no_store_are_left_alone(settings, tokenizer, tmp_path):
    folder = Path(settings.store)
    folder.mkdir()
    (folder / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="no store and is not empty"):
        build(settings, tokenizer)
    assert files_of(folder).keys() == {"precious.txt"}
    with pytest.raises(ValueError, match="is a file, not a folder"):
        build(settings, tokenizer, store=settings.inputs[0])


def test_paths_that_cannot_be_written(settings, tokenizer, tmp_path):
    with pytest.raises(OSError):
        build(settings, tokenizer, store=settings.inputs[0] + "/store")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        with pytest.raises(OSError):
            build(settings, tokenizer, store=str(locked / "store"))


@pytest.mark.parametrize(
    ("value", "key_dtype"), [(np.nan, "float32"), (1e19, "float32"), (np.inf, "bfloat16"), (1e6, "float16")]
)
def test_keys_that_are_not_finite_are_refused(settings, tokenizer, value, key_dtype):
    class Broken(HashingEmbedder):
        def embed(self, texts, is_query=False):
            keys = super().embed(texts)
            keys[3, 2] = value
            return keys

    with pytest.raises(ValueError, match="row 3"):
        build(settings, tokenizer, Broken(), key_dtype=key_dtype)
    assert not Path(settings.store).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_len": 0},
        {"min_chunk_len": 9},
        {"key_dtype": "int8"},
        {"index": "best"},
        {"recall": 0.9, "index": "exact+tfidf"},
        {"recall": 0.9, "embedder": "none"},
        {"shard_chunks": 0},
        {"on_bad": "x"},
    ],
)
def test_settings_out_of_range(settings, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(settings, **changes)


def test_missing_tokenizer_and_embedder(settings, tokenizer):
    with pytest.raises(ValueError, match="the tokenizer no/where is no folder"):
        build_store(replace(settings, tokenizer="no/where"), HashingEmbedder())
    with pytest.raises(ValueError, match=r"the embedder no/where .*pip install retro-lm\[demo\]"):
        build_store(replace(settings, embedder="no/where"), tokenizer=tokenizer)
    assert not Path(settings.store).exists()


def test_one_document_longer_than_a_shard(tmp_path, tokenizer):
    store = make_store(tmp_path, [words(3, 1), words(50, 2), words(3, 3)], tokenizer, shard_chunks=5)
    assert [record["rows"] for record in store.manifest["shards"]] == [1, 13, 1]


def killed_at(rename, work):
    """Run `work` in a child process that dies, as by kill -9, at its n-th rename; its exit code."""
    child = os.fork()
    if child == 0:
        calls, real = [], os.replace

        def dying(*args):
            calls.append(args)
            if len(calls) == rename:
                os._exit(9)
            return real(*args)

        os.replace = dying
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rename", [*range(1, 8), 11, 17, 23])
def test_a_killed_build_is_taken_up_to_the_same_bytes(tmp_path, settings, tokenizer, rename):
    settings = replace(settings, shard_chunks=4)
    assert killed_at(rename, lambda: build(settings, tokenizer)) == 9
    with pytest.raises(ValueError, match="is not a datastore|build has not finished"):
        Store.open(settings.store)
    taken_up = build(settings, tokenizer)
    undisturbed = build(settings, tokenizer, store=str(tmp_path / "other"))
    assert files_of(taken_up.path) == files_of(undisturbed.path)


def test_a_block_that_is_embedded_is_not_embedded_again(settings, tokenizer):
    class Dying(HashingEmbedder):
        calls = 0

        def embed(self, texts, is_query=False):
            type(self).calls += 1
            if self.calls == 3:
                raise RuntimeError("out of memory")
            return super().embed(texts)

    settings = replace(settings, shard_chunks=4)
    with pytest.raises(RuntimeError):
        build(settings, tokenizer, Dying())
    store = build(settings, tokenizer, Dying())
    assert Dying.calls == 3 + len(store.manifest["shards"]) - 2


def test_another_embedder_on_one_machine_stops_the_build_and_keeps_the_work(tmp_path, settings, tokenizer, monkeypatch):
    """It is no fault of the inputs, for which all would be cleared away."""
    from tests.retrieval.tiny_encoders import make_encoder

    settings = replace(settings, embedder=make_encoder(tmp_path / "encoder"))
    tasks._load_embedder.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "embedder_at_hand", nullcontext)
        patched.setattr(tasks, "embedder_from", lambda *args, **kwargs: HashingEmbedder())
        with pytest.raises(OSError, match="is another one here .* give every machine the same files"):
            build_store(settings, tokenizer=tokenizer)
        tasks._load_embedder.cache_clear()
        patched.setattr(tasks, "embedder_from", lambda *args, **kwargs: int("no weights"))
        with pytest.raises(OSError, match="the embedder cannot be loaded here: .*no weights"):
            build_store(settings, tokenizer=tokenizer)
    assert list((Path(settings.store) / "parts").glob("tables-*.json"))
    assert build_store(settings, tokenizer=tokenizer).num_documents == 4


def test_more_blocks_of_keys_than_a_process_may_open(tmp_path):
    import resource

    folder = tmp_path / "parts"
    folder.mkdir()
    (tmp_path / "shards" / "00000").mkdir(parents=True)
    names = [f"keys-{number}" for number in range(90)]
    for number, name in enumerate(names):
        save_npy(folder / f"{name}.npy", np.full((2, 3), number, np.float32))
    spec = {"folder": str(folder), "shard": "00000", "blocks": names, "rows": 180, "truncated_chunks": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, hard))
    try:
        tasks.join_keys(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    joined = np.load(tmp_path / "shards" / "00000" / "keys.npy")
    assert joined[:, 0].tolist() == np.repeat(np.arange(90), 2).tolist()


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537])
def test_the_largest_id_of_a_vocabulary_survives(tmp_path, size):
    """An id that does not fit is refused, whatever the tokenizer says of its size."""
    tokenizer = make_words_tokenizer(size - 3)
    text = f"w{size - 4} w1"
    store = make_store(tmp_path, [text], tokenizer)
    assert store.token_lists(np.array([0]))[0].tolist() == [size - 1, 4, 1]
    assert store.shard_arrays(0).tokens.dtype == ("uint16" if size <= 1 << 16 else "uint32")

    class Small:
        """Says that it has fewer ids than it gives."""

        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return 65_536

        def __call__(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    if size > 1 << 16:
        with pytest.raises(ValueError, match=f"gave the id {size - 1} for .*, which does not fit uint16"):
            make_store(tmp_path, [text], Small(tokenizer), name="small")
        assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("group_rows", [1, 3, 4096])
def test_document_tables_in_groups(tmp_path, tokenizer, monkeypatch, group_rows):
    monkeypatch.setattr(tasks, "_GROUP_ROWS", group_rows)
    texts = [words(1 + n % 9, n) for n in range(11)]
    store = make_store(tmp_path, texts, tokenizer, shard_chunks=9)
    for n, text in enumerate(texts):
        record = store.document(n)
        assert (record.id, record.title, record.num_bytes) == (f"d{n}", f"title {n}", len(text))
        assert (record.first_row, record.num_chunks) == tuple(store.document_spans[n])


def test_the_command_line_filters_and_shares_the_work(tmp_path, tokenizer, capsys):
    from retro.cli import main

    records = [{"text": words(9, n % 3), "date": str(2010 + n), "score": n} for n in range(6)]
    inputs = write_jsonl(tmp_path / "in.jsonl", records)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ["build", str(tmp_path / "store"), inputs, "--tokenizer", str(tmp_path / "tokenizer"), "--embedder", "none"]
    given += [
        "--index",
        "none",
        "--chunk-len",
        "4",
        "--min-chunk-len",
        "1",
        "--deduplicate",
        "exact",
        "--max-date",
        "2014",
        "--workers",
        "1",
    ]
    assert main([*given, "--quality", "extra.score>=1"]) == 0
    said = capsys.readouterr().out
    assert "read 6 = kept 3 + empty 0 + filtered 3 + rejected 0" in said
    assert "1 left out by date" in said and "1 left out by deduplicate" in said
    assert main([*given, "--pooling", "mean"]) == 2
    assert "pooling is given, but embedder is none" in capsys.readouterr().err
    assert main([*given, "--executor", "ranks"]) == 2
    assert "the executor ranks needs SLURM_ARRAY_TASK_ID" in capsys.readouterr().err
