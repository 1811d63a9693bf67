"""The measuring verbs end to end: a store with real MiniLM keys, a tiny RETRO, a plain Hugging Face LM beside it."""

import csv
import json
import shutil

import pytest
from transformers import AutoTokenizer

from retro.cli import main
from retro.loading import load
from retro.provenance import write_provenance
from retro.retrieval import Store
from tests.stand_ins import make_words_tokenizer, words, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory, words_tokenizer):
    """Paths by name: store, heldout (its first document a copy), retro (a run with one checkpoint), lm, other (an LM of
    another tokenizer)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro import RetroConfig, RetroForCausalLM

    folder = tmp_path_factory.mktemp("commands")
    words_tokenizer.save_pretrained(folder / "tok")
    texts = [words(40, seed=i, vocabulary=100) for i in range(8)]
    docs = write_jsonl(folder / "docs.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    held = [texts[3], *(words(40, seed=100 + i, vocabulary=100) for i in range(2))]
    heldout = write_jsonl(folder / "heldout.jsonl", [{"id": f"h{i}", "text": text} for i, text in enumerate(held)])
    build = ["build", str(folder / "store"), docs, "--tokenizer", str(folder / "tok"), "--chunk-len", "8"]
    assert main([*build, "--min-chunk-len", "1", "--index", "none"]) == 0
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=16)
    model = RetroForCausalLM(RetroConfig(vocab_size=len(words_tokenizer), cca_layers=[2], **sizes))
    checkpoint = folder / "retro" / "checkpoints" / "step-00000007"
    for place in (folder / "retro", checkpoint):
        model.save_pretrained(place)
        write_provenance(place, Store.open(folder / "store"))
    (checkpoint / "state.json").write_text('{"step": 7, "tokens": 700}')
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for name, tokenizer in (("lm", words_tokenizer), ("other", make_words_tokenizer(90))):
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "retro" / "checkpoints", folder / "empty" / "none")
    names = {name: str(folder / name) for name in ("store", "retro", "lm", "other", "empty")}
    return names | {"heldout": heldout}


def run(made, tmp_path, *argv: str) -> dict:
    """Run a verb on the held-out documents and give its JSON."""
    given = [argument.format(**made) for argument in argv]
    common = ["--store", made["store"], "--data", made["heldout"], "--cache", str(tmp_path / "cache")]
    assert main([*given, *common, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_evaluate_with_a_plain_lm_of_hugging_face(made, tmp_path, capsys):
    result = run(made, tmp_path, "evaluate", "{retro}", "--lm", "{lm}", "--window", "32", "--stride", "8")
    printed = capsys.readouterr().out
    assert set(result["bpb"]) == {"lm", "retro_off", "retro_on", "retro_on_random"}
    assert result["window_len"] == 32 and result["stride"] == 8 and result["words"] == 120
    assert result["model"] == made["retro"] and result["lm"] == made["lm"] and "torch" in result["versions"]
    assert f"{result['perplexity']['retro_on']['word']:.3f}" in printed
    alone = run(made, tmp_path, "evaluate", "{lm}", "--documents", "1", "--window", "32")
    assert list(alone["bpb"]) == ["lm"] and alone["documents"] == 1


def test_leakage_finds_the_copy(made, tmp_path, capsys):
    files = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "figure.png")]
    result = run(made, tmp_path, "leakage", "{retro}", "--lm", "{lm}", "--index", "exact", *files)
    printed = capsys.readouterr().out
    copied = result["points"][-1]["chunks"] - result["points"][-2]["chunks"]
    assert copied >= 5, "the five chunks of the first document"
    assert result["examples"][-1]["neighbor"]["document_id"] == "d3" and "[[w" in printed
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == 4 * len(result["points"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "figure.json").read_text()) == result
    assert (tmp_path / "figure.csv").read_text() == (tmp_path / "a.csv").read_text()
    assert len(list((tmp_path / "cache").glob("*/rows.npy"))) == 1


@pytest.mark.parametrize(
    ("argv", "places"),
    [
        (["neighbors", "{retro}", "--ks", "0", "3", "--lm", "{lm}"], [0, 3]),
        (["datastore", "{retro}", "--shares", "1", "0.5", "--draws", "2", "--k", "1"], [24, 48]),
        (["models", "{retro}", "{lm}"], None),
        (["tokens", "{retro}", "--lm", "{lm}"], [700, 700]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_sweeps(argv, places, made, tmp_path, capsys):
    result = run(made, tmp_path, "sweep", *argv, "--plot", str(tmp_path / "figure.svg"))
    assert result["sweep"] == argv[0] and result["store_fingerprint"] == Store.open(made["store"]).fingerprint
    if places:
        assert [point[result["x"]] for point in result["curve"]] == places
    printed = capsys.readouterr().out
    assert all(f"{point['bpb']:.4f}" in printed for point in result["curve"])
    assert json.loads((tmp_path / "figure.json").read_text()) == result
    rows = list(csv.DictReader((tmp_path / "figure.csv").open()))
    assert len([row for row in rows if row["what"] == "point"]) == len(result["points"])


READ = ["--store", "{store}", "--data", "{heldout}"]
REFUSED = {
    "an LM of another tokenizer": (["evaluate", "{retro}", *READ, "--lm", "{other}"], "tokenizer"),
    "an LM that is not there": (["evaluate", "{retro}", *READ, "--lm", "no/such"], "no/such cannot be loaded"),
    "a plot of no known kind": (["leakage", "{retro}", *READ, "--plot", "figure.gif"], ".png, .svg or .pdf"),
    "no document": (["leakage", "{retro}", *READ, "--documents", "0"], "--documents is 0"),
    "a window between chunks": (["evaluate", "{retro}", *READ, "--window", "20"], "multiple of the chunk length 8"),
    "k beyond 0": (["sweep", "neighbors", "{retro}", *READ, "--ks", "-1"], "k is swept over [-1]"),
    "a plain LM swept over k": (["sweep", "neighbors", "{lm}", *READ], "reads no neighbors"),
    "a plain LM that is served": (["serve", "{lm}", "--store", "{store}"], "reads no neighbors"),
    "a plain LM that writes from a store": (["generate", "{lm}", "w1", "--store", "{store}"], "reads no neighbors"),
    "a share above 1": (["sweep", "datastore", "{retro}", *READ, "--shares", "2"], "above 0 up to 1"),
    "an index that shares have not": (["sweep", "datastore", "{retro}", *READ, "--index", "faiss:sq8"], "faiss:sq8"),
    "shares of a server": (["sweep", "datastore", "{retro}", "--store", "http://h", *READ[2:]], "address of a server"),
    "baselines of a server": (["baselines", "{retro}", "--store", "http://h", *READ[2:]], "address of a server"),
    "a run without checkpoints": (["sweep", "tokens", "{empty}", *READ], "holds no checkpoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, made, capsys):
    argv, words_ = REFUSED[case]
    assert main([argument.format(**made) for argument in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retro: error: ") and words_ in error


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [("bm25", "auto", "bm25"), ("bm25", "tfidf", "tfidf"), ("scann", "auto", "exact"), (None, "auto", "exact")],
)
def test_a_model_reads_as_it_was_trained_to(made, tmp_path, monkeypatch, trained, asked, expected):

    folder = tmp_path / "model"
    shutil.copytree(made["retro"], folder, ignore=shutil.ignore_patterns("checkpoints"))
    AutoTokenizer.from_pretrained(made["lm"]).save_pretrained(folder)
    write_provenance(folder, Store.open(made["store"]), trained)
    monkeypatch.setattr(
        "retro.retrieval.search.index.find_spec", lambda name: None
    )  # no engine: what "auto" takes is exact
    assert load(folder, made["store"], index=asked).retriever.index.kind == expected


def test_a_store_without_keys_is_read_by_words(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made["retro"], folder, ignore=shutil.ignore_patterns("checkpoints"))
    store = Store.open(made["store"])
    write_provenance(folder, store, "exact+bm25")
    assert load(folder, store).retriever.index.kind == "exact+bm25"
    build = ["build", str(tmp_path / "keyless"), made["heldout"], "--tokenizer", made["lm"], "--embedder", "none"]
    assert main([*build, "--chunk-len", "8", "--min-chunk-len", "1"]) == 0
    assert load(folder, tmp_path / "keyless").retriever.index.kind == "bm25"
