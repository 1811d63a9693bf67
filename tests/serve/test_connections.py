"""Connections that take too long, that are too many, and that a server ends."""

import contextlib
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from retro.serve.app import create_app
from retro.web import connections
from tests.serve.conftest import serving_app
from tests.stand_ins import words
from tests.waiting import FOREVER, wait_until

BODY = {"prompt": words(20), "max_tokens": 40, "temperature": 0}


@contextlib.contextmanager
def serving_bytes(size=0, **options):
    """A server of one route, /, that answers with so many bytes once it has the whole request."""

    async def answer(request):
        await request.body()
        return Response(b"x" * size)

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    app.state.stop = lambda: None
    with serving_app(app, **options) as url:
        yield httpx.URL(url)


def connect(url, sent=b""):
    client = socket.create_connection((url.host, url.port), FOREVER)
    client.sendall(sent)
    return client


def read_all(client):
    """What comes until the other side closes or cuts the connection."""
    parts = []
    with client, contextlib.suppress(ConnectionError):
        while not parts or parts[-1]:
            parts.append(client.recv(1 << 16))
    return b"".join(parts)


WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a header": b"GET / HTTP/1.1\r\nHos",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc",
    "half a second header": WHOLE + b"GET / HT",
}


@pytest.mark.parametrize("case", SLOW)
def test_slow_senders_are_cut(case, monkeypatch, caplog):
    monkeypatch.setattr(connections, "_SEND_SECONDS", 0.1)
    with serving_bytes() as url:
        got = read_all(connect(url, SLOW[case]))
    assert got.count(b"200 OK") == ("second" in case) and "Traceback" not in caplog.text


def test_slow_readers_are_cut(monkeypatch):
    monkeypatch.setattr(connections, "_SEND_SECONDS", 0.1)
    with serving_bytes(1 << 26) as url, connect(url, WHOLE) as client:
        gone = threading.Event()
        lost = connections.HttpConnection.connection_lost
        monkeypatch.setattr(
            connections.HttpConnection, "connection_lost", lambda self, exc: (lost(self, exc), gone.set())
        )
        assert gone.wait(FOREVER) and len(read_all(client)) < 1 << 26


def test_slow_answers_are_not_cut(make_engine, hold, monkeypatch):
    made, new = connections.HttpConnection.connection_made, []
    monkeypatch.setattr(
        connections.HttpConnection, "connection_made", lambda self, transport: (new.append(self), made(self, transport))
    )
    hold(2)
    with serving_app(create_app(engine := make_engine(), "tiny")) as url, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(httpx.post, f"{url}/v1/completions", json=BODY, timeout=FOREVER)
        wait_until(lambda: engine.load["running"])
        assert new[0]._request_timer is new[0]._answer_timer is None
        hold(99)
        assert answer.result().status_code == 200


def test_more_connections_than_allowed_are_closed(monkeypatch):
    monkeypatch.setattr(connections, "_most_connections", lambda: 2)
    with serving_bytes() as url:
        kept = [connect(url, WHOLE[:10]) for _ in range(2)]
        assert read_all(connect(url)) == b""
        for client in kept:
            client.sendall(WHOLE[10:])
            assert b"200 OK" in client.recv(1000)
            client.close()


def test_without_handles_it_waits_and_says_so_once(caplog):
    with serving_bytes() as url, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(socket.socket()) for _ in range(40)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 4, hard))
        try:
            for client in clients:
                client.connect((url.host, url.port))
                client.sendall(WHOLE)
            wait_until(lambda: "new connections have to wait" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            assert b"200 OK" in client.recv(1000)
    assert caplog.text.count("new connections have to wait") == 1 and "Traceback" not in caplog.text


def test_what_is_not_done_at_the_end_is_told(make_engine, hold, capfd):
    hold(3)
    engine, clients = make_engine(), ThreadPoolExecutor(2)
    with serving_app(create_app(engine, "tiny"), grace_seconds=0.1) as url:
        ask = lambda **given: httpx.post(f"{url}/v1/completions", json=BODY | given, timeout=FOREVER)  # noqa: E731
        streamed = clients.submit(ask, stream=True)
        wait_until(lambda: any(len(row.new_ids) == 3 for row in engine._lanes["main"].running))
        plain = clients.submit(ask)
        wait_until(lambda: sum(engine.load[name] for name in ("waiting", "running")) == 2)
        slow = connect(httpx.URL(url), b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    plain, streamed = plain.result(), streamed.result()
    assert plain.status_code == 503 and "the server is shutting down" in plain.json()["error"]["message"]
    assert streamed.status_code == 200 and streamed.text.endswith("data: [DONE]\n\n")
    assert "the server is shutting down" in streamed.text.split("\n\n")[-3]
    read_all(slow)
    assert "Traceback" not in capfd.readouterr().err
