"""LAMBADA, summaries, questions with passages: hand-made cases with known figures, and the commands end to end."""

import copy
import gzip
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from retro.cli import main
from retro.evaluation.tasks import (
    Passage,
    Question,
    Reader,
    find_passages,
    measure_answers,
    measure_lambada,
    measure_summaries,
    read_questions,
    read_summaries,
    recall,
)
from retro.evaluation.tasks.examples import aligned
from retro.evaluation.tasks.lambada import last_word
from retro.evaluation.tasks.passages import passage_tokens
from retro.evaluation.tasks.prompts import CHAT_PROMPT, answer_ids, in_context, prompt_ids
from retro.evaluation.tasks.question_answering import _of_others
from retro.evaluation.tasks.summaries import Summary
from retro.text.documents import Document
from tests.stand_ins import make_store, words, write_jsonl


@pytest.fixture
def reader(pointer, words_tokenizer, words_retriever):
    given = dict(retriever=words_retriever, retrieval="on", num_neighbors=2, cache=False)
    return Reader(model=pointer, tokenizer=words_tokenizer, **given)


@pytest.fixture(scope="session")
def letters_tokenizer():
    """One token a character, so that words and answers have several."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kept = "abcdefghijklmnopqrstuvwxyz :,\n0123456789.?"
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: i + 3 for i, letter in enumerate(kept)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|\n)"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def letters_model(letters_tokenizer):
    from retro import RetroConfig, RetroForCausalLM

    torch.manual_seed(1)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=24)
    config = RetroConfig(vocab_size=len(letters_tokenizer), cca_layers=[1, 2], initializer_range=0.5, **sizes)
    return RetroForCausalLM(config).eval()


def most_likely(model, tokenizer, text, **neighbors):
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode(text)]), **neighbors).logits[0, -1].double().log_softmax(-1)


# Last words


def test_lambada_counts_the_last_words_that_greedy_decoding_writes(reader, words_tokenizer):
    """Three passages with the right last word without neighbors, one with the right one with neighbors, one neither."""
    contexts, log_probs, documents = [words(n, seed=50 + n) for n in (12, 17, 9, 20, 33)], [], []
    for i, context in enumerate(contexts):
        off = most_likely(reader.model, words_tokenizer, context)
        chunks = [words_tokenizer.encode(context)[s : s + 8] for s in range(0, len(context.split()) // 8 * 8, 8)]
        found = reader.retriever(chunks, 2)
        given = {"neighbor_ids": torch.from_numpy(found.tokens)[None]}
        on = most_likely(
            reader.model, words_tokenizer, context, neighbor_mask=torch.from_numpy(found.mask)[None], **given
        )
        third = next(t for t in range(3, 103) if t not in (off.argmax(), on.argmax()))
        word = [off.argmax().item()] * 3 + [on.argmax().item(), third]
        documents.append(Document(f"l{i}", f"{context}\n{words_tokenizer.decode([word[i]])} "))
        log_probs.append((off[word[i]].item(), on[word[i]].item(), off.argmax() == word[i], on.argmax() == word[i]))
    result = measure_lambada(reader, documents)
    off, on, off_right, on_right = (np.array(column, float) for column in zip(*log_probs, strict=True))
    assert off_right.sum() >= 3 and on_right[3] == 1 and off_right[4] == on_right[4] == 0
    assert result["accuracy"]["retro_off"]["value"] == pytest.approx(off_right.mean())
    assert result["accuracy"]["retro_on"]["value"] == pytest.approx(on_right.mean())
    assert result["accuracy_gain"]["retro_off"]["value"] == pytest.approx((on_right - off_right).mean())
    for column, expected in (("retro_off", off), ("retro_on", on)):
        figure = result["perplexity"][column]
        assert figure["value"] == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    assert result["read_neighbors"] == 1.0 and result["examples"] == 5 and result["num_neighbors"] == 2


def test_a_last_word_is_right_only_if_all_its_tokens_are(letters_model, letters_tokenizer):
    """A context after which greedy decoding writes a space and two letters, as no mean over tokens could show."""
    draw = np.random.default_rng(0)
    ids = torch.tensor([letters_tokenizer.encode("".join(draw.choice(list("abcdefgh"), 5))) for _ in range(1000)])
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, letters_model(ids).logits[:, -1:].argmax(-1)], 1)
    written = [(text[:5], text[5:]) for text in letters_tokenizer.batch_decode(ids)]
    context, word = next((before, word) for before, word in written if word[:1] == " " and word[1:].isalpha())
    reader = Reader(model=letters_model, tokenizer=letters_tokenizer)
    texts = [context + word, f"{context}{word[:2]}9", f"{context} 9{word[2:]}"]
    examples = [last_word(reader, Document("a", text)) for text in texts]
    assert letters_tokenizer.decode(examples[0].context) == context
    assert [letters_tokenizer.decode(one.continuation) for one in examples] == [text[5:] for text in texts]
    assert [one.greedy.tolist() for one in reader.score(examples)][:2] == [[True] * 3, [True, True, False]]
    assert [one.right for one in reader.score(examples)] == [True, False, False]
    with pytest.raises(ValueError, match="document a: .* has no two words"):
        last_word(reader, Document("a", " alone\n"))


def test_last_words_of_a_plain_lm(make_lm, words_tokenizer):
    result = measure_lambada(Reader(model=make_lm(), tokenizer=words_tokenizer), [Document("a", words(9))])
    assert list(result["accuracy"]) == ["lm"] and result["accuracy_gain"] == {} and "index" not in result


# Summaries


def test_only_the_summary_is_scored_in_bits_of_its_bytes(reader, words_tokenizer):
    pairs = [
        Summary("", words(19, seed=1), f" {words(10, seed=2)}\n"),
        Summary("d3", words(4, seed=3), words(3, seed=4)),
    ]
    result = measure_summaries(reader, pairs)
    bits, num_bytes = 0.0, 0
    for pair in pairs:
        before = words_tokenizer.encode(f"{pair.article}\nTL;DR:")
        ids = torch.tensor([before + words_tokenizer.encode(pair.summary)])
        with torch.no_grad():
            rows = reader.model(ids).logits[0].double().log_softmax(-1)
        places = torch.arange(len(before) - 1, ids.shape[1] - 1)
        bits -= rows[places, ids[0, len(before) :]].sum().item() / math.log(2)
        num_bytes += 1 + len(pair.summary.strip())
    assert result["bpb"]["retro_off"]["value"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert result["bytes"] == num_bytes and result["tokens"] == 13
    saved = 1 - result["bpb"]["retro_on"]["value"] / result["bpb"]["retro_off"]["value"]
    assert result["saved"]["retro_off"]["value"] == pytest.approx(saved) and saved != 0


# Questions


def test_answers_equal_a_loop_over_forward_passes(letters_model, letters_tokenizer):
    """The prompt ends a chunk, whose neighbors are the passages; an answer is its first line."""
    reader = Reader(model=letters_model, tokenizer=letters_tokenizer, batch_size=2)
    passages = (Passage("one", "the moon is far"), Passage("", "two"), Passage("three", "x"))
    questions = [Question(str(i), f"is it {i}?", ("a",), passages[i:] + passages[:i]) for i in range(3)]
    result = measure_answers(reader, questions, num_passages=2, max_new_tokens=5)
    own, within = ["retro_off", "retro_on", "retro_on_random"], ["in_context", "in_context_on", "in_context_on_random"]
    assert list(result["exact_match"]) == own + within
    for question, answer in zip(questions, result["answers"], strict=True):
        text = f"question: {question.question} \n answer:"
        plain = letters_tokenizer.encode(text)
        prompt = aligned(np.array(plain), 8, 1).tolist()
        assert len(prompt) % 8 == 0 and prompt[-len(plain) :] == plain and set(prompt[: -len(plain)]) <= {1}
        ids, mask = passage_tokens(letters_tokenizer, question.passages, 2, 24)
        first = str(f"title: {question.passages[0].title}, source: {question.passages[0].text}")
        assert letters_tokenizer.decode(ids[0][mask[0]]) == first[:24]
        both = aligned(np.array(letters_tokenizer.encode(in_context(text, question.passages[:2]))), 8, 1).tolist()
        for column, on, start in (("retro_off", 0, prompt), ("retro_on", 1, prompt), ("in_context_on", 1, both)):
            own = list(start)
            while len(own) < len(start) + 5 and own[-1] != 1:
                shape = (1, len(own) // 8, 2, 24)
                given = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
                place = len(start) // 8 - 1
                if on:
                    given[0][0, place], given[1][0, place] = torch.from_numpy(ids), torch.from_numpy(mask)
                with torch.no_grad():
                    own.append(letters_model(torch.tensor([own]), *given).logits[0, -1].argmax().item())
            written = letters_tokenizer.decode(own[len(start) :], skip_special_tokens=True)
            assert answer[column] == written.lstrip().split("\n")[0].strip()
    assert in_context("q", passages[:2]) == "two\n\none\nthe moon is far\n\nq"


def test_a_chat_is_asked_in_its_template_and_ends_its_answer_as_the_template_does(
    letters_model, letters_tokenizer, monkeypatch
):
    chat = copy.deepcopy(letters_tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    prompt = prompt_ids(chat, "who is it?")
    assert chat.decode(prompt) == "u: who is it?</s>\na: " and prompt[13] == 1, "the end of a turn is one token"
    assert answer_ids(chat, "who is it?", "the moon").tolist() == [*letters_tokenizer.encode("the moon"), 1]
    assert answer_ids(letters_tokenizer, "who is it?", "me").tolist() == [*letters_tokenizer.encode(" me"), 1]

    question = Question("0", "is it far?", ("yes",), (Passage("moon", "it is far"),))
    asked, generate = [], letters_model.generate
    monkeypatch.setattr(letters_model, "generate", lambda **given: asked.append(given) or generate(**given))
    reader = Reader(model=letters_model, tokenizer=chat)
    assert measure_answers(reader, [question], 1, 2, ["in_context"])["prompt"] == CHAT_PROMPT
    assert (
        asked[0]["input_ids"][0].tolist()
        == chat.apply_chat_template(
            [{"role": "user", "content": "moon\nit is far\n\n" + CHAT_PROMPT.format(question="is it far?")}],
            add_generation_prompt=True,
        )["input_ids"]
    )
    chat.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}a{% endif %}"
    with pytest.raises(ValueError, match="begins the assistant's turn otherwise"):
        answer_ids(chat, "who", "me")


def test_neighbors_hold_a_long_passage_where_there_is_room(letters_tokenizer):
    long, short = Passage("", "abcdefghijklmnopqrstuvwxyz"), Passage("a", "b")
    texts = lambda k: [  # noqa: E731
        letters_tokenizer.decode(own[real])
        for own, real in zip(*passage_tokens(letters_tokenizer, [long, short], k, 20), strict=True)
    ]
    assert texts(1) == ["title: , source: abc"]
    assert texts(2) == ["title: , source: abc", "title: a, source: b"]
    assert texts(5) == [*texts(2), "defghijklmnopqrstuvw", "xyz", ""]


def test_a_control_reads_another_passage():
    asked = [Question(str(i), "?", ("a",), passage_id=f"p{i // 3}") for i in range(9)]
    others = _of_others(asked, seed=0)
    assert all(one.passage_id != other.passage_id for one, other in zip(asked, others, strict=True))
    assert len({other.id for other in others}) > 4
    alone = [replace(one, passage_id="p") for one in asked]
    assert all(one.id != other.id for one, other in zip(alone, _of_others(alone, seed=0), strict=True))


def test_intervals_are_over_right_passages(letters_model, letters_tokenizer):
    """Questions of one passage are drawn together: two passages, one of them all right, give an interval of 0 to 1."""
    reader = Reader(model=letters_model, tokenizer=letters_tokenizer)
    asked = [Question(str(i), "what is it?", ("?",), passage_id=f"p{i // 40}") for i in range(80)]
    written = measure_answers(reader, asked[:1], max_new_tokens=4)["answers"][0]["retro_off"]
    known = [replace(one, answers=(written,)) if i < 40 else one for i, one in enumerate(asked)]
    figures = measure_answers(reader, known, max_new_tokens=4)["exact_match"]["retro_off"]
    assert figures == {"value": 0.5, "interval": [0, 1]}
    figures = measure_answers(reader, [replace(one, passage_id=None) for one in known], max_new_tokens=4)
    low, high = figures["exact_match"]["retro_off"]["interval"]
    assert 0.35 < low < 0.5 < high < 0.65


def test_exact_match_and_f1_of_known_answers(letters_model, letters_tokenizer):
    reader = Reader(model=letters_model, tokenizer=letters_tokenizer)
    asked = [Question(str(i), f"what is {i}?", ("?",)) for i in range(4)]
    written = [one["retro_off"] for one in measure_answers(reader, asked, max_new_tokens=4)["answers"]]
    known = [
        Question(one.id, one.question, ("nothing", text.upper() + " ."))
        for one, text in zip(asked, written, strict=True)
    ]
    result = measure_answers(reader, [*known[:3], asked[3]], max_new_tokens=4)
    right = [1.0, 1.0, 1.0, float(not written[3].strip("?.:, "))]
    assert list(result["exact_match"]) == ["retro_off"], "no passages, nothing else to compare"
    assert result["exact_match"]["retro_off"]["value"] == np.mean(right)
    with pytest.raises(ValueError, match="question 0 has no passages"):
        measure_answers(reader, asked, columns=["retro_on"])
    with pytest.raises(ValueError, match="lm does not go with this model"):
        measure_answers(reader, asked, columns=["lm"])


def test_questions_are_read_in_the_forms_of_fid_dpr_and_nq_open(tmp_path):
    ctx = {"id": "p7", "title": "The Moon", "text": "It is far.", "score": "81.2", "has_answer": False}
    fid = [{"question": "how far?", "answers": ["very", "far"], "target": "far", "ctxs": [ctx, {"text": "no title"}]}]
    (tmp_path / "fid.json").write_text(json.dumps(fid))
    (read,) = read_questions(tmp_path / "fid.json")
    assert read.answers == ("very", "far") and read.passage_id is None
    assert read.passages == (Passage("The Moon", "It is far.", "p7"), Passage("", "no title"))
    with gzip.open(tmp_path / "nq.jsonl.gz", "wt") as file:
        file.write(
            '{"question": "who?", "answer": ["me"]}\n\n{"question": "what?", "answers": "it", "passage_id": 3}\n'
        )
    (tmp_path / "nq-test.qas.csv").write_text("\nwho wrote it, and when?\t['someone', \"some one\"]\n")
    (plain,) = read_questions(tmp_path / "nq-test.qas.csv")
    assert (plain.question, plain.answers) == ("who wrote it, and when?", ("someone", "some one"))
    (tmp_path / "named.csv").write_text('\nid,question,answers\n7,"who, then?",she\n')
    (named,) = read_questions(tmp_path / "named.csv")
    assert (named.id, named.question, named.answers) == ("7", "who, then?", ("she",))
    for row, said in (
        ("alone\n", "1 cells in place of question, answers"),
        ("who?\t['x\", 3]\n", "no list of texts"),
        ("who?\t['x'\n", "no list of texts"),
    ):
        (tmp_path / "bad.tsv").write_text(row)
        with pytest.raises(ValueError, match=rf"bad\.tsv, line 1: .*{said}"):
            read_questions(tmp_path / "bad.tsv")
    first, second = read_questions(tmp_path / "nq.jsonl.gz")
    assert first == Question("0", "who?", ("me",)) and second == Question("1", "what?", ("it",), None, "3")
    for line, said in (
        ('{"question": "who?"}', 'line 1: "answers" is no list'),
        ('{"answers": ["me"]}', 'line 1: no text in "question"'),
        ('{"question": "who?", "answers": ["a"], "ctxs": ["text"]}', 'line 1: "ctxs" is no list of objects'),
        ('{"question": "who?", "answers": ["a"], "ctxs": [{"title": "t"}]}', 'ctxs: no text in "text"'),
        ('{"question": "who?"', "line 1: no JSON"),
        ("[1]", "record 1: a int, no JSON object"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match=said):
            read_questions(tmp_path / "bad.jsonl")
    (tmp_path / "s.jsonl").write_text('{"article": "a b", "summary": "c", "id": 4}\n{"article": "a"}')
    with pytest.raises(ValueError, match='line 2: no text in "summary"'):
        read_summaries(tmp_path / "s.jsonl")


def test_recall_by_hand():
    passages = [Passage("", "nothing", "a"), Passage("", "It was the year 1972.", "b"), Passage("", "none", "a")]
    questions = [
        Question("0", "?", ("1972",), tuple(passages), "a"),  # right by id at 1, by answer at 2
        Question("1", "?", ("1973", "none"), tuple(passages), "b"),  # at 2, at 3
        Question("2", "?", ("197",), (), "b"),  # never
        Question("3", "?", ("year 1972",), tuple(passages)),  # no id; at 2
    ]
    result = recall(questions, (1, 2, 3))
    assert [result["by_id"][k]["value"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [result["by_answer"][k]["value"] for k in (1, 2, 3)] == [0, 0.5, 0.75]
    assert recall(questions[3:])["by_id"] is None
    with pytest.raises(ValueError, match="question 4 has no passages"):
        recall([Question("4", "?", ("a",))])
    with pytest.raises(ValueError, match="give at least 1"):
        recall(questions, (0, 1))


@pytest.mark.parametrize("index", ["tfidf", "bm25", "exact"])
def test_passages_are_found_by_any_index_and_those_that_give_it_away_left_out(index, words_tokenizer, tmp_path):
    from retro.retrieval import Retriever
    from tests.stand_ins import HashingEmbedder

    question = words(14, seed=1)
    texts = [f"{question} w99 w98", *(words(30, seed=i) for i in range(2, 8))]
    store = make_store(tmp_path, texts, words_tokenizer, chunk_len=16)
    embedder = HashingEmbedder() if index == "exact" else None
    retriever = Retriever(store, index, embedder, retrieved_len=32)
    asked = [Question("0", question, ("w99",), None, "d0")]
    (found,) = find_passages(asked, retriever, 3)
    assert found.passages[0] == Passage("title 0", texts[0], "d0") and len(found.passages) == 3
    assert recall([found], [1])["by_id"][1]["value"] == 1
    (clean,) = find_passages(asked, retriever, 3, decontaminate=True)
    assert len(clean.passages) == 3 and clean.passages[:2] == found.passages[1:]
    assert recall([clean], [3])["by_id"][3]["value"] == 0


# The commands


@pytest.fixture(scope="module")
def made(tmp_path_factory, words_tokenizer):
    """Paths by name: store (searched by its words), model, lm, documents, summaries, questions, fid."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro import RetroConfig, RetroForCausalLM
    from retro.provenance import write_provenance
    from retro.retrieval import Store

    folder = tmp_path_factory.mktemp("tasks")
    words_tokenizer.save_pretrained(folder / "tok")
    texts = [words(40, seed=i, vocabulary=100) for i in range(8)]
    docs = write_jsonl(folder / "docs.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    command = ["build", str(folder / "store"), docs, "--tokenizer", str(folder / "tok"), "--chunk-len", "8"]
    assert main([*command, "--min-chunk-len", "1", "--embedder", "none", "--index", "none"]) == 0
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=16)
    model = RetroForCausalLM(RetroConfig(vocab_size=len(words_tokenizer), cca_layers=[2], **sizes))
    model.save_pretrained(folder / "model")
    words_tokenizer.save_pretrained(folder / "model")
    write_provenance(folder / "model", Store.open(folder / "store"))
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words_tokenizer), **sizes)).save_pretrained(folder / "lm")
    words_tokenizer.save_pretrained(folder / "lm")
    questions = [
        {"question": text[:30], "answers": [text.split()[7]], "passage_id": f"d{i}"} for i, text in enumerate(texts)
    ]
    files = {
        "documents": [{"text": words(20, seed=60 + i)} for i in range(4)],
        "summaries": [{"article": words(20, seed=70 + i), "summary": words(5, seed=80 + i)} for i in range(4)],
        "questions": questions,
        "fid": [one | {"ctxs": [{"title": "t", "text": texts[i], "id": f"d{i}"}]} for i, one in enumerate(questions)],
    }
    named = {name: write_jsonl(folder / f"{name}.jsonl", records) for name, records in files.items()}
    return named | {name: str(folder / name) for name in ("store", "model", "lm")}


def run(made, tmp_path, *argv):
    given = [argument.format(**made) for argument in argv]
    assert main(["task", *given, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_the_commands_for_texts(made, tmp_path, capsys):
    common = ["--store", "{store}", "--index", "bm25", "--documents", "3", "--cache", str(tmp_path / "cache")]
    result = run(made, tmp_path, "lambada", "{model}", "--data", "{documents}", "--align", "end", *common)
    assert result["examples"] == 3 and result["index"] == "bm25" and result["align"] == "end"
    assert f"{result['perplexity']['retro_on']['value']:.4f}" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*/rows.npy"))) == 1
    result = run(made, tmp_path, "summaries", "{model}", "--data", "{summaries}", *common, "--k", "1")
    assert result["num_neighbors"] == 1 and f"{result['bpb']['retro_on']['value']:.4f}" in capsys.readouterr().out
    result = run(made, tmp_path, "lambada", "{lm}", "--data", "{documents}")
    assert list(result["accuracy"]) == ["lm"] and result["examples"] == 4


def test_the_commands_for_questions(made, tmp_path, capsys):
    asked = ["--max-new-tokens", "2", "--passages", "2", "--documents", "4"]
    result = run(made, tmp_path, "qa", "{model}", "--data", "{fid}", *asked)
    assert result["questions"] == 4 and len(result["f1"]) == 6
    assert "passages in the prompt" in capsys.readouterr().out
    found = ["--data", "{questions}", "--store", "{store}", "--decontaminate"]
    assert list(run(made, tmp_path, "qa", "{lm}", *found, *asked)["exact_match"]) == ["lm", "in_context"]
    result = run(made, tmp_path, "qa", "{model}", *found, *asked, "--columns", "retro_on")
    assert list(result["exact_match"]) == ["retro_on"]
    found = ["recall", "--data", "{questions}", "--store", "{store}", "--index", "tfidf", "bm25", "--ks", "1", "5"]
    result = run(made, tmp_path, *found)
    assert set(result["recall"]) == {"tfidf", "bm25"}
    assert result["recall"]["bm25"]["by_id"]["5"]["value"] >= result["recall"]["bm25"]["by_id"]["1"]["value"] > 0.5
    printed = capsys.readouterr().out
    assert "@5" in printed and f"{result['recall']['tfidf']['by_answer']['5']['value']:.4f} (" in printed
    assert (
        run(made, tmp_path, "recall", "--data", "{fid}", "--ks", "1")["recall"]["the file's"]["by_id"]["1"]["value"]
        == 1
    )


REFUSED = {
    "k of nothing": (["lambada", "{model}", "--data", "{documents}", "--k", "2"], "--k means nothing without --store"),
    "no passages to search": (
        ["qa", "{model}", "--data", "{fid}", "--search"],
        "--search means nothing without --store",
    ),
    "no passages to count": (["recall", "--data", "{questions}"], "has no passages"),
    "an index of nothing": (["recall", "--data", "{fid}", "--index", "bm25"], "--index means nothing without --store"),
    "a column it has not": (["qa", "{lm}", "--data", "{fid}", "--columns", "retro_on"], "does not go with this model"),
    "no documents": (["qa", "{lm}", "--data", "{fid}", "--documents", "0"], "--documents is 0"),
    "no model": (["lambada", "no/such", "--data", "{documents}"], "no/such cannot be loaded"),
    "a file of another task": (["summaries", "{lm}", "--data", "{fid}"], 'no text in "article"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, made, capsys):
    argv, said = REFUSED[case]
    assert main(["task", *(argument.format(**made) for argument in argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retro: error: ") and said in error
