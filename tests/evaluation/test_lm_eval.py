"""The lm_eval adapter: against forward passes token by token, against lm_eval's own model, and through its tasks."""

import copy
import json

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from retro.cli import main
from retro.evaluation.harness import RetroLM, run_tasks
from tests.stand_ins import HashingEmbedder, words, write_jsonl


@pytest.fixture
def requests():
    """requests(kind, *args): as lm_eval makes them."""
    return lambda kind, *args: [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(args)]


@pytest.fixture
def adapter(pointer, words_tokenizer, words_store, monkeypatch):
    """adapter(**options): the copying model with the store of words."""
    monkeypatch.setattr("retro.retrieval.search.searchers.embedder_of", lambda store, embedder=None: HashingEmbedder())
    return lambda **options: RetroLM(pointer, words_store, index="tfidf", tokenizer=words_tokenizer, **options)


PAIRS = [
    (words(5, seed=1), " w7"),
    (words(8, seed=2), " w7 w8 w9"),
    (words(21, seed=3), f" {words(14, seed=4)}"),
    (f"{words(21, seed=3)} ", "w1"),
    ("", words(3, seed=5)),
]


def test_log_likelihoods_equal_forward_passes_token_by_token(adapter, requests, pointer, words_tokenizer):
    lm = adapter(num_neighbors=2, batch_size=3)
    for (context, continuation), (total, greedy) in zip(
        PAIRS, lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True), strict=True
    ):
        before, ids = words_tokenizer.encode(context), words_tokenizer.encode(context + continuation)
        if not before:
            before, ids = [words_tokenizer.eos_token_id], [words_tokenizer.eos_token_id, *ids]
        expected, most_likely = 0.0, True
        for end in range(len(before), len(ids)):
            given = {"input_ids": torch.tensor([ids[:end]])}
            if len(before) >= 8:
                chunks = [before[start : start + 8] for start in range(0, len(before) // 8 * 8, 8)]
                found = lm.reader.retriever(chunks, 2)
                place = torch.zeros(end // 8 - len(chunks), 2, 16)
                given["neighbor_ids"] = torch.cat([torch.from_numpy(found.tokens), place.long()])[None]
                given["neighbor_mask"] = torch.cat([torch.from_numpy(found.mask), place.bool()])[None]
            with torch.no_grad():
                row = pointer(**given).logits[0, -1].double().log_softmax(-1)
            expected += row[ids[end]].item()
            most_likely &= row.argmax().item() == ids[end]
        assert total == pytest.approx(expected, abs=1e-4) and greedy == most_likely
    off = adapter(retrieval="off").loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert off[0][0] == pytest.approx(lm.loglikelihood(requests("loglikelihood", PAIRS[0]), disable_tqdm=True)[0][0])
    assert abs(off[2][0] - lm.loglikelihood(requests("loglikelihood", PAIRS[2]), disable_tqdm=True)[0][0]) > 1e-3


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "RETRO[OFF]"])
def test_off_equals_the_model_of_lm_eval(make_lm, pointer, words_tokenizer, requests, fitted):
    from lm_eval.models.huggingface import HFLM

    model = pointer if fitted else make_lm()
    mine = RetroLM(model, tokenizer=words_tokenizer, batch_size=2, max_length=24)
    theirs = HFLM(pretrained=make_lm(), tokenizer=words_tokenizer, batch_size=2, max_length=24)
    pairs = [*PAIRS, (words(40, seed=8), f" {words(5, seed=9)}")]
    for kind, given in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(words(n, seed=n),) for n in (3, 24, 70)]),
    ):
        answers = [getattr(lm, kind)(requests(kind, *given), disable_tqdm=True) for lm in (mine, theirs)]
        np.testing.assert_allclose(*(np.array(found, float) for found in answers), atol=1e-5)
    given = [(words(n, seed=n), {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}) for n in (3, 11, 8)]
    assert mine.generate_until(requests("generate_until", *given), disable_tqdm=True) == theirs.generate_until(
        requests("generate_until", *given), disable_tqdm=True
    )


def test_rolling_and_generation_read_every_chunk_before(adapter, requests, pointer, words_tokenizer):
    lm, text = adapter(num_neighbors=2), words(37, seed=6)
    ids = [words_tokenizer.eos_token_id, *words_tokenizer.encode(text)]
    chunks = [ids[start : start + 8] for start in range(0, 32, 8)]
    found = lm.reader.retriever(chunks, 2)
    given = {"neighbor_ids": torch.from_numpy(found.tokens)[None], "neighbor_mask": torch.from_numpy(found.mask)[None]}
    with torch.no_grad():
        rows = pointer(torch.tensor([ids[:-1]]), **given).logits[0].double().log_softmax(-1)
    expected = rows[torch.arange(37), torch.tensor(ids[1:])].sum().item()
    rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert rolled == [pytest.approx(expected, abs=1e-4)]
    asked = {"until": [], "max_gen_toks": 9}
    written = lm.generate_until(requests("generate_until", (text, asked)), disable_tqdm=True)[0]
    prompt = torch.tensor([words_tokenizer.encode(text)])
    options = dict(retriever=lm.reader.retriever, num_neighbors=2, max_new_tokens=9, do_sample=False)
    out = pointer.generate(prompt, **options, pad_token_id=0, eos_token_id=1)[0, 37:]
    assert written == words_tokenizer.decode(out, skip_special_tokens=True)


def test_bos_is_read_and_not_scored(adapter, words_tokenizer):
    """In whole texts, by a tokenizer that puts a bos before each."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(words_tokenizer)
    tokenizer.bos_token = "w9"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w9 $A", special_tokens=[("w9", tokenizer.bos_token_id)]
    )
    lm = adapter()
    lm.tokenizer = tokenizer
    (context, predicted), *_ = lm._windows("w1 w2 w3")
    assert context.tolist() == [tokenizer.bos_token_id] == tokenizer("w1")["input_ids"][:1]
    assert tokenizer.decode(predicted) == "w1 w2 w3"


def test_automatic_batches_give_the_same(adapter, requests):
    given = requests("loglikelihood", *PAIRS)
    one, automatic = (adapter(batch_size=size).loglikelihood(given, disable_tqdm=True) for size in (1, "auto"))
    np.testing.assert_allclose([a[0] for a in one], [a[0] for a in automatic], atol=1e-5)
    assert adapter(batch_size="auto:4", max_batch_size=3).batch_size == 3


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a LAMBADA-like task and one of questions over local files, as YAML."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    text = words(30, seed=21)
    passages = write_jsonl(tmp_path / "words.jsonl", [{"text": text}, {"text": words(12, seed=22)}])
    questions = [{"question": words(6, seed=30 + i), "answers": ["w3", "w4"]} for i in range(2)]
    given = write_jsonl(tmp_path / "questions.jsonl", questions)
    common = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n"
    (tmp_path / "last_word.yaml").write_text(
        "task: last_word\noutput_type: loglikelihood\n"
        + common.format(passages)
        + "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
        + "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n  - metric: acc\n    aggregation: mean\n"
    )
    (tmp_path / "asked.yaml").write_text(
        "task: asked\noutput_type: generate_until\n"
        + common.format(given)
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answers}}"\n'
        + "generation_kwargs:\n  until: [w5]\n  max_gen_toks: 4\n  do_sample: false\n"
        + "metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
    )
    return tmp_path


def test_tasks_run_offline_and_answers_are_kept_for_this_model_and_store_only(adapter, tasks, words_tokenizer, make_lm):
    lm, cache = adapter(num_neighbors=2), tasks / "cache"
    first = run_tasks(lm, ["last_word", "asked"], tasks, cache)
    last = [(words(n, seed=s).rpartition(" ")) for n, s in ((30, 21), (12, 22))]
    examples = [lm.reader.pair(before, f" {word}") for before, _, word in last]
    scores = lm.reader.score(examples)
    expected = np.exp(-np.mean([one.log_prob for one in scores]))
    assert first["results"]["last_word"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)
    assert first["results"]["last_word"]["acc,none"] == np.mean([one.right for one in scores])
    assert 0 <= first["results"]["asked"]["exact_match,none"] <= 1
    assert first["config"]["retro"]["store"] == lm.reader.retriever.store.fingerprint
    (kept,) = cache.iterdir()
    assert kept.name.startswith(lm.fingerprint[:16])

    again = adapter(num_neighbors=2)
    again.reader.model.forward = None  # nothing is asked of the model any more
    assert run_tasks(again, ["last_word", "asked"], tasks, cache)["results"] == first["results"]
    del again.reader.model.forward
    others = [adapter(num_neighbors=1), adapter(retrieval="off"), RetroLM(make_lm(), tokenizer=words_tokenizer)]
    assert len({lm.fingerprint, *(one.fingerprint for one in others)}) == 4
    import lm_eval
    from lm_eval.tasks import TaskManager

    with pytest.raises(ValueError, match="answers of another model or store"):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        lm_eval.simple_evaluate(
            model=others[0], tasks=["last_word"], task_manager=manager, use_cache=str(kept).removesuffix("_rank0.db")
        )


def test_passages_in_the_prompt_of_any_model(make_lm, words_tokenizer, words_store, requests):
    """As prepending them by hand: the best one last, none that holds the end of the context and the continuation."""
    lm = RetroLM(make_lm(), words_store, "tfidf", 2, "prompt", tokenizer=words_tokenizer)
    context, continuation = words(20, seed=103), " w1"
    query = " ".join(context.split()[-lm.reader.chunk_len :])
    rows = lm.reader.retriever([query], 2).ids[0]
    best, second = lm.reader.passage_texts(rows)
    expected = RetroLM(make_lm(), tokenizer=words_tokenizer).loglikelihood(
        requests("loglikelihood", (f"{second}\n\n{best}\n\n{context}", continuation)), disable_tqdm=True
    )
    found = lm.loglikelihood(requests("loglikelihood", (context, continuation)), disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-5)
    copied = words_store.text(np.arange(*words_store.document_spans[5].cumsum()))
    whole = " ".join(copied)
    ids = words_tokenizer.encode(whole)
    prompt = lm._with_passages(ids, "", 200)
    first = lm.reader.retriever([whole], 1).ids[0]
    assert words_store.document_rows(first)[0] == 5 and len(prompt) > len(ids)
    assert lm.reader.passage_texts(first)[0] not in words_tokenizer.decode(prompt[: len(prompt) - len(ids)])
    assert lm._with_passages(ids, "", len(ids)) == ids


REFUSED = {
    "a maximum": ({"max_batch_size": 4}, "give one number"),
    "a batch size of 0": ({"batch_size": 0}, "give one number"),
    "another reading": ({"reading": "aloud"}, "choose one of neighbors, prompt"),
    "passages from nowhere": ({"reading": "prompt"}, "needs a store"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, make_lm, words_tokenizer):
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        RetroLM(make_lm(), tokenizer=words_tokenizer, **options)


def test_the_command(tasks, make_lm, words_tokenizer, capsys):
    make_lm().save_pretrained(tasks / "lm")
    words_tokenizer.save_pretrained(tasks / "lm")
    command = ["task", "lm-eval", str(tasks / "lm"), "--include", str(tasks), "--limit", "1", "--tasks"]
    assert main([*command, "last_word", "--json", str(tasks / "result.json")]) == 0
    assert "perplexity" in capsys.readouterr().out.split()
    result = json.loads((tasks / "result.json").read_text())
    assert result["n-samples"]["last_word"]["effective"] == 1 and result["results"]["last_word"]["perplexity,none"] > 1
    assert main([*command, "last_word", "--k", "2"]) == 2 and "without --store" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_the_device_that_lm_eval_takes_by_default_need_not_be_there(make_lm, words_tokenizer, caplog):
    lm = RetroLM(make_lm(), tokenizer=words_tokenizer, device="cuda:0")
    assert lm.device == torch.device("cpu") and "there is no CUDA here" in caplog.text


@pytest.mark.slow  # lm_eval reads all of its own tasks first
def test_a_task_that_nobody_knows(tasks, make_lm, words_tokenizer):
    with pytest.raises(ValueError, match="knows no task last_wrod"):
        run_tasks(RetroLM(make_lm(), tokenizer=words_tokenizer), ["last_wrod"], tasks)


@pytest.mark.slow
def test_the_command_of_lm_eval(tasks, make_lm, words_tokenizer, monkeypatch, capsys):
    from lm_eval.__main__ import cli_evaluate

    make_lm().save_pretrained(tasks / "lm")
    words_tokenizer.save_pretrained(tasks / "lm")
    options = ["--model_args", f"pretrained={tasks / 'lm'}", "--batch_size", "2", "--include_path", str(tasks)]
    monkeypatch.setattr("sys.argv", ["lm-eval", "--model", "retro", *options, "--tasks", "last_word"])
    cli_evaluate()
    assert "|perplexity|" in capsys.readouterr().out.replace(" ", "")
