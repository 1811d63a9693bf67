"""The model, and the rows that it continues: a lane for each store, and one for rows that read from none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from retro.model.padding import pad_left
from retro.retrieval.remote.client import RemoteRetriever
from retro.serve.lanes import Lane, Turn
from retro.serve.limits import GenerationLimits
from retro.serve.rows import FoundByChunk, Row, RunningRow, SampleRows, StreamRows
from retro.serve.searching import StoreSearch
from retro.text.chunks import pad_token_id

if TYPE_CHECKING:
    from retro.retrieval import Retriever


class Engine:
    """Continues rows, several at once where they retrieve alike; a context in which its threads run.

    A batch holds rows of one store and one k (or RETRO[OFF]), left-padded. All else is a row's own: length, stop
    strings, temperature, top_p, and a generator with the row's seed, so that a row's text does not depend on the batch.
    One batch computes at a time; while it searches, those of other stores do.
    """

    def __init__(
        self, model: Any, tokenizer: Any, stores: dict[str, Retriever], limits: GenerationLimits | None = None
    ) -> None:
        self.model, self.tokenizer, self.stores, self.limits = model, tokenizer, stores, limits or GenerationLimits()
        self.end_ids = _end_ids(model, tokenizer)
        for part in {model, getattr(model, "base", model)}:  # a row says how it is drawn, nothing else does
            part.generation_config = GenerationConfig(eos_token_id=sorted(self.end_ids) or None)
        searches, turn = {name: self._search(name) for name in stores}, Turn()
        sizes = self.limits.max_batch, self.limits.max_queue
        self._lanes = {name: Lane(searches.get(name), self._continue, turn, *sizes) for name in (None, *stores)}
        self._running = ExitStack()

    def _search(self, name: str) -> StoreSearch:
        retriever, seconds = self.stores[name], self.limits.max_search_seconds
        if isinstance(retriever, RemoteRetriever):
            retriever.timeout = min(retriever.timeout, seconds)
        return StoreSearch(name, retriever, seconds)

    def __enter__(self) -> Engine:
        for lane in self._lanes.values():
            self._running.enter_context(lane)
        return self

    def __exit__(self, *error: object) -> None:
        """End all rows with `RowCancelled` and wait for the threads."""
        self.stop()
        self._running.close()

    def stop(self) -> None:
        """End all rows with `RowCancelled`, whatever they wait for, and take no more."""
        for lane in self._lanes.values():
            lane.stop()

    @property
    def is_alive(self) -> bool:
        return all(lane.is_alive for lane in self._lanes.values())

    @property
    def load(self) -> dict[str, int]:
        """How many rows wait and how many are being written."""
        waiting, running = zip(*(lane.load for lane in self._lanes.values()), strict=True)
        return {"waiting": sum(waiting), "running": sum(running)}

    @property
    def stores_down(self) -> list[str]:
        """The stores that do not answer at present."""
        return [name for name, lane in self._lanes.items() if lane.search is not None and lane.search.is_down]

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue the rows of one store; see `Lane.submit`."""
        self._lanes[rows[0].store].submit(rows)

    def _continue(self, rows: Sequence[Row], search: Callable[..., Any] | None) -> None:
        """Generate one batch to its end."""
        store, num_neighbors, scores_prompt = rows[0].group
        found = None if search is None else FoundByChunk(search, getattr(self.stores[store], "measure", "score"))
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
                max_new_tokens=max(1, *(row.max_new_tokens for row in rows)),
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
    """A list that gets the logits of a model's first forward pass in this thread, if they are wanted."""
    kept: list[Tensor] = []
    here = threading.get_ident()

    def keep(module: Any, args: Any, out: Any) -> None:
        if threading.get_ident() == here:
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
