"""The benchmark of search among keys of text, at a size that measures nothing."""

import argparse
import sys
from pathlib import Path

import pytest

from retro.retrieval.search import hardness as measured


@pytest.fixture
def hardness(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import hardness

    yield hardness
    for name in ("hardness", "made_stores", "synthetic"):
        if name not in before:
            sys.modules.pop(name, None)


def test_text_says_costs_exponents_and_the_worst_tenths(hardness, monkeypatch, capsys, tmp_path):
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
