"""How right an answer is.

Source of the normalisation, exact match and F1: SQuAD (Rajpurkar et al. 2016), as its evaluation script has them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and English articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is any of the right ones once normalised, else 0."""
    return float(normalize_answer(answer) in [normalize_answer(one) for one in right])


def f1(answer: str, right: Sequence[str]) -> float:
    """2 P R / (P + R) of the normalised words, counted with their number; the best over the right answers."""
    return max((_f1(normalize_answer(answer).split(), normalize_answer(one).split()) for one in right), default=0.0)


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


def holds_answer(text: str, right: Sequence[str]) -> bool:
    """Whether the words of a right answer stand in the text one after another, both normalised."""
    words = f" {normalize_answer(text)} "
    return any(f" {one} " in words for one in map(normalize_answer, right) if one)
