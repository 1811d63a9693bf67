"""What the report says that its figures do not show: each sentence where it is true, and only there."""

import pytest

from retro.evaluation.report.caveats import caveats_of
from retro.evaluation.report.files import Result, StoreRecord

LM = {"lm": 1.0, "retro_off": 1.02, "retro_on": 0.9, "retro_on_random": 1.05}
BITS = {
    "bpb": LM,
    "bpb_little_overlap": {"lm": 2.0, "retro_off": 2.0, "retro_on": 1.8, "retro_on_random": 2.1},
    "interval": {"lm": [0.97, 1.03], "retro_off": [0.98, 1.04], "retro_on": [0.88, 0.92], "retro_on_random": [1, 1.1]},
    "documents": 50,
    "chunks": 1000,
    "chunks_little_overlap": 500,
    "bytes": 90_000,
    "tokens": 20_000,
    "window_len": 512,
    "stride": 256,
    "index": "exact",
    "store_fingerprint": "abc",
}
POINT = {"chunks": 500, "bpb": LM, "gain": {"lm": [0.1, 0.05, 0.15], "retro_off": [0.12, 0.06, 0.17]}}
LEAKAGE = {"points": [{**POINT, "alpha": 0.125}, {**POINT, "alpha": 1.0}], "documents": 50, "documents_in_store": 0}
PLACE = {"column": "retro_on", "gain": 0.1, "gain_low": 0.05, "gain_high": 0.2}
SWEEP = {"sweep": "neighbors", "x": "k", "xlabel": "neighbors", "band": "95%", "documents": 50}
SWEEP |= {"curve": [{**PLACE, "k": 1, "bpb": 1.0}, {**PLACE, "k": 4, "bpb": 0.9}]}
ROWS = [
    {"label": "LM", "method": "lm", "model": "lm", "k": None, "bpb": 1.0}
    | {"gain": [0.0, 0.0, 0.0], "gain_little_overlap": [0.0, 0.0, 0.0]},
    {"label": "ON", "method": "retro_on", "model": "a", "k": 2, "bpb": 0.9}
    | {"gain": [0.1, 0.05, 0.2], "gain_little_overlap": [0.05, -0.1, 0.1]},
]
BASELINES = {"rows": ROWS, "validation_tokens": 5, "documents": 50, "near_copies": []}
FIGURE = {"value": 0.2, "interval": [0.1, 0.3]}
TASK = {"task": "lambada", "examples": 500, "read_neighbors": 1.0, "accuracy_gain": {"lm": FIGURE}}
TASK |= {"accuracy": {"retro_on": FIGURE}, "decontaminate": True}
CLEAN = {"evaluate": BITS, "leakage": LEAKAGE, "sweep": SWEEP, "baselines": BASELINES, "task": TASK}


def told(kind, value, stores=()):
    return " ".join(sentence for sentence, _ in caveats_of([Result("a.json", kind, value, "", "")], stores))


def bits(**changed):
    """BITS with some columns of bpb changed."""
    return BITS | {"bpb": LM | changed}


def little(value):
    return BITS | {"bpb_little_overlap": BITS["bpb_little_overlap"] | {"retro_on": value}}


def gain(place, *values):
    points = [dict(point) for point in LEAKAGE["points"]]
    points[place] |= {"gain": POINT["gain"] | {"retro_off": list(values)}}
    return LEAKAGE | {"points": points}


STORE = StoreRecord("s", "abc", {}, "minilm", [], {"scann": {"k": 10, "recall": 0.93}})
NONE = float("nan")
CASES = {
    "no gain where there is little overlap": (
        "evaluate",
        little(2.0),
        "0.0% below LM, over all chunks 10.0% below: there",
    ),
    "a small gain there": ("evaluate", little(1.92), "most of the gain is copying"),
    "no gain at all": ("evaluate", bits(retro_on=1.0), "RETRO[ON] is no better than LM"),
    "random as good": ("evaluate", bits(retro_on_random=0.9), "Random neighbors are as good"),
    "OFF worse than the LM": ("evaluate", bits(), "RETRO[OFF] is 2.0% above LM: part of what"),
    "intervals overlap": (
        "evaluate",
        BITS | {"interval": BITS["interval"] | {"retro_on": [0.8, 0.975]}},
        "intervals of RETRO[ON] and LM overlap",
    ),
    "no intervals": ("evaluate", {k: v for k, v in BITS.items() if k != "interval"}, "carry no intervals"),
    "few chunks with little overlap": ("evaluate", BITS | {"chunks_little_overlap": 12}, "Only 12 chunks"),
    "few documents": ("evaluate", BITS | {"documents": 3}, "Only 3 documents"),
    "one document": ("evaluate", BITS | {"documents": 1}, "Only 1 document: there is no interval"),
    "windows cut": ("evaluate", BITS | {"documents": 10}, "2,000 tokens on average, are cut into windows of 512"),
    "chunks without neighbors": ("evaluate", BITS | {"chunks_without_neighbors": 7}, "7 of 1,000 chunks found no"),
    "recall below 1": (
        "evaluate",
        BITS | {"index": "bm25+scann", "index_recall": 0.97},
        "(bm25, scann) that finds 97.00% of what exact search",
    ),
    "recall of words": ("evaluate", BITS | {"index": "tfidf", "index_recall": 0.97}, "(tfidf) that finds 97.00%"),
    "recall unknown": ("evaluate", BITS | {"index": "faiss:sq8+tfidf:exact>bm25"}, "(faiss) whose recall"),
    "no interval above 0": ("leakage", gain(0, 0.02, -0.01, 0.05), "500 chunks with r(C) at most 12.5%: 2.00%"),
    "worse": ("leakage", gain(1, -0.02, -0.03, -0.01), "-2.00% (-3.00% to -1.00%): it is worse"),
    "an unknown interval": ("leakage", gain(1, 0.02, NONE, NONE), "without an interval"),
    "documents of the store": ("leakage", LEAKAGE | {"documents_in_store": 4}, "4 of the 50 documents have the id"),
    "more is not better": (
        "sweep",
        SWEEP | {"curve": [SWEEP["curve"][0] | {"bpb": 0.8}, SWEEP["curve"][1]]},
        "more is not better throughout. RETRO[ON] is best at 1",
    ),
    "a band of draws": ("sweep", SWEEP | {"sweep": "datastore", "band": "least and greatest"}, "no interval over"),
    "a method not told apart": (
        "baselines",
        BASELINES | {"rows": [ROWS[0], ROWS[1] | {"gain": [0.1, -0.01, 0.2]}]},
        "Not told apart from LM (the interval holds 0, or is not known): ON, k = 2.",
    ),
    "a method that copies": (
        "baselines",
        BASELINES | {"rows": [ROWS[0], ROWS[1] | {"gain_little_overlap": [0.0, -0.1, 0.1]}]},
        "not over those with little overlap with their neighbors: ON, k = 2.",
    ),
    "random neighbors of the same k as good": (
        "baselines",
        BASELINES | {"rows": [*ROWS, ROWS[1] | {"model": "b"}, ROWS[1] | {"model": "b", "method": "retro_on_random"}]},
        "Random neighbors are as good",
    ),
    "near copies": ("baselines", BASELINES | {"near_copies": ["a", "b"]}, "2 of 50 documents are near copies"),
    "the oracle": ("baselines", BASELINES | {"rows": [*ROWS, ROWS[1] | {"method": "retro_on_oracle"}]}, "a bound"),
    "few examples": ("task", TASK | {"examples": 12}, "only 12 examples"),
    "an unsure task": ("task", TASK | {"accuracy_gain": {"lm": FIGURE | {"interval": [-0.1, 0.3]}}}, "over LM, task"),
    "words that read nothing": ("task", TASK | {"read_neighbors": 0.25}, "Only 25.00% of the last words"),
    "not decontaminated": ("task", TASK | {"decontaminate": False}, "were not left out"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_limit_is_told_where_it_is_true_and_only_there(case):
    kind, value, sentence = CASES[case]
    assert sentence in told(kind, value)
    if case != "OFF worse than the LM":  # true of BITS as they are
        assert sentence not in told(kind, CLEAN[kind])


def test_nothing_is_told_of_results_that_are_clear():
    assert told("evaluate", bits(retro_off=1.0)) == ""
    assert [told(kind, CLEAN[kind]) for kind in ("leakage", "sweep", "baselines", "task")] == [""] * 4


def test_the_recall_of_a_store_among_the_runs_is_known():
    approximate = BITS | {"index": "scann"}
    assert "93.00% of what exact search" in told("evaluate", approximate, [STORE])
    assert "whose recall these files do not say" in told("evaluate", approximate | {"store_fingerprint": "b"}, [STORE])


def test_a_limit_of_several_results_is_told_once():
    results = [Result(name, "evaluate", BITS | {"documents": 1}, "", "") for name in ("a", "b")]
    said = [(sentence, of) for sentence, of in caveats_of(results) if sentence.startswith("Only 1 document")]
    assert len(said) == 1 and [one.name for one in said[0][1]] == ["a", "b"]
