"""What a row does with its tokens: stop strings, drawing, whole characters."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

from retro.retrieval import Neighbors, Source
from retro.serve.rows import Row, RunningRow, StopStrings, chunks_json

letters = st.text("ab.", max_size=12)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_whole_text_has_the_first(pieces, stops):
    whole = "".join(pieces)
    found = [whole.find(stop) for stop in stops if stop in whole]
    cutter, out, stopped = StopStrings(stops), "", False
    for piece in pieces:
        text, stopped = cutter.push(piece)
        out += text
        if stopped:
            break
        assert whole.startswith(out) and len("".join(pieces)) - len(out) >= 0
    out += "" if stopped else cutter.flush()
    assert stopped == bool(found)
    # of two stop strings the one that is complete first wins; within one piece the one that begins first
    assert (
        out == whole
        if not found
        else out in {whole[:place] for place in range(len(whole)) if whole.startswith(tuple(stops), place)}
    )


def test_nothing_is_held_back_that_cannot_begin_a_stop_string():
    cutter = StopStrings(["###"])
    assert cutter.push("a#") == ("a", False)
    assert cutter.push("b##") == ("#b", False)
    assert cutter.push("#c") == ("", True)


def running(tokenizer, prompt=(5,), end_ids=frozenset(), **options):
    """A row that retrieves nothing, and the list of what it sends."""
    sent = []
    row = Row(list(prompt), **{"max_new_tokens": 100, **options}, send=lambda kind, value: sent.append((kind, value)))
    return RunningRow(row, tokenizer, end_ids, 8, None), sent


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.7, 0.3), (1.0, 0.0)])
def test_draws_as_hugging_faces_warpers_say(tokenizer, temperature, top_p):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    expected = (
        torch.softmax(TopPLogitsWarper(top_p)(None, warped), -1)[0] if top_p < 1 else torch.softmax(warped, -1)[0]
    )
    row, _ = running(tokenizer, temperature=temperature, top_p=top_p, seed=1)
    drawn = torch.bincount(torch.tensor([row.draw(logits[0]) for _ in range(4000)]), minlength=30) / 4000
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 0.04


def test_a_hair_above_zero_is_greedy(tokenizer):
    logits = torch.tensor([-3.0, 4.0, 3.9])
    assert {running(tokenizer, temperature=t)[0].draw(logits) for t in (0.0, 5e-324, 1e-30)} == {1}


def byte_level():
    """A token a byte, as GPT-2 spells them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback():
    """Letters as they are, all else as bytes, as SentencePiece does it; spaces are marked."""
    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "▁"]
    backend = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["a🦊🦊b é", " a 漢字b", "👩‍👩‍👧"])
@pytest.mark.parametrize("prompt", ["ab", "a🦊"])
def test_characters_come_whole_and_the_first_space_stays(make, text, prompt):
    tokenizer = make()
    ids = tokenizer(prompt + text)["input_ids"][len(tokenizer(prompt)["input_ids"]) :]
    row, sent = running(tokenizer, tokenizer(prompt)["input_ids"], max_new_tokens=len(ids))
    for token in ids:
        row.push(token)
    pieces = [value for kind, value in sent if kind == "text"]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert sent[-1] == ("end", "length")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_character_that_the_length_cuts_is_left_out(make):
    tokenizer = make()
    ids = tokenizer("a🦊")["input_ids"][:-1]
    row, sent = running(tokenizer, tokenizer("b")["input_ids"], max_new_tokens=len(ids))
    for token in ids:
        row.push(token)
    assert sent == [("text", "a"), ("end", "length")]


def test_the_end_token_ends_and_flushes_what_was_held_back(tokenizer):
    row, sent = running(tokenizer, end_ids=frozenset([1]), stops=["w5 w6"])
    for token in tokenizer("w4 w5")["input_ids"] + [1, 7]:
        row.push(token)
    assert "".join(value for kind, value in sent if kind == "text") == " w4 w5" and sent[-1] == ("end", "stop")
    assert sum(kind == "end" for kind, _ in sent) == 1


def test_a_cancelled_row_ends_at_its_next_token(tokenizer):
    row, sent = running(tokenizer)
    row.push(5)
    row.row.cancelled = True
    row.push(6)
    row.push(7)
    assert [kind for kind, _ in sent] == ["text", "error"] and row.row.finished and row.row.new_ids == [5]


def found_by(passage):
    """What a chunk found: one passage."""
    tokens = np.array([[passage]])
    sources = [[Source("d", "title", "here", 0)]]
    return Neighbors(np.array([[0]]), tokens, tokens >= 0, np.array([[-0.5]], np.float32), sources)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("shift", range(4))
def test_the_sources_of_text_whose_characters_chunks_cut_are_whole(make, shift):
    tokenizer = make()
    ids = tokenizer("a" * shift + "🦊" * 13)["input_ids"]
    for first in range(1, 6):
        chunks = chunks_json(tokenizer, ids, 9, {u: found_by(ids[:16]) for u in range(7)}, 8, first, "cosine")
        assert [chunk["chunk"] for chunk in chunks] == list(range(first, -(-len(ids) // 8)))
        assert [(chunk["start"], chunk["stop"]) for chunk in chunks] == [
            (u * 8, min(u * 8 + 8, len(ids))) for u in range(first, -(-len(ids) // 8))
        ]
        assert "\ufffd" not in str(chunks)
        assert all(chunk["text"] == "".join(chunk["tokens"]) for chunk in chunks)
    cut = chunks_json(tokenizer, ids[:-1], 9, {}, 8, 1, "cosine")
    assert "\ufffd" not in str(cut) and sum(chunk["text"].count("🦊") for chunk in cut) >= 9
