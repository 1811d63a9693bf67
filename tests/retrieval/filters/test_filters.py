"""Filters of documents against sets, loops and dates worked out by hand."""

import datetime
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.retrieval import near_copies
from retro.retrieval.filters import (
    DateFilter,
    Decontaminator,
    FilterSettings,
    SubsampleFilter,
    days_of,
    document_hashes,
    drawn,
    filters_of,
    grams,
    largest_shares,
    parse_rule,
    shares_run,
)
from retro.text.documents import Document
from tests.stand_ins import words, write_jsonl


def gram_set(text, n):
    """The set of n-grams, by hand; a text of fewer words is one gram."""
    split = text.lower().split()
    return {tuple(split[i : i + n]) for i in range(max(len(split) - n + 1, 1))} if split else set()


def measured(a, b, n):
    """The three measures of two texts, by sets and the textbook recurrence."""
    one, two = gram_set(a, n), gram_set(b, n)
    run, best = {}, 0
    for i, left in enumerate(a.lower().split()):
        for j, right in enumerate(b.lower().split()):
            run[i, j] = run.get((i - 1, j - 1), 0) + 1 if left == right else 0
            best = max(best, run[i, j])
    return {"jaccard": len(one & two) / len(one | two), "overlap": len(one & two) / len(two), "longest_run": best}


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "D"]), min_size=1, max_size=12).map(" ".join)


# What two texts share


@settings(max_examples=100)
@given(text=TEXTS, held_out=st.lists(TEXTS, min_size=1, max_size=4), threshold=st.sampled_from([0.3, 0.5, 0.8]))
def test_against_sets(text, held_out, threshold):
    documents = [Document(str(i), other) for i, other in enumerate(held_out)]
    found = near_copies([Document("x", text)], documents, ngram=3, threshold=threshold)
    best = max(measured(text, other, 3)["jaccard"] for other in held_out)
    assert bool(found) == (best >= threshold)
    if found:
        assert abs(found[0].jaccard - best) < 1e-12
        assert measured(text, held_out[int(found[0].held_out_id)], 3)["jaccard"] == best


LONG = st.lists(st.sampled_from(["a", "b", "C"]), min_size=1, max_size=40).map(" ".join)


@settings(max_examples=100)
@given(
    text=LONG,
    held_out=st.lists(LONG, min_size=1, max_size=3),
    chosen=st.sampled_from(["jaccard>=0.1", "overlap>=0.25", "longest_run>=5", "longest_run>=13", "longest_run>=1"]),
)
def test_every_measure_is_that_of_sets_and_loops(text, held_out, chosen):
    name, threshold = chosen.split(">=")
    index = Decontaminator([Document(str(i), other) for i, other in enumerate(held_out)], chosen)
    values = [measured(text, other, 13)[name] for other in held_out]
    found = index.verdict(Document("x", text, place="in:1"))
    assert (found is not None) == (max(values) >= float(threshold))
    (measure,) = index.measures
    a = grams.word_hashes(text)
    for other, value in zip(held_out, values, strict=True):
        b = grams.word_hashes(other)
        assert measure.between(a, b) == pytest.approx(value) and measure.reached(a, b) == (value >= float(threshold))
    if found:
        assert found[name] == pytest.approx(max(values)) and values[int(found["held_out_id"])] == max(values)
        assert (found["filter"], found["place"], found["document_id"]) == ("decontaminate", "in:1", "x")


def test_a_changed_end_is_a_near_copy_and_another_text_is_not():
    held_out = [Document("h", words(200, 1))]
    near, far = Document("near", words(200, 1) + " and more"), Document("far", words(200, 2))
    assert [found.document_id for found in near_copies([near, far, Document("none", "...")], held_out)] == ["near"]


def test_the_largest_share_of_a_held_out_text_in_any_one_text():
    """By sets of strings: shares of two texts do not add up, and what a text has besides does not count."""
    first, second = words(60, 1), words(40, 2)
    held_out = [f"{first} {second}", second, words(50, 3), "too short", ""]
    texts = [f"{words(80, 4)} {first}", f"{first[:100]} {second}", words(30, 5), "Too short!"]
    grams = lambda text: {tuple(part) for part in zip(*(text.lower().split()[i:] for i in range(13)), strict=False)}  # noqa: E731
    expected = [max(len(grams(one) & grams(text)) / len(grams(one)) for text in texts) for one in held_out[:3]]
    held_out = [Document(f"h{i}", text) for i, text in enumerate(held_out)]
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    np.testing.assert_allclose(largest_shares(held_out, documents), [*expected, 1, 0])
    itself = Document("h1", held_out[1].text)
    np.testing.assert_allclose(largest_shares(held_out[:2], [itself])[1], 0, err_msg="a document is no copy of itself")
    assert largest_shares(held_out[:2], [itself])[0] > 0
    assert expected[2] == 0 < expected[0] < 1 == expected[1]


def test_a_question_inside_a_long_text_is_found_by_run_and_overlap_only():
    question = words(20, 3)
    document, held_out = Document("x", f"{words(300, 4)} {question} {words(300, 5)}"), [Document("q", question)]
    reasons = {}
    for name in ("jaccard", "overlap", "longest_run"):
        found = Decontaminator(held_out, name).verdict(document)
        reasons[name] = found and found[name]
    assert reasons == {"jaccard": None, "overlap": 1.0, "longest_run": 20}
    both = Decontaminator(held_out, ["jaccard", "longest_run>=21"])
    assert both.verdict(document) is None and both.verdict(Document("y", question))["jaccard"] == 1
    assert Decontaminator([], ["jaccard", "longest_run"]).verdict(document) is None


def test_held_out_texts_too_short_to_be_found_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        Decontaminator([Document("a", "three short words"), Document("b", words(20))], "longest_run>=13")
    assert "1 of 2 held-out texts have fewer than 13 words" in caplog.text


def test_words_are_not_kept_for_ever():
    assert grams._hash.cache_info().maxsize


def test_a_shared_run_is_a_search_for_runs_of_words():
    draw = np.random.default_rng(1)
    for _ in range(300):
        ngram = int(draw.integers(2, 5))
        passage, text = (draw.integers(0, 3, draw.integers(1, 9)).astype(str).tolist() for _ in range(2))
        width = min(ngram, len(text), len(passage))
        runs = [passage[i : i + width] for i in range(len(passage) - width + 1)]
        expected = any(text[i : i + width] in runs for i in range(len(text) - width + 1))
        assert shares_run(" ".join(passage), ", ".join(text).upper(), ngram) == expected
    run = " ".join(f"x{i}" for i in range(13))
    assert shares_run(f"a {run} b", f"c {run} d") and not shares_run(f"a {run} b", f"c {run[:-4]} d e f g h")
    assert not shares_run("a b", "  ")


# Dates


def test_what_days_a_date_may_mean():
    def day(*date):
        return datetime.date(*date).toordinal()

    assert days_of("2015") == (day(2015, 1, 1), day(2015, 12, 31))
    assert days_of("2016-02") == (day(2016, 2, 1), day(2016, 2, 29))
    for same in ("2015-06-30", "20150630", "2015-06-30T23:59:59+02:00", "2015-06-30 00:00:00", " 2015-06-30 "):
        assert days_of(same) == (day(2015, 6, 30), day(2015, 6, 30))
    for none in (None, "", "June 2015", "2015-13", "2015-02-30", "0000", "201506", "15-06-30", "2015-6-3", "2015-06-3"):
        assert days_of(none) is None, none


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        ("2015", "2015", {"2015", "2015-06", "2015-06-30", "2015-12-31"}),
        ("2015-06", "2015-12", {"2015-06", "2015-06-30", "2015-12-31"}),
        ("2015-06-30", None, {"2015-06-30", "2015-12-31", "2016"}),
        (None, "2015-06-29", {"2014"}),
        (None, "2015-06", {"2014", "2015-06", "2015-06-30"}),
        (None, "2015", {"2014", "2015", "2015-06", "2015-06-30", "2015-12-31"}),
    ],
)
def test_a_date_range_keeps_what_lies_in_it_for_certain(low, high, kept):
    dates = ["2014", "2015", "2015-06", "2015-06-30", "2015-12-31", "2016", None, "soon"]
    for undated in ("drop", "keep"):
        chosen = DateFilter(low, high, undated)
        found = {date for date in dates if chosen.verdict(Document("x", "t", date=date)) is None}
        assert found == kept | ({None, "soon"} if undated == "keep" else set())
    record = DateFilter("2015").verdict(Document("x", "t", date="soon", place="p"))
    assert record == {
        "filter": "date",
        "place": "p",
        "document_id": "x",
        "date": "soon",
        "reason": "the date is not ISO (2015, 2015-06, 2015-06-30)",
    }


# Rules


def test_rules_by_hand():
    document = Document(
        "d1",
        "text",
        source="web",
        extra={"score": 0.5, "language": "en", "n": {"votes": 3}, "ok": True, "s": "7", "l": []},
    )
    passing = [
        "extra.score>=0.5",
        "score >= 5e-1",
        "score==0.50",
        "language==en",
        'language == "en"',
        "language!=de",
        "source==web",
        "id!=d2",
        "extra.n.votes>2",
        "n.votes<=3",
        "ok==true",
        "s>6.5",
        's=="7"',
        "s==7.0",
    ]
    failing = [
        "extra.score>0.5",
        "score<0.5",
        "language==EN",
        "language>3",
        "source!=web",
        "title==x",
        "missing==1",
        "missing!=1",
        "n.votes.more==1",
        "n==1",
        "l!=1",
        "ok==1",
        "ok>0",
        's=="7.0"',
        "language.x==en",
    ]
    assert [rule for rule in passing if parse_rule(rule).verdict(document) is not None] == []
    assert [rule for rule in failing if parse_rule(rule).verdict(document) is None] == []
    record = parse_rule("extra.score>0.5").verdict(document)
    assert (record["filter"], record["value"], record["reason"]) == (
        "quality: extra.score>0.5",
        0.5,
        "not extra.score>0.5",
    )
    assert parse_rule("missing!=1").verdict(document)["reason"] == "has no field missing"
    nan = Document("x", "t", extra={"score": float("nan")})
    assert all(parse_rule(f"score{sign}0").verdict(nan) is not None for sign in (">=", "<=", "=="))


COMPARED = st.one_of(st.integers(-5, 5), st.floats(-5, 5), st.sampled_from(["", "a", "3", "-1.5"]), st.booleans())


@settings(max_examples=100)
@given(value=COMPARED, sign=st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), number=st.integers(-5, 5))
def test_a_comparison_with_a_number_is_that_of_numbers(value, sign, number):
    passes = parse_rule(f"x{sign}{number}").verdict(Document("d", "t", extra={"x": value})) is None
    try:
        left = None if isinstance(value, bool) else float(value)
    except ValueError:
        left = None
    if left is None:
        assert passes == (sign == "!=")
    else:
        compare = {"==": left == number, "!=": left != number, "<": left < number, "<=": left <= number}
        assert passes == {**compare, ">": left > number, ">=": left >= number}[sign]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("score", "is not .field comparison value."),
        ("score=3", "is not .field comparison value."),
        ("__import__('os')==1", "is not .field comparison value."),
        ("a b==1", "is not .field comparison value."),
        ("score>=", "is not .field comparison value."),
        ("score>=high", "'high' is not a number"),
        ('score>="3"', "is not a number"),
        ('score=="3', "do not close"),
        ("date>=2015", "use min_date and max_date"),
        ("text==a", "use min_chars and max_chars"),
    ],
)
def test_rules_that_cannot_be_read_are_refused(rule, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_rule(rule)
    assert rule in str(error.value) and "\n" not in str(error.value)


# Subsampling


def test_shares_are_nested_uniform_and_a_matter_of_id_and_seed_alone():
    names = [f"document {i}" for i in range(4000)]
    hashes = document_hashes(names, 5)
    assert np.histogram(hashes / 2.0**64, 10, (0, 1))[0] == pytest.approx(np.full(10, 400), abs=80)
    shares = [1e-18, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    chosen = [set(np.flatnonzero(drawn(names, share, 5))) for share in shares]
    assert all(small <= large for small, large in zip(chosen, chosen[1:], strict=False)) and len(chosen[-1]) == 4000
    assert [len(c) / 4000 for c in chosen] == pytest.approx(shares, abs=0.03)
    assert set(np.flatnonzero(drawn(names, 0.5, 6))) != chosen[5]
    exactly = {i for i, value in enumerate(hashes.tolist()) if value < 2**62}
    assert exactly == chosen[4]
    order = np.random.default_rng(0).permutation(4000)
    assert {int(order[i]) for i in np.flatnonzero(drawn([names[i] for i in order], 0.25, 5))} == exactly
    assert {i for i in range(4000) if SubsampleFilter(0.25, 5).verdict(Document(names[i], "")) is None} == exactly


# Settings


RECORDS = [
    {"id": "old", "text": words(40, 1), "date": "2001", "score": 0.9},
    {"id": "poor", "text": words(40, 2), "date": "2020", "score": 0.1},
    {"id": "short", "text": "w1", "date": "2020", "score": 0.9},
    {"id": "test", "text": words(40, 3) + " and more", "date": "2020", "score": 0.9},
    {"id": "good", "text": words(40, 4), "date": "2020", "score": 0.9},
    {"id": "undated", "text": words(40, 5), "score": 0.9},
    {"id": "bare", "text": words(40, 6), "date": "2021"},
]
EXPECTED = {
    "old": "date",
    "poor": "quality: score>=0.5",
    "short": "length",
    "test": "decontaminate",
    "undated": "date",
    "bare": "quality: score>=0.5",
}


def documents_of(records):
    return [
        Document(r["id"], r["text"], date=r.get("date"), extra={"score": r["score"]} if "score" in r else {})
        for r in records
    ]


def test_settings_make_filters_whose_verdicts_are_json_and_do_not_depend_on_order(tmp_path):
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"text": words(40, 3)}])
    given = FilterSettings(
        decontaminate=[held_out],
        decontaminate_by=["jaccard>=0.9", "longest_run>=20"],
        min_date="2010",
        min_chars=20,
        quality=["score>=0.5"],
    )
    verdicts = {}
    for order in (RECORDS, RECORDS[::-1]):
        filters = filters_of(given)
        for document in documents_of(order):
            found = next((record for one in filters if (record := one.verdict(document)) is not None), None)
            assert json.loads(json.dumps(found)) == found
            verdicts.setdefault(document.id, []).append(found)
    assert all(first == second for first, second in verdicts.values())
    assert {name: found["filter"] for name, (found, _) in verdicts.items() if found} == EXPECTED
    assert filters_of(FilterSettings()) == []


def test_held_out_inputs_must_be_documents(tmp_path):
    bad = write_jsonl(tmp_path / "test.jsonl", [{"body": "x"}])
    with pytest.raises(ValueError, match="test.jsonl:1: the record has no field 'text'"):
        filters_of(FilterSettings(decontaminate=[bad]))
    assert len(filters_of(FilterSettings(decontaminate=[bad]), text_field="body")) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deduplicate": "fuzzy"}, "deduplicate is fuzzy; give one of exact, minhash"),
        ({"deduplicate_at": 0.5}, "deduplicate_at is given without deduplicate=minhash"),
        ({"deduplicate": "exact", "deduplicate_ngram": 5}, "deduplicate_ngram is given without deduplicate=minhash"),
        ({"deduplicate": "minhash", "deduplicate_at": 0.0}, "deduplicate_at is 0.0; give a number, above 0"),
        ({"deduplicate": "minhash", "deduplicate_ngram": 0}, "deduplicate_ngram is 0; give a whole"),
        ({"decontaminate_by": "overlap"}, "decontaminate_by is given without decontaminate"),
        (
            {"decontaminate": ["a"], "decontaminate_by": "cosine"},
            "'cosine' is no measure of resemblance; write jaccard",
        ),
        ({"decontaminate": ["a"], "decontaminate_by": "jaccard>=2"}, "'jaccard>=2' must be above 0 and at most 1"),
        ({"decontaminate": ["a"], "decontaminate_by": "jaccard>=0.1.2"}, "must be above 0 and at most 1"),
        ({"decontaminate": ["a"], "decontaminate_by": "longest_run>=2.5"}, "must be a whole number of words"),
        ({"decontaminate": ["a"], "decontaminate_by": []}, "no measure of resemblance is given"),
        ({"min_date": "last year"}, "min_date must be a year, month or day"),
        ({"max_date": "2015-06-30T10:00"}, "max_date must be a year, month or day"),
        ({"min_date": "2016", "max_date": "2015-12"}, r"min_date \(2016\) is after max_date \(2015-12\)"),
        ({"undated": "keep"}, "undated is given without min_date or max_date"),
        ({"min_date": "2015", "undated": "maybe"}, "undated is maybe; give one of drop, keep"),
        ({"min_chars": 0}, "min_chars is 0; give a whole number, at least 1"),
        ({"min_chars": 9, "max_chars": 8}, r"min_chars \(9\) is above max_chars \(8\)"),
        ({"quality": ["score"]}, "the quality rule 'score' is not"),
        ({"subsample": (0.0, 1)}, "subsample must be a share above 0 and at most 1, and a seed"),
        ({"subsample": (1.5, 1)}, "subsample must be a share"),
        ({"subsample": (0.5, 0.5)}, r"subsample is \(0.5, 0.5\); give a list of values, each a whole number"),
        ({"subsample": (0.5,)}, r"subsample is \(0.5,\); give a list of 2 values"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError, match=message) as error:
        FilterSettings(**given)
    assert "\n" not in str(error.value)
