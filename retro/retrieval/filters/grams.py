"""Texts as words, and what two texts share: runs of words, and sets of word n-grams.

A word is a run of letters, digits and underscores, in lower case. The n-grams of a text are a set; a text of fewer than
n words is one gram, and one without words has none. Everything is exact, up to collisions of 64-bit hashes.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np
from jaxtyping import UInt64

NGRAM = 13
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


def word_hashes(text: str) -> UInt64[np.ndarray, " words"]:
    """The words of a text, hashed, in their order."""
    return np.asarray([_hash(word) for word in _WORD.findall(text.lower())], np.uint64)


def ngrams(words: UInt64[np.ndarray, " words"], n: int = NGRAM) -> UInt64[np.ndarray, " grams"]:
    """The set of hashed n-grams of a text's hashed words, sorted.

    The hash of a run is sum_j B^j h_(i+j) modulo 2^64: the difference of two prefix sums, divided by B^i.
    """
    n, count = min(n, len(words)), max(len(words) - n + 1, 1)
    if not n:
        return np.zeros(0, np.uint64)
    weighted = words * _powers(_BASE, len(words))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighted, dtype=np.uint64)])
    return np.unique((prefix[n:] - prefix[:-n]) * _powers(_INVERSE, count))


def text_ngrams(text: str) -> UInt64[np.ndarray, " grams"]:
    """The set of hashed word 13-grams of a text, sorted."""
    return ngrams(word_hashes(text), NGRAM)


def num_common(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> int:
    """|A & B| of two sets of `ngrams`."""
    return int(np.isin(a, b, assume_unique=True).sum())


def jaccard(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """|A & B| / |A | B| of two sets of `ngrams`; 0 where both are empty."""
    common = num_common(a, b)
    return common / max(len(a) + len(b) - common, 1)


def overlap(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """|A & B| / |B| of two sets of `ngrams`: how much of B is in A; 0 where B is empty."""
    return num_common(a, b) / max(len(b), 1)


def longest_run(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> int:
    """The words of the longest run that two texts' `word_hashes` share, by bisection: whoever shares a run of n words
    shares one of n - 1."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if num_common(ngrams(a, middle), ngrams(b, middle)):
            low = middle
        else:
            high = middle - 1
    return low


def shares_run(one: str, other: str, n: int = NGRAM) -> bool:
    """Whether two texts share a run of n words, or all words of the shorter one.

    Differs from MassiveDS (Shao et al. 2024), which takes a Jaccard similarity of 0.8 or a run of 32 tokens: a passage
    that holds a question word for word, and much else, has a small similarity.
    """
    a, b = word_hashes(one), word_hashes(other)
    n = min(n, len(a), len(b))
    return n > 0 and num_common(ngrams(a, n), ngrams(b, n)) > 0


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """1, base, base^2, ... modulo 2^64."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


@lru_cache(maxsize=1 << 20)  # frequent words; a large corpus has far more
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
