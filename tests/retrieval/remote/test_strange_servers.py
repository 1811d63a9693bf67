"""What no retrieval server would say: one sentence each, and no answer that does not end."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from retro.retrieval import RemoteRetriever
from retro.retrieval.remote import client as client_module
from retro.retrieval.remote.wire import pack, unpack
from tests.retrieval.remote.test_remote import connect, serving_store


@pytest.fixture(scope="module")
def url(stores):
    with serving_store(stores["main"]) as url:
        yield url


@contextmanager
def answering(*parts):
    """The address of a server that answers each connection by these bytes, the last of them without end."""

    def answer_all():
        while True:
            try:
                connection, _ = bound.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                tries.append(connection.recv(1000))
                for part in parts[:-1]:
                    connection.sendall(part)
                while parts[-1]:
                    connection.sendall(parts[-1])
                    time.sleep(0.01)

    tries = []
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", tries
        bound.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf", b"SSH-2.0\r\n\r\n"])
def test_a_connection_that_is_lost_in_the_middle(answer):
    """Each try is answered so; there are as many as allowed, then one sentence."""
    with (
        answering(answer, b"") as (url, tries),
        pytest.raises(ConnectionError, match="gave no answer at 3 tries: the connection was lost"),
    ):
        RemoteRetriever(url, retries=2)
    assert len(tries) == 3


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "a status": (b"HTTP/1.1 ", b"2"),
    "continuations": (b"HTTP/1.1 100 Continue\r\n\r\n",),
    "a header": (OK + b"X: ", b"a"),
    "a body": (OK + b"Content-Length: 100000\r\n\r\n", b"a"),
    "pieces of a body": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
}


@pytest.mark.parametrize("case", DRIPS)
def test_what_drips_is_not_waited_for(case):
    with answering(*DRIPS[case]) as (url, _), pytest.raises(TimeoutError, match="has not answered within 0.3 seconds"):
        RemoteRetriever(url, timeout=0.3)


ABOUTS = {
    "no object": (lambda said: [], r"what http.* says of itself is \[\] in the place of a record; is it a retrieval"),
    "nothing": (lambda said: {}, "says of itself has no fingerprint"),
    "no number": (lambda said: said | {"num_neighbors": "2"}, "num_neighbors of what .* is 2, not a whole number"),
    "no limits": (lambda said: said | {"limits": {"max_queries": 0}}, "max_queries of limits of what .* is 0"),
}


def changed(monkeypatch, path, change):
    """From now on the answers to a path are others."""
    ask = client_module._Server.ask
    given = lambda server, method, asked, body=None: (  # noqa: E731
        change(ask(server, method, asked, body)) if asked == path else ask(server, method, asked, body)
    )
    monkeypatch.setattr(client_module._Server, "ask", given)


@pytest.mark.parametrize("case", ABOUTS)
def test_what_no_retrieval_server_says_of_itself(case, url, monkeypatch):
    change, said = ABOUTS[case]
    changed(monkeypatch, "/v1/store", lambda data: json.dumps(change(json.loads(data))).encode())
    with pytest.raises(ConnectionError, match=said):
        RemoteRetriever(url)


@pytest.mark.parametrize("data", [b"\xff", b"[" * 100_000, b"1" * 5000], ids=["no UTF-8", "deep", "long"])
def test_what_is_no_json(data, url, monkeypatch):
    changed(monkeypatch, "/v1/store", lambda _: data)
    with pytest.raises(ConnectionError, match="sent what cannot be read: .*; is it a retrieval server of this version"):
        RemoteRetriever(url)


ANSWERS = {
    "fewer neighbors": lambda arrays: {name: array[:, :1] for name, array in arrays.items()},
    "other queries": lambda arrays: arrays | {"ids": np.repeat(arrays["ids"], 2, 0)},
    "rows that are not there": lambda arrays: arrays | {"ids": arrays["ids"] + 10_000},
    "tokens that are none": lambda arrays: arrays | {"tokens": arrays["tokens"] + 10_000},
    "tokens below 0": lambda arrays: arrays | {"tokens": arrays["tokens"] - 10_000},
    "a mask of numbers": lambda arrays: arrays | {"mask": arrays["mask"].astype(np.float32)},
    "no scores": lambda arrays: {name: array for name, array in arrays.items() if name != "scores"},
    "sources that are not there": lambda arrays: arrays | {"sources": arrays["sources"] + 10_000},
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_does_not_answer_a_search(case, url, monkeypatch):
    def change(data):
        said, arrays = unpack(data)
        return pack(said, ANSWERS[case](arrays))

    client = connect(url)
    changed(monkeypatch, "/v1/search", change)
    with pytest.raises(ConnectionError, match="sent what cannot be read"):
        client(["w1"])


@pytest.mark.parametrize("said", [[], 5, {}, [[1, "t", "s", 0]], [["d", "t", "s", "0"]], [["d"]]])
def test_what_are_no_sources(said, url, monkeypatch):
    remote = connect(url)
    changed(monkeypatch, "/v1/rows", lambda _: pack(said, {}))
    with pytest.raises(ConnectionError, match="sent what cannot be read"):
        remote.sources(np.zeros((1, 1), np.int64))


def test_what_are_no_rows(url, monkeypatch):
    remote, rows = connect(url), np.zeros((1, 1), np.int64)
    changed(monkeypatch, "/v1/rows", lambda _: pack({}, {"document_rows": rows[0] + 10_000}))
    for ask in (remote.store.document_rows, remote.store.text):
        with pytest.raises(ConnectionError, match="sent what cannot be read"):
            ask(rows)
