"""What an extra brings is asked for by the extra's name."""

import re
from pathlib import Path

import pytest

from retro.common import extras
from retro.retrieval import BuildSettings
from retro.retrieval.search.postings import words_of

SETUP = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("library, extra", extras.EXTRAS.items())
def test_every_extra_brings_its_library(library, extra):
    (packages,) = re.findall(rf'"{extra}": \[(.*)\]', SETUP)
    assert f'"{library.replace("_", "-")}>=' in packages


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def test_what_is_missing_is_named_with_its_extra(bare):
    with pytest.raises(ValueError, match=r'bm25 needs bm25s, which is not installed; pip install "retro-lm\[bm25\]"'):
        words_of(["a text"])
    with pytest.raises(ValueError, match=r'datasketch, which is not installed; pip install "retro-lm\[minhash\]"'):
        BuildSettings("store", ["a.jsonl"], "tokenizer", deduplicate="minhash")
    assert BuildSettings("store", ["a.jsonl"], "tokenizer", deduplicate="exact").deduplicate == "exact"
