"""The same bytes, whoever builds: many workers, other splits of the inputs, ranks, Ray, and builds that are killed."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retro.retrieval import BuildSettings, Store, build_store
from retro.retrieval.building import build as build_module
from retro.retrieval.building import job, shards
from retro.retrieval.building.build import plan_build, write_shards
from retro.text.corpus import expand_inputs, read_input
from retro.text.documents import InputPartition
from retro.text.formats import read_partition, split_input
from tests.kills import count_calls, killed_at_call
from tests.retrieval.tiny_encoders import make_encoder
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl
from tests.waiting import FOREVER

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
slow = pytest.mark.slow


def files_of(folder):
    """Checksums of a store's files but the lock of its writers."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_inputs(folder, documents=40):
    """Three inputs of two kinds, with copies, blank lines and records that are no document."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": words(1 + 7 * n % 53, n), "title": f"é{n}"}) for n in range(documents)]
    lines[5], lines[9], lines[20] = "", "{nonsense", lines[3]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:12]).encode(), mtime=0))
    for n in range(4):
        (folder / f"c{n}.txt").write_text(words(30 + n, 100 + n))
    return str(folder)


def settings_for(tmp_path, name="store", **changes):
    given = dict(chunk_len=4, min_chunk_len=2, index="none", on_bad="reject", shard_chunks=60, workers=1)
    given |= {"deduplicate": "exact", **changes}
    return BuildSettings(str(tmp_path / name), [write_inputs(tmp_path / "in")], "words", **given)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of a few documents and blocks of a few chunks, all worth a process."""
    split_into(monkeypatch, 900, 1100)
    monkeypatch.setattr(shards, "KEY_ROWS", 16)
    monkeypatch.setattr(job, "LIGHT_BYTES", 0)
    monkeypatch.setattr(job, "_LIGHT_ROWS", 0)


def split_into(patched, partition_bytes, part_bytes):
    patched.setattr(build_module, "PARTITION_BYTES", partition_bytes)
    patched.setattr(shards, "PART_BYTES", part_bytes)


def build(settings, tokenizer, embedder=None):
    return build_store(settings, embedder or HashingEmbedder(), tokenizer)


# Workers and splits


def test_one_worker_and_three_give_the_same_bytes(tmp_path, tokenizer, small_parts):
    encoder = make_encoder(tmp_path / "encoder")
    one, three = (
        build_store(settings_for(tmp_path, f"{count}", embedder=encoder, workers=count), tokenizer=tokenizer)
        for count in (1, 3)
    )
    assert files_of(one.path) == files_of(three.path)
    counts = one.manifest["counts"]
    assert [counts[name] for name in ("read", "kept", "empty", "filtered", "rejected")] == [56, 41, 2, 11, 2]
    assert counts["filtered_by"] == {"deduplicate": 11} and len(one.manifest["shards"]) > 3


@pytest.mark.parametrize(("partition_bytes", "part_bytes"), [(1, 1), (300, 100), (700, 2000), (1 << 20, 1 << 20)])
def test_inputs_split_otherwise_give_the_same_bytes(tmp_path, tokenizer, monkeypatch, partition_bytes, part_bytes):
    whole = build(settings_for(tmp_path), tokenizer)
    split_into(monkeypatch, partition_bytes, part_bytes)
    assert files_of(build(settings_for(tmp_path, "split"), tokenizer).path) == files_of(whole.path)
    filtered = [json.loads(line) for line in (whole.path / "rejects/filtered.jsonl").read_text().splitlines()]
    assert filtered[0]["place"] == "a.jsonl:21" and [record["place"] for record in filtered][1:3] == [
        "b.jsonl.gz:1",
        "b.jsonl.gz:2",
    ]


LINES = st.one_of(
    st.sampled_from([b"", b"  ", b"{", b'{"text": ""}', b'{"title": "no text"}', b'{"text": "\xff"}', b"[1]"]),
    st.integers(0, 40).map(lambda count: json.dumps({"text": words(count, count)}).encode()),
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=30).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
    ),
)


@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    final=st.booleans(),
    partition_bytes=st.integers(1, 200),
    part_bytes=st.integers(1, 400),
    reverse=st.booleans(),
)
def test_every_line_is_in_one_place(
    tmp_path_factory, tokenizer, lines, end, bom, final, partition_bytes, part_bytes, reverse
):
    folder = tmp_path_factory.mktemp("lines")
    raw = (b"\xef\xbb\xbf" if bom else b"") + end.join(lines) + (end if final else b"")
    (folder / "x.jsonl").write_bytes(raw)
    (folder / "y.jsonl").write_bytes(b'{"text": "w1 w2 w3 w4 w5"}')
    inputs = [str(folder / "x.jsonl"), str(folder / "y.jsonl")]
    settings = BuildSettings(
        str(folder / "one"), inputs, "words", chunk_len=4, min_chunk_len=1, shard_chunks=9, index="none", workers=1
    )
    settings.on_bad = "reject"
    whole = build(settings, tokenizer)
    with pytest.MonkeyPatch.context() as patched:
        split_into(patched, partition_bytes, part_bytes)
        if reverse:
            patched.setattr(build_module, "open_executor", lambda *given: Backwards())
        split = build(replace(settings, store=str(folder / "two")), tokenizer)
    assert files_of(split.path) == files_of(whole.path)
    counts = whole.manifest["counts"]
    assert counts["read"] == raw.count(b"\n") + (not raw.endswith(b"\n") and raw != b"") + 1
    assert counts["read"] == sum(counts[name] for name in ("kept", "empty", "filtered", "rejected"))
    expected = [text for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if (text := text_of(line))]
    assert counts["kept"] == len(expected) + 1 == whole.num_documents
    assert [whole.document(row).num_bytes for row in range(len(expected))] == [len(t.encode()) for t in expected]


def text_of(line):
    try:
        text = json.loads(line.decode())["text"]
    except (ValueError, KeyError, TypeError):
        return ""
    return text if text.strip() else ""


class Backwards:
    """Does the last task first, in this process."""

    leads, shared = True, False

    def run(self, folder, tasks, on_done=None):
        from retro.retrieval.executors.tasks import run_task

        waiting = list(tasks)
        while waiting:
            task = waiting.pop()
            waiting += list(on_done(task, run_task(folder, task)) or ())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "dataset"])
@pytest.mark.parametrize("partition_bytes", [1, 70, 1000])
def test_partitions_hold_every_record_once(tmp_path, kind, partition_bytes):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"text": words(n % 5, n) + "é漢"} for n in range(60)]
    path = tmp_path / f"x.{kind}"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    elif kind == "dataset":
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    (item,) = expand_inputs([str(path)])
    record, partitions = split_input(item, partition_bytes)
    assert record == split_input(item)[0] and len(partitions) > 1
    assert [one for partition in partitions for one in read_partition(partition)] == list(read_input(item))
    assert [found.text for found in read_input(item)] == [record["text"] for record in records]
    assert [partition.first for partition in partitions] == [
        1 + sum(len(list(read_partition(before))) for before in partitions[:n]) for n in range(len(partitions))
    ]
    assert len(partitions) <= 64 or kind != "jsonl.gz"


def test_an_empty_file_is_one_piece(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"")
    (item,) = expand_inputs([str(tmp_path / "x.jsonl")])
    assert split_input(item, 5)[1] == [InputPartition(item, 0, 0)] and list(read_input(item)) == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("change", ["longer last line", "shorter", "a line more before"])
def test_an_input_that_changes_while_it_is_read_is_told(tmp_path, name, change):
    lines = ['{"text": "w1 w2"}', '{"text": "w3"}', '{"text": "w4 w5"}']
    path = tmp_path / name

    def write(lines, end=""):
        raw = ("\n".join(lines) + end).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)

    write(lines)
    (item,) = expand_inputs([str(path)])
    partitions = split_input(item, 20)[1]
    assert len(partitions) > 1
    write(
        *{
            "longer last line": (lines, '\n{"text": "w6"}'),
            "shorter": (lines[:-1],),
            "a line more before": (["{}", *lines],),
        }[change]
    )
    if name.endswith("gz") and change != "shorter":
        return  # lines are counted: what comes behind is not read, and what comes before is not seen
    with pytest.raises(ValueError, match=f"{name} has changed since the work began"):
        [list(read_partition(partition)) for partition in partitions]


# More shards


def test_more_shards_behind_the_others(tmp_path, tokenizer):
    store = make_store(tmp_path, [words(9, n) for n in range(3)], tokenizer, shard_chunks=4)
    before = files_of(store.path)
    hashing = HashingEmbedder()
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": f"m{n}", "text": words(20, 50 + n)} for n in range(2)] + [{}])
    settings = BuildSettings(
        str(store.path), [more], "words", chunk_len=4, min_chunk_len=1, shard_chunks=4, on_bad="reject", workers=1
    )
    plan = plan_build(settings, tokenizer, hashing) | {"generation": 2}
    written = write_shards(store, settings, plan, hashing)
    assert before.items() <= files_of(store.path).items()
    assert [(shard["name"], shard["rows"], shard["generation"]) for shard in written["shards"]] == [
        ("00003", 6, 2),
        ("00004", 6, 2),
    ]
    assert [(shard["first_row"], shard["first_document"]) for shard in written["shards"]] == [(9, 3), (15, 4)]
    assert written["counts"]["rejected"] == 1 and set(written["rejects"]) == {
        "00002/rejected.jsonl",
        "00002/filtered.jsonl",
    }
    taken = write_jsonl(tmp_path / "taken.jsonl", [{"id": "m1", "text": "w1"}, {"id": "d1", "text": "w1"}])
    settings = replace(settings, inputs=[taken], on_bad="error")
    plan = plan_build(settings, tokenizer, hashing) | {"generation": 2}
    with pytest.raises(
        ValueError, match=r"taken\.jsonl:2: the document id 'd1' is in the store already; remove that document"
    ):
        write_shards(store, settings, plan, hashing)
    write_jsonl(tmp_path / "taken.jsonl", [{"text": "w1"}])
    with pytest.raises(ValueError, match="the inputs have changed since the plan was made"):
        write_shards(store, settings, plan, hashing)


# Ranks and Ray

RANK = """
import sys
from tests.retrieval.building.test_build_parallel import *
from tests.stand_ins import make_words_tokenizer
shards.KEY_ROWS, build_module.PARTITION_BYTES, shards.PART_BYTES = 16, 900, 1100
build(settings_for(Path(sys.argv[1]), "ranks", executor="ranks", workers=None, **json.loads(sys.argv[2])),
      make_words_tokenizer())
"""


def start_rank(tmp_path, rank, count, **changes):
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-c", RANK, str(tmp_path), json.dumps(changes)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def forked_rank(tmp_path, tokenizer, rank, count):
    """The process of a rank, which begins with what is imported here."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            build(settings_for(tmp_path, "ranks", executor="ranks", workers=None), tokenizer)
            code = 0
        finally:
            os._exit(code)
    return child


@needs_fork
def test_ranks_give_the_same_bytes_and_stop_together(tmp_path, tokenizer, small_parts):
    expected = files_of(build(settings_for(tmp_path), tokenizer).path)
    ranks = [forked_rank(tmp_path, tokenizer, rank, 3) for rank in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks] == [0, 0, 0]
    assert files_of(tmp_path / "ranks") == expected


@slow
def test_an_error_in_one_rank_leaves_nothing(tmp_path):
    ranks = [start_rank(tmp_path, rank, 3, on_bad="error") for rank in range(3)]
    said = [rank.communicate(timeout=FOREVER)[1] for rank in ranks]
    assert all("a.jsonl:10: the line is not JSON" in words or "b.jsonl.gz:10" in words for words in said), said
    assert not (tmp_path / "ranks").exists()


@slow
def test_a_ray_cluster_that_loses_a_node_gives_the_same_bytes(tmp_path, tokenizer, small_parts, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    encoder = make_encoder(tmp_path / "encoder")
    expected = files_of(build_store(settings_for(tmp_path, embedder=encoder), tokenizer=tokenizer).path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    seen = Counter()
    real = shards._BuildState.on_done

    def killing(self, task, record):
        seen[task.name.split("-")[0]] += 1
        if task.name.startswith("keys-") and seen["keys"] == 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        return real(self, task, record)

    monkeypatch.setattr(shards._BuildState, "on_done", killing)
    try:
        settings = settings_for(tmp_path, "ray", embedder=encoder, executor="ray", workers=None)
        store = build_store(settings, tokenizer=tokenizer)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(nodes) == 1 and seen["keys"] > 6 and files_of(store.path) == expected


# Kills


@needs_fork
def test_twenty_kills_at_random_moments(tmp_path, tokenizer, small_parts):
    calls = count_calls(lambda: build(settings_for(tmp_path, "undisturbed"), tokenizer))
    expected = files_of(tmp_path / "undisturbed")
    draw, kills, stores, moments = random.Random(0), 0, 0, []
    while kills < 20:
        settings = settings_for(tmp_path, f"store{stores}")
        if killed_at_call(draw.randrange(1, calls), lambda: build(settings, tokenizer)):  # noqa: B023
            kills += 1
            moments.append(len(list((tmp_path / f"store{stores}").rglob("*"))))
        else:
            assert files_of(tmp_path / f"store{stores}") == expected
            stores += 1
    assert files_of(build(settings_for(tmp_path, f"store{stores}"), tokenizer).path) == expected
    assert len(set(moments)) > 5  # they were different moments


KILLED = """
import sys
from tests.kills import die_at_call
from tests.retrieval.building.test_build_parallel import *
from tests.stand_ins import make_words_tokenizer
shards.KEY_ROWS, build_module.PARTITION_BYTES, shards.PART_BYTES, job.LIGHT_BYTES = 16, 900, 1100, 0
settings = settings_for(Path(sys.argv[1]), embedder=sys.argv[2], workers=2)
tokenizer = make_words_tokenizer()
die_at_call(int(sys.argv[3]))
build_store(settings, tokenizer=tokenizer)
"""


@slow
def test_kills_with_worker_processes(tmp_path, tokenizer, small_parts):
    encoder = make_encoder(tmp_path / "encoder")
    settings = settings_for(tmp_path, "undisturbed", embedder=encoder, workers=2)
    calls = count_calls(lambda: build_store(settings, tokenizer=tokenizer))
    expected, draw, kills = files_of(tmp_path / "undisturbed"), random.Random(0), 0
    while kills < 5:
        command = [sys.executable, "-c", KILLED, str(tmp_path), encoder, str(draw.randrange(1, calls))]
        if subprocess.run(command).returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert files_of(tmp_path / "store") == expected
            shutil.rmtree(tmp_path / "store")
    store = build_store(settings_for(tmp_path, embedder=encoder, workers=1), tokenizer=tokenizer)
    assert files_of(store.path) == expected and np.isfinite(Store.open(store.path).keys(np.arange(3))).all()
