"""Fine-tune a trained RETRO, or what a RETRO-fit added, to answer questions from passages: the loss is on answers only.

A text is what `retro task qa` reads: the prompt, filled up in front so that it ends a chunk whose neighbors are the
passages, then one of the answers and its end; a chat's turns where the tokenizer has a chat template. Source: RETRO,
section 4.3.

The script train/finetune.py is the same, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from transformers import PreTrainedConfig, PreTrainedModel

from retro.common.settings import find_config, load_settings
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.passages import Question, find_passages, passage_tokens, read_questions
from retro.evaluation.tasks.prompts import answer_ids, prompt_ids, prompt_of
from retro.evaluation.tasks.reading import Reader
from retro.loading import load
from retro.provenance import check_store, own_index, read_provenance
from retro.retrieval import Store
from retro.retrofit import open_base, retrofit
from retro.retrofit.bases import stored_name
from retro.training.loop import fit
from retro.training.retrofit import check_tokenizer, start_from
from retro.training.settings import FinetuneSettings
from retro.training.setup import setup
from retro.training.windows import IGNORED, Batch, Windows, check_window


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Train as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    A run that finds its own checkpoint in `output` goes on from it. Raises ValueError or OSError for what
    the user can mend.
    """
    settings = load_settings(FinetuneSettings, find_config(config, "finetune"), list(overrides))
    factory = FinetuneModelFactory(settings)
    return fit(setup(settings, factory.config, factory, factory.windows))


class FinetuneModelFactory:
    """How the loop makes its model: from where it starts, or from a checkpoint. A plain LM is fitted for neighbors.

    Nothing is loaded before `config`.
    """

    def __init__(self, settings: FinetuneSettings):
        self.model: PreTrainedModel | None = None
        self.store: Store | None = None
        self.is_new = False

    def _load(self, settings: FinetuneSettings, store: Store) -> None:
        dtype = {} if settings.base_dtype is None else {"dtype": getattr(torch, settings.base_dtype)}
        self.model, self.store = open_base(settings.start, **dtype), store
        self.is_new = settings.retrieval and not reads_neighbors(self.model)
        if self.is_new:
            given = dict(chunk_len=store.chunk_len, num_neighbors=settings.num_neighbors)
            self.model = retrofit(self.model, base_name_or_path=stored_name(settings.start), **given)
        if not hasattr(self.model, "base"):  # all of it is trained
            if settings.base_dtype not in (None, "float32"):
                raise ValueError(
                    f"base_dtype: {settings.base_dtype} is for a frozen base, and all of {settings.start} is trained; "
                    "give base_dtype=null"
                )
            self.model = self.model.float()

    def config(self, settings: FinetuneSettings, store: Store) -> PreTrainedConfig:
        """Loads the model, and gives its configuration; ValueError for a store of another tokenizer."""
        self._load(settings, store)
        if read_provenance(settings.start) is None:
            base = getattr(self.model.config, "base_name_or_path", None) or settings.start
            check_tokenizer(base, self.model, store)
        else:
            check_store(settings.start, store)
        return self.model.config

    def __call__(self, config: PreTrainedConfig) -> PreTrainedModel:
        if self.is_new:
            start_from(self.store, self.model)
        return self.model

    def from_pretrained(self, folder: str | Path, dtype: Any = None) -> PreTrainedModel:
        """The model of a checkpoint; a base keeps its type."""
        base = getattr(self.model, "base", None)
        given = {"dtype": dtype} if base is None else {"base": base}
        return type(self.model).from_pretrained(folder, **given)

    def windows(self, settings: FinetuneSettings, store: Store, retrieved_len: int) -> QuestionWindows:
        """The questions of the file, with passages."""
        questions = read_questions(settings.questions)
        index = own_index(settings.start, store, settings.index or "auto") if settings.retrieval else None
        if settings.retrieval and any(one.passages is None for one in questions):
            retriever = load(self.model, store, index=index).retriever
            questions = find_passages(questions, retriever, settings.num_neighbors, progress=True)
        k = settings.num_neighbors if settings.retrieval else 0
        reader = Reader(model=self.model, tokenizer=store.tokenizer, align="end")
        return QuestionWindows(store, reader, questions, settings.window_len, k, retrieved_len, settings.seed, index)


class QuestionWindows(Windows):
    """Questions as windows of a Loader: one a window, padded at its end to the longest of a batch.

    Raises ValueError for a question that leaves no room for an answer.
    """

    def __init__(
        self,
        store: Store,
        reader: Reader,
        questions: Sequence[Question],
        window_len: int,
        num_passages: int,
        retrieved_len: int,
        seed: int = 0,
        index: str | None = None,
    ):
        check_window(window_len, store.chunk_len)
        self.store, self.neighbors = store, None  # no table: passages belong to questions
        self.index = index
        self.reader, self.questions = reader, questions
        self.window_len, self.num_passages, self.retrieved_len = window_len, num_passages, retrieved_len
        self.answers = [
            one.answers[np.random.default_rng([seed, number]).integers(len(one.answers))]
            for number, one in enumerate(questions)
        ]
        for one in questions:
            if len(self._prompt(one)) >= window_len:
                raise ValueError(f"question {one.id} fills window_len {window_len}; give a larger one, or leave it out")

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, windows: Int[np.ndarray, " b"]) -> Batch:
        """input_ids, labels [b, n], -100 outside of answers; with passages neighbor_ids, neighbor_mask [b, l, k, r].

        n is that of the longest of them, in whole chunks; an answer that would go beyond the window is cut.
        """
        m, asked = self.store.chunk_len, [self.questions[window] for window in windows]
        prompts = [self._prompt(one) for one in asked]
        answers = [self._answer(one, self.answers[window]) for one, window in zip(asked, windows, strict=True)]
        answers = [answer[: self.window_len - len(prompt)] for prompt, answer in zip(prompts, answers, strict=True)]
        num_chunks = max(-(-(len(prompt) + len(answer)) // m) for prompt, answer in zip(prompts, answers, strict=True))
        ids = np.full((len(windows), num_chunks * m), self.store.pad_token_id, np.int64)
        labels = np.full(ids.shape, IGNORED, np.int64)
        shape = (len(windows), num_chunks, self.num_passages, self.retrieved_len)
        neighbors = {"neighbor_ids": np.zeros(shape, np.int64), "neighbor_mask": np.zeros(shape, bool)}
        for row, (question, prompt, answer) in enumerate(zip(asked, prompts, answers, strict=True)):
            start, end = len(prompt), len(prompt) + len(answer)
            ids[row, :start], ids[row, start:end], labels[row, start:end] = prompt, answer, answer
            if self.num_passages:
                found = passage_tokens(self.store.tokenizer, question.passages, *shape[2:])
                for array, value in zip(neighbors.values(), found, strict=True):
                    array[row, start // m - 1] = value
        batch = {"input_ids": ids, "labels": labels} | (neighbors if self.num_passages else {})
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _prompt(self, question: Question) -> np.ndarray:
        return self.reader.place(prompt_ids(self.store.tokenizer, self._text(question)))

    def _answer(self, question: Question, answer: str) -> np.ndarray:
        return answer_ids(self.store.tokenizer, self._text(question), answer)

    def _text(self, question: Question) -> str:
        return prompt_of(self.store.tokenizer).format(question=question.question)
