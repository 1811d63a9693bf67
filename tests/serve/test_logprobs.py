"""Log-probabilities: of prompts and of what is written, whole and streamed, in completions and in chats."""

import numpy as np
import pytest
import torch
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from retro.retrofit import retrofit
from retro.serve.engine import Engine
from tests.serve.conftest import ask_all
from tests.serve.test_app import CHAT, COMPLETIONS, HELLO, PROMPT, sse
from tests.serve.test_rows import byte_fallback, byte_level, running


def make_fit(vocab_size):
    """A fit that shows what it reads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, eos_token_id=1, initializer_range=0.3, **sizes)).eval()
    fitted = retrofit(base, chunk_len=8, retrieved_len=16).eval()
    with torch.no_grad():
        for name, weight in fitted.form.named_parameters():
            if name.endswith(("gate", "opening")):
                weight.fill_(1.0)
    return fitted


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("fitted", [False, True], ids=["a RETRO", "a fit"])
def test_log_probabilities_of_prompt_and_text(fitted, on, model, tokenizer, stores):
    """As a forward pass over all of it gives them; prompts of other lengths, and other requests, change nothing."""
    if fitted:
        model = make_fit(len(tokenizer))
    prompts = [list(range(5, 25)), list(range(7, 16))]
    asked = {"prompt": prompts, "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    asked |= {} if on else {"retro": {"retrieval": False}}
    both = [(COMPLETIONS, asked), (COMPLETIONS, asked | {"echo": False})]
    echoed, plain = (r.json()["choices"] for r in ask_all(Engine(model, tokenizer, stores), both))
    for prompt, choice, short in zip(prompts, echoed, plain, strict=True):
        told = choice["logprobs"]
        found = stores["main"](np.array(prompt[: len(prompt) // 8 * 8]).reshape(-1, 8), num_neighbors=2)
        pairs = (("ids", found.tokens), ("mask", found.mask))
        neighbors = {f"neighbor_{name}": torch.from_numpy(x)[None] for name, x in pairs} if on else {}
        with torch.no_grad():
            log_p = model(torch.tensor([prompt]), **neighbors).logits[0].log_softmax(-1)
        expected = [None, *(log_p[i, token].item() for i, token in enumerate(prompt[1:])), log_p[-1].max().item()]
        assert told["token_logprobs"][1 : len(expected)] == pytest.approx(expected[1:], abs=1e-4)
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        for i, (own, top) in enumerate(zip(told["token_logprobs"], told["top_logprobs"], strict=True)):
            assert i == 0 or own in top.values()
            assert i in (0, *range(len(expected), 99)) or max(top.values()) == pytest.approx(
                log_p[i - 1].max().item(), abs=1e-4
            )
        assert "".join(told["tokens"]) == choice["text"]
        assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(len(told["tokens"]))]
        assert short["logprobs"]["token_logprobs"] == pytest.approx(told["token_logprobs"][len(prompt) :], abs=1e-4)


def test_prompts_alone_are_scored(make_engine):
    """Without a token being written; a first token has no probability, nor has a prompt of one any other."""
    asked = {"prompt": ["w1", PROMPT], "logprobs": 1, "echo": True, "temperature": 0}
    bodies = [asked | {"max_tokens": n} for n in (0, 1)]
    (one, alone), (_, written) = (
        r.json()["choices"] for r in ask_all(make_engine(), [(COMPLETIONS, b) for b in bodies])
    )
    assert one["text"] == "w1" and one["logprobs"]["token_logprobs"] == [None] == one["logprobs"]["top_logprobs"]
    assert alone["text"] == PROMPT and len(alone["logprobs"]["tokens"]) == 20 and alone["finish_reason"] == "length"
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(written["logprobs"]["token_logprobs"][1:-1])


def streamed(parts, path):
    """The text and the log-probabilities of a stream's pieces; text and the tokens that begin in it come at once."""
    choices = [choice for part in parts for choice in part["choices"]]
    pieces = [choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices]
    told = [choice["logprobs"] for choice in choices]
    assert all(bool(piece) <= bool(given) for piece, given in zip(pieces, told, strict=True))
    names = ["content"] if path == CHAT else ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    return "".join(pieces), {name: [x for given in told if given for x in given[name]] for name in names}


@pytest.mark.parametrize("stop", [None, "w6"], ids=["whole", "stopped"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_tells_what_the_whole_answer_tells(make_engine, path, stop):
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    asked = asked if path == CHAT else {"prompt": PROMPT, "logprobs": 2, "echo": True}
    asked |= {"max_tokens": 12, "seed": 3, "stop": stop}
    whole, stream = ask_all(make_engine(), [(path, asked), (path, asked | {"stream": True})])
    (choice,), parts = whole.json()["choices"], sse(stream)
    text, told = streamed(parts, path)
    assert {name: choice["logprobs"][name] for name in told} == told
    if path == CHAT:
        assert text == choice["message"]["content"]
        for part in parts:
            ChatCompletionChunk.model_validate(part)
        names = "".join(token["token"] for token in told["content"])
        assert b"".join(bytes(token["bytes"]) for token in told["content"]).decode() == names
    else:
        names = "".join(told["tokens"])
        assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(len(told["tokens"]))]
    assert names == text if stop is None else names.startswith(text) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("top", [None, 0, 3])
def test_a_chat_tells_what_its_completion_tells(make_engine, top):
    same = {"temperature": 0, "max_tokens": 7}
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": top, **same}
    bodies = [(CHAT, asked), (COMPLETIONS, {"prompt": "w3 w4 w1", "logprobs": 3, **same})]
    chat, plain = (response.json() for response in ask_all(make_engine(), bodies))
    content, told = chat["choices"][0]["logprobs"]["content"], plain["choices"][0]["logprobs"]
    ChatCompletion.model_validate(chat)
    assert [token["token"] for token in content] == told["tokens"]
    assert [token["logprob"] for token in content] == pytest.approx(told["token_logprobs"], abs=1e-4)
    for token, likeliest in zip(content, told["top_logprobs"], strict=True):
        assert [given["token"] for given in token["top_logprobs"]] == list(likeliest)[: top or 0]


def test_a_token_of_no_probability_is_told_as_openai_tells_it(make_engine, model, monkeypatch):
    """JSON has no -inf."""
    forward = model.forward

    def without_most(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., 3:] = -torch.inf
        return out

    monkeypatch.setattr(model, "forward", without_most)
    asked = {"prompt": "w1 w2", "max_tokens": 0, "logprobs": 0, "echo": True}
    (answer,) = ask_all(make_engine(), [(COMPLETIONS, asked)])
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [None, -9999.0]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_tokens_are_those_of_the_text(make):
    """A character of four tokens is told of when it is whole, an end that has no text with the end."""
    tokenizer = make()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    ids = [*tokenizer("a🦊b")["input_ids"], tokenizer.eos_token_id]
    row, sent = running(tokenizer, tokenizer("b")["input_ids"], frozenset([tokenizer.eos_token_id]), num_logprobs=1)
    for token in ids:
        logits = torch.zeros(len(tokenizer))
        logits[token] = 9.0
        row.push(row.draw(logits))
    pieces = [len(value) if kind == "logprobs" else value for kind, value in sent]
    assert pieces == [1, "a", 4, "🦊", 1, "b", 1, "stop"]
    told = [token for kind, value in sent if kind == "logprobs" for token in value]
    assert b"".join(token.token.bytes or b"" for token in told).decode() == "a🦊b"
    assert [token.token.name for token in told][:3] == ["a", "bytes:\\xf0", "bytes:\\x9f"] and told[
        -1
    ].token.name == "</s>"
    assert [token.start for token in told] == [0, 1, 1, 1, 1, 2, 3]
    assert all(token.top[0] == token.token for token in told)
