"""Search on three nodes, of which one is killed."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from retro.loading import load
from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import (
    RemoteRetriever,
    Retriever,
    Store,
    build_index,
    open_neighbors,
    open_sharded,
    remove_documents,
)
from retro.retrieval.search.gathering import MissingShards
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.sharded import ShardedSearcher
from tests.retrieval.search.test_gathering import bordered_store, queries_of
from tests.stand_ins import HashingEmbedder
from tests.waiting import FOREVER, wait_until


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    return bordered_store(tmp_path_factory.mktemp("sharded"), tokenizer)


SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A head without processors and three nodes."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def sharded(cluster, store):
    with open_sharded(store, "exact", 3, HashingEmbedder(), timeout=FOREVER) as searcher:
        yield searcher


def where(actor):
    """The node and the process of an actor."""
    import ray

    def found(shard):
        return ray.get_runtime_context().get_node_id(), os.getpid()

    return ray.get(actor.__ray_call__.remote(found))


def kill_node_of(cluster, actor):
    """As when a machine loses its power: its raylet and its workers at once."""
    node, process = where(actor)
    (lost,) = (n for n in cluster.worker_nodes if n.node_id == node)
    os.kill(process, signal.SIGKILL)
    cluster.remove_node(lost, allow_graceful=False)


def when_one_is_left(do):
    """`ray.wait` as if time ran out for the last answer; or else `do` once, and wait for it."""
    import ray

    wait, done = ray.wait, []

    def waiting(references, **options):
        if len(references) > 1:
            return wait(references, timeout=FOREVER)
        if do is None:
            return [], references
        if not done:
            done.append(do())
        return wait(references, timeout=FOREVER)

    return waiting


def check_same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.slow
def test_answers_of_three_nodes_are_those_of_one(cluster, store, sharded):
    assert len({where(actor)[0] for actor in sharded._actors}) == 3
    local, remote = Retriever(store, "exact", HashingEmbedder()), Retriever(store, sharded)
    texts, own = store.text(np.arange(50)), [{f"d{n % 9}"} for n in range(50)]
    check_same(remote(texts, 5), local(texts, 5))
    check_same(remote(texts, 5, exclude_documents=own), local(texts, 5, exclude_documents=own))
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, chunk_len=4, retrieved_len=6)
    model = RetroForCausalLM(RetroConfig(vocab_size=9, cca_layers=[1], **sizes))
    loaded = load(model, store, index=sharded, num_neighbors=5).retriever
    check_same(loaded(texts), load(model, store, index="exact", embedder=HashingEmbedder()).retriever(texts, 5))
    hits = sharded.search(queries_of(store, np.arange(4)), 3)
    assert (hits.shards_answered, hits.shards_total, sharded.shards_answered) == (3, 3, 3)
    with pytest.raises(ValueError, match="query row 1 is not finite"):
        keys = store.keys(np.arange(2)) * np.array([[1.0], [np.nan]], np.float32)
        sharded.search(Queries(store.tokenizer, texts=["w1", "w2"], keys=keys), 3)
    kind = "exact+tfidf>tfidf"
    if find_spec("faiss"):
        build_index(store, "routed", lists=24)
        kind = "routed+tfidf>tfidf"
    staged = Retriever(store, kind, HashingEmbedder())
    with open_sharded(store, kind, 2, HashingEmbedder(), timeout=FOREVER) as both:
        assert both.kind == kind
        check_same(Retriever(store, both)(texts, 5), staged(texts, 5))


@pytest.mark.slow
def test_a_node_killed_between_and_during_searches(cluster, store, sharded, monkeypatch):
    """The right answer once its shard is open elsewhere, or an error that names it, or what says that it is partial."""
    import ray

    local, remote = Retriever(store, "exact", HashingEmbedder()), Retriever(store, sharded)
    texts = store.text(np.arange(0, store.num_chunks, 15))
    expected = local(texts, 5)
    kill_node_of(cluster, sharded._actors[1])
    check_same(remote(texts, 5), expected)  # between
    os.kill(where(sharded._actors[0])[1], signal.SIGKILL)
    check_same(remote(texts, 5), expected)  # a process alone
    node, process = where(sharded._actors[2])
    os.kill(process, signal.SIGSTOP)  # in the middle of its search, as far as the others can tell
    with monkeypatch.context() as patched:
        patched.setattr(ray, "wait", when_one_is_left(lambda: os.kill(process, signal.SIGKILL)))
        check_same(remote(texts, 5), expected)

    process = where(sharded._actors[1])[1]
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(ray, "wait", when_one_is_left(None))
    middle = f"rows {store.num_chunks // 3} to {2 * store.num_chunks // 3 - 1}"
    said = rf"1 of 3 shards are missing: shard 1 \({middle}\): no answer within 600 seconds"
    with pytest.raises(MissingShards, match=said):
        remote(texts, 5)
    sharded.partial = True
    found = remote(texts, 5)
    assert sharded.shards_answered == 2
    outside = (found.ids < store.num_chunks // 3) | (found.ids >= 2 * store.num_chunks // 3)
    assert outside.all() and not np.array_equal(found.ids, expected.ids)
    os.kill(process, signal.SIGKILL)
    monkeypatch.undo()
    sharded.partial = False
    check_same(remote(texts, 5), expected)
    assert sharded.shards_answered == 3


@pytest.mark.slow
def test_a_server_over_shards_says_how_many_answered(cluster, store, sharded, monkeypatch):
    import ray

    from tests.retrieval.remote.test_remote import serving_store

    sharded.partial = True
    with serving_store(Retriever(store, sharded)) as url:
        client = RemoteRetriever(url, timeout=FOREVER)
        check_same(client(["w1 w2"]), Retriever(store, "exact", HashingEmbedder())(["w1 w2"]))
        assert (client.shards_answered, client.shards_total) == (3, 3)
        process = where(sharded._actors[0])[1]
        os.kill(process, signal.SIGSTOP)
        monkeypatch.setattr(ray, "wait", when_one_is_left(None))
        assert client(["w1 w2"]).mask.any() and client.shards_answered == 2
        sharded.partial = False
        with pytest.raises(ConnectionError, match="1 of 3 shards are missing: shard 0"):
            client(["w1 w2"])
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_store_that_a_node_does_not_see(cluster, store, tmp_path, monkeypatch):
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    remove_documents(copy.path, ["d3"])
    said = "2 of 2 shards are missing: .*: ValueError: .* is another store here, or has been changed"
    calls, call = [], ShardedSearcher._call
    monkeypatch.setattr(ShardedSearcher, "_call", lambda *given: calls.append(given) or call(*given))
    with pytest.raises(MissingShards, match=said):
        open_sharded(copy, "exact", 2, HashingEmbedder(), timeout=FOREVER)
    assert len(calls) == 2  # not tried again until the time is over


JOB = """
import sys, ray
from retro.retrieval import Store, build_neighbors
from retro.retrieval.building import join
ray.init(address=sys.argv[2], log_to_driver=False, logging_level="ERROR")
join._TASK_QUERIES, join._TASK_PAIRS, join._TASKS = (64, 64), 1 << 16, 32
build_neighbors(Store.open(sys.argv[1]), 4, executor="ray")
"""


@pytest.mark.slow
def test_the_neighbor_table_of_a_cluster_that_loses_a_node(cluster, store):
    from retro.retrieval import build_neighbors

    names = ("rows.npy", "distances.npy", "neighbors.json")
    table = build_neighbors(store, 4)
    kept = [(table.path / name).read_bytes() for name in names]
    shutil.rmtree(table.path)
    process = subprocess.Popen([sys.executable, "-c", JOB, str(store.path), cluster.address], stderr=subprocess.PIPE)
    wait_until(lambda: process.poll() is not None or len(list(table.path.glob("job/hits-*.json"))) >= 5)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert process.wait(FOREVER) == 0, process.stderr.read().decode()
    found = open_neighbors(store, k=4)
    assert [(found.path / name).read_bytes() for name in names] == kept
