"""The routes over ASGI: answers, and what is refused and how."""

import json
import math

import pytest

from retro.retrieval.remote.server import create_retrieval_app
from retro.serve.app import create_app
from retro.serve.engine import Engine
from retro.serve.lanes import QueueFull
from tests.serve.conftest import SCRIPT, ask_all
from tests.stand_ins import words

PROMPT = words(20)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "w3 w4"}]


def test_a_completion_with_its_sources(ask):
    answer = ask(COMPLETIONS, {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion" and choice["finish_reason"] == "length"
    assert len(choice["text"].split()) == 12
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 12, "total_tokens": 32}
    assert {name: answer["retro"][name] for name in ("retrieval", "store", "num_neighbors")} == {
        "retrieval": True,
        "store": "main",
        "num_neighbors": 2,
    }
    assert [chunk["chunk"] for chunk in answer["retro"]["sources"]] == [2, 3]
    neighbor = answer["retro"]["sources"][0]["neighbors"][0]
    assert neighbor["title"].startswith("title ") and neighbor["document_id"]
    assert neighbor["measure"] == "-squared L2" and neighbor["score"] <= 0


def test_retrieval_off_another_store_and_k(make_engine):
    bodies = [
        {"prompt": PROMPT, "temperature": 0, "retro": retro}
        for retro in (
            {},
            {"retrieval": False},
            {"store": "hostile"},
            {"num_neighbors": 3},
            {"store": "lone", "num_neighbors": 5},
        )
    ]
    plain, off, hostile, three, lone = (
        response.json() for response in ask_all(make_engine(), [(COMPLETIONS, body) for body in bodies])
    )
    assert len({answer["choices"][0]["text"] for answer in (plain, off, hostile)}) == 3
    assert off["retro"] | {"seed": 0} == {
        "retrieval": False, "store": None, "num_neighbors": None, "seed": 0, "sources": []
    }  # fmt: skip
    assert SCRIPT in json.dumps(hostile["retro"]["sources"]).replace('\\"', '"')
    assert len(three["retro"]["sources"][0]["neighbors"]) == 3
    assert lone["retro"]["num_neighbors"] == 1 and lone["retro"]["sources"][0]["neighbors"][0]["document_id"] == "d0"


def test_several_prompts_and_choices(ask):
    body = {"prompt": ["w1 w2", PROMPT], "n": 2, "max_tokens": 6, "seed": 5, "echo": True}
    answer = ask(COMPLETIONS, body).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(text.startswith("w1 w2 ") for text in texts[:2]) and all(text.startswith(PROMPT) for text in texts[2:])
    assert texts[0] != texts[1]
    assert answer["usage"]["prompt_tokens"] == 22
    assert {chunk["choice"] for chunk in answer["retro"]["sources"] if chunk["neighbors"]} == {2, 3}
    assert ask(COMPLETIONS, body).json()["choices"] == answer["choices"]
    assert ask(COMPLETIONS, body | {"seed": 6}).json()["choices"] != answer["choices"]


def test_prompts_as_tokens(ask, tokenizer):
    options = {"temperature": 0, "max_tokens": 5}
    by_text = ask(COMPLETIONS, {"prompt": "w1 w2 w3", **options}).json()["choices"]
    ids = tokenizer("w1 w2 w3")["input_ids"]
    assert ask(COMPLETIONS, {"prompt": ids, **options}).json()["choices"] == by_text
    assert ask(COMPLETIONS, {"prompt": [ids], **options}).json()["choices"] == by_text


def test_chat_says_what_its_template_completes_to(ask):
    messages = [{"role": "system", "content": "w8"}, {"role": "user", "content": [{"type": "text", "text": "w3 w4"}]}]
    answer = ask(CHAT, {"messages": messages, "temperature": 0, "max_completion_tokens": 7}).json()
    plain = ask(COMPLETIONS, {"prompt": "w8 w3 w4 w1", "temperature": 0, "max_tokens": 7}).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert answer["usage"] == plain["usage"]


def test_the_length_is_what_the_models_positions_leave(model, tokenizer, stores, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 24)
    requests = [
        ("/v1/models", None),
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 5}),
        (COMPLETIONS, {"prompt": words(24)}),
        (COMPLETIONS, {"prompt": PROMPT, "temperature": 0}),
        (CHAT, {"messages": HELLO, "temperature": 0}),
    ]
    models, long, longer, default, chat = (r.json() for r in ask_all(Engine(model, tokenizer, stores), requests))
    assert models["data"][0]["retro"]["max_prompt_tokens"] == models["data"][0]["retro"]["max_new_tokens"] == 23
    assert "max_tokens is 5; at most 4 can follow" in long["error"]["message"]
    assert "24 tokens; this server reads at most 23" in longer["error"]["message"]
    assert default["usage"]["completion_tokens"] == 4 and chat["usage"]["completion_tokens"] == 21


def test_stop_strings(ask):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    text = ask(COMPLETIONS, body).json()["choices"][0]["text"]
    stop = " ".join(text.split()[5:7])
    (choice,) = ask(COMPLETIONS, body | {"stop": ["never", stop]}).json()["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    streamed = sse(ask(COMPLETIONS, body | {"stop": stop, "stream": True}))
    assert "".join(c["text"] for part in streamed for c in part["choices"]) == choice["text"]


def sse(response) -> list[dict]:
    """The events of a stream but its [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_is_the_answer_in_pieces(ask, path):
    asked = {"messages": HELLO} if path == CHAT else {"prompt": PROMPT, "echo": True}
    body = {**asked, "temperature": 0, "max_tokens": 20}
    whole = ask(path, body).json()
    parts = sse(ask(path, body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    assert all(part["usage"] is None for part in parts[:-1]) and len({part["id"] for part in parts}) == 1
    choices = [choice for part in parts for choice in part["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    sources = {chunk["chunk"]: chunk for part in parts for chunk in part.get("retro", {}).get("sources", [])}
    assert [sources[number] for number in sorted(sources)] == whole["retro"]["sources"] != []
    if path == CHAT:
        assert choices[0]["delta"]["role"] == "assistant"
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert len(choices) > 10


def test_lists_and_health(make_engine):
    paths = ["/v1/models", "/v1/models/tiny", "/v1/stores", "/health", "/v1/models/other"]
    models, model, stores, health, other = ask_all(make_engine(), [(path, None) for path in paths])
    assert models.json()["data"] == [model.json()] and model.json()["id"] == "tiny"
    assert [(s["id"], s["num_documents"], s["max_num_neighbors"]) for s in stores.json()["data"]] == [
        ("main", 30, 16),
        ("hostile", 5, 10),
        ("lone", 1, 1),
    ]
    assert health.json() == {"status": "ok", "waiting": 0, "running": 0, "stores_down": []}
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"


ACCEPTED = {
    "neutral values": {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "user": "me"},
    "as many as there are": {"n": 2, "best_of": 2, "suffix": ""},
    "nulls": dict.fromkeys(["max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "suffix", "retro"]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_changes_nothing_is_taken(ask, case):
    assert ask(COMPLETIONS, {"prompt": "w1", **ACCEPTED[case]}).status_code == 200


REFUSED = {
    "an unknown field": ({"temprature": 1}, "temprature", "temprature is no field"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is 0.5"),
    "logprobs of too many": ({"logprobs": 6}, "logprobs", "logprobs is 6"),
    "a bias": ({"logit_bias": {"5": 100}}, "logit_bias", 'logit_bias is {"5": 100}'),
    "the best of several": ({"n": 2, "best_of": 3}, "best_of", "best_of is 3, and n 2"),
    "a suffix": ({"suffix": "w1"}, "suffix", 'suffix is "w1"'),
    "another model's name": ({"model": "gpt-4"}, "model", "its model is tiny"),
    "a temperature of letters": ({"temperature": "hot"}, "temperature", 'temperature is "hot"'),
    "a temperature above 2": ({"temperature": 2.5}, "temperature", "temperature is 2.5"),
    "a top_p below 0": ({"top_p": -0.1}, "top_p", "top_p is -0.1"),
    "fewer than no tokens": ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    "too many tokens": ({"max_tokens": 5000}, "max_tokens", "max_tokens is 5000; at most 1024"),
    "true as a number": ({"max_tokens": True}, "max_tokens", "max_tokens is true"),
    "too many texts": ({"n": 9}, "n", "make 9 texts; ask for 1 to 8"),
    "no prompts": ({"prompt": []}, "n", "make 0 texts"),
    "a number of 4,300 digits": ({"n": 10**4299, "prompt": ["w1"] * 10}, "n", "less than 9223372036854775808"),
    "a prompt of spaces": ({"prompt": "   "}, "prompt", "the prompt has no tokens"),
    "an empty prompt": ({"prompt": ""}, "prompt", "the prompt has no tokens"),
    "one empty prompt of two": ({"prompt": ["w1", ""]}, "prompt", "the prompt has no tokens"),
    "a prompt of 10,000 tokens": ({"prompt": words(10_000)}, "prompt", "the prompt has 10000 tokens"),
    "a token that is none": ({"prompt": [5, 10**6]}, "prompt", "1000000 is no token"),
    "a prompt that is no text": ({"prompt": 5}, "prompt", "prompt is 5"),
    "half a character": ({"prompt": "\ud83d"}, "prompt", "half of a surrogate pair"),
    "a name with a hyphen": ({"top-p": 1}, "top-p", "top-p is no field"),
    "half a character as a field": ({"\ud83d": 1}, None, "half of a surrogate pair"),
    "half a character as a stop string": ({"stop": ["\ud83d"]}, "stop", "half of a surrogate pair"),
    "an empty stop string": ({"stop": ["w1", ""]}, "stop", "stop holds an empty string"),
    "five stop strings": ({"stop": list("abcde")}, "stop", 'stop is ["a", "b", "c", "d", "e"]'),
    "stream options alone": ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    "an unknown store": ({"retro": {"store": "x"}}, "retro.store", "the stores are main, hostile, lone"),
    "more neighbors than the limit": ({"retro": {"num_neighbors": 17}}, "retro.num_neighbors", "at most 16"),
    "no neighbors": ({"retro": {"num_neighbors": 0}}, "retro.num_neighbors", "num_neighbors is 0"),
    "a store beside retrieval off": ({"retro": {"retrieval": False, "store": "main"}}, "retro.store", "leave one out"),
    "an unknown option": ({"retro": {"k": 2}}, "retro.k", "retro.k is no field"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(model, tokenizer, stores):
    """The responses to all of REFUSED, asked of one application."""
    bodies = [json.dumps({"prompt": "w1", **given}).encode() for given, *_ in REFUSED.values()]
    responses = ask_all(Engine(model, tokenizer, stores), [(COMPLETIONS, body) for body in bodies])
    return dict(zip(REFUSED, responses, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_sentence(refusals, case):
    _, param, said = REFUSED[case]
    response = refusals[case]
    assert response.status_code == (404 if "model" in case else 400), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert said in error["message"] and "\n" not in error["message"] and len(error["message"]) < 200
    assert param in (None, error["param"])


REFUSED_CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "a role that is none": ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "tools": ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools is"),
    "JSON mode": ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format is"),
    "likeliest tokens alone": ({"messages": HELLO, "top_logprobs": 2}, "set logprobs to true"),
    "too many likeliest tokens": ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    "no tokens": ({"messages": HELLO, "max_tokens": 0}, "max_tokens is 0"),
    "what the template refuses": ({"messages": [{"role": "tool", "content": "x"}]}, "no tools here"),
    "two lengths": ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    "a prompt": ({"messages": HELLO, "prompt": "w1"}, "prompt is no field"),
}  # fmt: skip


def test_refuses_chats_in_one_sentence(make_engine):
    responses = ask_all(make_engine(), [(CHAT, body) for body, _ in REFUSED_CHATS.values()])
    for response, (case, (_, said)) in zip(responses, REFUSED_CHATS.items(), strict=True):
        assert response.status_code == 400 and said in response.json()["error"]["message"], (case, response.text)


def test_a_model_without_a_chat_template(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (response,) = ask_all(make_engine(), [(CHAT, {"messages": HELLO})])
    assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"


MALFORMED = {
    "cut": b"{",
    "empty": b"",
    "a list": b"[]",
    "a string": b'"x"',
    "no UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "no number": b'{"prompt": "w1", "temperature": NaN}',
    "no finite number": b'{"prompt": "w1", "temperature": 1e999}',
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_bodies(ask, case):
    response = ask(COMPLETIONS, MALFORMED[case])
    assert response.status_code == 400 and 0 < len(response.json()["error"]["message"]) < 200, response.text


def test_a_body_that_is_too_large(make_engine):
    async def pieces():
        for _ in range(11):
            yield b" " * 100

    bodies = [b" " * 1001, b" " * 1000, pieces()]
    declared, fitting, counted = ask_all(make_engine(max_request_bytes=1000), [(COMPLETIONS, body) for body in bodies])
    assert (declared.status_code, fitting.status_code, counted.status_code) == (413, 400, 413)
    assert declared.json()["error"]["code"] == "request_too_large"


def test_routes_that_are_not_there(ask):
    assert ask("/v1/embeddings", {}).status_code == 404
    response = ask(COMPLETIONS)
    assert response.status_code == 405 and "does not take GET" in response.json()["error"]["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("kind", ["serve", "serve-store"])
def test_the_openapi_page_declares_errors(kind, make_engine, stores):
    """schemathesis found no answer that these pages do not declare."""
    app = create_app(make_engine(), "tiny") if kind == "serve" else create_retrieval_app(stores["main"])
    page, most = app.openapi(), {"/v1/completions": {"429", "503", "504"}, "/v1/search": {"409", "429", "503", "504"}}
    for path, methods in page["paths"].items():
        (told,) = (operation["responses"] for operation in methods.values())
        v1 = {"401"} if path.startswith("/v1") else set()
        assert {"200", "400", "403", "404", "413", "500", "default"} | v1 | most.get(path, set()) <= told.keys()
        assert "422" not in told
        for error in v1 | {"400", "default"}:
            (body,) = told[error]["content"].items()
            assert body == ("application/json", {"schema": {"$ref": "#/components/schemas/ErrorBody"}})


def test_a_full_queue_and_a_slow_model(make_engine, hold):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    engine = make_engine(max_queue=2, max_batch=2)
    submit = engine.submit

    def until_full(rows):
        try:
            submit(rows)
        except QueueFull:
            hold(math.inf)
            raise

    engine.submit = until_full
    hold(0)
    responses = ask_all(engine, [(COMPLETIONS, body)] * 12)
    codes = [response.status_code for response in responses]
    assert set(codes) == {200, 429} and codes[:2] == [200, 200]
    refused = responses[codes.index(429)]
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
    endless = body | {"max_tokens": 15_000}
    slow = ask_all(make_engine(max_seconds=0.05, max_new_tokens=15_000), [(COMPLETIONS, endless)])[0]
    assert slow.status_code == 504 and "0.05 seconds" in slow.json()["error"]["message"]


def test_a_stream_that_runs_out_of_time_says_so_in_the_stream(make_engine, time_runs_out):
    body = {"prompt": PROMPT, "max_tokens": 15_000, "stream": True, "temperature": 0}
    parts = sse(ask_all(make_engine(max_new_tokens=15_000), [(COMPLETIONS, body)])[0])
    assert "error" not in parts[0] and "600 seconds" in parts[-1]["error"]["message"]


def test_a_failing_model_is_a_500_and_no_secret(make_engine, model, tokenizer, stores):
    engine = Engine(model, tokenizer, {"main": Failing(stores["main"])})
    failed, again = ask_all(engine, [(COMPLETIONS, {"prompt": PROMPT}), (COMPLETIONS, {"prompt": "w1"})])
    assert failed.status_code == 500 and "secret" not in failed.text and again.status_code == 500
    assert ask_all(make_engine(), [(COMPLETIONS, {"prompt": PROMPT})])[0].status_code == 200


class Failing:
    def __init__(self, retriever):
        self.index, self.store = retriever.index, retriever.store

    def __call__(self, queries, **options):
        raise RuntimeError("a secret path")


def test_all_neighbors_missing(make_engine):
    """Chunks of unknown words have no text to search with: retrieval is on, and nothing is found."""
    body = {"prompt": "x " * 8, "temperature": 0, "max_tokens": 3}
    response = ask_all(make_engine(), [(COMPLETIONS, body)])[0].json()
    assert [chunk["neighbors"] for chunk in response["retro"]["sources"]] == [[]]
    assert len(response["choices"][0]["text"].split()) == 3


def test_a_long_prompt_where_it_is_allowed(make_engine):
    body = {"prompt": words(10_000), "max_tokens": 2, "temperature": 0, "retro": {"retrieval": False}}
    (response,) = ask_all(make_engine(max_prompt_tokens=10_000), [(COMPLETIONS, body)])
    assert response.json()["usage"]["prompt_tokens"] == 10_000


def test_the_bearer_token(make_engine, caplog):
    caplog.set_level("DEBUG")
    for token, expected in [(None, 401), ("wrong", 401), ("s3cret-tokem", 401), ("s3cret-token", 200), ("é", 401)]:
        headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
        paths = ["/v1/models", "/health", "/", "/static/page.js"]
        requests = [(COMPLETIONS, {"prompt": "w1"}), (COMPLETIONS, b"{"), *((path, None) for path in paths)]
        answers = ask_all(make_engine(), requests, headers=headers, api_key="s3cret-token")
        codes = [answer.status_code for answer in answers]
        assert codes == [expected, 400 if expected == 200 else 401, expected, 200, 200, 200]
        if expected == 401:
            assert answers[0].json()["error"]["code"] == "invalid_api_key"
            assert answers[0].headers["www-authenticate"] == "Bearer"
    assert "s3cret" not in caplog.text


def test_the_name_by_which_the_server_is_called(make_engine):
    (by_name,) = ask_all(make_engine(), [("/health", None)], hosts=["localhost"])
    (by_other,) = ask_all(
        make_engine(), [("/health", None)], hosts=["localhost"], headers={"Host": "evil.example:8000"}
    )
    assert (by_name.status_code, by_other.status_code) == (200, 403)


def test_the_page_loads_nothing_from_elsewhere(make_engine):
    answers = ask_all(
        make_engine(), [(path, None) for path in ("/", "/static/page.js", "/static/page.css", "/v1/stores")]
    )
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    page, script, style, _ = (answer.text for answer in answers)
    for text in (page, script, style):
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert "innerHTML" not in script and "<script>" not in page and "onclick" not in page
