"""Passages that give a task away: those that share a run of words with it."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from retro.retrieval.filters import NGRAM, HeldOut


def overlaps(passage: str, text: str, ngram: int = NGRAM) -> bool:
    """Whether a passage and a text share a run of `ngram` words (lower case), or all words of the shorter one.

    For a question the text is the question and an answer. Differs from MassiveDS (Shao et al. 2024), which takes a
    Jaccard similarity of 0.8 or a run of 32 tokens: a passage that holds a question word for word, and much else, has
    a small similarity.
    """
    width = min(ngram, *(len(re.findall(r"\w+", one)) for one in (passage, text)))
    if not width:
        return False
    grams = _hasher(width).grams
    return bool(np.isin(grams(text), grams(passage)).any())


@cache
def _hasher(ngram: int) -> HeldOut:
    return HeldOut([], ngram)
