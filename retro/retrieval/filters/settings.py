"""What a store's build leaves out: the one schema of its filters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from retro.common.extras import check_installed
from retro.common.values import Count, Range, check_fields
from retro.retrieval.filters.dates import DateFilter
from retro.retrieval.filters.decontamination import parse_measures
from retro.retrieval.filters.rules import parse_rule
from retro.retrieval.filters.subsampling import check_subsample

Deduplication = Literal["exact", "minhash"]
Undated = Literal["drop", "keep"]


@dataclass(kw_only=True)
class DocumentFilterSettings:
    """Which documents count, by what their records say; the defaults keep all.

    Arguments:
        min_date: First year, month or day (2015, 2015-06 or 2015-06-30) of documents. A document stays if every day
            that its date may mean lies in the range. Default: no limit.
        max_date: Last year, month or day of documents. Default: no limit.
        undated: Whether to drop or keep documents without an ISO date where there is a first or last one. Default:
            drop.
        quality: Rules about fields of a document, such as "extra.score>=0.5" or "language==en", which must all hold; a
            shell wants quotes around > and <. Default: no rule.
        subsample: A share P of the documents and a SEED by which it is drawn from their ids. With one seed a smaller
            share lies within the larger ones. Default: all documents.
    """

    min_date: str | None = None
    max_date: str | None = None
    undated: Undated | None = None
    quality: list[str] | None = None
    subsample: tuple[float, int] | None = None


@dataclass(kw_only=True)
class FilterSettings(DocumentFilterSettings):
    """Which documents are kept out of a store; the defaults keep all.

    Arguments:
        decontaminate: Held-out inputs that no document may resemble. Default: none.
        decontaminate_by: How the resemblance of a document A to a held-out text B is measured, and from where on it is
            too much; one or several of "jaccard>=0.8" (|A & B| / |A | B| over sets of word 13-grams), "overlap>=0.8"
            (|A & B| / |B|) and "longest_run>=13" (words in a row that both hold). A name alone takes these values.
            Default: jaccard.
        deduplicate: Whether to leave out documents whose text was read before or is in the store: "exact" takes texts
            for one that are the same but for case and white space, "minhash" also those whose word n-grams have an
            estimated Jaccard similarity of deduplicate_at. The first in the order of the inputs is kept. Default:
            all are kept.
        deduplicate_at: Jaccard similarity, above 0 and at most 1, from which "minhash" takes two texts for one.
            Default: 0.8.
        deduplicate_ngram: Length in words of the n-grams of "minhash". Default: 13.
        min_chars: Characters of the shortest document. Default: no limit.
        max_chars: Characters of the longest document. Default: no limit.
    """

    decontaminate: list[str] = field(default_factory=list)
    decontaminate_by: Sequence[str] | None = None
    deduplicate: Deduplication | None = None
    deduplicate_at: Annotated[float, Range(gt=0, le=1)] | None = None
    deduplicate_ngram: Count | None = None
    min_chars: Count | None = None
    max_chars: Count | None = None

    def __post_init__(self) -> None:
        """Check what is given; ValueError names the field, the value and the remedy."""
        held_out = self.decontaminate
        self.decontaminate = list(map(os.fspath, [held_out] if isinstance(held_out, (str, os.PathLike)) else held_out))
        if isinstance(self.decontaminate_by, str):
            self.decontaminate_by = [self.decontaminate_by]
        check_fields(self, without=["inputs"])  # which may be data sets in memory
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
        if self.min_chars and self.max_chars and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars ({self.min_chars}) is above max_chars ({self.max_chars}); no text is so long")

    def _check_deduplication(self) -> None:
        if self.deduplicate == "minhash":
            check_installed("datasketch", "deduplicate=minhash")
