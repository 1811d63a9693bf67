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
    for name in {"hardness", "large", "made_stores", "shards", "synthetic"} - before:
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


@pytest.mark.usefixtures("benchmarks")
def test_large_builds_searches_joins_and_extends_one_index(monkeypatch, capsys, tmp_path):
    pytest.importorskip("faiss")
    import large

    spent = dict.fromkeys(("seconds", "cpu_seconds", "memory", "with_files"), 1.0)
    monkeypatch.setattr(large, "in_own_process", lambda step, *stores: large.STEPS[step](*stores) | spent)
    monkeypatch.setattr(large, "_SHARDS", 4)
    given = {"large_rows": 4000, "large_joined": 50, "dim": 8, "seed": 0, "key_dtype": "float16", "work": tmp_path}
    found = large.large(argparse.Namespace(**given))
    assert found["build"]["lists"] == found["add"]["lists"] == -(-3000 // 128) and found["index_bytes"] > 3000 * 16
    assert found["build"]["base"] is None and (tmp_path / "large" / "index" / found["add"]["base"]).is_dir()
    for step in ("search", "again"):
        assert found[step]["recall"] > 0.85 and 0 < found[step]["rows_compared"] < 2 * 4000 and found[step]["ms"] > 0
    assert found["join"]["recall"] >= 0.9 and "4,000 keys of 8" in capsys.readouterr().out
