"""Queries in the forms that the kinds of search want: texts, token ids, keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.chunks import TokenIds, decode_chunks


class Queries:
    """Queries as texts and as token ids without special tokens, each made from the other when it is asked for.

    keys: of the queries, where they are known already.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str] | None = None,
        tokens: Sequence[TokenIds] | None = None,
        keys: Float32[np.ndarray, "q d"] | None = None,
    ):
        self._tokenizer, self._texts, self._tokens, self.keys = tokenizer, texts, tokens, keys

    def __len__(self) -> int:
        return len(self._tokens if self._texts is None else self._texts)

    def __getitem__(self, chosen: np.ndarray) -> Queries:
        """Some of the queries."""
        texts, tokens = (None if x is None else [x[i] for i in chosen] for x in (self._texts, self._tokens))
        return Queries(self._tokenizer, texts, tokens, None if self.keys is None else self.keys[chosen])

    @cached_property
    def texts(self) -> list[str]:
        return decode_chunks(self._tokenizer, self._tokens) if self._texts is None else list(self._texts)

    @cached_property
    def tokens(self) -> list[Int64[np.ndarray, " t"]]:
        tokens = self._tokens
        if tokens is None and len(self):
            tokens = self._tokenizer(self.texts, add_special_tokens=False, verbose=False)["input_ids"]
        special = np.asarray(sorted(self._tokenizer.all_special_ids), np.int64)
        arrays = (np.asarray(ids, np.int64) for ids in tokens)
        return [ids[~np.isin(ids, special)] for ids in arrays]
