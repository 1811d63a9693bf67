"""The retrieval server and its client: the answers of a local Retriever, whoever asks, or else one sentence."""

import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retro.cli import main
from retro.retrieval import RemoteRetriever, Retriever
from retro.retrieval.neighbors import Neighbors, Source
from retro.retrieval.remote import client as client_module
from retro.retrieval.remote.limits import RetrievalLimits
from retro.retrieval.remote.server import create_retrieval_app
from retro.retrieval.remote.wire import pack_neighbors, unpack_neighbors
from tests.serve.conftest import serving_app
from tests.stand_ins import HashingEmbedder, make_store, make_words_tokenizer, words
from tests.waiting import FOREVER, wait_until

TEXTS = [words(3 + i % 9, seed=i) for i in range(32)]


def serving_store(retriever, api_key=None, port=0, **limits):
    limits = RetrievalLimits(**{"max_seconds": FOREVER, **limits})
    return serving_app(create_retrieval_app(retriever, limits, api_key), port)


def connect(url, **options):
    return RemoteRetriever(url, **{"timeout": FOREVER, **options})


@pytest.fixture(scope="module")
def local(stores):
    return stores["main"]


@pytest.fixture(scope="module")
def url(local):
    with serving_store(local) as url:
        yield url


@pytest.fixture(scope="module")
def remote(url):
    return RemoteRetriever(url)


def check_same(found, expected):
    for name in ("ids", "tokens", "mask", "scores"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)
    assert found.sources == expected.sources


class Searches:
    """A search that notes what it is asked, waits while `held`, and refuses the text `refused`."""

    def __init__(self, inner, refused=None):
        self.inner, self.refused, self.asked = inner, refused, []
        self.kind, self.num_rows, self.recall = inner.kind, inner.num_rows, inner.recall
        self.free = threading.Event()
        self.free.set()

    def search(self, queries, k, excluded=None):
        self.asked.append(list(queries.texts))
        self.free.wait(FOREVER)
        if self.refused in queries.texts:
            raise ValueError(f"the text {self.refused!r} is refused")
        return self.inner.search(queries, k, excluded)

    @contextmanager
    def held(self):
        self.free.clear()
        try:
            yield
        finally:
            self.free.set()


@pytest.fixture
def searches(local):
    return Searches(local.index)


@pytest.fixture
def noted(local, searches):
    """A retriever whose searches are noted."""
    return Retriever(local.store, searches, num_neighbors=2, retrieved_len=16)


def at_once(calls):
    """The results of calls made together, errors included."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# The same answers


def test_answers_are_those_of_the_retriever(remote, local):
    tokens = local.store.chunks(np.array([0, 3, 11, 40]))
    mask = np.arange(8) < local.store.chunk_lens(np.array([0, 3, 11, 40]))[:, None]
    names = [{"d0", "d1"}, set(), {"unknown"}, {"d3"}]
    check_same(remote(TEXTS), local(TEXTS))
    check_same(remote(tokens, 3), local(tokens, 3))
    check_same(remote(tokens, mask=mask), local(tokens, mask=mask))
    check_same(remote(torch.from_numpy(tokens)), local(tokens))
    check_same(remote([list(row) for row in tokens]), local(tokens))
    check_same(remote(tokens, 4, exclude_documents=names), local(tokens, 4, exclude_documents=names))
    check_same(remote(["", TEXTS[0]]), local(["", TEXTS[0]]))
    check_same(remote(TEXTS[:1], local.index.num_rows + 3), local(TEXTS[:1], local.index.num_rows + 3))
    check_same(remote([]), local([]))
    assert remote.show(TEXTS[3], 3) == local.show(TEXTS[3], 3)
    assert (remote.num_neighbors, remote.retrieved_len) == (local.num_neighbors, local.retrieved_len)
    assert remote.shards_total is None and remote.shards_answered is None


def test_the_store_behind_it(remote, local):
    mine, other, rows = remote.store, local.store, np.array([[0, 7], [30, 2]])
    for name in ("fingerprint", "tokenizer_fingerprint", "embedder_fingerprint", "chunk_len", "num_chunks", "key_dim"):
        assert getattr(mine, name) == getattr(other, name)
    for name in ("chunks", "chunk_lens", "document_rows", "text", "token_lists"):
        np.testing.assert_equal(getattr(mine, name)(rows), getattr(other, name)(rows))
    for retrieved_len in (3, 8, 20):
        np.testing.assert_equal(mine.values(rows - 1, retrieved_len), other.values(rows - 1, retrieved_len))
    np.testing.assert_array_equal(mine.searchable_rows, other.searchable_rows)
    assert mine.document_ids == other.document_ids
    assert mine.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert remote.sources(rows - 1) == local.sources(rows - 1)


def test_a_model_reads_from_it(remote, local, model, tokenizer):
    prompt = torch.tensor([tokenizer(words(20, seed=5))["input_ids"]])
    texts = [
        model.generate(prompt, retriever=retriever, num_neighbors=2, max_new_tokens=20, do_sample=False)
        for retriever in (local, remote)
    ]
    assert texts[0].tolist() == texts[1].tolist()


def test_evaluation_reads_from_it(remote, local, model):
    from retro.evaluation.bits import bits_per_byte
    from retro.text.documents import Document

    documents = [Document(f"e{i}", words(30, seed=200 + i)) for i in range(3)]
    results = [bits_per_byte(model, documents, retriever, 2) for retriever in (local, remote)]
    assert all(result.pop("seconds") for result in results) and results[0] == results[1]
    assert not (local.store.path.parent / "http:").exists()


def test_it_can_be_sent_to_another_process(remote, local):
    copied = pickle.loads(pickle.dumps(remote))
    check_same(copied(TEXTS[:2]), local(TEXTS[:2]))


# Many at once


def test_32_clients_at_once_get_what_they_get_alone(local, searches, noted):
    ways = [{}, {"num_neighbors": 1}, {"exclude_documents": [{"d4"}]}]
    queries = [[text] if i % 2 else [local.store.tokenizer(text)["input_ids"]] for i, text in enumerate(TEXTS)]
    alone = [local(query, **{"num_neighbors": 2, **ways[i % 3]}) for i, query in enumerate(queries)]
    with serving_store(noted) as url:
        clients = [connect(url, retrieved_len=16 if i % 5 else 9) for i in range(32)]
        with searches.held():
            first = threading.Thread(target=lambda: clients[0](["w1"]))
            first.start()
            wait_until(lambda: searches.asked)
            calls = [lambda i=i: clients[i](queries[i], **ways[i % 3]) for i in range(32)]
            threading.Thread(target=free_at, args=(searches, url, 33)).start()
            together = at_once(calls)
        first.join()
    for i, (found, expected) in enumerate(zip(together, alone, strict=True)):
        if i % 5:
            check_same(found, expected)
        else:
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.tokens, expected.tokens[:, :, :9])
    assert len(searches.asked) < 20 and max(map(len, searches.asked)) > 3  # many requests, few searches


def test_a_request_that_fails_does_so_alone(local, searches, noted):
    searches.refused = TEXTS[5]
    with serving_store(noted) as url:
        client = connect(url)
        with searches.held():
            threading.Thread(target=free_at, args=(searches, url, 32)).start()
            results = at_once([lambda text=text: client([text]) for text in TEXTS])
    assert isinstance(results[5], ValueError) and str(results[5]).endswith(f"the text {TEXTS[5]!r} is refused")
    for i, found in enumerate(results):
        if i != 5:
            check_same(found, local([TEXTS[i]]))


def test_an_error_of_the_servers_own_is_not_told(local, searches, noted, caplog):
    searches.inner = None
    with serving_store(noted) as url, pytest.raises(ConnectionError, match="the search failed; the server's log says"):
        RemoteRetriever(url)(["w1"])
    assert "NoneType" in caplog.text


def raw_search(url, body):
    """A request that nobody waits for: its socket."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), FOREVER)
    data = json.dumps(body).encode()
    head = f"POST /v1/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def load(url):
    health = httpx.get(f"{url}/health", timeout=FOREVER).json()
    return health["waiting"], health["running"]


def free_at(searches, url, asked):
    """Let searches go once so many are asked for."""
    wait_until(lambda: sum(load(url)) == asked)
    searches.free.set()


def test_searches_of_clients_that_hang_up_are_not_done(searches, noted):
    with serving_store(noted, max_batch=1) as url:
        with searches.held():
            running = raw_search(url, {"queries": ["w1 w2"]})
            wait_until(lambda: searches.asked)
            gone = [raw_search(url, {"queries": [f"w3 w{i}"]}) for i in range(10, 15)]
            wait_until(lambda: load(url) == (5, 1))
            kept = raw_search(url, {"queries": ["w4"]})
            wait_until(lambda: load(url) == (6, 1))
            for connection in gone:
                connection.close()
            wait_until(lambda: load(url) == (1, 1))
        assert b"200 OK" in kept.recv(100) and b"200 OK" in running.recv(100)
        assert searches.asked == [["w1 w2"], ["w4"]]


# Limits


def test_what_is_too_much_is_refused(local):
    limits = dict(max_queries=4, max_query_bytes=30, max_query_tokens=10, max_neighbors=5, max_retrieved_len=20)
    with serving_store(local, max_answer_tokens=100, max_request_bytes=3000, **limits) as url:
        client = httpx.Client(base_url=url)

        def refusal(status=400, path="/v1/search", **body):
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == status
            return answer.json()["error"]["message"]

        assert refusal(queries=["w1"] * 5) == "queries is 5 of them; this server takes 0 to 4."
        assert refusal(queries=["w1"], num_neighbors=6) == "num_neighbors is 6; this server takes 1 to 5."
        assert refusal(queries=["w1"], retrieved_len=21) == "retrieved_len is 21; this server takes 1 to 20."
        assert refusal(queries=["w1 " * 11]) == "queries.0 has 33 bytes; this server takes at most 30."
        assert refusal(queries=[[3] * 11]) == "queries.0 has 11 tokens; this server takes at most 10."
        assert refusal(queries=[[3], [4, 1000]]).startswith(
            "queries.1 holds token 1000; the store's tokenizer has 0 to"
        )
        assert refusal(queries=[[-1]]).startswith("queries.0 holds token -1;")
        assert "4 queries x 5 neighbors x 20 tokens are more than 100" in refusal(
            queries=["w1"] * 4, num_neighbors=5, retrieved_len=20
        )
        assert "exclude_documents has 1 items for 2 queries" in refusal(
            queries=["w1", "w2"], exclude_documents=[["d1"]]
        )
        assert refusal(queries=["w1"], k=3) == "k is no field that this server knows; leave it out."
        assert "half of a surrogate pair" in refusal(queries=["\ud800"])
        assert refusal(409, queries=["w1"], store_fingerprint="0" * 64).startswith("this server has another store")
        assert refusal(413, queries=["w" * 4000]) == "the request is larger than 3000 bytes."
        assert refusal(path="/v1/rows", rows=[10**9]).startswith("rows holds 1000000000; the store has")
        assert "should be less than 9223372036854775808" in refusal(path="/v1/rows", rows=[10**2000])
        assert refusal(path="/v1/rows", rows=[-1], what="document_rows").startswith("rows holds -1; the store has 0 to")
        assert refusal(path="/v1/rows", rows=[0] * 30).startswith("rows is 30 of them")
        assert client.get("/v1/store/tokenizer/../manifest.json").status_code == 404
        assert client.get("/v1/store/tokenizer/%2e%2e%2fmanifest.json").status_code == 404
        remote = RemoteRetriever(url, retrieved_len=12)  # splits what is too much for one request
        texts = [words(5, seed=i) for i in range(11)]
        check_same(remote(texts, 4), Retriever(local.store, local.index, retrieved_len=12)(texts, 4))
        np.testing.assert_equal(remote.store.values(np.arange(50), 16), local.store.values(np.arange(50), 16))
        with pytest.raises(ValueError, match=r"said: queries\.0 has .* bytes; this server takes at most 30"):
            remote([words(20)])


def test_the_queue_has_an_end(searches, noted):
    with serving_store(noted, max_queries=2, max_queue=2) as url:
        client = connect(url, retries=1)
        with searches.held():
            held = [raw_search(url, {"queries": ["w1"]})]
            wait_until(lambda: searches.asked)
            held.append(raw_search(url, {"queries": ["w2", "w3"]}))
            wait_until(lambda: load(url) == (2, 1))
            with pytest.raises(ConnectionError, match="gave no answer at 2 tries: the queue is full"):
                client(["w4"])


def test_time_limits_of_server_and_client(searches, noted):
    with serving_store(noted, max_seconds=0.4) as url:
        with searches.held(), pytest.raises(TimeoutError, match=r"said: the search was not done in 0\.4 seconds"):
            connect(url)(["w1"])
        wait_until(lambda: load(url) == (0, 0))
    with serving_store(noted) as url:
        client = connect(url)
        hurried = pickle.loads(pickle.dumps(client))
        hurried._server.timeout = 0.2
        with searches.held(), pytest.raises(TimeoutError, match=r"has not answered within 0\.2 seconds"):
            hurried(["w1"])
        wait_until(lambda: load(url) == (0, 0))
        assert client(["w1"]).mask.any()  # it lives on


# Whom it does not answer, and who does not answer


def test_what_is_checked_at_connect(url, local, tokenizer):
    assert RemoteRetriever(url, tokenizer=local.store.tokenizer, fingerprint=local.store.fingerprint)
    with pytest.raises(
        ValueError, match=r"was built with the tokenizer .*, not with .*; serve a store of that tokenizer"
    ):
        RemoteRetriever(url, tokenizer=make_words_tokenizer(7))
    with pytest.raises(ValueError, match="serves the store .*, not 000000000000; ask for that one's server"):
        RemoteRetriever(url, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="num_neighbors and retrieved_len must be at least 1"):
        RemoteRetriever(url, num_neighbors=0)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        RemoteRetriever(url, timeout=0.0)
    with pytest.raises(ValueError, match="'localhost:1' is no address of a retrieval server"):
        RemoteRetriever("localhost:1")


def test_refusals_are_those_of_the_retriever(remote, local):
    with pytest.raises(ValueError, match="k is 0; give a whole number, at least 1"):
        remote(["w1"], num_neighbors=0)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        remote("w1")
    with pytest.raises(ValueError, match="exclude_documents must hold one item per query"):
        remote(["w1"], exclude_documents=[])
    with pytest.raises(ValueError, match="made without decontaminate"):
        remote(["w1"], against=["w1 w2"])


def test_a_token_is_asked_for(local, monkeypatch):
    monkeypatch.delenv("RETRO_API_KEY", raising=False)
    with serving_store(local, api_key="s3cret") as url:
        for given in (None, "wrong"):
            with pytest.raises(ValueError, match="the bearer token is missing or wrong"):
                RemoteRetriever(url, api_key=given)
        check_same(RemoteRetriever(url, api_key="s3cret")(["w1"]), local(["w1"]))
        monkeypatch.setenv("RETRO_API_KEY", "s3cret")
        assert RemoteRetriever(url)(["w1"]).mask.any()


@pytest.fixture
def free_port():
    """Bound, so that nobody else is given it; whoever asks for it may listen there."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_nobody_is_there(free_port):
    with pytest.raises(ConnectionError, match=r"gave no answer at 2 tries: .*refused.*; is the server running\?"):
        RemoteRetriever(f"http://127.0.0.1:{free_port}", retries=1)


def test_a_server_that_goes_and_comes_back(local, tmp_path, tokenizer, monkeypatch, free_port):
    with serving_store(local, port=free_port) as url:
        client = connect(url, retries=2)
        expected = client(TEXTS)
    with pytest.raises(ConnectionError, match="gave no answer at 1 tries"):
        RemoteRetriever.__call__(quick(client), TEXTS)
    results, lost, back = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: results.append(client(TEXTS)))
    with monkeypatch.context() as patched:
        patched.setattr(client_module.time, "sleep", lambda seconds: (lost.set(), back.wait(FOREVER)))
        thread.start()
        lost.wait(FOREVER)
    with serving_store(local, port=free_port):
        back.set()
        thread.join()
    check_same(results[0], expected)
    other = make_store(tmp_path, TEXTS[:9], tokenizer, chunk_len=8)
    said = "has another store by now, or another state of it .*; connect again"
    changed = serving_store(Retriever(other, embedder=HashingEmbedder()), port=free_port)
    with changed, pytest.raises(ValueError, match=said):
        client(TEXTS)


def quick(client):
    """The same client, which does not try again."""
    copied = pickle.loads(pickle.dumps(client))
    copied._server.retries = 0
    return copied


def test_another_kind_of_server(make_engine):
    from tests.serve.conftest import serving

    with serving(make_engine()) as url, pytest.raises(ValueError, match="said: nothing is at /v1/store"):
        RemoteRetriever(url)


# On the wire


@given(st.data())
def test_what_is_cut_or_changed_is_noticed(data):
    sources = [[Source("d1", "a \u00e9", "x", 3, None), None]]
    tokens = np.arange(8).reshape(1, 2, 4)
    found = Neighbors(np.array([[5, -1]]), tokens, tokens < 3, np.array([[-0.5, -np.inf]], np.float32), sources)
    sent = pack_neighbors(found, {"shards_answered": 2})
    same, about = unpack_neighbors(sent, (1, 2, 4), 6, 8)
    check_same(same, found)
    assert about == {"shards_answered": 2}
    with pytest.raises(ValueError):
        unpack_neighbors(sent[: data.draw(st.integers(0, len(sent) - 1))], (1, 2, 4), 6, 8)


# The command line


def test_commands_take_an_address(url, local, capsys, tmp_path, free_port):
    assert main(["search", url, TEXTS[3], "--k", "2", "--retrieved-len", "16", "--json", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["neighbors"] == local.show(TEXTS[3], 2) and result["store_fingerprint"] == local.store.fingerprint
    assert main(["search", url, TEXTS[3], "--index", "exact"]) == 2
    assert "index is for a store of this machine" in capsys.readouterr().err
    assert main(["search", url, TEXTS[3], "--deduplicate"]) == 2
    assert "deduplicate is for a store of this machine" in capsys.readouterr().err
    assert main(["search", f"http://127.0.0.1:{free_port}", "w1"]) == 2
    assert "is the server running?" in capsys.readouterr().err
    assert main(["serve-store", url]) == 2
    assert "is served already" in capsys.readouterr().err
    assert main(["serve-store", str(local.store.path), "--partial"]) == 2
    assert "--partial means nothing without --shards" in capsys.readouterr().err


def test_generate_with_an_address(url, local, model, tokenizer, tmp_path):
    from retro.provenance import write_provenance

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_provenance(folder, local.store)
    prompt, texts = words(20, seed=5), []
    for store in (url, None):
        given = ["--store", store] if store else ["--no-retrieval"]
        file = tmp_path / "out.json"
        assert main(["generate", str(folder), prompt, *given, "--max-new-tokens", "9", "--json", str(file)]) == 0
        texts.append(json.loads(file.read_text()))
    assert texts[0]["store_fingerprint"] == local.store.fingerprint
    assert texts[0]["texts"][0]["chunks"] != texts[1]["texts"][0]["chunks"]


def test_the_command_serves_until_it_is_told_to_end(tmp_path, tokenizer):
    from retro.retrieval.embedding.embedder import NoEmbedder

    store = make_store(tmp_path, TEXTS, tokenizer, NoEmbedder(), chunk_len=8)
    command = [sys.executable, "-m", "retro.cli", "serve-store", str(store.path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        client = RemoteRetriever(said.split()[-1], retries=6)
        assert client.index.kind == "tfidf"
        check_same(client(TEXTS, 2), Retriever(store)(TEXTS, 2))
        process.send_signal(signal.SIGTERM)
        assert process.wait(FOREVER) == 0
    finally:
        process.kill()
