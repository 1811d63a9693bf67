"""What is kept out of a store: documents that nearly copy a held-out text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import UInt64

from retro.corpus import Document

NGRAM = 13
THRESHOLD = 0.8
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: powers never vanish modulo 2^64


@dataclass(frozen=True)
class NearCopy:
    """A document, the held-out one it resembles most, and the Jaccard similarity of their n-gram sets."""

    document_id: str
    held_out_id: str
    jaccard: float


def near_copies(
    documents: Iterable[Document], held_out: Iterable[Document], ngram: int = NGRAM, threshold: float = THRESHOLD
) -> list[NearCopy]:
    """The documents whose word n-gram set has a Jaccard similarity >= threshold with that of a held-out document.

    J(A, B) = |A & B| / |A | B| over sets of word n-grams (lower case); a text shorter than n words is one gram.
    Exact, up to collisions of a 64-bit hash.
    """
    index = HeldOut(held_out, ngram, threshold)
    return [found for document in documents if (found := index.find(document)) is not None]


class HeldOut:
    """An inverted index over the hashed n-grams of held-out documents."""

    def __init__(self, held_out: Iterable[Document], ngram: int = NGRAM, threshold: float = THRESHOLD) -> None:
        if ngram < 1 or not 0 < threshold <= 1:
            raise ValueError(f"ngram must be at least 1 and threshold in (0, 1], not {ngram} and {threshold}")
        self.ngram, self.threshold = ngram, threshold
        self._ids: list[str] = []
        sets = []
        for document in held_out:
            self._ids.append(document.id)
            sets.append(self.grams(document.text))
        self._sizes = np.asarray([len(grams) for grams in sets], np.int64)
        owners = np.repeat(np.arange(len(sets)), self._sizes)
        grams = np.concatenate(sets) if sets else np.zeros(0, np.uint64)
        order = np.argsort(grams, kind="stable")
        self._grams, self._owners = grams[order], owners[order]

    def find(self, document: Document) -> NearCopy | None:
        """The held-out document most like this one, if similar enough."""
        grams = self.grams(document.text)
        first = np.searchsorted(self._grams, grams, side="left")
        counts = np.searchsorted(self._grams, grams, side="right") - first
        if not counts.sum():
            return None
        hits = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        common = np.bincount(self._owners[hits], minlength=len(self._ids))
        jaccard = common / np.maximum(len(grams) + self._sizes - common, 1)
        best = int(jaccard.argmax())
        if jaccard[best] < self.threshold:
            return None
        return NearCopy(document.id, self._ids[best], float(jaccard[best]))

    def grams(self, text: str) -> UInt64[np.ndarray, " grams"]:
        """The set of hashed word n-grams of a text, sorted."""
        words = _WORD.findall(text.lower())
        if not words:
            return np.zeros(0, np.uint64)
        hashes = np.asarray([_hash(word) for word in words], np.uint64)
        width = min(self.ngram, len(words))
        windows = np.lib.stride_tricks.sliding_window_view(hashes, width)
        weights = np.cumprod(np.full(width, _BASE, np.uint64), dtype=np.uint64)
        return np.unique((windows * weights).sum(axis=1, dtype=np.uint64))


@lru_cache(maxsize=1 << 20)  # frequent words; a large corpus has far more
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
