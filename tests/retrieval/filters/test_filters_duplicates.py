"""Copies: exact ones against a set of texts, near ones against exact Jaccard."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from retro.retrieval.filters import Deduplicator, FilterSettings, deduplicator_of
from retro.retrieval.filters.duplicates import bands
from retro.text.documents import Document
from tests.retrieval.filters.test_filters import gram_set


def run(deduplicator, documents):
    """The records of what is left out, in order."""
    return [
        found
        for document in documents
        if (found := deduplicator.add(document.id, deduplicator.signature(document), document.place)) is not None
    ]


def jaccard(a, b, n):
    one, two = gram_set(a, n), gram_set(b, n)
    return len(one & two) / len(one | two)


def near_copy(text, num_changes, draw):
    """The text with some words, far from each other or not, replaced by new ones."""
    split = text.split()
    for place in draw.choice(len(split), num_changes, replace=False):
        split[place] = f"new{draw.integers(1 << 30)}"
    return " ".join(split)


def random_text(draw, count):
    return " ".join(f"w{i}" for i in draw.integers(0, 5000, count))


def test_exact_copies_are_those_of_the_same_normal_text():
    texts = ["One text.", "one\n  TEXT.", "One text!", "ﬁne", "fine", "", "  ", "Straße", "STRASSE", "One text."]
    documents = [Document(f"d{i}", text, place=f"in:{i}") for i, text in enumerate(texts)]
    found = run(Deduplicator("exact"), documents)
    assert {record["document_id"]: record["kept_id"] for record in found} == {
        "d1": "d0",
        "d4": "d3",
        "d6": "d5",
        "d8": "d7",
        "d9": "d0",
    }
    assert found[0] == {
        "filter": "deduplicate",
        "place": "in:1",
        "document_id": "d1",
        "kept_id": "d0",
        "jaccard": 1.0,
        "reason": "the same text",
    }


@pytest.mark.parametrize("by", ["exact", "minhash"])
def test_half_copies_leave_each_text_once_and_the_first_of_each(by):
    draw = np.random.default_rng(0)
    texts = [random_text(draw, int(draw.integers(1, 60))) for _ in range(60)]
    order = draw.permutation(np.repeat(np.arange(60), 2))
    documents = [Document(f"{place}", texts[i]) for place, i in enumerate(order)]
    removed = run(Deduplicator(by), documents)
    first = {texts[i]: str(np.flatnonzero(order == i)[0]) for i in range(60)}
    assert len(removed) == 60
    assert all(record["kept_id"] == first[documents[int(record["document_id"])].text] for record in removed)
    shuffled = run(Deduplicator(by), [documents[i] for i in draw.permutation(120)])
    kept = Counter(document.text for document in documents)
    kept.subtract(documents[int(record["document_id"])].text for record in shuffled)
    assert set(kept.values()) == {1}, "in another order other copies stay, and of each text one"


def test_near_copies_against_exact_jaccard():
    """Of pairs at 0.88 and above 97% are found, of those at 0.72 and below 3%; in between as the estimate falls."""
    draw = np.random.default_rng(1)
    found, similar, deduplicator = [], [], Deduplicator("minhash")
    for number in range(500):
        text = random_text(draw, 250)
        copy = near_copy(text, int(draw.integers(0, 7)), draw)
        records = run(deduplicator, [Document(f"a{number}", text), Document(f"b{number}", copy)])
        found.append(len(records))
        similar.append(jaccard(text, copy, 13))
        if records:
            assert records[0]["kept_id"] == f"a{number}" and abs(records[0]["jaccard"] - similar[-1]) < 0.2
    found, similar = np.asarray(found), np.asarray(similar)
    clear, other = similar >= 0.88, similar <= 0.72
    assert min(clear.sum(), other.sum(), (~clear & ~other).sum()) > 50
    assert found[clear].mean() >= 0.97 and found[other].mean() <= 0.03


def test_many_texts_at_once_are_told_apart_as_in_pairs():
    """Among 180 texts of which a third are near copies, each copy finds its original, and nothing else is found."""
    draw = np.random.default_rng(2)
    originals = [random_text(draw, 300) for _ in range(120)]
    copies = [near_copy(text, 1, draw) for text in originals[:60]]
    documents = [Document(f"o{i}", text) for i, text in enumerate(originals)]
    documents += [Document(f"c{i}", text) for i, text in enumerate(copies)]
    removed = {record["document_id"]: record["kept_id"] for record in run(Deduplicator("minhash"), documents)}
    certain = {f"c{i}": f"o{i}" for i in range(60) if jaccard(originals[i], copies[i], 13) >= 0.9}
    assert len(certain) > 30 and certain.items() <= removed.items()
    assert all(name[0] == "c" and name[1:] == kept[1:] for name, kept in removed.items())


def test_short_texts_and_texts_without_words():
    documents = [Document(str(i), text) for i, text in enumerate(["a b", "A, b!", "b a", "...", "???", " ... ", ""])]
    removed = {record["document_id"]: record["kept_id"] for record in run(Deduplicator("minhash"), documents)}
    assert removed == {"1": "0", "5": "3"}


def test_smaller_grams_and_another_threshold():
    draw = np.random.default_rng(3)
    text = random_text(draw, 200)
    copy = near_copy(text, 10, draw)
    documents = [Document("a", text), Document("b", copy)]
    assert jaccard(text, copy, 13) < 0.5 < 0.75 < jaccard(text, copy, 2)
    assert not run(Deduplicator("minhash"), documents)
    settings = FilterSettings(deduplicate="minhash", deduplicate_at=0.6, deduplicate_ngram=2)
    assert run(deduplicator_of(settings), documents) and deduplicator_of(FilterSettings()) is None


def test_bands_make_candidates_of_pairs_at_the_threshold():
    for threshold in (0.1, 0.3, 0.5, 0.8, 0.95, 1.0):
        b, r = bands(threshold)
        assert b * r <= 128 and b >= 2 and 1 - (1 - threshold**r) ** b >= 0.9


def test_signatures_are_the_same_on_every_machine_and_of_fixed_size():
    """They may be stored, and 40,000 grams are more than are permuted at once."""
    document = Document("x", " ".join(f"word{i}" for i in range(40_000)))
    made = {by: Deduplicator(by).signature(document) for by in ("exact", "minhash")}
    assert {by: (len(one), hashlib.sha256(one).hexdigest()[:16]) for by, one in made.items()} == {
        "exact": (16, "3971bed7f2e40a0e"),
        "minhash": (512, "b860ed6b3593f7ea"),
    }
