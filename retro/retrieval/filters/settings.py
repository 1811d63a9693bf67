"""What a store's build leaves out: the one schema of its filters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from retro.common.extras import check_installed
from retro.retrieval.filters.dates import DateFilter
from retro.retrieval.filters.decontamination import parse_measures
from retro.retrieval.filters.grams import NGRAM
from retro.retrieval.filters.rules import parse_rule
from retro.retrieval.filters.subsampling import check_subsample

DEDUPLICATIONS = ("exact", "minhash")


@dataclass(kw_only=True)
class FilterSettings:
    """Which documents are kept out of a store; the defaults keep all.

    Arguments:
        decontaminate: held-out inputs that no document may resemble.
        decontaminate_by: how the resemblance of a document A to a held-out text B is measured and from where on it is
            too much; one or several of "jaccard>=0.8" (|A & B| / |A | B| over sets of word 13-grams), "overlap>=0.8"
            (|A & B| / |B|) and "longest_run>=13" (words in a row that both hold). A name alone takes these values; None
            is "jaccard".
        deduplicate: None, "exact" (texts that are the same but for case and white space) or "minhash" (also texts of
            which the word n-grams have a Jaccard similarity of deduplicate_at, estimated). The first in the order of
            the inputs is kept.
        deduplicate_at: similarity from which "minhash" takes two texts for one; None is 0.8.
        deduplicate_ngram: words of a gram of "minhash"; None is 13.
        min_date, max_date: first and last year, month or day (2015, 2015-06, 2015-06-30) of documents. A document stays
            if every day that its date may mean lies between them.
        undated: "drop" or "keep" documents without an ISO date where there is a min_date or max_date; None is "drop".
        min_chars, max_chars: the shortest and the longest text, in characters.
        quality: rules such as "extra.score>=0.5" or "language==en", which must all hold; see `parse_rule`.
        subsample: (p, seed) keeps a share p of the documents, drawn by a hash of seed and id. With one seed a smaller
            share lies within the larger ones.
    """

    decontaminate: list[str] = field(default_factory=list)
    decontaminate_by: list[str] | str | None = None
    deduplicate: str | None = None
    deduplicate_at: float | None = None
    deduplicate_ngram: int | None = None
    min_date: str | None = None
    max_date: str | None = None
    undated: str | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    quality: list[str] | None = None
    subsample: Sequence[float | int] | None = None

    def __post_init__(self) -> None:
        """Check what is given; ValueError names the field, the value and the remedy."""
        self.decontaminate = [os.fspath(item) for item in self.decontaminate]
        if isinstance(self.decontaminate_by, str):
            self.decontaminate_by = [self.decontaminate_by]
        self._check_needed()
        if self.decontaminate_by is not None:
            parse_measures(self.decontaminate_by)
        if self.min_date is not None or self.max_date is not None:
            DateFilter(self.min_date, self.max_date, self.undated or "drop")
        for rule in self.quality or ():
            parse_rule(rule)
        if self.subsample is not None:
            self.subsample = list(check_subsample(self.subsample))
        self._check_lengths()
        self._check_deduplication()

    def _check_needed(self) -> None:
        """Refuse what says how without what."""
        dated, minhash = self.min_date is not None or self.max_date is not None, self.deduplicate == "minhash"
        needed = (
            ("decontaminate_by", bool(self.decontaminate), "decontaminate"),
            ("undated", dated, "min_date or max_date"),
            ("deduplicate_at", minhash, "deduplicate=minhash"),
            ("deduplicate_ngram", minhash, "deduplicate=minhash"),
        )
        for name, there, what in needed:
            if getattr(self, name) is not None and not there:
                raise ValueError(f"{name} is given without {what}; give that too, or leave {name} out")

    def _check_lengths(self) -> None:
        for name in ("min_chars", "max_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.min_chars and self.max_chars and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars ({self.min_chars}) is above max_chars ({self.max_chars}); no text is so long")

    def _check_deduplication(self) -> None:
        if self.deduplicate not in (None, *DEDUPLICATIONS):
            raise ValueError(f"deduplicate must be {' or '.join(DEDUPLICATIONS)}, not {self.deduplicate!r}")
        if self.deduplicate == "minhash":
            check_installed("datasketch", "deduplicate=minhash")
        if self.deduplicate_at is not None and not 0 < self.deduplicate_at <= 1:
            raise ValueError(f"deduplicate_at must be above 0 and at most 1, not {self.deduplicate_at}")
        if self.deduplicate_ngram is not None and self.deduplicate_ngram < 1:
            raise ValueError(f"deduplicate_ngram must be 1 or more, as in {NGRAM}, not {self.deduplicate_ngram}")
