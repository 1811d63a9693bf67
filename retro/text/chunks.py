"""The one tokenization of a document, and the one way back from a chunk's tokens to text.

Building, evaluation and generation all call the functions of this module, so that a chunk of a document is the same
tokens everywhere and a query is the same text as the key it should find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from retro.common.files import stable_hash

TokenIds = Sequence[int] | np.ndarray  # of one chunk, without padding

_PROBE = "The 3 quick  foxes\n\tjump()é ß 漢字 🦊 isn't <s> </s> <|endoftext|> x_1=0x2F; A-b\r\n    return None # …"


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document and the UTF-8 bytes of each (0 for bos and eos; the sum is the text's size)."""

    ids: Int64[np.ndarray, " t"]
    num_bytes: Int64[np.ndarray, " t"]


def tokenize_document(tokenizer: Any, text: str) -> TokenizedDocument:
    """Tokenize one document: [bos if the tokenizer itself puts one before a text] + tokens + [eos if it has one].

    Special tokens spelled inside the text ("</s>") are ordinary text where the tokenizer allows it. A byte belongs to
    the first token that covers its character; characters that no token covers (stripped whitespace) go to the token
    after them, or to the last one.
    """
    encoding = _encode(tokenizer, [text], offsets=tokenizer.is_fast)
    ids = np.asarray(encoding["input_ids"][0], np.int64)
    num_bytes = np.zeros(len(ids), np.int64)
    if len(ids) and tokenizer.is_fast:
        num_bytes = _bytes_of_offsets(text, np.asarray(encoding["offset_mapping"][0], np.int64))
    elif len(ids):
        num_bytes = _bytes_of_pieces(tokenizer, text, ids)
    head, tail = _frame(tokenizer)
    ids = np.concatenate([np.asarray(head, np.int64), ids, np.asarray(tail, np.int64)])
    return TokenizedDocument(ids, np.pad(num_bytes, (len(head), len(tail))))


def tokenize_ids(tokenizer: Any, texts: Sequence[str]) -> list[Int64[np.ndarray, " t"]]:
    """The ids of `tokenize_document` for a batch of texts, without the bytes."""
    head, tail = _frame(tokenizer)
    batch = _encode(tokenizer, list(texts), offsets=False)["input_ids"]
    return [np.asarray([*head, *ids, *tail], np.int64) for ids in batch]


def decode_chunks(tokenizer: Any, chunks: Sequence[TokenIds]) -> list[str]:
    """Token ids of chunks (without padding) to text; special tokens are left out. Keys and queries embed this text."""
    lists = [[int(i) for i in chunk] for chunk in chunks]
    if not lists:
        return []
    return tokenizer.batch_decode(lists, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what the tokenizer does: its vocabulary, its special ids and its encoding of a probe text."""
    head, tail = _frame(tokenizer)
    return stable_hash(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "special_ids": sorted(tokenizer.all_special_ids),
            "frame": [head, tail],
            "probe": list(_encode(tokenizer, [_PROBE], offsets=False)["input_ids"][0]),
        }
    )


def bos_of(tokenizer: Any) -> int | None:
    """The id that the tokenizer itself puts before a text; None where it puts none."""
    return next(iter(_frame(tokenizer)[0]), None)


def num_embeddings(tokenizer: Any) -> int:
    """How many embeddings the tokens of documents need. Special tokens spelled in a text are ordinary text, so that
    those which come last may have none, such as the image token of a text-only Gemma 3."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    head, tail = _frame(tokenizer)
    return 1 + max(set(tokenizer.get_vocab().values()) - special | {*head, *tail, pad_token_id(tokenizer)})


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills padded positions: the tokenizer's pad, else its eos, else 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None)


def _encode(tokenizer: Any, texts: list[str], offsets: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids put before and after every document."""
    starts = tokenizer("a", verbose=False)["input_ids"][:1]
    head = [int(starts[0])] if starts and starts[0] == tokenizer.bos_token_id else []
    tail = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return head, tail


def _bytes_of_offsets(text: str, offsets: Int64[np.ndarray, "t 2"]) -> Int64[np.ndarray, " t"]:
    """Bytes per token from character offsets: what lies between the furthest end so far and the token's own."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[-1] = len(points)
    return np.diff(bytes_before[ends], prepend=0)


def _bytes_of_pieces(tokenizer: Any, text: str, ids: Int64[np.ndarray, " t"]) -> Int64[np.ndarray, " t"]:
    """Bytes per token where the tokenizer knows no offsets: each piece's own size, scaled to the exact sum."""
    pieces = [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]
    weights = np.maximum([len(piece.encode("utf-8", "replace")) for piece in pieces], 1)
    total, cumulated = len(text.encode("utf-8")), np.cumsum(weights)
    return np.diff(cumulated * total // cumulated[-1], prepend=0)
