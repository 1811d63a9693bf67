"""Attribution: who read what, what was copied, what it gained; the text of tokens; lines for a terminal."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.retrieval import Neighbors
from retro.sampling import (
    IncrementalDetokenizer,
    TextStream,
    as_json,
    attribute,
    sample,
    terminal_stream,
    terminal_text,
    token_gains,
    token_texts,
    wants_color,
)
from retro.sampling.sources import ReadNeighbor
from retro.text.documents import Document
from tests.stand_ins import words

WORDS = [f"w{i}" for i in range(60)]
PROMPTS = [" ".join(WORDS[:n]) for n in (1, 7, 8, 9, 25)]  # chunks have 8 tokens


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    """SentencePiece with byte fallback: a rare character is one token a byte."""
    from retro.text.tokenizer import train_tokenizer

    documents = [Document(id=str(i), text=f"the quick  brown fox {i} jumps\n\tover it\n") for i in range(40)]
    return train_tokenizer(tmp_path_factory.mktemp("tok") / "bytes", documents, vocab_size=300)


@pytest.fixture
def model(words_tokenizer, make_model):
    return make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16, eos_token_id=1, pad_token_id=0)


@pytest.fixture(params=["retro", "pointer", "paper", "joint"])
def reader(request, model, words_tokenizer):
    """A RETRO, or a fitted base of each form whose new weights are no longer at their start."""
    if request.param == "retro":
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro import retrofit

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(words_tokenizer), initializer_range=0.3, pad_token_id=0, eos_token_id=1, **sizes
    )
    fitted = retrofit(LlamaForCausalLM(config), chunk_len=8, retrieved_len=16, form=request.param).eval()
    with torch.no_grad():
        for parameter in fitted.form.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for name, parameter in fitted.form.named_parameters():
            if name.endswith(("gate.bias", "opening")):  # the gate is all but closed at its start
                parameter.fill_(2.0)
    return fitted


# the text of tokens


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("the qu🦊é漢\n\t👩‍🚀x"), max_size=25))
def test_the_texts_of_tokens_are_whole_and_join_to_the_text(bytes_tokenizer, text):
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(bytes_tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)


def test_bytes_that_make_no_character_are_held_and_then_shown(bytes_tokenizer):
    ids = bytes_tokenizer("a🦊b", add_special_tokens=False)["input_ids"]
    (fox,) = [place for place, text in enumerate(token_texts(bytes_tokenizer, ids)) if "🦊" in text]
    cut = ids[:fox] + ids[fox + 1 :]  # its last byte is missing
    assert "".join(token_texts(bytes_tokenizer, cut)) == "a\ufffd\ufffd\ufffdb"
    assert token_texts(bytes_tokenizer, ids[:fox])[-1].endswith("\ufffd")


def test_bytes_that_make_no_character_are_held_for_a_few_tokens_only(bytes_tokenizer):
    fox = bytes_tokenizer("🦊", add_special_tokens=False)["input_ids"][-4:]
    stray = fox[1]
    detokenizer = IncrementalDetokenizer(bytes_tokenizer)
    assert [detokenizer.add(token) for token in [stray] * 6] == ["", "", "", *["\ufffd"] * 3]
    assert "".join(detokenizer.add(token) for token in fox) + detokenizer.rest() == "\ufffd" * 3 + "🦊"
    texts = token_texts(bytes_tokenizer, [stray, *fox, stray])
    assert "".join(texts) == "\ufffd🦊\ufffd"


def test_a_stream_hands_on_whole_characters(bytes_tokenizer):
    ids = bytes_tokenizer("the 🦊 fox 漢", add_special_tokens=True)["input_ids"]
    prompts, texts = [], []
    stream = TextStream(bytes_tokenizer, texts.append, prompts.append)
    for _ in range(2):  # a stream may be used again
        prompts.clear(), texts.clear()
        stream.put(torch.tensor([ids[:2]]))
        for token in ids[2:]:
            stream.put(torch.tensor([token]))
        stream.end()
        assert len(prompts) == 1 and prompts[0] + "".join(texts) == "the 🦊 fox 漢"
        assert len(texts) > 3 and "🦊" in "".join(texts) and not any("\ufffd" in text for text in texts)
    with pytest.raises(ValueError, match="batch of 2 rows cannot be streamed"):
        stream.put(torch.zeros(2, 3, dtype=torch.long))


def test_a_stream_gives_what_is_generated(model, words_tokenizer, words_retriever):
    texts = []
    options = dict(max_new_tokens=20, do_sample=False, streamer=TextStream(words_tokenizer, texts.append))
    (text,) = sample(model, words_tokenizer, [PROMPTS[3]], words_retriever, **options)
    assert "".join(texts) == text.text and len(texts) > 5


# attribution


def naive_run(a: list[int], b: list[int]) -> int:
    return max(
        (n for i in range(len(a)) for j in range(len(b)) for n in range(1, len(a) + 1) if a[i : i + n] == b[j : j + n]
         and len(a[i : i + n]) == n == len(b[j : j + n])),
        default=0,
    )  # fmt: skip


def test_each_chunk_reads_what_the_one_before_it_found(model, words_tokenizer, words_retriever):
    (text,) = sample(model, words_tokenizer, [PROMPTS[4]], words_retriever, 2, max_new_tokens=40, eos_token_id=-1)
    ids = list(text.token_ids)
    assert text.prompt == PROMPTS[4] and text.num_prompt_tokens == 25 and len(ids) == 65
    assert [chunk.origin for chunk in text.chunks] == ["prompt"] * 3 + ["both"] + ["generated"] * 5
    assert text.chunks[0].neighbors == () and text.chunks[-1].stop == 65
    copied = 0
    for chunk in text.chunks[1:]:
        found = words_retriever([ids[chunk.start - 8 : chunk.start]], 2)
        assert [neighbor.row for neighbor in chunk.neighbors] == found.ids[0].tolist()
        for j, neighbor in enumerate(chunk.neighbors):
            assert neighbor.source == found.sources[0][j] and neighbor.score == pytest.approx(found.scores[0, j])
            assert neighbor.measure == "-squared L2"
            passage = found.tokens[0, j][found.mask[0, j]].tolist()
            assert neighbor.text == words_tokenizer.decode(passage, skip_special_tokens=True)
            assert len(neighbor.tokens) == len(passage) and neighbor.continuation_start == min(8, len(passage))
            written, run = ids[max(chunk.start, 25) : chunk.stop], neighbor.copied
            assert (run.num_tokens if run else 0) == naive_run(written, passage)
            if run:
                copied += 1
                assert max(chunk.start, 25) <= run.start and run.start + run.num_tokens <= chunk.stop
                same = passage[run.neighbor_start : run.neighbor_start + run.num_tokens]
                assert same == ids[run.start : run.start + run.num_tokens]
                assert run.text.strip() == words_tokenizer.decode(same, skip_special_tokens=True)
    assert copied, "nothing to check"


def test_ragged_prompts_are_attributed_as_alone(reader, words_tokenizer, words_retriever):
    model = reader
    options = dict(max_new_tokens=20, do_sample=False)
    together = sample(model, words_tokenizer, PROMPTS, words_retriever, 2, batch_size=3, **options)
    for prompt, text in zip(PROMPTS, together, strict=True):
        (alone,) = sample(model, words_tokenizer, [prompt], words_retriever, 2, **options)
        assert text == alone


def test_a_prompt_at_the_end_of_a_chunk_reads_what_it_finds(model, words_tokenizer, words_retriever):
    """One shorter than a chunk too; its text and what its chunk is a query for are those of the prompt alone."""
    prompts = [words(5, 3), words(11, 4)]
    given = (model, words_tokenizer, prompts, words_retriever)
    plain, filled = sample(*given, max_new_tokens=3), sample(*given, align="end", max_new_tokens=3)
    assert not any(chunk.neighbors for chunk in plain[0].chunks)
    for prompt, text in zip(prompts, filled, strict=True):
        assert text.prompt == prompt and text.num_prompt_tokens % text.chunk_len == 0
        last = words_tokenizer.decode(words_tokenizer(prompt)["input_ids"][-text.chunk_len :])
        found = words_retriever([last])
        read = text.chunks[text.num_prompt_tokens // text.chunk_len].neighbors
        assert [neighbor.row for neighbor in read] == found.ids[0].tolist()
    assert sample(model, words_tokenizer, prompts, align="end", max_new_tokens=4) == sample(
        model, words_tokenizer, prompts, max_new_tokens=4
    )


def test_several_texts_of_each_prompt_stand_in_a_row(model, words_tokenizer, words_retriever):
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=12, do_sample=False)
    texts = sample(model, words_tokenizer, [PROMPTS[4], PROMPTS[1]], words_retriever, **options)
    assert [text.prompt for text in texts] == [PROMPTS[4]] * 2 + [PROMPTS[1]] * 2
    assert texts[0].text != texts[1].text
    for text in texts:
        for chunk in text.chunks[1:]:
            found = words_retriever([list(text.token_ids[chunk.start - 8 : chunk.start])], 2)
            assert [neighbor.row for neighbor in chunk.neighbors] == found.ids[0].tolist()


def test_rows_end_with_their_eos(model, words_tokenizer, words_retriever):
    options = dict(max_new_tokens=60, do_sample=False)
    first, second = sample(model, words_tokenizer, PROMPTS[3:], words_retriever, eos_token_id=-1, **options)
    eos = first.token_ids[15]  # what the first row says early, and the second does not have to
    texts = sample(model, words_tokenizer, PROMPTS[3:], words_retriever, eos_token_id=eos, **options)
    assert texts[0].token_ids[9:] == first.token_ids[9 : first.token_ids.index(eos, 9) + 1]
    assert 0 not in texts[0].token_ids, "padding is no text"


def some_neighbors(mask: bool = True) -> Neighbors:
    tokens = np.arange(3, 35).reshape(1, 2, 16)
    scores = np.full((1, 2), -0.5, np.float32)
    return Neighbors(np.array([[4, 9]]), tokens, np.full(tokens.shape, mask), scores, [[None, None]])


def test_missing_neighbors_are_no_neighbors(words_tokenizer):
    ids = list(range(3, 23))
    text = attribute(words_tokenizer, ids, 4, [some_neighbors(False), None], 8)
    assert text.retrieved and all(chunk.neighbors == () for chunk in text.chunks)
    assert "nothing was found" in terminal_text(text)
    off = attribute(words_tokenizer, ids, 4, None, 8)
    assert not off.retrieved and "retrieval is off" in terminal_text(off)


def test_nothing_counts_as_copied_in_the_prompt(words_tokenizer):
    ids = list(range(3, 23))
    text = attribute(words_tokenizer, ids, 18, [some_neighbors(), some_neighbors()], 8)
    assert [neighbor.copied for neighbor in text.chunks[1].neighbors] == [None, None]
    first, second = text.chunks[2].neighbors
    assert first.copied is None and first.source is None
    assert (second.copied.start, second.copied.neighbor_start, second.copied.num_tokens) == (18, 2, 2)
    with pytest.raises(ValueError, match="num_prompt_tokens is 21"):
        attribute(words_tokenizer, ids, 21, None, 8)


def test_a_character_cut_by_a_passage_is_left_out(bytes_tokenizer):
    ids = bytes_tokenizer("🦊 the 🦊", add_special_tokens=False)["input_ids"]
    first = next(place for place, text in enumerate(token_texts(bytes_tokenizer, ids)) if text)
    cut = np.array(ids[first : len(ids) - 1])  # the last byte of one fox to the last but one of the other
    found = Neighbors(
        np.zeros((1, 1), int), cut[None, None], np.ones((1, 1, len(cut)), bool), np.zeros((1, 1), np.float32), [[None]]
    )
    text = attribute(bytes_tokenizer, ids, len(ids), [found], chunk_len=4)
    assert text.chunks[1].neighbors[0].text == " the "
    assert "".join(text.text_of(chunk.start, chunk.stop) for chunk in text.chunks) == "🦊 the 🦊"
    assert "\ufffd" not in json.dumps(as_json(text), ensure_ascii=False)


def test_json_holds_what_it_says(model, words_tokenizer, words_retriever):
    (text,) = sample(model, words_tokenizer, [PROMPTS[4]], words_retriever, gains=True, max_new_tokens=20)
    value = json.loads(json.dumps(as_json(text), allow_nan=False))
    assert "".join(value["tokens"]) == value["prompt"] + value["text"]
    assert "".join(chunk["text"] for chunk in value["chunks"]) == value["prompt"] + value["text"]
    assert len(value["gains"]) == len(value["tokens"]) == len(value["token_ids"])
    chunk = value["chunks"][3]
    assert chunk["origin"] == "both" and chunk["num_prompt_tokens"] == 1
    assert chunk["gain"] == pytest.approx(sum(value["gains"][chunk["start"] : chunk["stop"]]))
    neighbor, read = chunk["neighbors"][0], text.chunks[3].neighbors[0]
    assert neighbor["title"] == read.source.title and neighbor["document_id"] == read.source.document_id
    assert neighbor["text"] == "".join(neighbor["tokens"]) == read.text
    for name in (*value, *chunk, *neighbor, *(neighbor["copied"] or {})):
        assert f'"{name}"' in as_json.__doc__
    unknown = as_json(attribute(words_tokenizer, list(range(3, 23)), 4, [some_neighbors()], 8))
    neighbor = unknown["chunks"][1]["neighbors"][0]
    assert neighbor["document_id"] is None and unknown["gains"] is None
    assert (neighbor["measure"], neighbor["score"]) == ("score", -0.5)


def test_keys_of_length_1_are_shown_with_their_cosine(words_tokenizer):
    text = attribute(words_tokenizer, list(range(3, 23)), 4, [some_neighbors()], 8, measure="cosine")
    assert (text.chunks[1].neighbors[0].measure, text.chunks[1].neighbors[0].score) == ("cosine", 0.75)


# gains


def bits_by_hand(model, ids: list[int], found: list[Neighbors] | None) -> list[float]:
    """Bits of each token after the first, each by a forward pass over the tokens before it alone."""
    bits = []
    for end in range(1, len(ids)):
        whole, neighbors = end // 8, {}
        if found is not None and whole:
            for name, field in (("neighbor_ids", "tokens"), ("neighbor_mask", "mask")):
                neighbors[name] = torch.from_numpy(np.stack([getattr(found[u], field)[0] for u in range(whole)]))[None]
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:end]]), **neighbors).logits[0, -1].log_softmax(-1)
        bits.append(-log_p[ids[end]].item() / math.log(2))
    return bits


def test_gains_are_the_losses_off_minus_on(reader, words_tokenizer, words_retriever):
    model = reader
    (text,) = sample(model, words_tokenizer, [PROMPTS[3]], words_retriever, gains=True, max_new_tokens=18)
    ids = list(text.token_ids)
    found = [words_retriever([ids[start : start + 8]], 2) for start in range(0, len(ids) - 7, 8)]
    off, on = bits_by_hand(model, ids, None), bits_by_hand(model, ids, found)
    assert text.gains[0] is None
    assert text.gains[1:] == pytest.approx([a - b for a, b in zip(off, on, strict=True)], abs=1e-3)
    assert text.gains[1:8] == pytest.approx([0] * 7, abs=1e-4) and max(map(abs, text.gains[8:])) > 0.1
    assert text.gain_of(text.chunks[1]) == pytest.approx(sum(off[7:15]) - sum(on[7:15]), abs=1e-3)


def test_gains_without_neighbors_are_nothing(model):
    assert token_gains(model, [5, 6, 7], []) == [None, 0.0, 0.0]
    assert token_gains(model, list(range(5, 25)), [None, None]) == [None] + [0.0] * 19
    missing = token_gains(model, list(range(5, 25)), [some_neighbors(False), None])
    assert missing[1:] == pytest.approx([0.0] * 19, abs=1e-4)


# what is refused


REFUSED = {
    "an empty prompt": (["w1", ""], {}, "prompt 2 has no tokens"),
    "a prompt without tokens": ([" "], {}, "the prompt has no tokens"),
    "one text in the place of a list": ("w1 w2", {}, r"write \[text\]"),
    "a prompt that is None": ([None], {}, "the prompt is no UTF-8 text"),
    "a prompt that is no text": (["w1 \udcff"], {}, "the prompt is no UTF-8 text"),
    "a prompt beyond the positions": (
        [f"{PROMPTS[4]} " * 4],
        {},
        "a prompt of 100 tokens .* 64 positions .* a shorter",
    ),
    "a text beyond the positions": ([PROMPTS[4]], {"max_new_tokens": 40}, "at most 39 new tokens"),
    "no batch": (["w1"], {"batch_size": 0}, "batch_size is 0"),
    "gains of nothing": (["w1"], {"gains": True, "retriever": None}, "there is no retriever"),
}


def test_by_default_a_text_keeps_inside_the_positions(words_tokenizer, make_model):
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, max_position_embeddings=27)
    (text,) = sample(model, words_tokenizer, [PROMPTS[4]], eos_token_id=-1)
    assert len(text.token_ids) == 27
    with pytest.raises(ValueError, match="a prompt of 25 tokens and 3 new ones .* at most 2 new tokens"):
        sample(model, words_tokenizer, [PROMPTS[4]], max_new_tokens=3)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, words_tokenizer, words_retriever, make_model):
    prompts, options, words = REFUSED[case]
    model = make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16, max_position_embeddings=64)
    with pytest.raises(ValueError, match=words):
        sample(model, words_tokenizer, prompts, **{"retriever": words_retriever, **options})


def test_a_retriever_beside_a_model_that_reads_none(words_tokenizer, words_retriever, make_model):
    model = make_model(vocab_size=len(words_tokenizer), cca_layers=[])
    with pytest.raises(ValueError, match="the model reads no neighbors; sample without a store"):
        sample(model, words_tokenizer, ["w1"], words_retriever)


# the terminal


@pytest.fixture
def told(model, words_tokenizer, words_retriever):
    (text,) = sample(model, words_tokenizer, [PROMPTS[4]], words_retriever, gains=True, max_new_tokens=20)
    return text


def test_terminal_text_names_sources_and_copies(told):
    plain = terminal_text(told)
    assert "\x1b" not in plain and plain.startswith(told.prompt + told.text)
    for chunk in told.chunks[1:]:
        assert f"chunk {chunk.number + 1} (" in plain and f"gain {told.gain_of(chunk):+.1f} bits" in plain
        for neighbor in chunk.neighbors:
            assert f"-squared L2 {neighbor.score:.3f}  {neighbor.source.title}, chunk" in plain
    assert told.prompt not in terminal_text(told, with_text=False)


def test_color_changes_no_text(told):
    import re

    painted = terminal_text(told, color=True)
    assert painted.startswith("\x1b[2mw0 ") and re.sub(r"\x1b\[\d+m", "", painted) == terminal_text(told)


def test_copied_tokens_are_painted_as_their_neighbor(words_tokenizer):
    ids = [60, *range(10, 25)]
    painted = terminal_text(attribute(words_tokenizer, ids, 8, [some_neighbors()], 8), color=True)
    assert "copied 8 tokens" not in painted  # 17 18 19 20 21 22 23 24: the first neighbor ends with 18
    assert "copied 6 tokens: \x1b[33mw16 w17 w18 w19 w20 w21\x1b[0m" in painted
    assert "\x1b[33m w16 w17 w18 w19 w20 w21\x1b[0m" in painted.split("\n")[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_color_is_for_terminals_that_want_it(stream, variables, expected, monkeypatch):
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(stream) is expected


HOSTILE = "\x1b[2J\x9b1m\r\x00\u202egpj.exe\u2066"


def test_a_terminal_is_sent_no_control_characters(told, bytes_tokenizer):
    neighbor = told.chunks[1].neighbors[0]
    hostile = replace(
        neighbor,
        source=replace(neighbor.source, title=HOSTILE + "\nsources: none", date=HOSTILE),
        tokens=(HOSTILE, *neighbor.tokens),
    )
    chunks = (told.chunks[0], replace(told.chunks[1], neighbors=(hostile,)), *told.chunks[2:])
    shown = terminal_text(replace(told, chunks=chunks, tokens=(HOSTILE, *told.tokens[1:])))
    written = []
    stream = terminal_stream(bytes_tokenizer, written.append)
    ids = bytes_tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    stream.put(torch.tensor([ids]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    for text in (shown, "".join(written)):
        assert not set("\x1b\x9b\r\x00\u202e\u2066") & set(text)
        assert "␛[2J" in text and "[U+202E]gpj.exe" in text
    assert "\nsources: none" not in shown


def test_a_distance_that_rounds_to_nothing_has_no_sign():
    near = ReadNeighbor(0, -0.0002, None, (), 0)
    assert f"{near.rounded_score:.3f}" == "0.000"
    assert replace(near, score=-0.0006).rounded_score == -0.001
