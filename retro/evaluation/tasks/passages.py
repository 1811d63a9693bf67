"""Questions with their answers and passages: read from files, found in a store, counted (recall), put into tokens.

    FiD, DPR    {"question", "answers": [...], "ctxs": [{"id"?, "title", "text", ...}, ...]}, best passage first
    NQ-open     {"question", "answer": [...]}, without passages
    CSV, TSV    question and answers, a text or a list of texts, as DPR's qas.csv; the first line may name the columns
    and         "id", and "passage_id" of the right passage where it is known

Sources: Izacard and Grave 2021 (FiD), Karpukhin et al. 2020 (DPR), RETRO, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int64
from tqdm.auto import tqdm

from retro.evaluation.intervals import mean
from retro.evaluation.tasks.examples import encode, passage_texts
from retro.evaluation.tasks.files import field_of, read_records
from retro.evaluation.tasks.metrics import holds_answer
from retro.evaluation.tasks.results import with_interval
from retro.retrieval.filters import shares_run
from retro.text.chunks import pad_token_id

if TYPE_CHECKING:
    from retro.retrieval import Retriever

_BATCH = 256


@dataclass(frozen=True)
class Passage:
    """A passage; id of its document where it is known."""

    title: str
    text: str
    id: str = ""

    def __str__(self) -> str:
        return f"title: {self.title}, source: {self.text}"


@dataclass(frozen=True)
class Question:
    """A question, all of its right answers, its passages (best first; None: none given) and the id of the right one."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] | None = None
    passage_id: str | None = None


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file in one of the forms above; ValueError names the record that is none."""
    records = read_records(path, columns=("question", "answers"))
    return [_question(place, record, number) for number, (place, record) in enumerate(records)]


def _question(place: str, record: dict[str, Any], number: int) -> Question:
    answers = record.get("answers", record.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise ValueError(f'{place}: "answers" is no list of texts; write {{"answers": ["..."]}}.')
    passages, right = record.get("ctxs"), record.get("passage_id")
    return Question(
        id=str(record.get("id", number)),
        question=field_of(record, "question", place),
        answers=tuple(answers),
        passages=None if passages is None else _passages(place, passages),
        passage_id=None if right is None else str(right),
    )


def _passages(place: str, records: Any) -> tuple[Passage, ...]:
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise ValueError(f'{place}: "ctxs" is no list of objects; write {{"ctxs": [{{"title": ..., "text": ...}}]}}.')
    ids = (one.get("id", one.get("passage_id", "")) for one in records)
    return tuple(
        Passage(str(one.get("title") or ""), field_of(one, "text", f"{place}, ctxs"), str(id))
        for one, id in zip(records, ids, strict=True)
    )


def find_passages(
    questions: Sequence[Question],
    retriever: Retriever,
    num_passages: int,
    decontaminate: bool = False,
    progress: bool = False,
) -> list[Question]:
    """The questions with the passages that a retriever of any kind finds for them: chunks with what follows, [N, F].

    decontaminate: leave out passages that share 13 words in a row with question and answer; see `shares_run`.
    """
    k = min(3 * num_passages + 8 if decontaminate else num_passages, retriever.index.num_rows)
    found = []
    for start in tqdm(range(0, len(questions), _BATCH), desc="retrieving", disable=not progress or None):
        batch = list(questions[start : start + _BATCH])
        hits = retriever([one.question for one in batch], k)
        for one, rows, sources in zip(batch, hits.ids, hits.sources, strict=True):
            texts = passage_texts(retriever.store, rows[rows >= 0], retriever.retrieved_len)
            known = [source for source in sources if source is not None]
            passages = [Passage(s.title, text, s.document_id) for s, text in zip(known, texts, strict=True)]
            one = replace(one, passages=tuple(passages))
            one = without_overlap(one) if decontaminate else one
            found.append(replace(one, passages=one.passages[:num_passages]))
    return found


def without_overlap(question: Question) -> Question:
    """The question without the passages that overlap with it and any of its answers."""
    texts = [f"{question.question} {answer}" for answer in question.answers]
    clean = (one for one in question.passages or () if not any(shares_run(one.text, text) for text in texts))
    return question if question.passages is None else replace(question, passages=tuple(clean))


def recall(questions: Sequence[Question], ks: Sequence[int] = (1, 5, 20), seed: int = 0) -> dict[str, Any]:
    """recall@k: for how many questions one of the first k passages is right.

    Right "by_id": of the document that the question names (null where none does); "by_answer": its text holds a right
    answer. Gives {"questions", "by_id", "by_answer": {k: {"value", "interval"}}}.

    Raises ValueError for questions without passages.
    """
    if not questions or min(ks, default=0) < 1:
        raise ValueError(f"recall@k of {len(questions)} questions at k = {list(ks)}; give at least 1 of both.")
    missing = next((one.id for one in questions if one.passages is None), None)
    if missing is not None:
        raise ValueError(f'question {missing} has no passages; give a file with "ctxs", or a store to find them in.')
    named = [one for one in questions if one.passage_id is not None]
    by_id = [[passage.id == one.passage_id for passage in one.passages] for one in named]
    by_answer = [[holds_answer(passage.text, one.answers) for passage in one.passages] for one in questions]
    return {
        "questions": len(questions),
        "by_id": _recall(by_id, ks, seed) if named else None,
        "by_answer": _recall(by_answer, ks, seed),
    }


def _recall(hits: list[list[bool]], ks: Sequence[int], seed: int) -> dict[int, dict[str, Any]]:
    return {k: with_interval(*mean(np.array([any(own[:k]) for own in hits], float), seed)) for k in ks}


def rankings(questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """The documents of each question's passages, best first; their scores are reciprocal ranks."""
    found: dict[str, dict[str, float]] = {}
    for one in questions:
        names = dict.fromkeys(passage.id for passage in one.passages or ())
        found[one.id] = {name: 1 / rank for rank, name in enumerate(names, start=1)}
    return found


def passage_tokens(
    tokenizer: Any, passages: Sequence[Passage], num_passages: int, retrieved_len: int
) -> tuple[Int64[np.ndarray, "k r"], Bool[np.ndarray, "k r"]]:
    """The first k passages as neighbors, "title: {title}, source: {text}", cut to r tokens; a missing one is masked.

    Places that are left hold how the first passages go on, r tokens each.
    """
    shape = (num_passages, retrieved_len)
    ids, mask = np.full(shape, pad_token_id(tokenizer), np.int64), np.zeros(shape, bool)
    texts = [encode(tokenizer, str(passage)) for passage in passages[:num_passages]]
    rest = [text[i : i + retrieved_len] for text in texts for i in range(retrieved_len, len(text), retrieved_len)]
    for row, real, tokens in zip(ids, mask, [*(text[:retrieved_len] for text in texts), *rest], strict=False):
        row[: len(tokens)], real[: len(tokens)] = tokens, True
    return ids, mask
