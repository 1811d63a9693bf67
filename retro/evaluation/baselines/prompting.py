"""Retrieved text in front of the text: what is searched for which tokens, and what the reader is given.

A span is `stride` tokens in a row, searched for with the `query_len` tokens before it. Its reader sees

    [documents, the nearest last] [the window up to the span] [the span]

and is scored on the span. Where that is longer than the reader's positions, the window is cut on its left.

Source: Ram et al. 2023 (in-context RALM). Differs: there the queries' text comes from a tokenizer of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from retro.evaluation.baselines.sample import Sample
from retro.evaluation.scorer import Ids

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store


@dataclass(frozen=True)
class Spans:
    """Spans of the windows of a sample: span s is tokens begins[s] .. ends[s] - 1 of windows[s].

    queries: what is searched for each; empty at the beginning of a document. of_target: the span of each scored token.
    numbers: of the chunk before each, as the sample counts chunks, and for spans within a chunk of their places in it.
    """

    windows: Int[np.ndarray, " s"]
    begins: Int[np.ndarray, " s"]
    ends: Int[np.ndarray, " s"]
    queries: list[list[int]]
    of_target: Int[np.ndarray, " t"]
    numbers: Int[np.ndarray, " s"]

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def num_searches(self) -> int:
        return sum(len(query) > 0 for query in self.queries)


@dataclass(frozen=True)
class SpanHits:
    """What the spans retrieved, nearest first; row -1 and score -inf where there is none."""

    rows: Int[np.ndarray, "s k"]
    scores: Float[np.ndarray, "s k"]
    seconds: float


def spans_of(sample: Sample, stride: int, query_len: int) -> Spans:
    """Cut what is scored into spans. The stride divides the chunk length, so that a span lies in one chunk."""
    windows, begins, ends, queries, of_target = [], [], [], [], []
    in_chunk, numbers = sample.data.chunk_len // stride, []
    for window, (text, places) in enumerate(zip(sample.texts, sample.places, strict=True)):
        for number in np.unique(places // stride):
            begin = int(number * stride)
            of_target += [len(windows)] * int((places // stride == number).sum())
            windows.append(window)
            begins.append(begin)
            ends.append(min(begin + stride, int(places[-1]) + 1))
            queries.append(text[max(0, begin - query_len) : begin].tolist())
            numbers.append(int(sample.numbers[sample.first_chunk[window]] - 1) * in_chunk + int(number))
    return Spans(*map(np.asarray, (windows, begins, ends)), queries, *map(np.asarray, (of_target, numbers)))


def search_spans(sample: Sample, spans: Spans, retriever: Retriever, k: int) -> SpanHits:
    """The k nearest chunks of each span's query, none from a document of the same id."""
    started = time.perf_counter()
    names = [{sample.data.document_ids[window]} for window in spans.windows]
    found = retriever(spans.queries, k, exclude_documents=names)
    return SpanHits(found.ids, found.scores.astype(np.float64), time.perf_counter() - started)


def texts_with_documents(
    sample: Sample, spans: Spans, documents: Sequence[Sequence[Ids]], num_positions: int | None
) -> tuple[list[Ids], list[Ids]]:
    """What is read for each span, with its documents (nearest first) in front, and where its scored tokens stand."""
    texts, places = [], []
    for s, window in enumerate(spans.windows):
        text, scored, begin, end = sample.texts[window], sample.places[window], spans.begins[s], spans.ends[s]
        front = np.concatenate([*reversed(documents[s]), np.empty(0, np.int64)])
        room = begin if num_positions is None else num_positions - len(front) - (end - begin)
        assert room > 0 or begin == 0, "the settings leave room for at least one token of the window"
        kept = text[max(0, begin - room) : begin]
        texts.append(np.concatenate([front, kept, text[begin:end]]))
        inside = scored[(scored >= begin) & (scored < end)]
        places.append(inside - begin + len(front) + len(kept))
    return texts, places


def documents_of(store: Store, rows: Int[np.ndarray, "s k"], retrieved_len: int) -> list[list[Ids]]:
    """The tokens [N, F] of each row that is there, without special tokens (a title page's bos, an end of text)."""
    special = np.asarray(sorted(store.tokenizer.all_special_ids), np.int64)
    documents = []
    for found in rows:
        ids, mask = store.values(found[found >= 0], retrieved_len)
        texts = (line[real] for line, real in zip(ids, mask, strict=True))
        documents.append([text[~np.isin(text, special)] for text in texts])
    return documents


def check_room(num_tokens: int, stride: int, num_positions: int | None) -> None:
    """Refuse documents that leave the reader no position for the text they stand before."""
    if num_positions is not None and num_tokens + stride >= num_positions:
        raise ValueError(
            f"{num_tokens} tokens of neighbors and a stride of {stride} leave no room for the text in the reader's "
            f"{num_positions} positions; give fewer prompt_neighbors."
        )
