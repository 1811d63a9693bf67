"""The command, end to end on a few real documents with the real MiniLM and ScaNN, and what it refuses."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retro.cli import main
from tests.docs.blocks import TINY, inside, make_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with documents, and what the commands of the README make of them: tokenizer, store, trained models."""
    folder = tmp_path_factory.mktemp("cli")
    make_documents(folder)
    with inside(folder):
        run(["tokenizer", "tok", "docs.jsonl", "--vocab-size", "600"])
        run(["build", "store", "docs.jsonl", "--tokenizer", "tok", "--decontaminate", "heldout.jsonl"])
        run(["neighbors", "store"])
        run(["train", "train_small", "store=store", "output=run", *TINY])
        run(["train", "train_small", "store=store", "output=run-lm", "retrieval=false", *TINY])
    names = {"docs": "docs.jsonl", "heldout": "heldout.jsonl"} | {name: name for name in ("tok", "store", "run")}
    shutil.copytree(folder / "run", folder / "broken", ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "broken" / "model.safetensors").write_bytes(b"damaged")
    names["broken"] = "broken"
    return {name: str(folder / path) for name, path in names.items()} | {"lm": str(folder / "run-lm"), "folder": folder}


def run(argv: list[str]) -> None:
    assert main(argv) == 0, argv


def test_search_shows_chunk_neighbors_scores_and_sources(made, capsys, tmp_path):
    run(["search", made["store"], "rearrange elements of a tensor", "--k", "2", "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "einops" in printed
    assert json.loads((tmp_path / "found.json").read_text())


def test_evaluate(made, capsys, tmp_path):
    file = tmp_path / "bpb.json"
    run(
        [
            "evaluate",
            made["run"],
            "--store",
            made["store"],
            "--data",
            made["heldout"],
            "--lm",
            made["lm"],
            "--json",
            str(file),
        ]
    )
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert set(result["bpb"]) == {"lm", "retro_off", "retro_on", "retro_on_random"}
    assert f"{result['bpb']['retro_on']:.4f}" in printed
    with open(made["heldout"]) as documents:
        texts = [json.loads(line)["text"] for line in documents]
    assert result["bytes"] == sum(len(text.encode()) for text in texts)  # the tokenizer has a bos: every byte is scored
    assert all(0 < value < 20 for value in result["bpb"].values())


def test_generate_prints_sources(made, capsys, tmp_path):
    prompt = " ".join(["rearrange the axes of a tensor"] * 10)
    file = tmp_path / "sample.json"
    run(["generate", made["run"], prompt, "--store", made["store"], "--max-new-tokens", "4", "--json", str(file)])
    (sample,), printed = json.loads(file.read_text())["texts"], capsys.readouterr().out
    assert sample["chunks"][1]["neighbors"][0]["title"] in printed
    run(["generate", made["run"], prompt, "--no-retrieval", "--max-new-tokens", "4", "--do-sample", "--seed", "1"])
    assert "retrieval is off" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(made):
    before = (made["folder"] / "run" / "metrics.jsonl").read_bytes()
    with inside(made["folder"]):
        run(["train", "train_small", "store=store", "output=run", *TINY])
    assert (made["folder"] / "run" / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def fitted(made):
    """A tiny base with the store's tokenizer, fitted for a few steps by the packaged recipe."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(made["tok"])
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    for part in (base, tokenizer):
        part.save_pretrained(made["folder"] / "base")
    return fit("retrofit_smollm2", made)


def fit(recipe, made):
    """The folder of a few steps."""
    folder = str(made["folder"] / recipe)
    given = [f"base={made['folder'] / 'base'}", f"store={made['store']}", f"output={folder}"]
    given += ["index=null", "num_neighbors=2"]
    run(["retrofit", recipe, *given, "window_len=128", "max_tokens=null", "max_steps=3", "log_every=1"])
    return folder


def test_the_recipe_for_a_gpu_names_no_base(fitted, made):
    lines = Path(fit("retrofit_gpu", made), "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tokens"] == 3 * 16 * 128


def test_a_fitted_model_is_evaluated_and_sampled_from(fitted, made, capsys, tmp_path):
    file = tmp_path / "bpb.json"
    run(["evaluate", fitted, "--store", made["store"], "--data", made["heldout"], "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["num_neighbors"] == 2 and result["window_len"] == 2048
    assert len({result["bpb"][name] for name in ("retro_off", "retro_on", "retro_on_random")}) == 3
    prompt = " ".join(["rearrange the axes of a tensor"] * 10)
    capsys.readouterr()
    run(["generate", fitted, prompt, "--store", made["store"], "--max-new-tokens", "3", "--json", str(file)])
    (sample,) = json.loads(file.read_text())["texts"]
    assert sample["chunks"][1]["neighbors"][0]["title"] in capsys.readouterr().out
    run(["generate", fitted, prompt, "--no-retrieval", "--max-new-tokens", "3"])
    assert "retrieval is off" in capsys.readouterr().out


def test_a_fit_whose_base_has_gone_elsewhere(fitted, made, capsys, tmp_path):
    moved = shutil.copytree(fitted, tmp_path / "moved", ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads((moved / "config.json").read_text()) | {"base_name_or_path": "/gone/base"}
    (moved / "config.json").write_text(json.dumps(config))
    argv = ["generate", str(moved), "a tensor", "--no-retrieval", "--max-new-tokens", "3"]
    assert main(argv) != 0 and "--base" in capsys.readouterr().err
    base = ["--base", str(made["folder"] / "base")]
    run([*argv, *base])
    run(["task", "lambada", str(moved), "--data", made["heldout"], "--documents", "1", *base])


REFUSED = {
    "an unknown key": (["train", "train_small", "store={store}", "output={new}", "lerning_rate=1"], "lerning_rate"),
    "an unknown model field": (
        ["train", "train_small", "store={store}", "output={new}", "model.hiden_size=1"],
        "hidden_size",
    ),
    "a window that m does not divide": (
        ["train", "train_small", "store={store}", "output={new}", "window_len=100"],
        "64",
    ),
    "a checkpoint of another config": (
        ["train", "train_small", "store={store}", "output={run}", *TINY, "lr=0.5"],
        "lr",
    ),
    "a packaged config that is not there": (["train", "train_smal", "store={store}", "output={new}"], "train_small"),
    "no store": (["train", "train_small", "store={new}", "output={new}2"], "{new}"),
    "no model": (["evaluate", "{store}", "--store", "{store}", "--data", "{heldout}"], "config.json is missing"),
    "sampling options without sampling": (
        ["generate", "{run}", "x", "--no-retrieval", "--top-p", "0.5"],
        "do_sample",
    ),
    "a damaged model": (["generate", "{broken}", "x", "--no-retrieval"], "are recorded; restore it from a copy"),
    "a prompt without a store": (["generate", "{run}", "x"], "--store is missing"),
    "no such input": (["build", "{new}", "{new}.jsonl", "--tokenizer", "{tok}"], "{new}.jsonl"),
    "no such embedder": (["build", "{new}", "{docs}", "--tokenizer", "{tok}", "--embedder", "{new}"], "{new}"),
    "no file of ids": (["remove", "{store}", "--ids", "{new}"], "error: {new}: No such file"),
    "a result that would be a folder": (["search", "{new}", "x", "--json", "{store}"], "{store}' is a folder"),
    "an output without a name": (["train", "train_small", "store={store}", "output="], "output is empty"),
    "a store without a name": (["train", "train_small", "store=", "output={new}"], "store is empty"),
    "no beams": (["generate", "{run}", "x", "--no-retrieval", "--num-beams", "0"], "num_beams is 0"),
    "a probability above 1": (
        ["generate", "{run}", "x", "--no-retrieval", "--do-sample", "--top-p", "2"],
        "top_p is 2.0",
    ),
    "a seed beyond 64 bits": (
        ["generate", "{run}", "x", "--no-retrieval", "--do-sample", "--seed", "9" * 30],
        "seed is 999",
    ),
    "settings that are no text": (["train", "{run}/model.safetensors"], "model.safetensors is no UTF-8 text"),
    "ids that are no text": (["remove", "{store}", "--ids", "{run}/model.safetensors"], "is no UTF-8 text"),
    "a demo folder in use": (["demo", "--output", "{store}"], "in use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, made, capsys, tmp_path):
    argv, words = REFUSED[case]
    fill = lambda text: text.format(**made, new=tmp_path / "new")  # noqa: E731
    assert main([fill(argument) for argument in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("retro: error: ") and fill(words) in error[-1]
    assert sum(line.startswith("retro: error") for line in error) == 1
    assert not (tmp_path / "new").exists(), "nothing is half-written"


def test_a_store_of_another_tokenizer_is_refused(made, capsys, tmp_path):
    run(["tokenizer", str(tmp_path / "tok"), made["heldout"], "--vocab-size", "500"])
    run(["build", str(tmp_path / "store"), made["docs"], "--tokenizer", str(tmp_path / "tok"), "--index", "none"])
    assert main(["generate", made["run"], "x", "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error and str(tmp_path / "store") in error and made["run"] in error


def shell(command: str, folder, **env) -> tuple[int, str]:
    """Exit code and what is left of stderr, of `retro` in a shell of its own; $retro stands for the command."""
    retro = f"{shlex.quote(sys.executable)} -m retro.cli"
    env = {**os.environ, "retro": retro, "PYTHONPATH": os.pathsep.join(sys.path)} | env
    ended = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stderr


def test_a_reader_that_has_gone_ends_a_verb_without_a_word(tmp_path):
    (tmp_path / "train_long.yaml").write_text("# a line\n" * 100_000)
    assert shell("$retro configs train_long.yaml | true; exit ${PIPESTATUS[0]}", tmp_path) == (141, "")


def test_what_a_terminal_cannot_show_stops_nothing(tmp_path):
    (tmp_path / "train_long.yaml").write_text("# größer ≥ 🤗\n", encoding="utf-8")
    assert shell("$retro configs train_long.yaml", tmp_path, PYTHONIOENCODING="ascii") == (0, "")


def test_an_argument_that_is_no_text_is_refused(tmp_path):
    code, error = shell("$retro search store $'\\xff'", tmp_path, PYTHONUTF8="1")
    assert code == 2 and error.startswith("retro: error: the argument '\\udcff' is no UTF-8 text")


@pytest.mark.parametrize("columns", ["0", "1", "4", "7"])
def test_help_ends_in_a_narrow_terminal(columns, tmp_path):
    assert shell("ulimit -v 2000000; timeout 30 $retro train --help", tmp_path, COLUMNS=columns) == (0, "")


def test_a_library_that_no_check_has_foreseen_is_named_with_its_extra(monkeypatch, capsys):
    def needs_it(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    monkeypatch.setattr("retro.cli.app", needs_it)
    assert main(["serve"]) == 2
    assert 'needs uvicorn, which is not installed; pip install "retro-lm[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory", "a/b"), OSError("a sentence")])
def test_an_error_of_the_system_is_a_sentence(error, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("retro.cli.app", fails)
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told in (
        "retro: error: a/b: No such file or directory; give another path.\n",
        "retro: error: a sentence\n",
    )


def test_an_interrupt_is_told(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["retro.cli.configs"], "packaged_configs", interrupted)
    assert main(["configs"]) == 130
    assert capsys.readouterr().err == "retro: stopped\n"
