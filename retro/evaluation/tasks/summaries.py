"""Summaries scored after their articles, as RETRO does with the Curation Corpus: article, "TL;DR:", summary.

    bits per byte    bits of the summary's tokens / UTF-8 bytes of the summary and the space before it

The text starts on a chunk border; all of its whole chunks are queries, those of the summary too. An article that leaves
no room is cut at its start.

Source: RETRO, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro.evaluation.intervals import quotient
from retro.evaluation.tasks.files import field_of, read_records
from retro.evaluation.tasks.reading import Reader
from retro.evaluation.tasks.results import about, with_interval

BETWEEN = "\nTL;DR:"


@dataclass(frozen=True)
class Summary:
    """An article and its summary; no document of the store with this id is read."""

    id: str
    article: str
    summary: str


def read_summaries(path: str | Path) -> list[Summary]:
    """Records {"article", "summary", "id"?} of a JSON or JSON Lines file; ValueError names the record that is none."""
    found = []
    for place, record in read_records(path, columns=("article", "summary")):
        article, summary = (field_of(record, name, place) for name in ("article", "summary"))
        found.append(Summary(str(record.get("id", "")), article, summary))
    return found


def measure_summaries(reader: Reader, pairs: Sequence[Summary]) -> dict[str, Any]:
    """Bits per byte of the summaries: of a plain LM, or RETRO[OFF], [ON] and [ON] with random neighbors.

    Gives {"bpb": {column: {"value", "interval"}}, "saved": share of the bits that ON saves against each other column,
    "examples", "bytes", "tokens", "seconds", ...}.
    """
    if not pairs:
        raise ValueError("there is no summary; give at least one")
    continuations = [f" {pair.summary.strip()}" for pair in pairs]
    examples = [
        reader.pair(pair.article.rstrip() + BETWEEN, after, pair.id, pair.summary)
        for pair, after in zip(pairs, continuations, strict=True)
    ]
    num_bytes = np.array([len(after.encode()) for after in continuations], float)
    scores, seconds = reader.score_columns(examples, of="text")
    bits = {column: np.array([-one.log_prob / np.log(2) for one in found]) for column, found in scores.items()}
    on = bits.get("retro_on")
    others = {} if on is None else {column: other for column, other in bits.items() if column != "retro_on"}
    return {
        "task": "summaries",
        "bpb": {column: with_interval(*quotient(own, num_bytes, reader.seed)) for column, own in bits.items()},
        "saved": {column: with_interval(*quotient(other - on, other, reader.seed)) for column, other in others.items()},
        "examples": len(examples),
        "bytes": int(num_bytes.sum()),
        "tokens": sum(len(example.continuation) for example in examples),
        "align": reader.align,
        "seconds": seconds,
        **about(reader),
    }
