"""A tiny random model with three stores, its engine, and its application over ASGI and at a real port."""

import asyncio
import contextlib
import math
import threading
from functools import partial

import httpx
import pytest
import torch

from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import BuildSettings, Retriever, build_store
from retro.serve.app import create_app
from retro.serve.engine import Engine
from retro.serve.limits import GenerationLimits
from retro.serve.rows import RunningRow
from retro.web.connections import make_server
from retro.web.listening import listen, url_of
from tests.conftest import TINY
from tests.stand_ins import HashingEmbedder, make_store, make_words_tokenizer, words, write_jsonl
from tests.waiting import FOREVER, wait_until

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"
)
SCRIPT = '<script>document.title="owned"</script>'
IMAGE = '</p><img/src=x/onerror="document.title=1">'


@pytest.fixture(scope="package")
def tokenizer():
    """One token a word, scripts and images among them."""
    tokenizer = make_words_tokenizer()
    tokenizer.add_tokens([SCRIPT, IMAGE])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="package")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "chunk_len": 8, "retrieved_len": 16, "max_position_embeddings": 16384}
    return RetroForCausalLM(
        RetroConfig(**{**TINY, "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0, **sizes})
    ).eval()


@pytest.fixture(scope="package")
def stores(tokenizer, tmp_path_factory):
    """main: 30 documents; hostile: 5, whose texts and titles hold markup; lone: one document of one chunk."""
    folder, embedder = tmp_path_factory.mktemp("stores"), HashingEmbedder()
    sizes = {"chunk_len": 8, "min_chunk_len": 2, "index": "none"}
    texts = [words(5 + 7 * i % 56, seed=i) for i in range(30)]
    bad = [
        {
            "id": f"{IMAGE}{i}",
            "title": f"{SCRIPT} {i}",
            "source": "javascript:alert(1)",
            "text": f"{SCRIPT} {words(9, i)} {IMAGE}",
        }
        for i in range(5)
    ]
    settings = BuildSettings(str(folder / "hostile"), [write_jsonl(folder / "bad.jsonl", bad)], "words", **sizes)
    made = {
        "main": make_store(folder, texts, tokenizer, name="main", **sizes),
        "hostile": build_store(settings, embedder, tokenizer),
        "lone": make_store(folder, [words(6, seed=99)], tokenizer, name="lone", **sizes),
    }
    return {name: Retriever(store, embedder=embedder, retrieved_len=16) for name, store in made.items()}


@pytest.fixture
def make_engine(model, tokenizer, stores):
    """make_engine(**limits): not yet running."""
    return lambda **limits: Engine(model, tokenizer, stores, GenerationLimits(**{"max_seconds": FOREVER, **limits}))


@pytest.fixture
def hold(monkeypatch):
    """hold(n): from now on no row gets more than n tokens, until it is cancelled or another hold lets it."""
    most, push = [math.inf], RunningRow.push

    def held(running, token):
        row = running.row
        wait_until(lambda: row.finished or row.cancelled or len(row.new_ids) < most[0])
        push(running, token)

    monkeypatch.setattr(RunningRow, "push", held)
    return lambda n: most.__setitem__(0, n)


@pytest.fixture
def time_runs_out(monkeypatch):
    """The time of a request is over with the first token that is written when somebody reads its answer."""
    alarms, push, call_later = [], RunningRow.push, asyncio.BaseEventLoop.call_later

    def later(loop, delay, callback, *args, **options):
        if delay == FOREVER:
            alarms.append(partial(loop.call_soon_threadsafe, callback, *args))
        return call_later(loop, delay, callback, *args, **options)

    def pushed(running, token):
        push(running, token)
        while alarms:
            alarms.pop()()

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_later", later)
    monkeypatch.setattr(RunningRow, "push", pushed)


@pytest.fixture
def ask(make_engine):
    """ask(path, body, **headers): one request to an application of its own, over ASGI."""
    return lambda path, body=None, **options: ask_all(make_engine(), [(path, body)], **options)[0]


def ask_all(engine, requests, headers=None, in_turn=False, **app_options):
    """The responses to (path, body) requests sent at once, or in turn: GET without a body, a dict as JSON, else as it
    is."""

    async def one(client, path, body):
        raw = {"content": body, "headers": {"content-type": "application/json"}}
        given = {"json": body} if isinstance(body, dict) else raw
        return await (client.get(path) if body is None else client.post(path, **given))

    async def every():
        with engine:
            transport = httpx.ASGITransport(create_app(engine, "tiny", **app_options), raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=headers, timeout=None
            ) as client:
                asked = [one(client, *request) for request in requests]
                return [await request for request in asked] if in_turn else await asyncio.gather(*asked)

    return asyncio.run(every())


def serving(engine, **app_options):
    """The URL of a real server on a free port."""
    return serving_app(create_app(engine, "tiny", **app_options))


@contextlib.contextmanager
def serving_app(app, port=0, grace_seconds=FOREVER):
    bound = listen("127.0.0.1", port)
    server = make_server(app, grace_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
