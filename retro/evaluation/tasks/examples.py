"""Texts of a task in tokens, and what scoring one gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retro.text.chunks import decode_chunks, tokenize_ids


@dataclass(frozen=True)
class Example:
    """A continuation to score after its context, in tokens.

    name: id of a document that is no neighbor of it. text: what no neighbor may overlap with, if the reader
    decontaminates.
    """

    context: Int64[np.ndarray, " s"]
    continuation: Int64[np.ndarray, " t"]
    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class ScoredContinuation:
    """Log-probability of each token of a continuation, in nats, whether it is the most likely one, and how many
    neighbors its first token could read."""

    log_probs: Float64[np.ndarray, " t"]
    greedy: Bool[np.ndarray, " t"]
    num_read: int

    @property
    def log_prob(self) -> float:
        return float(self.log_probs.sum())

    @property
    def right(self) -> bool:
        """Whether greedy decoding would write the whole continuation."""
        return bool(self.greedy.all())


def encode(tokenizer: Any, text: str) -> Int64[np.ndarray, " t"]:
    """The ids of a text that may go on: with the tokenizer's bos, without an eos."""
    ids = tokenize_ids(tokenizer, [text])[0]
    return ids if tokenizer.eos_token_id is None else ids[:-1]


def aligned(ids: Int64[np.ndarray, " s"], chunk_len: int, filler: int, align: str = "end") -> Int64[np.ndarray, " t"]:
    """The ids, with "end" filled up in front so that the last one ends a chunk."""
    return ids if align == "start" else np.pad(ids, (-len(ids) % chunk_len, 0), constant_values=filler)


def passage_texts(store: Any, rows: Int64[np.ndarray, " p"], retrieved_len: int) -> list[str]:
    """The texts of [N, F] of some rows of a store."""
    ids, mask = store.values(rows, retrieved_len)
    return decode_chunks(store.tokenizer, [own[real] for own, real in zip(ids, mask, strict=True)])
