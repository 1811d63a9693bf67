"""LAMBADA: the last word of a passage, greedily, all of its tokens right (Paperno et al. 2016).

    accuracy                     share of the passages whose last word greedy decoding would write
    perplexity of a last word    exp(-mean of log p(word)), over words

RETRO does not say how the text stands in the chunks; see `retro.evaluation.tasks.reading` for "start" (the default: the
text as a document, without retrieval the plain model) and "end".

Source: RETRO, section 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from retro.evaluation.intervals import mean
from retro.evaluation.tasks.examples import Example, ScoredContinuation
from retro.evaluation.tasks.reading import Reader
from retro.evaluation.tasks.results import about, with_interval
from retro.text.documents import Document

_LAST_WORD = re.compile(r"(?P<context>.*\S)(?P<word>\s+\S+)\s*", re.DOTALL)


def measure_lambada(reader: Reader, documents: Sequence[Document]) -> dict[str, Any]:
    """Last-word accuracy and perplexity: of a plain LM, or RETRO[OFF], [ON] and [ON] with random neighbors.

    Gives {"accuracy", "perplexity": {column: {"value", "interval"}}, "accuracy_gain": of ON over each other column,
    "examples", "read_neighbors": share of the last words that could read a neighbor, "seconds", ...}.

    Raises ValueError for a text of one word.
    """
    examples = [last_word(reader, document) for document in documents]
    if not examples:
        raise ValueError("there is no passage; give at least one")
    scores, seconds = reader.score_columns(examples)
    right = {column: np.array([one.right for one in found], float) for column, found in scores.items()}
    on = right.get("retro_on")
    gains = {} if on is None else {column: on - other for column, other in right.items() if column != "retro_on"}
    read = [one.num_read > 0 for one in scores.get("retro_on", [])]
    return {
        "task": "lambada",
        "accuracy": {column: with_interval(*mean(values, reader.seed)) for column, values in right.items()},
        "accuracy_gain": {column: with_interval(*mean(values, reader.seed)) for column, values in gains.items()},
        "perplexity": {column: _perplexity(found, reader.seed) for column, found in scores.items()},
        "examples": len(examples),
        "read_neighbors": float(np.mean(read)) if read else 0.0,
        "align": reader.align,
        "seconds": seconds,
        **about(reader),
    }


def last_word(reader: Reader, document: Document) -> Example:
    """All but the last word, and the last word with the white space before it."""
    found = _LAST_WORD.fullmatch(document.text)
    if found is None:
        raise ValueError(f"document {document.id}: {document.text[:40]!r} has no two words; leave it out.")
    return reader.pair(found["context"], found["word"], document.id, document.text)


def _perplexity(scores: Sequence[ScoredContinuation], seed: int) -> dict[str, Any]:
    return with_interval(*map(math.exp, mean(np.array([-one.log_prob for one in scores]), seed)))
