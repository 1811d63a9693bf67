"""Fine-tuning on questions: what a window holds, and that it teaches an answer, from the command on."""

import copy
import json

import numpy as np
import pytest
import torch

import retro
from retro.cli import main
from retro.provenance import read_provenance, write_provenance
from tests.stand_ins import words, write_jsonl


@pytest.fixture
def made(words_store, words_tokenizer, pointer, make_lm, tmp_path):
    """Folders of a RETRO and of a fitted model, and files of questions with and without passages."""
    from retro import RetroConfig, RetroForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=16)
    model = RetroForCausalLM(RetroConfig(vocab_size=len(words_tokenizer), cca_layers=[1, 2], **sizes))
    make_lm().save_pretrained(tmp_path / "lm")
    pointer.config.base_name_or_path = str(tmp_path / "lm")
    for name, one in (("retro", model), ("fitted", pointer)):
        one.save_pretrained(tmp_path / name)
        words_tokenizer.save_pretrained(tmp_path / name)
        write_provenance(tmp_path / name, words_store)
    asked = [{"question": words(5, seed=i), "answers": ["w11 w12", "w13"]} for i in range(4)]
    write_jsonl(tmp_path / "plain.jsonl", asked)
    write_jsonl(tmp_path / "fid.jsonl", [one | {"ctxs": [{"title": "w1", "text": words(9, seed=9)}]} for one in asked])
    return tmp_path


def overrides(made, name, questions, **more):
    given = dict(
        start=made / name, store=made.parent, questions=made / questions, output=made / "out", num_neighbors=2,
        window_len=24, batch_size=2, max_steps=2, warmup_steps=0, index="tfidf",
    )  # fmt: skip
    return [f"{key}={value}" for key, value in (given | more).items()]


def test_a_window_is_what_the_task_reads_and_an_answer(words_store, pointer, made):
    from retro.evaluation.tasks import Reader, read_questions
    from retro.evaluation.tasks.passages import passage_tokens
    from retro.evaluation.tasks.prompts import PROMPT
    from retro.training.finetune import QuestionWindows

    questions = read_questions(made / "fid.jsonl")
    reader = Reader(model=pointer, tokenizer=words_store.tokenizer, align="end")
    windows = QuestionWindows(words_store, reader, questions, 40, 2, 16, seed=1)
    batch = windows.batch(np.array([2, 0]))
    assert batch["input_ids"].shape == (2, 16), "as long as the longest of both, in whole chunks"
    assert set(windows.answers) == {"w11 w12", "w13"}, "drawn of all right answers"
    for row, number in enumerate([2, 0]):
        prompt = reader.place(reader.encode(PROMPT.format(question=questions[number].question))).tolist()
        answer = [*words_store.tokenizer.encode(windows.answers[number]), 1]
        padding = batch["input_ids"].shape[1] - len(prompt) - len(answer)
        assert batch["input_ids"][row].tolist() == prompt + answer + [0] * padding and len(prompt) % 8 == 0
        assert batch["labels"][row].tolist() == [-100] * len(prompt) + answer + [-100] * padding
        ids, mask = passage_tokens(words_store.tokenizer, questions[number].passages, 2, 16)
        place = len(prompt) // 8 - 1
        assert (batch["neighbor_ids"][row, place].numpy() == ids).all()
        assert (batch["neighbor_mask"][row, place].numpy() == mask).all()
        others = [i for i in range(batch["neighbor_mask"].shape[1]) if i != place]
        assert not batch["neighbor_mask"][row, others].any() and mask.sum() > 8 and not mask[1].any()
    with pytest.raises(ValueError, match="question 0 fills window_len 8"):
        QuestionWindows(words_store, reader, questions, 8, 2, 16)


@pytest.mark.parametrize(("name", "questions"), [("retro", "fid.jsonl"), ("fitted", "plain.jsonl")])
def test_the_command_trains_goes_on_and_its_model_answers(name, questions, made, words_store, tmp_path):
    more = dict(store=words_store.path, save_every=1)
    command = ["task", "finetune", "finetune_qa", *overrides(made, name, questions, **more)]
    assert main(command) == 0
    metrics = [json.loads(line) for line in (made / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2 and metrics[-1]["grad_norm"] > 0
    assert read_provenance(made / "out")["index"] == "tfidf"
    assert main(command[:-1] + ["index=tfidf", "max_steps=2"]) == 0, "nothing is left to do"
    asked = ["--data", str(made / questions), "--store", str(words_store.path), "--index", "tfidf", "--passages", "2"]
    assert main(["task", "qa", str(made / "out"), *asked, "--max-new-tokens", "2"]) == 0


def test_it_learns_an_answer_from_nothing_but_the_answer(made, words_store):
    from retro.evaluation.tasks import measure_answers, open_reader, read_questions

    more = dict(store=words_store.path, max_steps=40, lr="1e-2", batch_size=4)
    assert main(["task", "finetune", "finetune_qa", *overrides(made, "retro", "fid.jsonl", **more)]) == 0
    questions = read_questions(made / "fid.jsonl")
    result = measure_answers(open_reader(str(made / "out")), questions, 2, 4, ["retro_on"])
    assert result["exact_match"]["retro_on"]["value"] == 1


REFUSED = {
    "data of another kind": (dict(valid_store="a"), "valid_store: a means nothing"),
    "no model": (dict(start="no/such"), "no/such cannot be loaded"),
    "a base of other tokens": (dict(start="{made}/other"), "another tokenizer than that of the base"),
    "a base of fewer tokens": (dict(start="{made}/small"), "20; build a store with the base's tokenizer"),
    "a type of what is trained": (dict(base_dtype="bfloat16"), "base_dtype: bfloat16 is for a frozen base, and all of"),
    "no room": (dict(window_len=8), "fills window_len 8"),
}


def test_a_plain_lm_is_fitted_and_only_its_form_is_trained(made, words_store, words_tokenizer):
    from retro.retrofit import RetrofitForCausalLM, open_base

    words_tokenizer.save_pretrained(made / "lm")
    base = open_base(made / "lm").state_dict()
    given = overrides(made, "lm", "fid.jsonl", store=words_store.path, max_steps=8, lr="1e-1")
    assert main(["task", "finetune", "finetune_qa", *given]) == 0
    fitted = RetrofitForCausalLM.from_pretrained(made / "out")
    assert fitted.config.base_name_or_path == str(made / "lm") and fitted.config.num_neighbors == 2
    assert all(torch.equal(tensor, base[name]) for name, tensor in fitted.base.state_dict().items())
    start = retro.retrofit(str(made / "lm"), chunk_len=8).form.state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in fitted.form.state_dict().items())


def test_a_fitted_folder_without_a_record_is_held_to_its_base(made, words_store, words_tokenizer, capsys):
    other = copy.deepcopy(words_tokenizer)
    other.add_tokens(["another"])
    other.save_pretrained(made / "lm")
    (made / "fitted" / "retro.json").unlink()
    given = overrides(made, "fitted", "fid.jsonl", store=words_store.path)
    assert main(["task", "finetune", "finetune_qa", *given]) == 2
    assert f"another tokenizer than that of the base {made / 'lm'}" in capsys.readouterr().err


def test_a_window_of_a_chat_ends_with_the_turn(words_store, pointer, made, monkeypatch):
    from retro.evaluation.tasks import Reader, read_questions
    from retro.training.finetune import QuestionWindows

    template = "{% for m in messages %}w5 {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
    monkeypatch.setattr(words_store.tokenizer, "chat_template", template)
    questions = read_questions(made / "fid.jsonl")
    reader = Reader(model=pointer, tokenizer=words_store.tokenizer, align="end")
    windows = QuestionWindows(words_store, reader, questions, 32, 2, 16)
    labels = windows.batch(np.array([0]))["labels"][0]
    place = int((labels != -100).nonzero()[0])
    end = [*words_store.tokenizer.encode(windows.answers[0]), 1]
    assert labels[labels != -100].tolist() == end and place % 8 == 0
    ids = windows.batch(np.array([0]))["input_ids"][0]
    assert ids[place - 2] == 1 and ids[place - 1] == words_store.tokenizer.encode("w5")[0], "the user's turn has ended"


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, made, words_store, words_tokenizer, make_lm, capsys):
    make_lm().save_pretrained(made / "other")
    other = copy.deepcopy(words_tokenizer)
    other.add_tokens(["another"])
    other.save_pretrained(made / "other")
    small = make_lm()
    small.resize_token_embeddings(20)
    small.save_pretrained(made / "small")
    given, said = REFUSED[case]
    given = {key: str(value).format(made=made) for key, value in given.items()}
    command = [
        "task",
        "finetune",
        "finetune_qa",
        *overrides(made, "retro", "fid.jsonl", **({"store": words_store.path} | given)),
    ]
    assert main(command) == 2 and said in capsys.readouterr().err
