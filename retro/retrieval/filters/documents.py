"""The filters that a store's settings name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retro.retrieval.filters.dates import DateFilter
from retro.retrieval.filters.decontamination import Decontaminator
from retro.retrieval.filters.duplicates import THRESHOLD, Deduplicator
from retro.retrieval.filters.grams import NGRAM
from retro.retrieval.filters.records import DocumentFilter, removed
from retro.retrieval.filters.rules import parse_rule
from retro.retrieval.filters.settings import FilterSettings
from retro.retrieval.filters.subsampling import SubsampleFilter
from retro.text.corpus import read_documents
from retro.text.documents import Document


@dataclass(frozen=True)
class LengthFilter:
    """Keeps the documents of min_chars to max_chars characters."""

    min_chars: int | None = None
    max_chars: int | None = None
    name: str = "length"

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None, or the record of a document that is too short or too long."""
        chars = len(document.text)
        if self.min_chars is not None and chars < self.min_chars:
            return removed(self, document, f"fewer than {self.min_chars} characters", chars=chars)
        if self.max_chars is not None and chars > self.max_chars:
            return removed(self, document, f"more than {self.max_chars} characters", chars=chars)
        return None


def filters_of(settings: FilterSettings, text_field: str = "text") -> list[DocumentFilter]:
    """The filters of single documents that settings name, the quick ones first; the first verdict counts.

    Each is a function of the document alone, so that neither order nor workers decide. Reads the held-out inputs
    (ValueError at the first record that is no document).
    """
    found: list[DocumentFilter] = []
    if settings.subsample is not None:
        found.append(SubsampleFilter(*settings.subsample))
    if settings.min_date is not None or settings.max_date is not None:
        found.append(DateFilter(settings.min_date, settings.max_date, settings.undated or "drop"))
    if settings.min_chars or settings.max_chars:
        found.append(LengthFilter(settings.min_chars, settings.max_chars))
    found += [parse_rule(rule) for rule in settings.quality or ()]
    if settings.decontaminate:
        held_out = (one for one in read_documents(settings.decontaminate, text_field=text_field))
        documents = (one for one in held_out if isinstance(one, Document))
        found.append(Decontaminator(documents, settings.decontaminate_by or "jaccard"))
    return found


def deduplicator_of(settings: FilterSettings) -> Deduplicator | None:
    """What finds copies, if the settings ask for it."""
    if settings.deduplicate is None:
        return None
    at, ngram = settings.deduplicate_at, settings.deduplicate_ngram
    return Deduplicator(settings.deduplicate, THRESHOLD if at is None else at, NGRAM if ngram is None else ngram)
