"""One tokenization for every user; bytes add up; fingerprints tell tokenizers apart."""

import numpy as np
import pytest

from retro.retrieval.building.build import token_dtype
from retro.text.chunks import (
    bos_of,
    decode_chunks,
    num_embeddings,
    pad_token_id,
    tokenize_document,
    tokenize_ids,
    tokenizer_fingerprint,
)


def byte_level(**special):
    """GPT-2's kind: bytes, no bos of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the quick brown fox"] * 5, vocab_size=300, special_tokens=["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>", **special)


def bert_like():
    """Strips whitespace, lowers case, knows neither bos nor eos."""
    from retro.retrieval import load_embedder

    return load_embedder("minilm").tokenizer


@pytest.mark.parametrize("text", ["the quick fox", " a  b \n", "é 漢字 🦊 <|end|>", "x"])
def test_bytes_add_up(tokenizer, text):
    for kind in (tokenizer, byte_level(), bert_like(), byte_level(bos_token="<|end|>")):
        found = tokenize_document(kind, text)
        assert found.num_bytes.sum() == len(text.encode()) and len(found.ids) == len(found.num_bytes)
        np.testing.assert_array_equal(found.ids, tokenize_ids(kind, ["other", text])[1])


def test_slow_tokenizer_has_bytes_too():
    from transformers import ByT5Tokenizer

    found = tokenize_document(ByT5Tokenizer(), "é fox")
    assert found.num_bytes.sum() == 6 and found.num_bytes[-1] == 0


def test_special_tokens_in_the_text_are_text():
    kind = byte_level()
    ids = tokenize_document(kind, "a<|end|>b").ids
    assert (ids == kind.eos_token_id).sum() == 1 and ids[-1] == kind.eos_token_id
    assert decode_chunks(kind, [ids]) == ["a<|end|>b"]


def test_bos_only_where_the_tokenizer_puts_one():
    assert tokenize_document(byte_level(bos_token="<|end|>"), "a").ids[0] != 0
    assert bos_of(byte_level(bos_token="<|end|>")) is None
    assert decode_chunks(byte_level(), []) == []


def test_special_tokens_that_come_last_need_no_embedding():
    kind = byte_level()
    kind.add_tokens(["<|image|>"], special_tokens=True)
    assert num_embeddings(kind) == len(kind) - 1 > tokenize_document(kind, "a<|image|>b").ids.max()
    kind.add_tokens(["fox trot"])
    assert num_embeddings(kind) == len(kind) == tokenize_document(kind, "fox trot").ids.max() + 1
    assert num_embeddings(byte_level(pad_token="<|image|>")) == len(byte_level()) + 1


def test_fingerprint_survives_saving_and_use(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    for number, kind in enumerate((tokenizer, byte_level(), bert_like())):
        before = tokenizer_fingerprint(kind)
        kind.save_pretrained(tmp_path / str(number))
        kind(["a", "b c"], padding=kind.pad_token is not None, truncation=True, max_length=3)
        assert tokenizer_fingerprint(kind) == before
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / str(number))) == before


def test_fingerprint_changes_with_the_vocabulary():
    one, other = byte_level(), byte_level()
    other.add_tokens(["fox trot"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def test_pad_falls_back_to_eos(tokenizer):
    assert pad_token_id(tokenizer) == 0 and pad_token_id(byte_level()) == byte_level().eos_token_id


@pytest.mark.parametrize(("size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_token_type_by_vocabulary(size, dtype):
    assert token_dtype(size) == dtype and np.iinfo(token_dtype(size)).max >= size - 1
