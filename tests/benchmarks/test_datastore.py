"""Parts of the benchmark of the datastore, at sizes that measure nothing."""

import argparse
import sys
from pathlib import Path

import pytest

from retro.retrieval.search import hardness as measured


@pytest.fixture
def benchmarks(monkeypatch):
    """Where modules of benchmarks/ are imported by their own names; they are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield
    for name in {"hardness", "made_stores", "shards", "synthetic"} - before:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("benchmarks")
def test_text_says_costs_exponents_and_the_worst_tenths(monkeypatch, capsys, tmp_path):
    import hardness

    pytest.importorskip("faiss")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measured, "_HALF_OCTAVES", 1)
    given = {"store": None, "text_rows": 2500, "text_kinds": ["exact", "routed"], "text_plot": tmp_path / "text.svg"}
    result = hardness.text(argparse.Namespace(**given, dim=8, seed=0, key_dtype="float16"))
    assert [(point["kind"], point["rows"]) for point in result["points"]] == [
        ("exact", 1476), ("exact", 1044), ("routed", 1476), ("routed", 1044)
    ]  # fmt: skip
    assert result["exponents"]["exact"]["rows_compared"]["exponent"] == pytest.approx(1)
    routed = result["points"][2]
    assert routed["rows_compared"] < 1476 and routed["recall"] >= 0.95
    assert 0 < routed["groups"] <= routed["recall"] and 0 < routed["sparse"] <= 1
    assert "1,476 keys of text" in capsys.readouterr().out and (tmp_path / "text.svg").is_file()


@pytest.mark.usefixtures("benchmarks")
def test_shards_says_how_many_a_query_asks(capsys, tmp_path):
    pytest.importorskip("faiss")
    import shards

    given = {"store": None, "work": tmp_path, "rows": 3000, "queries": 20, "shards": [1, 3]}
    result = shards.shards(argparse.Namespace(**given, dim=8, seed=0, key_dtype="float16"))
    one, three = result["points"]
    assert one["placed"] == one["random"] == one["most"] == 1 and sum(one["groups_of_shards"]) > 3
    assert 1 <= three["placed"] <= three["most"] <= 3 and len(three["groups_of_shards"]) == 3
    assert "placed at random" in capsys.readouterr().out
