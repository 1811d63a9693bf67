"""Held-out text to score: documents in chunks, the neighbors of each, and windows over them.

Each token is predicted once. A document's first token is scored where the tokenizer puts a bos before it; the end
of text is not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from retro.evaluation.neighbors import neighbor_rows
from retro.evaluation.scorer import Ids
from retro.text.documents import Document
from retro.text.overlap import longest_common_run

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store

LEAKAGE_NEIGHBORS = 10  # neighbors of a chunk that its overlap is measured against
EXCLUDE = ("same_document", "none")


@dataclass(frozen=True)
class EvaluationData:
    """Held-out documents cut into chunks, with what each chunk retrieves. Chunks of all documents stand in one row.

    `rows` are the neighbors in the store, nearest first, -1 = none; `overlap` is s, the longest token run that a chunk
    shares with any of `leak_rows`, its 10 nearest neighbors with what follows them (2 m tokens each). `words` and
    `line_ends` are counted per document. `bos` is what the tokenizer itself puts before a text.
    """

    tokens: Int[np.ndarray, "c m"]
    lens: Int[np.ndarray, " c"]
    num_bytes: Int[np.ndarray, "c m"]
    scored: Bool[np.ndarray, "c m"]
    documents: Int[np.ndarray, " c"]
    rows: Int[np.ndarray, "c k"] | None
    leak_rows: Int[np.ndarray, "c s"] | None
    overlap: Int[np.ndarray, " c"] | None
    document_ids: list[str]
    words: Int[np.ndarray, " d"]
    line_ends: Int[np.ndarray, " d"]
    bos: int | None = None

    @property
    def chunk_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def mask(self) -> Bool[np.ndarray, "c m"]:
        """True = a real token."""
        return np.arange(self.chunk_len) < self.lens[:, None]

    @property
    def num_documents(self) -> int:
        return len(self.document_ids)

    @property
    def overlap_ratio(self) -> Float[np.ndarray, " c"]:
        """r(C) = s / the tokens of C, which are m but in the last chunk of a document.

        The paper divides by m <= 64, which leaves a short last chunk open. Divided by its own length, a copy has r = 1
        however short it is, and a chunk of a few tokens seldom counts as having little in common.
        """
        return self.overlap / self.lens

    @cached_property
    def bytes_of_chunk(self) -> Int[np.ndarray, " c"]:
        """UTF-8 bytes of the scored text of each chunk."""
        return (self.num_bytes * self.scored).sum(-1)


def prepare(
    documents: Iterable[Document],
    tokenizer: Any,
    chunk_len: int,
    retriever: Retriever | None = None,
    num_neighbors: int = 2,
    progress: bool = False,
    exclude: str = "same_document",
    cache: str | Path | bool = True,
) -> EvaluationData:
    """Tokenize and chunk documents and search the neighbors of every chunk.

    Args:
        exclude: "same_document" leaves out neighbors from a document of the same id, "none" nothing.
        cache: Where the neighbors are kept: True in the store, a folder, or False nowhere (see `neighbor_rows`).

    Raises ValueError if there is no document, or no text in them.
    """
    from retro.text.chunks import bos_of

    if exclude not in EXCLUDE:
        raise ValueError(f"exclude is {exclude!r}; choose one of {', '.join(EXCLUDE)}.")
    pieces, ids, words, line_ends = [], [], [], []
    for number, document in enumerate(tqdm(documents, desc="reading", unit="document", disable=not progress or None)):
        if not isinstance(document, Document):
            raise ValueError(f"documents[{number}] is a {type(document).__name__}; give a Document(id=..., text=...)")
        pieces.append(_chunks_of(document, tokenizer, chunk_len, number))
        ids.append(document.id)
        words.append(len(document.text.split()))
        line_ends.append(document.text.count("\n"))
    if not any(piece[2].any() for piece in pieces):
        raise ValueError("there is no text to evaluate; give at least one document")
    tokens, lens, num_bytes, scored, numbers = (np.concatenate(part) for part in zip(*pieces, strict=True))
    data = EvaluationData(
        tokens, lens, num_bytes, scored, numbers, None, None, None, ids, np.array(words), np.array(line_ends),
        bos_of(tokenizer),
    )  # fmt: skip
    if retriever is None:
        return data
    found = find_neighbors(data, retriever, max(num_neighbors, LEAKAGE_NEIGHBORS), exclude, cache, progress)
    leak_rows = found[:, :LEAKAGE_NEIGHBORS]
    overlap = overlap_of(data, leak_rows, retriever.store)
    return replace(data, rows=found[:, :num_neighbors], leak_rows=leak_rows, overlap=overlap)


def find_neighbors(
    data: EvaluationData,
    retriever: Retriever,
    num_neighbors: int,
    exclude: str = "same_document",
    cache: str | Path | bool = True,
    progress: bool = False,
) -> Int[np.ndarray, "c k"]:
    """The k nearest rows of every chunk in the retriever's store; see `prepare`."""
    names = None if exclude == "none" else [data.document_ids[number] for number in data.documents]
    return neighbor_rows(retriever, data.tokens, data.mask, num_neighbors, names, cache, progress)


def _chunks_of(document: Document, tokenizer: Any, chunk_len: int, number: int) -> tuple[np.ndarray, ...]:
    """One document's chunks: tokens, lengths, bytes and which tokens are scored, the last chunk padded."""
    from retro.text.chunks import pad_token_id, tokenize_document

    tokenized = tokenize_document(tokenizer, document.text)
    ids, num_bytes = tokenized.ids, tokenized.num_bytes
    scored = np.ones(len(ids), bool)
    scored[:1] = False  # bos, or the first token of a text that has none: nothing predicts it
    if len(ids) and ids[-1] == tokenizer.eos_token_id and num_bytes[-1] == 0:
        scored[-1] = False
    num_chunks = -(-len(ids) // chunk_len)
    padding = num_chunks * chunk_len - len(ids)
    fold = lambda x, fill: np.pad(x, (0, padding), constant_values=fill).reshape(num_chunks, chunk_len)  # noqa: E731
    lens = np.full(num_chunks, chunk_len)
    lens[-1:] -= padding
    numbers = np.full(num_chunks, number)
    return fold(ids, pad_token_id(tokenizer)), lens, fold(num_bytes, 0), fold(scored, False), numbers


def overlap_of(data: EvaluationData, rows: np.ndarray, store: Store) -> Int[np.ndarray, " c"]:
    """s of every chunk: the longest run in common with its neighbors [N, F] of 2 m tokens."""
    overlap = np.zeros(len(rows), np.int64)
    for start in range(0, len(rows), 512):
        part = slice(start, start + 512)
        values, value_mask = store.values(rows[part], 2 * store.chunk_len)
        overlap[part] = longest_common_run(data.tokens[part], values, data.mask[part], value_mask)
    return overlap


def window_of(
    models: Sequence[Any], chunk_len: int, window_len: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Tokens of a window and of the step between windows that all models can read, as given or by default.

    The default is 2048 tokens or the least `max_position_embeddings` if smaller, and half of it. Raises ValueError for
    more than that, and for what is no multiple of the chunk length.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    longest = min((limit for limit in limits if limit), default=None)
    if window_len is None:
        window_len = max(chunk_len, min(longest or 2048, 2048) // chunk_len * chunk_len)
    if stride is None:
        stride = max(chunk_len, window_len // 2 // chunk_len * chunk_len)
    for name, value in (("window_len", window_len), ("stride", stride)):
        if value % chunk_len or value < 1:
            raise ValueError(f"{name} is {value}; it must be a multiple of the chunk length {chunk_len}.")
    if longest and window_len > longest:
        raise ValueError(f"window_len is {window_len}, more than the {longest} positions of the model; give fewer.")
    if stride >= window_len:
        raise ValueError(
            f"stride is {stride} and window_len {window_len}, so that windows start with nothing to read; "
            "give a longer window."
        )
    return window_len, stride


def window_start(model: Any, bos: int | None) -> int | None:
    """What each window begins with, wherever in its document: the bos that the tokenizer puts before a text.

    Pretrained models know no window without it, and some read badly so (Gemma). None for a RETRO from scratch, which
    was trained on windows cut as they are.
    """
    from retro.model import RetroConfig

    return None if isinstance(model.config, RetroConfig) else bos


def windows_of(data: EvaluationData, window_chunks: int, stride_chunks: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first chunk not scored before) of each window, in chunks; windows stay inside a document."""
    borders = np.flatnonzero(np.diff(data.documents, prepend=-1, append=-1))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        start, done = first, first
        while done < end:
            stop = min(start + window_chunks, end)
            yield start, stop, done
            start, done = start + stride_chunks, stop


def texts_of(
    data: EvaluationData, windows: Iterable[tuple[int, int, int]]
) -> tuple[list[Ids], list[Ids], Int[np.ndarray, " t"]]:
    """What `score_tokens` takes of windows: the tokens of each, the places of those that are new and scored; and the
    chunk of each of these."""
    texts, places, chunks, mask = [], [], [], data.mask
    for start, stop, first_new in windows:
        new = data.scored[start:stop] & (np.arange(start, stop) >= first_new)[:, None]
        texts.append(data.tokens[start:stop][mask[start:stop]])
        places.append(np.flatnonzero(new[mask[start:stop]]))
        chunks.append(start + places[-1] // data.chunk_len)
    return texts, places, np.concatenate(chunks)
