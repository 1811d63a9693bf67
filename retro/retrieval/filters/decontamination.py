"""Documents that resemble a held-out text, by measures that the user names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt64

from retro.retrieval.filters.grams import NGRAM, jaccard, longest_run, ngrams, num_common, overlap, word_hashes
from retro.retrieval.filters.records import removed
from retro.text.documents import Document

log = logging.getLogger(__name__)

THRESHOLD = 0.8
DEFAULTS = {"jaccard": THRESHOLD, "overlap": THRESHOLD, "longest_run": NGRAM}


@dataclass(frozen=True)
class OverlapMeasure:
    """One way to tell that a document A resembles a held-out text B, and the value from which on it does.

    jaccard = |A & B| / |A | B| and overlap = |A & B| / |B| over sets of word 13-grams; longest_run = words in a row
    that both hold, of which a text of fewer words than the threshold never has enough.
    """

    name: str
    threshold: float | int
    ngram: int = NGRAM

    def __str__(self) -> str:
        return f"{self.name}>={self.threshold:g}"

    @property
    def width(self) -> int:
        """Words of the n-grams of which two texts share one, wherever the threshold is reached."""
        return int(self.threshold) if self.name == "longest_run" else self.ngram

    def between(self, a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float | int:
        """The value for the `word_hashes` of two texts."""
        if self.name == "longest_run":
            return longest_run(a, b)
        of_sets = jaccard if self.name == "jaccard" else overlap
        return of_sets(ngrams(a, self.ngram), ngrams(b, self.ngram))

    def reached(self, a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> bool:
        """Whether `between` is the threshold or more."""
        if self.name == "longest_run":
            n = self.width
            return min(len(a), len(b)) >= n and num_common(ngrams(a, n), ngrams(b, n)) > 0
        return self.between(a, b) >= self.threshold


def parse_measures(given: str | Sequence[str | OverlapMeasure]) -> list[OverlapMeasure]:
    """Measures as written, "jaccard>=0.8" or "jaccard" alone; ValueError says what is wrong with one."""
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ValueError(f"no measure of resemblance is given; name one of {', '.join(DEFAULTS)}")
    return [one if isinstance(one, OverlapMeasure) else _measure(one) for one in names]


def _measure(text: str) -> OverlapMeasure:
    match = re.fullmatch(r"\s*(\w+)\s*(?:>=\s*([\d.]+)\s*)?", text)
    name, value = match.groups() if match else (text, None)
    if name not in DEFAULTS:
        raise ValueError(
            f"{text!r} is no measure of resemblance; write {', '.join(f'{name}>={t}' for name, t in DEFAULTS.items())}"
        )
    try:
        threshold = DEFAULTS[name] if value is None else (int if name == "longest_run" else float)(value)
    except ValueError:
        threshold = 0
    if not (threshold >= 1 if name == "longest_run" else 0 < threshold <= 1):
        allowed = "a whole number of words, at least 1" if name == "longest_run" else "above 0 and at most 1"
        raise ValueError(f"the threshold of {text!r} must be {allowed}, as in {name}>={DEFAULTS[name]}")
    return OverlapMeasure(name, threshold)


class Decontaminator:
    """Keeps out the documents that resemble a held-out text by any of the measures; the most similar one is named."""

    name = "decontaminate"

    def __init__(
        self, held_out: Iterable[Document], measures: str | Sequence[str | OverlapMeasure] = "jaccard"
    ) -> None:
        self.measures = parse_measures(measures)
        self.ids: list[str] = []
        self._words = []
        for document in held_out:
            self.ids.append(document.id)
            self._words.append(word_hashes(document.text))
        widths = {measure.width for measure in self.measures}
        self._indexes = {width: _NgramIndex([ngrams(words, width) for words in self._words]) for width in widths}
        self._warn_of_short_texts()

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None, or the record of a document that resembles a held-out one."""
        words = word_hashes(document.text)
        for measure in self.measures:
            number, value = self.closest(words, measure)
            if value >= measure.threshold:
                reason = f"resembles a held-out document ({measure})"
                return removed(self, document, reason, held_out_id=self.ids[number], **{measure.name: value})
        return None

    def resembles(self, words: UInt64[np.ndarray, " words"]) -> bool:
        """Whether the `word_hashes` of a text are those of one that resembles a held-out text."""
        return any(self.closest(words, measure)[1] >= measure.threshold for measure in self.measures)

    def closest(self, words: UInt64[np.ndarray, " words"], measure: OverlapMeasure) -> tuple[int, float | int]:
        """Number and value of the held-out text most like these words, the first of equals; -1 and 0 where none shares
        an n-gram of the measure's width with them."""
        grams, index = ngrams(words, measure.width), self._indexes[measure.width]
        common = index.common(grams)
        if measure.name == "longest_run":
            values = np.zeros(len(common), np.int64)
            for number in np.flatnonzero(common):
                values[number] = longest_run(words, self._words[number])
        else:
            values = common / np.maximum(index.sizes + (measure.name == "jaccard") * (len(grams) - common), 1)
        return (int(values.argmax()), values.max().item()) if values.any() else (-1, 0)

    def _warn_of_short_texts(self) -> None:
        longest = max((m.threshold for m in self.measures if m.name == "longest_run"), default=0)
        short = sum(len(words) < longest for words in self._words)
        if short and len(self.measures) == 1:
            log.warning(
                "%d of %d held-out texts have fewer than %d words: no document can hold so long a run of theirs",
                short,
                len(self._words),
                longest,
            )


class _NgramIndex:
    """Which of many sets hold a gram."""

    def __init__(self, sets: list[UInt64[np.ndarray, " _"]]) -> None:
        self.sizes = np.asarray([len(grams) for grams in sets], np.int64)
        owners = np.repeat(np.arange(len(sets)), self.sizes)
        grams = np.concatenate(sets) if sets else np.zeros(0, np.uint64)
        order = np.argsort(grams, kind="stable")
        self._grams, self._owners = grams[order], owners[order]

    def common(self, grams: UInt64[np.ndarray, " grams"]) -> Int[np.ndarray, " sets"]:
        """How many grams each set has in common with this one."""
        first = np.searchsorted(self._grams, grams, side="left")
        counts = np.searchsorted(self._grams, grams, side="right") - first
        hits = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return np.bincount(self._owners[hits], minlength=len(self.sizes))


@dataclass(frozen=True)
class NearCopy:
    """A document, the held-out one it resembles most, and the Jaccard similarity of their n-gram sets."""

    document_id: str
    held_out_id: str
    jaccard: float


def near_copies(
    documents: Iterable[Document], held_out: Iterable[Document], ngram: int = NGRAM, threshold: float = THRESHOLD
) -> list[NearCopy]:
    """The documents whose word n-gram set has a Jaccard similarity >= threshold with that of a held-out document."""
    if ngram < 1 or not 0 < threshold <= 1:
        raise ValueError(f"ngram must be at least 1 and threshold in (0, 1], not {ngram} and {threshold}")
    index = Decontaminator(held_out, [OverlapMeasure("jaccard", threshold, ngram)])
    records = (index.verdict(document) for document in documents)
    return [NearCopy(r["document_id"], r["held_out_id"], r["jaccard"]) for r in records if r is not None]


def largest_shares(
    held_out: Iterable[Document], documents: Iterable[Document], ngram: int = NGRAM
) -> Float[np.ndarray, " held_out"]:
    """For each held-out document the largest share of its word n-grams in one of the documents, none of its own id."""
    held_out = list(held_out)
    index = _NgramIndex([ngrams(word_hashes(document.text), ngram) for document in held_out])
    ids, largest = np.asarray([document.id for document in held_out]), np.zeros(len(held_out))
    for document in documents:
        common = index.common(ngrams(word_hashes(document.text), ngram))
        shares = np.where(ids == document.id, 0, common / np.maximum(index.sizes, 1))
        np.maximum(largest, shares, out=largest)
    return largest
