"""Queries in the forms that the kinds of search want: texts, token ids, keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.text.chunks import TokenIds, decode_chunks


def as_lists(queries: Any, mask: Any = None) -> list[str] | list[list[int]]:
    """Queries as a Retriever takes them (texts, or token ids in lists, an array or a tensor, `mask` True = a real one)
    as texts or as lists of token ids without padding."""
    if isinstance(queries, str):
        raise ValueError("queries must be a list of texts or of token ids, not one text; write [text]")
    if len(queries) and isinstance(queries[0], str):
        return list(queries)
    lists = queries.tolist() if hasattr(queries, "tolist") else [np.asarray(query).tolist() for query in queries]
    if mask is None:
        return lists
    pairs = zip(lists, mask.tolist(), strict=True)
    return [[token for token, real in zip(query, of_query, strict=True) if real] for query, of_query in pairs]


class Queries:
    """Queries as texts and as token ids without special tokens, each made from the other when it is asked for.

    keys: of the queries, where they are known already. Queries may be keys only: their texts and tokens are then
    refused, with a ValueError.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str] | None = None,
        tokens: Sequence[TokenIds] | None = None,
        keys: Float32[np.ndarray, "q d"] | None = None,
    ):
        self._tokenizer, self._texts, self._tokens, self.keys = tokenizer, texts, tokens, keys
        self._length = len(next(given for given in (texts, tokens, keys) if given is not None))
        self._embedded: dict[str, np.ndarray] = {}  # keys made by embedders, by their fingerprints

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, chosen: np.ndarray) -> Queries:
        """Some of the queries; what was made of them already stays made."""
        known = vars(self).get("texts", self._texts)
        texts, tokens = (None if x is None else [x[i] for i in chosen] for x in (known, self._tokens))
        some = Queries(self._tokenizer, texts, tokens, None if self.keys is None else self.keys[chosen])
        some._embedded = {fingerprint: keys[chosen] for fingerprint, keys in self._embedded.items()}
        return some

    def embedded(self, embedder: Any) -> Float32[np.ndarray, "q d"]:
        """The keys that an embedder gives the queries, made once, also for those that are chosen later."""
        if embedder.fingerprint not in self._embedded:
            self._embedded[embedder.fingerprint] = embedder.embed(self.texts, is_query=True)
        return self._embedded[embedder.fingerprint]

    @cached_property
    def texts(self) -> list[str]:
        self._refuse_keys_only()
        return decode_chunks(self._tokenizer, self._tokens) if self._texts is None else list(self._texts)

    @cached_property
    def tokens(self) -> list[Int64[np.ndarray, " t"]]:
        self._refuse_keys_only()
        tokens = self._tokens
        if tokens is None:
            make = partial(self._tokenizer, add_special_tokens=False, verbose=False)
            tokens = make(self.texts)["input_ids"] if len(self) else []  # most tokenizers refuse an empty list
        ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(ids, np.int64) for ids in tokens)])
        is_kept = ~np.isin(ids, sorted(self._tokenizer.all_special_ids))
        ends = np.append(0, np.cumsum(is_kept))[np.cumsum([0, *map(len, tokens)])].tolist()
        kept = ids[is_kept]
        return [kept[start:stop] for start, stop in pairwise(ends)]

    def _refuse_keys_only(self) -> None:
        if self._texts is None and self._tokens is None:
            raise ValueError("the queries are keys only, but this search goes by their words; give their texts too")
