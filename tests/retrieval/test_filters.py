"""Near copies by exact Jaccard of word 13-grams."""

from hypothesis import given, settings
from hypothesis import strategies as st

from retro.corpus import Document
from retro.retrieval import filters as filters_module
from retro.retrieval import near_copies
from tests.stand_ins import words


def jaccard(a, b, n):
    """Sets of n-grams, by hand."""
    one, two = (
        {tuple(text.lower().split()[i : i + n]) for i in range(max(len(text.split()) - n + 1, 1))} for text in (a, b)
    )
    return len(one & two) / len(one | two)


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "D"]), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, held_out=st.lists(TEXTS, min_size=1, max_size=4), threshold=st.sampled_from([0.3, 0.5, 0.8]))
def test_against_sets(text, held_out, threshold):
    documents = [Document(str(i), other) for i, other in enumerate(held_out)]
    found = near_copies([Document("x", text)], documents, ngram=3, threshold=threshold)
    best = max(jaccard(text, other, 3) for other in held_out)
    assert bool(found) == (best >= threshold)
    if found:
        assert abs(found[0].jaccard - best) < 1e-12 and jaccard(text, held_out[int(found[0].held_out_id)], 3) == best


def test_words_are_not_kept_for_ever():
    assert filters_module._hash.cache_info().maxsize


def test_a_changed_end_is_a_near_copy_and_another_text_is_not():
    held_out = [Document("h", words(200, 1))]
    near, far = Document("near", words(200, 1) + " and more"), Document("far", words(200, 2))
    assert [found.document_id for found in near_copies([near, far, Document("none", "...")], held_out)] == ["near"]
