"""Open-domain question answering: greedy answers, exact match and F1 by the SQuAD normalisation.

    neighbors    the prompt is filled up in front so that it ends a chunk, the first one but for long questions; the
                 passages are that chunk's neighbors, "title: ..., source: ..."
    in context   for any causal LM: the passages in the prompt; as neighbors too, if the model reads them

For prompts see retro.evaluation.tasks.prompts. An answer is the first line that is not empty.

Source: RETRO, section 4.3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retro.evaluation.bits import RETRIEVAL
from retro.evaluation.intervals import quotient
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.examples import aligned
from retro.evaluation.tasks.metrics import exact_match, f1, holds_answer
from retro.evaluation.tasks.passages import Question, passage_tokens
from retro.evaluation.tasks.prompts import in_context, prompt_ids, prompt_of
from retro.evaluation.tasks.reading import Reader
from retro.evaluation.tasks.results import about, with_interval

STOP = ("\n",)
METRICS = {"exact_match": exact_match, "f1": f1, "holds_answer": lambda *pair: float(holds_answer(*pair))}
PASSAGES = {"in_context": None, "in_context_on": "retro_on", "in_context_on_random": "retro_on_random"}


def measure_answers(
    reader: Reader,
    questions: Sequence[Question],
    num_passages: int = 20,
    max_new_tokens: int = 32,
    columns: Sequence[str] | None = None,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Exact match, F1, and whether the answer holds a right one, over questions; intervals over right passages, where
    questions name them.

    Args:
        columns: "retro_off", "retro_on" and "retro_on_random" (the passages of another question) of a model that reads
            neighbors, "lm" of another; "in_context": the passages in the prompt of either; "in_context_on" and
            "in_context_on_random": in the prompt, and neighbors as well. Default: all that go.
        prompt: With {question} in it. Default: that of `prompts.prompt_of`.

    Gives {"exact_match", "f1", "holds_answer": {column: {"value", "interval"}}, "answers": one record a question,
    "seconds", ...}.

    Raises ValueError for columns that do not go, and for questions without passages where they are needed.
    """
    if not questions:
        raise ValueError("there is no question; give at least one")
    columns = _columns(reader, questions, columns)
    prompt = prompt_of(reader.tokenizer) if prompt is None else prompt
    written, seconds = {}, {}
    for column in columns:
        started = time.perf_counter()
        written[column] = _answers(reader, questions, column, num_passages, max_new_tokens, prompt)
        seconds[column] = round(time.perf_counter() - started, 2)
    figures: dict[str, Any] = {}
    for name, metric in METRICS.items():
        for column, answers in written.items():
            values = [metric(answer, one.answers) for answer, one in zip(answers, questions, strict=True)]
            figures.setdefault(name, {})[column] = with_interval(*_mean(values, questions, reader.seed))
    return {
        "task": "question answering",
        **figures,
        "questions": len(questions),
        "right_passages": len({one.passage_id for one in questions} - {None}),
        "num_passages": num_passages,
        "max_new_tokens": max_new_tokens,
        "prompt": prompt,
        "seconds": seconds,
        "answers": [
            {"id": one.id, "question": one.question, "right": list(one.answers)} | {c: written[c][i] for c in columns}
            for i, one in enumerate(questions)
        ],
        **about(reader),
    }


def _mean(values: Sequence[float], questions: Sequence[Question], seed: int) -> list[float]:
    """The mean over questions, with an interval over right passages: questions of one resemble each other."""
    names = [(one.passage_id is None, one.passage_id or i) for i, one in enumerate(questions)]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    passage = [place[name] for name in names]
    return quotient(np.bincount(passage, values), np.bincount(passage).astype(np.float64), seed)


def _columns(reader: Reader, questions: Sequence[Question], asked: Sequence[str] | None) -> list[str]:
    reads = reads_neighbors(reader.model)
    own = [*RETRIEVAL, *PASSAGES] if reads else ["lm", "in_context"]
    missing = next((one.id for one in questions if one.passages is None), None)
    possible = own if missing is None else own[:1]
    for column in asked or ():
        if column not in own:
            raise ValueError(f"{column} does not go with this model; choose of {', '.join(own)}.")
        if column not in possible:
            raise ValueError(f'question {missing} has no passages; give a file with "ctxs", or a store.')
    return list(asked or possible)


def _answers(
    reader: Reader, questions: Sequence[Question], column: str, num_passages: int, max_new_tokens: int, prompt: str
) -> list[str]:
    texts = [prompt.format(question=one.question) for one in questions]
    if column in PASSAGES:
        texts = [in_context(text, one.passages[:num_passages]) for text, one in zip(texts, questions, strict=True)]
    neighbors = PASSAGES.get(column, column)
    prompts, passages = [prompt_ids(reader.tokenizer, text) for text in texts], None
    if neighbors in RETRIEVAL:
        prompts = [aligned(ids, reader.chunk_len, reader.filler) for ids in prompts]
    if neighbors in ("retro_on", "retro_on_random"):
        given = questions if neighbors == "retro_on" else _of_others(questions, reader.seed)
        passages = [passage_tokens(reader.tokenizer, one.passages, num_passages, reader.retrieved_len) for one in given]
    plain = replace(reader, retrieval="off")
    return [answer.strip() for answer in plain.complete(prompts, max_new_tokens, STOP, passages, strip=True)]


def _of_others(questions: Sequence[Question], seed: int) -> list[Question]:
    """For each question the next one of another passage, where there is one, in a drawn order."""
    order, others = np.random.default_rng(seed).permutation(len(questions)).tolist(), {}
    for place, own in enumerate(order):
        later = [*order[place + 1 :], *order[:place], own]
        passage = questions[own].passage_id
        others[own] = next((i for i in later if passage is None or questions[i].passage_id != passage), later[0])
    return [questions[others[i]] for i in range(len(questions))]
