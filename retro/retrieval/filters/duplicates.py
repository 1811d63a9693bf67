"""Documents that are there already: exact copies by a hash of the text, near copies by MinHash.

A signature is computed for each document alone, in any process; the decisions are taken one after another in the order
of the inputs, so that the first of several copies is kept, whoever read them. A document is compared with the kept
ones only. Sources: MinHash, Broder 1997; its search in bands, Leskovec et al., Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cache, cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt32

from retro.retrieval.filters.grams import NGRAM, ngrams, word_hashes

NUM_PERMUTATIONS = 128
THRESHOLD = 0.8
_CANDIDATE_PROBABILITY = 0.9  # that a pair at the threshold is compared
_SCHEME = "affine32"  # of datasketch 2
_BLOCK_GRAMS = 1 << 15  # grams permuted at a time: 16 MB


class Deduplicator:
    """Finds documents whose text was seen before.

    by: "exact": texts that are the same in Unicode's form NFKC, without case, any white space being one space.
        "minhash": texts whose sets of word n-grams have a Jaccard similarity s >= threshold, estimated as the share of
        128 permutations with the same minimum: the standard deviation is sqrt(s (1 - s) / 128), 0.035 at s = 0.8. The
        texts themselves are not compared. Candidates come from bands of the signature: a pair at the threshold is one
        with a probability of 0.9 or more. Texts of fewer than n words are copies if their words are the same; those
        without any word, if they are "exact" copies.

    Memory, per document kept and beside its id: about 0.2 kB for "exact", 6 kB for "minhash".
    """

    name = "deduplicate"

    def __init__(self, by: str, threshold: float = THRESHOLD, ngram: int = NGRAM) -> None:
        if by not in ("exact", "minhash"):
            raise ValueError(f"by must be exact or minhash, not {by!r}")
        self.by, self.threshold, self.ngram = by, threshold, ngram
        self._kept: list[str] = []
        self._exact: dict[bytes, int] = {}
        self._signatures: list[bytes] = []

    def signature(self, document: Any) -> bytes:
        """What `add` needs to know of a document: 16 bytes for "exact", 512 for "minhash"."""
        if self.by == "exact":
            return _text_hash(document.text)
        words = word_hashes(document.text)
        grams = ngrams(words, self.ngram) if len(words) else np.frombuffer(_text_hash(document.text)[:8], "<u8")
        return _minhash((grams >> np.uint64(32)).astype(np.uint32))

    def add(self, document_id: str, signature: bytes, place: str = "") -> dict[str, Any] | None:
        """None, and from now on the document is known, or the record of a copy, which names the first one like it."""
        copy = self.find(document_id, signature, place)
        if copy is None:
            if self.by == "exact":
                self._exact[signature] = len(self._kept)
            else:
                self._bands.insert(len(self._kept), _sketch(signature), check_duplication=False)
                self._signatures.append(signature)
            self._kept.append(document_id)
        return copy

    def find(self, document_id: str, signature: bytes, place: str = "") -> dict[str, Any] | None:
        """The record of a copy of what is known, or None."""
        first, similarity = (self._exact.get(signature), 1.0) if self.by == "exact" else self._similar(signature)
        if first is None:
            return None
        reason = "the same text" if self.by == "exact" else f"a near copy (jaccard>={self.threshold:g}, estimated)"
        measured = {"kept_id": self._kept[first], "jaccard": similarity}
        return {"filter": self.name, "place": place, "document_id": document_id, "reason": reason, **measured}

    def _similar(self, signature: bytes) -> tuple[int | None, float]:
        """The number of the first kept document with this similarity."""
        sketch = _sketch(signature)
        candidates = sorted(self._bands.query(sketch))
        if candidates:
            others = np.frombuffer(b"".join(self._signatures[number] for number in candidates), "<u4")
            similarity = (others.reshape(-1, NUM_PERMUTATIONS) == sketch.hashvalues).mean(1)
            near = np.flatnonzero(similarity >= self.threshold)
            if len(near):
                return candidates[near[0]], float(similarity[near[0]])
        return None, 1.0

    @cached_property
    def _bands(self) -> Any:
        """Signatures by bands of r minima; two texts of similarity s share one of b with 1 - (1 - s^r)^b."""
        from datasketch import MinHashLSH

        return MinHashLSH(num_perm=NUM_PERMUTATIONS, params=bands(self.threshold), hashfunc=_band_hash)


def bands(threshold: float) -> tuple[int, int]:
    """b bands of r minima: the longest ones for which a pair at the threshold is a candidate with 0.9 or more."""
    for r in range(NUM_PERMUTATIONS // 2, 1, -1):
        b = NUM_PERMUTATIONS // r
        if 1 - (1 - threshold**r) ** b >= _CANDIDATE_PROBABILITY:
            return b, r
    return NUM_PERMUTATIONS, 1


def _text_hash(text: str) -> bytes:
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normal.encode("utf-8"), digest_size=16).digest()


def _minhash(grams: UInt32[np.ndarray, " grams"]) -> bytes:
    sketch = _sketch()
    for start in range(0, len(grams), _BLOCK_GRAMS):
        sketch.update_batch(grams[start : start + _BLOCK_GRAMS].tolist())
    return sketch.hashvalues.astype("<u4").tobytes()


def _sketch(signature: bytes | None = None) -> Any:
    """An empty MinHash of grams that are hashed already, or that of a signature."""
    MinHash, permutations = _datasketch()
    values = None if signature is None else np.frombuffer(signature, "<u4").astype(np.uint32)
    return MinHash(NUM_PERMUTATIONS, hashfunc=int, hashvalues=values, permutations=permutations, scheme=_SCHEME)


@cache
def _datasketch() -> tuple[Any, Any]:
    from datasketch import MinHash

    return MinHash, MinHash(NUM_PERMUTATIONS, seed=1, scheme=_SCHEME).permutations


def _band_hash(band: bytes) -> bytes:
    return hashlib.blake2b(band, digest_size=8).digest()
