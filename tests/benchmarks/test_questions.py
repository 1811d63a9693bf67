"""The benchmark of questions: no held-out passage is learned from, and every column is measured."""

import json
import runpy
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retro.evaluation.tasks import read_questions
from tests.stand_ins import words, write_jsonl

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "questions.py"


def test_it_learns_from_other_passages_than_it_asks_about(words_tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(words_tokenizer), eos_token_id=1, pad_token_id=0, **sizes))
    base.save_pretrained(tmp_path / "lm")
    words_tokenizer.save_pretrained(tmp_path / "lm")
    documents = [{"id": f"p{i}", "title": "w1", "text": words(90, seed=i)} for i in range(6)]
    asked = [{"question": words(6, seed=i % 6), "answers": ["w1"], "passage_id": f"p{i % 6}"} for i in range(18)]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", it) for name, it in (("passages", documents), ("questions", asked))
    ]
    given = ["--start", str(tmp_path / "lm"), "--output", str(tmp_path / "out"), "--held-out", "2"]
    settings = ["--settings", "max_steps=1", "window_len=128", "batch_size=2"]
    monkeypatch.setattr(sys, "argv", ["questions.py", *map(str, files), *given, *settings])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    learned = {one.passage_id for one in read_questions(tmp_path / "out" / "train.jsonl")}
    assert len(learned) == 4
    for name in ("given", "found"):
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        names = {answer["id"]: f"p{int(answer['id']) % 6}" for answer in result["answers"]}
        assert result["questions"] == 6 and result["right_passages"] == 2 and not learned & set(names.values())
        assert set(result["exact_match"]) == {
            "retro_off", "retro_on", "retro_on_random", "in_context", "in_context_on", "in_context_on_random",
        }  # fmt: skip
