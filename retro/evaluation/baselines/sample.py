"""Which tokens are scored: windows of held-out documents, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from retro.evaluation.bits import ChunkScores, bits_of_chunks
from retro.evaluation.data import EvaluationData, texts_of, windows_of
from retro.evaluation.neighbors import neighbor_rows
from retro.evaluation.scorer import Ids

if TYPE_CHECKING:
    from retro.retrieval import Retriever


@dataclass(frozen=True)
class Sample:
    """Windows of documents, one after another.

    data: their chunks, each window a document of its own; only what is new in a window is marked as scored, so that
        bytes and bits are those of the sample. texts, places: as `score_tokens` takes them, and chunks, of `data`, of
        the scored tokens; see `texts_of`. document_of_window: which document each came from, of `document_ids`.
    numbers: of the chunks, in the sample that was drawn: a part of it keeps them.
    """

    data: EvaluationData
    texts: list[Ids]
    places: list[Ids]
    chunks: Int[np.ndarray, " t"]
    document_of_window: Int[np.ndarray, " w"]
    document_ids: list[str]
    numbers: Int[np.ndarray, " c"]

    @cached_property
    def targets(self) -> Int[np.ndarray, " t"]:
        """The scored tokens of all windows."""
        return np.concatenate([text[places] for text, places in zip(self.texts, self.places, strict=True)])

    @cached_property
    def first_chunk(self) -> Int[np.ndarray, " w"]:
        """Where each window begins in `data`."""
        return np.searchsorted(self.data.documents, np.arange(len(self.texts)))

    @cached_property
    def by_document(self) -> EvaluationData:
        """`data` with the chunks of all windows of a document together under its id: what intervals are drawn over."""
        present, numbers = np.unique(self.document_of_window, return_inverse=True)
        names = [self.document_ids[document] for document in present]
        return replace(self.data, documents=numbers[self.data.documents], document_ids=names)

    def of_documents(self, chosen: Bool[np.ndarray, " d"]) -> Sample:
        """The windows of the documents marked True."""
        windows = np.flatnonzero(chosen[self.document_of_window])
        kept = np.isin(self.data.documents, windows)
        at = np.searchsorted(np.flatnonzero(kept), self.chunks[kept[self.chunks]])
        by_chunk = ("tokens", "lens", "num_bytes", "scored")
        data = replace(
            self.data,
            **{name: getattr(self.data, name)[kept] for name in by_chunk},
            documents=np.searchsorted(windows, self.data.documents[kept]),
            document_ids=[self.data.document_ids[window] for window in windows],
            words=np.zeros(len(windows), np.int64),
            line_ends=np.zeros(len(windows), np.int64),
        )
        texts, places = ([of[window] for window in windows] for of in (self.texts, self.places))
        return Sample(data, texts, places, at, self.document_of_window[windows], self.document_ids, self.numbers[kept])

    def parts(self) -> list[Sample]:
        """Each document alone."""
        every = np.arange(len(self.document_ids))
        return [self.of_documents(every == document) for document in np.unique(self.document_of_window)]

    def search(self, retriever: Retriever, k: int, asks: Bool[np.ndarray, " c"]) -> Int[np.ndarray, "c k"]:
        """The k nearest rows of the chunks that ask, none from a document of the same id; -1 for the other chunks."""
        data, rows = self.data, np.full((len(self.data.tokens), k), -1, np.int64)
        names = [data.document_ids[window] for window in data.documents[asks]]
        rows[asks] = neighbor_rows(retriever, data.tokens[asks], data.mask[asks], k, names, cache=False)
        return rows

    def chunk_scores(self, log_p: Float[np.ndarray, " t"], elapsed_seconds: float = 0.0) -> ChunkScores:
        """Bits of each chunk from the log-probabilities of the scored tokens."""
        return ChunkScores(bits_of_chunks(log_p, self.chunks, self.data), elapsed_seconds)


def draw_sample(
    data: EvaluationData, window_len: int, stride: int, windows_per_document: int | None = None, seed: int = 0
) -> Sample:
    """Windows as `score` lays them, or so many of each document, drawn without replacement.

    Raises ValueError if a window would have no token before those it scores.
    """
    if stride >= window_len:
        raise ValueError(
            f"stride is {stride} and window_len {window_len}, so that windows start with nothing to read; "
            "give a smaller stride."
        )
    every = np.asarray(list(windows_of(data, window_len // data.chunk_len, stride // data.chunk_len)))  # [w, 3]
    every = every[_scores_any(data, every)]
    return _cut(data, every[_drawn(data.documents[every[:, 0]], windows_per_document, seed)])


def _scores_any(data: EvaluationData, windows: np.ndarray) -> np.ndarray:
    """False for a window in which only an end of text is new."""
    return np.asarray([bool(data.scored[first_new:stop].any()) for _, stop, first_new in windows], bool)


def _drawn(documents: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Up to `count` places of each document, ascending; a document's draw does not depend on the others."""
    chosen = []
    for document in np.unique(documents):
        places = np.flatnonzero(documents == document)
        if count is not None and len(places) > count:
            places = np.random.default_rng([seed, int(document)]).choice(places, count, replace=False)
        chosen.append(np.sort(places))
    return np.concatenate(chosen)


def _cut(data: EvaluationData, windows: Int[np.ndarray, "w 3"]) -> Sample:
    chunks = [np.arange(start, stop) for start, stop, _ in windows]
    new = np.concatenate([at >= first for at, (_, _, first) in zip(chunks, windows, strict=True)])
    flat, numbers = np.concatenate(chunks), np.repeat(np.arange(len(windows)), [len(at) for at in chunks])
    sources, zeros = data.documents[windows[:, 0]], np.zeros(len(windows), np.int64)
    cut = EvaluationData(
        tokens=data.tokens[flat],
        lens=data.lens[flat],
        num_bytes=data.num_bytes[flat],
        scored=data.scored[flat] & new[:, None],
        documents=numbers,
        rows=None,
        leak_rows=None,
        overlap=None,
        document_ids=[data.document_ids[source] for source in sources],
        words=zeros,
        line_ends=zeros,
        bos=data.bos,
    )
    borders = np.cumsum([0, *map(len, chunks)]).tolist()
    texts, places, scored = texts_of(cut, ((first, end, first) for first, end in pairwise(borders)))
    assert all(len(place) and place[0] > 0 for place in places), "every scored token has one before it"
    return Sample(cut, texts, places, scored, sources, data.document_ids, np.arange(len(flat)))


def check_targets(sample: Sample, targets: Sequence[int] | np.ndarray) -> None:
    """What a method scored is what every method scores."""
    assert np.array_equal(sample.targets, targets), "a method scored other tokens than those of the sample"
