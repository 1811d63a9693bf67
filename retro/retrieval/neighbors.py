"""What a search gives: neighbors with their tokens, scores and sources.

Models and retrievers share this alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64


@dataclass(frozen=True)
class Source:
    """Where a neighbor came from; position is the chunk's index inside its document."""

    document_id: str
    title: str
    source: str
    position: int
    date: str | None = None


class Sources(Sequence):
    """Where the neighbors of each query come from, read of the store, all together, when one is first looked at."""

    def __init__(
        self, read: Callable[[Int64[np.ndarray, "q k"]], list[list[Source | None]]], rows: Int64[np.ndarray, "q k"]
    ) -> None:
        self._read, self._rows = read, rows

    @cached_property
    def lines(self) -> list[list[Source | None]]:
        """The sources of each query."""
        return self._read(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int | slice) -> list[Source | None] | Sequence[list[Source | None]]:
        if isinstance(place, slice) and "lines" not in vars(self):
            return Sources(self._read, self._rows[place])
        return self.lines[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.lines == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.lines)

    def __reduce__(self) -> tuple[type, tuple[list]]:
        return list, (self.lines,)


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of q queries, nearest first; a missing one has id -1, an all-False mask and no source.

    Those of a `Retriever` read their sources from the store when they are first looked at.
    """

    ids: Int64[np.ndarray, "q k"]
    tokens: Int64[np.ndarray, "q k r"]
    mask: Bool[np.ndarray, "q k r"]
    scores: Float32[np.ndarray, "q k"]
    sources: Sequence[list[Source | None]]

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[Sequence[str]],
        tokenizer: Any,
        num_neighbors: int,
        retrieved_len: int = 128,
        scores: Sequence[Sequence[float]] | None = None,
        sources: Sequence[Sequence[Source | None]] | None = None,
    ) -> Neighbors:
        """The neighbors that a search of one's own gives, from the texts that it found.

        Arguments:
            texts: of each query, those found, best first; where there are more than k the rest is left out.
            tokenizer: the model's.
            num_neighbors, retrieved_len: k, and r: a text is read up to its r-th token.
            scores, sources: of each text; default: 0, and a source without title.

        Raises ValueError if there are not as many scores or sources as texts.
        """
        shape = (len(texts), num_neighbors)
        tokens = np.zeros((*shape, retrieved_len), np.int64)
        mask = np.zeros((*shape, retrieved_len), bool)
        ids, found = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        origins: list[list[Source | None]] = [[None] * num_neighbors for _ in texts]
        for name, given in (("scores", scores), ("sources", sources)):
            if given is not None and list(map(len, given)) != list(map(len, texts)):
                raise ValueError(f"{name} must hold one for each text, {list(map(len, texts))}; give as many")
        for q, k in np.ndindex(shape):
            if k < len(texts[q]):
                text = tokenizer(texts[q][k], add_special_tokens=False, truncation=True, max_length=retrieved_len)
                length = len(text["input_ids"])
                tokens[q, k, :length], mask[q, k, :length] = text["input_ids"], True
                ids[q, k] = q * num_neighbors + k
                found[q, k] = 0.0 if scores is None else scores[q][k]
                origins[q][k] = Source(str(ids[q, k]), "", "", 0) if sources is None else sources[q][k]
        return cls(ids, tokens, mask, found, origins)

    def __repr__(self) -> str:
        (q, k), r = self.ids.shape, self.tokens.shape[-1]
        return f"Neighbors(q={q}, k={k}, r={r}, found {int((self.ids >= 0).sum())} of {q * k})"

    def __getitem__(self, queries: slice) -> Neighbors:
        """The neighbors of some of the queries."""
        arrays = (self.ids, self.tokens, self.mask, self.scores)
        return Neighbors(*(array[queries] for array in arrays), self.sources[queries])
