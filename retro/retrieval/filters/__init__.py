"""What is kept out: documents out of a store when it is built, and neighbors out of an answer when it is asked for.

    settings = FilterSettings(deduplicate="minhash", max_date="2024", quality=["extra.score>=0.5"])
    filters, duplicates = filters_of(settings), deduplicator_of(settings)      pure, made in every process that reads
    filter.verdict(document) -> None | record                                  of a document alone
    duplicates.signature(document) -> bytes                                    of a document alone
    duplicates.add(id, signature, place) -> None | record                      one process, in the order of the inputs

A record is {"filter", "place", "document_id", "reason", and what was measured}.
Of neighbors: retro.retrieval.filters.hits.
"""

from retro.retrieval.filters.dates import DateFilter, days_of
from retro.retrieval.filters.decontamination import (
    THRESHOLD,
    Decontaminator,
    NearCopy,
    OverlapMeasure,
    largest_shares,
    near_copies,
    parse_measures,
)
from retro.retrieval.filters.documents import LengthFilter, deduplicator_of, filters_of
from retro.retrieval.filters.duplicates import Deduplicator
from retro.retrieval.filters.grams import NGRAM, shares_run
from retro.retrieval.filters.records import DocumentFilter
from retro.retrieval.filters.rules import QualityFilter, parse_rule
from retro.retrieval.filters.settings import FilterSettings
from retro.retrieval.filters.subsampling import SubsampleFilter, check_subsample, document_hashes, drawn

__all__ = [
    "NGRAM",
    "THRESHOLD",
    "DateFilter",
    "Decontaminator",
    "Deduplicator",
    "DocumentFilter",
    "FilterSettings",
    "LengthFilter",
    "OverlapMeasure",
    "NearCopy",
    "QualityFilter",
    "SubsampleFilter",
    "check_subsample",
    "days_of",
    "deduplicator_of",
    "document_hashes",
    "drawn",
    "filters_of",
    "largest_shares",
    "near_copies",
    "parse_measures",
    "parse_rule",
    "shares_run",
]
