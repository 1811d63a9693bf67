"""A real server with the `openai` package as its client, many clients, clients that hang up, and the command."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from starlette.testclient import TestClient

from retro.cli import main
from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import BuildSettings, build_store
from retro.retrieval.embedding.embedder import NoEmbedder
from retro.serve.server import load_with_stores, serve_app
from retro.web.listening import read_api_key
from tests.conftest import TINY
from tests.serve.conftest import serving
from tests.stand_ins import make_words_tokenizer, words, write_jsonl
from tests.waiting import FOREVER, wait_until

PROMPT = words(20)


@pytest.fixture(scope="module")
def url(model, tokenizer, stores):
    from retro.serve.engine import Engine

    with serving(Engine(model, tokenizer, stores), api_key="s3cret-token") as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="s3cret-token", max_retries=0)


def complete(client, prompt=PROMPT, retro=None, **options):
    given = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(**given, extra_body={"retro": retro} if retro else None)


def test_a_completion(client):
    answer = complete(client, retro={"num_neighbors": 3})
    assert answer.choices[0].finish_reason == "length" and len(answer.choices[0].text.split()) == 12
    assert answer.usage.total_tokens == 32
    assert len(answer.retro["sources"][0]["neighbors"]) == 3


def test_a_streamed_completion(client):
    parts = list(complete(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.text for part in parts for choice in part.choices)
    assert text == complete(client).choices[0].text and parts[-1].usage.completion_tokens == 12
    sources = [part.retro["sources"] for part in parts if "retro" in part.model_extra]
    assert sources[0][0]["chunk"] == 2 and [chunk["chunk"] for chunk in sources[-1]] == [2, 3]


def test_a_chat_whole_and_streamed(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant" and whole.retro["sources"]
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content


def test_the_lists(client):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]


def test_errors_are_those_of_openai(client, url):
    with pytest.raises(openai.BadRequestError, match="the prompt has 10000 tokens") as raised:
        complete(client, words(10_000))
    assert raised.value.code == "context_length_exceeded" and raised.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="its model is tiny"):
        complete(client, model="gpt-4")
    with pytest.raises(openai.AuthenticationError, match="the bearer token is missing or wrong"):
        complete(client.with_options(api_key="wrong"))
    with pytest.raises(openai.APIStatusError) as raised:
        complete(client, "x " * 600_000)
    assert raised.value.status_code == 413


def test_an_error_in_a_stream_reaches_the_client(make_engine, time_runs_out):
    with serving(make_engine(max_new_tokens=15_000)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        parts = complete(client, max_tokens=15_000, stream=True)
        with pytest.raises(openai.APIError, match="not finished in 600 seconds"):
            list(parts)


def test_32_clients_at_once_get_what_they_get_alone(client):
    ways = [{}, {"retrieval": False}, {"store": "hostile"}, {"store": "lone"}, {"num_neighbors": 1}]
    asked = [
        {"prompt": words(1 + 5 * i % 37, seed=i), "retro": ways[i % 5], "max_tokens": 4 + i % 9} for i in range(32)
    ]
    alone = [complete(client, **options).choices[0].text for options in asked]
    together: list = [None] * 32

    def ask(i):
        if i % 2:
            together[i] = complete(client, **asked[i]).choices[0].text
        else:
            parts = complete(client, **asked[i], stream=True)
            together[i] = "".join(choice.text for part in parts for choice in part.choices)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len(set(alone)) > 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_costing(make_engine, hold, stream):
    engine = make_engine(max_new_tokens=15_000)
    hold(100)
    with serving(engine) as url:
        body = {"prompt": PROMPT, "max_tokens": 15_000, "temperature": 0, "stream": stream}
        staying = threading.Thread(target=lambda: answers.append(complete(client, max_tokens=60).choices[0].text))
        client, answers = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), []
        expected = complete(client, max_tokens=60).choices[0].text
        connection = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
        content = json.dumps(body).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        connection.sendall("\r\n".join(head).encode() + content)
        staying.start()
        lane = engine._lanes["main"]
        written = lambda: [row for row in lane.running if row.max_new_tokens == 15_000 and row.new_ids]  # noqa: E731
        wait_until(written)
        if stream:
            assert connection.recv(100)
        (leaving,) = written()
        connection.close()
        wait_until(lambda: leaving.finished)
        assert len(leaving.new_ids) <= 100
        staying.join()
        wait_until(lambda: engine.load == {"waiting": 0, "running": 0})
        assert answers == [expected]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model and two stores that are searched by their words, so that no embedder is loaded."""
    folder, tokenizer = tmp_path_factory.mktemp("served"), make_words_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "chunk_len": 8, "retrieved_len": 16}
    model = RetroForCausalLM(RetroConfig(**{**TINY, **sizes, "eos_token_id": 1, "pad_token_id": 0}))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "run")
    for number in range(2):
        records = [{"id": f"{number}-{i}", "text": words(30, seed=i + 10 * number)} for i in range(5)]
        inputs = [write_jsonl(folder / f"{number}.jsonl", records)]
        settings = BuildSettings(
            str(folder / f"store{number}"), inputs, "words", embedder="none", chunk_len=8, min_chunk_len=2
        )
        build_store(settings, NoEmbedder(), tokenizer)
    return folder


def test_the_command_serves_until_it_is_told_to_stop(folders):
    key = folders / "key"
    key.write_text("s3cret-token\n")
    given = ["--store", str(folders / "store0"), "--store", f"second={folders / 'store1'}", "--port", "0"]
    argv = ["serve", str(folders / "run"), *given, "--api-key-file", str(key), "--max-new-tokens", "50"]
    argv += ["--grace-seconds", str(FOREVER)]
    served = subprocess.Popen(
        [sys.executable, "-m", "retro.cli", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    try:
        lines.append(next(line for line in served.stdout if "http://" in line))
        assert lines[0].startswith("run with store0, second: http://127.0.0.1:")
        reader = threading.Thread(target=lambda: lines.extend(served.stdout))
        reader.start()
        client = OpenAI(base_url=f"{lines[0].split()[-1]}/v1", api_key="s3cret-token", max_retries=0)
        second = complete(client, model="run", retro={"store": "second"})
        assert second.retro["sources"][0]["neighbors"][0]["document_id"].startswith("1-")
        with pytest.raises(openai.BadRequestError, match="at most 50"):
            complete(client, model="run", max_tokens=51)
        parts = iter(complete(client, model="run", max_tokens=50, stream=True))
        next(parts)
        served.send_signal(signal.SIGTERM)
        assert list(parts)[-1].choices[0].finish_reason == "length", "what had begun was finished"
        assert served.wait(FOREVER) == 0
        reader.join()
    finally:
        served.kill()
    assert "s3cret" not in "".join(lines)


REFUSED = {
    "two stores of one name": (["--store", "{store0}", "--store", "store0={store1}"], "two stores are called store0"),
    "no such store": (["--store", "{store0}x"], "store0x"),
    "a limit of nothing": (["--store", "{store0}", "--max-batch", "0"], "max_batch is 0"),
    "a limit that is no number": (["--store", "{store0}", "--max-seconds", "nan"], "max_seconds is nan"),
    "no such token": (["--store", "{store0}", "--api-key-file", "{store0}/no"], "No such file"),
    "a port in use": (["--store", "{store0}", "--port", "{port}"], "cannot listen on 127.0.0.1 port {port}"),
    "a port that is none": (["--store", "{store0}", "--port", "99999"], "port 99999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(folders, capsys, case):
    argv, words = REFUSED[case]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"store0": folders / "store0", "store1": folders / "store1", "port": taken.getsockname()[1]}
        fill = lambda text: text.format(**names)  # noqa: E731
        assert main(["serve", str(folders / "run"), *map(fill, argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("retro: error: ") and fill(words) in error[-1]


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("RETRO_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("RETRO_API_KEY", "from-environment")
    assert read_api_key(None) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_api_key(str(tmp_path / "key")) == "from-file"
    for wrong in ("", "two words", "schlüssel", "two\nlines"):
        (tmp_path / "key").write_text(wrong)
        with pytest.raises(ValueError, match="the token in .*key is empty or not ASCII"):
            read_api_key(str(tmp_path / "key"))


def test_who_may_ask_whom(make_engine, caplog):
    def codes(host, api_key, *names):
        app, bound = serve_app(make_engine(), "tiny", host, 0, api_key)
        bound.close()
        client = TestClient(app)
        return [client.get("/", headers={"Host": name}).status_code for name in names]

    assert (
        codes("127.0.0.2", None, "127.0.0.2:80", "localhost:80", "[::1]:80", "evil.example", "")
        == [200] * 3 + [403] * 2
    )
    assert codes("127.0.0.1", "token", "proxy.example") == [200] and not caplog.records
    assert codes("0.0.0.0", "token", "proxy.example") == [200] and not caplog.records
    assert codes("0.0.0.0", None, "me.example") == [200] and "give --api-key-file" in caplog.text


def test_stores_of_one_embedder_share_it(tmp_path, model, tokenizer, monkeypatch):
    from tests.stand_ins import HashingEmbedder, make_store

    made = []

    def load(description, folder):
        made.append(HashingEmbedder())
        return made[-1]

    monkeypatch.setattr("retro.retrieval.search.searchers.embedder_from", load)
    paths = []
    for name in ("a", "b"):
        paths.append(str(make_store(tmp_path, [words(9)], tokenizer, name=name, chunk_len=8).path))
    same, _, opened = load_with_stores(model, paths)
    assert same is model and list(opened) == ["a", "b"] and len(made) == 1
    assert os.path.samefile(opened["b"].store.path, paths[1])
