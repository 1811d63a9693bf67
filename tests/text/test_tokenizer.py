"""The trained tokenizer: lossless, fast, exact offsets."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from retro.text.chunks import bos_of, decode_chunks, tokenize_document, tokenizer_fingerprint
from retro.text.documents import Document
from retro.text.tokenizer import train_tokenizer

TEXT = (
    "def f(x):\n    return x + 1\n\n\tThe quick brown fox jumps over the lazy dog.\nThe dog sleeps; the fox runs.\n"
    * 20
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(folder, [Document("a", TEXT)], vocab_size=400)
    return AutoTokenizer.from_pretrained(folder)


def test_loads_as_a_fast_tokenizer_with_special_tokens(trained):
    assert trained.is_fast and len(trained) == 400
    assert [trained.unk_token_id, trained.bos_token_id, trained.eos_token_id, trained.pad_token_id] == [0, 1, 2, 3]
    assert trained("a")["input_ids"][0] == trained.bos_token_id == bos_of(trained)
    assert len(trained("The quick brown fox", add_special_tokens=False)["input_ids"]) <= 6


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_round_trip_and_bytes(trained, text):
    found = tokenize_document(trained, text)
    assert decode_chunks(trained, [found.ids]) == [text]
    assert found.num_bytes.sum() == len(text.encode()) and len(found.num_bytes) == len(found.ids)
    assert found.ids[0] == trained.bos_token_id and found.ids[-1] == trained.eos_token_id


@pytest.mark.parametrize(
    "text", ["a\tb\n\n  c   d\r\n", "▁ is not a space", "x </s> <s> <0x41> y", "é 漢字 🦊\x00", TEXT]
)
def test_round_trip_of_awkward_texts(trained, text):
    assert decode_chunks(trained, [tokenize_document(trained, text).ids]) == [text]


def test_offsets_are_exact(trained):
    encoded = trained(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [TEXT[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces == [trained.decode([i]) for i in encoded["input_ids"]] and "".join(pieces) == TEXT


def test_same_text_gives_the_same_bytes(tmp_path, trained):
    train_tokenizer(tmp_path / "again", [Document("a", TEXT)], vocab_size=400)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        (tmp_path / "again").joinpath(trained.name_or_path, "tokenizer.json").read_bytes()
    )


def test_a_bad_line_is_named_and_a_lone_path_is_one_input(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": TEXT}) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: the line is not JSON"):
        train_tokenizer(tmp_path / "t", [str(file)], vocab_size=400)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    file.write_text(json.dumps({"text": TEXT}))
    assert len(train_tokenizer(tmp_path / "t", str(file), vocab_size=400)) == 400


def test_refusals_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 100000 does not suit the text"):
        train_tokenizer(tmp_path / "t", [Document("a", "few words")], vocab_size=100_000)
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer(tmp_path / "t", [Document("a", "")], vocab_size=400)
    assert not (tmp_path / "t").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError, match="is in use"):
        train_tokenizer(tmp_path / "used", [Document("a", TEXT)], vocab_size=400)
