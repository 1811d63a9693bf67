"""The queue of rows and the one thread that owns the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from retro.model.padding import pad_left
from retro.serve.limits import GenerationLimits
from retro.serve.rows import FoundByChunk, Row, RowCancelled, RunningRow, SampleRows, StreamRows
from retro.text.chunks import pad_token_id
from retro.web.worker import Worker

if TYPE_CHECKING:
    from retro.retrieval import Retriever

_GATHER_SECONDS = 0.02  # how long the first row of a batch waits for others that come at the same moment
logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full."""


class Engine(Worker):
    """Continues rows, several at once where they retrieve alike; a context in which its thread runs.

    A batch holds rows of one store and one k (or RETRO[OFF]), left-padded. All else is a row's own: length, stop
    strings, temperature, top_p, and a generator with the row's seed, so that a row's text does not depend on the batch.
    Rows that come later wait for the next batch; the longest waiting one is always in it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, stores: dict[str, Retriever], limits: GenerationLimits | None = None
    ) -> None:
        super().__init__("retro-serve-model")
        self.model, self.tokenizer, self.stores, self.limits = model, tokenizer, stores, limits or GenerationLimits()
        self.end_ids = _end_ids(model, tokenizer)
        for part in {model, getattr(model, "base", model)}:  # a row says how it is drawn, nothing else does
            part.generation_config = GenerationConfig(eos_token_id=sorted(self.end_ids) or None)
        self._waiting: list[Row]
        self._running: list[Row] = []

    def __exit__(self, *error: object) -> None:
        """End all rows with `RowCancelled` and wait for the thread."""
        with self._changed:
            self._closed = True  # from here on no further row runs
            for row in self._running:
                row.cancelled = True
        self._close()

    @property
    def load(self) -> dict[str, int]:
        """How many rows wait and how many are being written."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": sum(not row.finished for row in self._running)}

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows; raises Full if they do not all fit, Closed at shutdown."""
        with self._changed:
            if not self.is_alive:
                raise RowCancelled
            self._drop_cancelled()
            if len(self._waiting) + len(rows) > self.limits.max_queue:
                raise QueueFull
            self._waiting.extend(rows)
            self._changed.notify_all()

    def _drop_cancelled(self) -> None:
        self._waiting = [row for row in self._waiting if not row.cancelled]

    def _work(self) -> None:
        while rows := self._next_batch():
            try:
                self._continue(rows)
            except Exception as error:  # one batch's failure is its own; the thread lives on
                logger.exception("a batch of %d rows failed", len(rows))
                for row in rows:
                    row.end("error", error)
            with self._changed:
                self._running = []
        for row in self._waiting:
            row.end("error", RowCancelled())

    def _next_batch(self) -> list[Row]:
        """The rows that go with the longest waiting one; none at shutdown."""
        with self._changed:
            while not self._closed:
                self._drop_cancelled()
                if len(self._waiting) >= self.limits.max_batch or self._gathered():
                    break
                self._changed.wait(_GATHER_SECONDS if self._waiting else None)
            if self._closed:
                return []
            alike = [row for row in self._waiting if row.group == self._waiting[0].group]
            self._running = alike[: self.limits.max_batch]
            self._waiting = [row for row in self._waiting if row not in self._running]
            return self._running

    def _gathered(self) -> bool:
        return bool(self._waiting) and time.monotonic() >= self._waiting[0].came_at + _GATHER_SECONDS

    def _continue(self, rows: Sequence[Row]) -> None:
        """Generate one batch to its end."""
        store, num_neighbors, scores_prompt = rows[0].group
        found = None if store is None else FoundByChunk(self.stores[store])
        m, padding = self.model.config.chunk_len, pad_token_id(self.tokenizer)
        running = [RunningRow(row, self.tokenizer, self.end_ids, m, found) for row in rows]
        ids, mask = pad_left([row.prompt_ids for row in rows], padding)
        retrieval = {"retriever": found, "num_neighbors": num_neighbors} if found else {}
        whole = {"logits_to_keep": 0} if scores_prompt else {}
        generating = self.model if found else getattr(self.model, "base", self.model)
        with torch.inference_mode(), first_logits(generating, scores_prompt) as prompt_logits:
            self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max(row.max_new_tokens for row in rows),
                do_sample=False,
                pad_token_id=padding,
                logits_processor=LogitsProcessorList([SampleRows(running, prompt_logits)]),
                stopping_criteria=StoppingCriteriaList([StreamRows(running, sorted(self.end_ids))]),
                **retrieval,
                **whole,
            )
        for row in rows:
            row.end("error", RuntimeError("the text ended before its time"))  # nothing, where it has ended as it should


@contextmanager
def first_logits(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that gets the logits of a model's first forward pass, if they are wanted."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append(out.logits)
        handle.remove()

    handle = model.register_forward_hook(keep) if wanted else None
    try:
        yield kept
    finally:
        if handle is not None:
            handle.remove()


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's generation config says, else the tokenizer."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
