"""Open-domain question answering: greedy answers, exact match and F1 by the SQuAD normalisation.

    neighbors    "question: ... \\n answer:" is filled up in front so that it ends a chunk, the first one but for
                 very long questions; the passages are that chunk's neighbors, "title: ..., source: ..."
    prompt       for any causal LM: the passages in front of the question, the best one last (as Shao et al. 2024)

Source: RETRO, section 4.3. An answer is the first line that is not empty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retro.evaluation.bits import RETRIEVAL
from retro.evaluation.intervals import mean
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.examples import aligned
from retro.evaluation.tasks.metrics import exact_match, f1
from retro.evaluation.tasks.passages import Passage, Question, passage_tokens
from retro.evaluation.tasks.reading import Reader
from retro.evaluation.tasks.results import about, with_interval

PROMPT = "question: {question} \n answer:"
STOP = ("\n",)


def measure_answers(
    reader: Reader,
    questions: Sequence[Question],
    num_passages: int = 20,
    max_new_tokens: int = 32,
    columns: Sequence[str] | None = None,
    prompt: str = PROMPT,
) -> dict[str, Any]:
    """Exact match and F1 over questions.

    Args:
        columns: "retro_off", "retro_on" and "retro_on_random" (the passages of another question) of a model that reads
            neighbors, "lm" of another, and "in_context": the passages in the prompt of either. Default: all that go.
        prompt: With {question} in it.

    Gives {"exact_match", "f1": {column: {"value", "interval"}}, "answers": one record a question, "seconds", ...}.

    Raises ValueError for columns that do not go, and for questions without passages where they are needed.
    """
    if not questions:
        raise ValueError("there is no question; give at least one")
    columns = _columns(reader, questions, columns)
    written, seconds = {}, {}
    for column in columns:
        started = time.perf_counter()
        written[column] = _answers(reader, questions, column, num_passages, max_new_tokens, prompt)
        seconds[column] = round(time.perf_counter() - started, 2)
    figures: dict[str, Any] = {}
    for name, metric in (("exact_match", exact_match), ("f1", f1)):
        for column, answers in written.items():
            values = [metric(answer, one.answers) for answer, one in zip(answers, questions, strict=True)]
            figures.setdefault(name, {})[column] = with_interval(*mean(np.array(values), reader.seed))
    return {
        "task": "question answering",
        **figures,
        "questions": len(questions),
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


def _columns(reader: Reader, questions: Sequence[Question], asked: Sequence[str] | None) -> list[str]:
    own = [*RETRIEVAL] if reads_neighbors(reader.model) else ["lm"]
    missing = next((one.id for one in questions if one.passages is None), None)
    possible = [own[0]] if missing is not None else [*own, "in_context"]
    for column in asked or ():
        if column not in [*own, "in_context"]:
            raise ValueError(f"{column} does not go with this model; choose of {', '.join(own)}, in_context.")
        if column not in possible:
            raise ValueError(f'question {missing} has no passages; give a file with "ctxs", or a store.')
    return list(asked or possible)


def _answers(
    reader: Reader, questions: Sequence[Question], column: str, num_passages: int, max_new_tokens: int, prompt: str
) -> list[str]:
    plain = replace(reader, retrieval="off")
    texts = [prompt.format(question=one.question) for one in questions]
    if column in ("lm", "in_context"):
        if column == "in_context":
            texts = [in_context(text, one.passages[:num_passages]) for text, one in zip(texts, questions, strict=True)]
        prompts, passages = [reader.encode(text) for text in texts], None
    else:
        prompts = [aligned_prompt(reader, text) for text in texts]
        given = questions if column == "retro_on" else _of_others(questions, reader.seed)
        passages = None if column == "retro_off" else [
            passage_tokens(reader.tokenizer, one.passages, num_passages, reader.retrieved_len) for one in given
        ]  # fmt: skip
    return [answer.strip() for answer in plain.complete(prompts, max_new_tokens, STOP, passages, strip=True)]


def aligned_prompt(reader: Reader, text: str) -> np.ndarray:
    """A prompt that ends with a chunk."""
    return aligned(reader.encode(text), reader.chunk_len, reader.filler)


def in_context(prompt: str, passages: Sequence[Passage]) -> str:
    """The passages in front of a prompt, the best one last, so that a cut at the start takes the worst."""
    texts = [f"{passage.title}\n{passage.text}".strip() for passage in reversed(passages)]
    return "\n\n".join([*texts, prompt])


def _of_others(questions: Sequence[Question], seed: int) -> list[Question]:
    """For each question another one, a cycle through all of them in a drawn order."""
    order = np.random.default_rng(seed).permutation(len(questions))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [questions[other[i]] for i in range(len(questions))]
