"""Bits per byte of whole documents, with and without retrieval.

Bits per byte = sum of the token losses in bits / UTF-8 bytes of exactly the scored text. Sums in float64, never means
of means. A document's first token is scored where the tokenizer puts a bos before it; the end of text is not scored.

Source: RETRO, sections 2.6 and 4.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from retro.corpus import Document
from retro.data import random_rows
from retro.evaluation.overlap import longest_common_run

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store

LEAKAGE_NEIGHBORS = 10  # neighbors of a chunk that its overlap is measured against
LITTLE_OVERLAP = 8  # tokens: the paper's r(C) <= 12.5% for chunks of 64
RETRIEVAL = ("off", "on", "random")
MAX_LOGITS = 2**25  # elements of the logits of one batch


@dataclass(frozen=True)
class EvaluationData:
    """Held-out documents cut into chunks, with what each chunk retrieves. Chunks of all documents stand in one row.

    `rows` are the neighbors in the store, nearest first, -1 = none; `overlap` is the longest token run that a chunk
    shares with any of its 10 nearest neighbors.
    """

    tokens: Int[np.ndarray, "c m"]
    lens: Int[np.ndarray, " c"]
    num_bytes: Int[np.ndarray, "c m"]
    scored: Bool[np.ndarray, "c m"]
    documents: Int[np.ndarray, " c"]
    rows: Int[np.ndarray, "c k"] | None
    overlap: Int[np.ndarray, " c"] | None
    num_documents: int

    @property
    def chunk_len(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def bytes_of_chunk(self) -> Int[np.ndarray, " c"]:
        """UTF-8 bytes of the scored text of each chunk."""
        return (self.num_bytes * self.scored).sum(-1)


@dataclass(frozen=True)
class ChunkScores:
    """Bits that the scored tokens of each chunk cost a model, and the seconds it took."""

    bits: Float[np.ndarray, " c"]
    elapsed_seconds: float

    def bits_per_byte(self, data: EvaluationData, chunks: Bool[np.ndarray, " c"] | None = None) -> float:
        """Over all chunks, or those marked True; NaN where they hold no text."""
        chunks = np.ones(len(self.bits), bool) if chunks is None else chunks
        num_bytes = int(data.bytes_of_chunk[chunks].sum())
        return float(self.bits[chunks].sum() / num_bytes) if num_bytes else float("nan")


def prepare(
    documents: Iterable[Document],
    tokenizer: Any,
    chunk_len: int,
    retriever: Retriever | None = None,
    num_neighbors: int = 2,
    progress: bool = False,
) -> EvaluationData:
    """Tokenize and chunk documents and search the neighbors of every chunk, none of them from the document itself.

    Raises ValueError if there is no document, or no text in them.
    """
    pieces, ids = [], []
    for number, document in enumerate(tqdm(documents, desc="reading", unit="document", disable=not progress)):
        pieces.append(_chunks_of(document, tokenizer, chunk_len, number))
        ids += [document.id] * len(pieces[-1][0])
    if not ids:
        raise ValueError("there is no text to evaluate; give at least one document")
    tokens, lens, num_bytes, scored, numbers = (np.concatenate(part) for part in zip(*pieces, strict=True))
    rows = overlap = None
    if retriever is not None:
        rows, overlap = _retrieve(retriever, tokens, lens, ids, num_neighbors, progress)
    return EvaluationData(tokens, lens, num_bytes, scored, numbers, rows, overlap, len(pieces))


def score(
    model: Any,
    data: EvaluationData,
    retrieval: str = "off",
    store: Store | None = None,
    retrieved_len: int = 128,
    num_neighbors: int | None = None,
    window_len: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ChunkScores:
    """Bits of every scored token, each predicted once, with at least `window_len - stride` tokens before it if any are.

    Args:
        model: Any Hugging Face causal LM; with neighbors, one of this library's.
        retrieval: "off", "on", or "random": as many neighbors, each a random chunk of the store, as a control.
        store: Where `data`'s neighbors are rows; needed unless "off".
        retrieved_len: r, tokens of a value [N, F].
        num_neighbors: k, at most what `data` holds; default all.
        window_len, stride: n and the step between windows, multiples of the chunk length; default 2048 or the model's
            `max_position_embeddings` if smaller, and half of it.
    """
    if retrieval not in RETRIEVAL:
        raise ValueError(f"retrieval is {retrieval!r}; choose one of {', '.join(RETRIEVAL)}.")
    window_len, stride = _window(model, data.chunk_len, window_len, stride)
    rows = _rows_for(retrieval, data, store, num_neighbors, seed)
    values = None if rows is None else lambda places: store.values(places, retrieved_len)
    started, bits = time.perf_counter(), np.zeros(len(data.tokens))
    windows = sorted(_windows(data, window_len // data.chunk_len, stride // data.chunk_len), key=_num_chunks)
    batches = list(_batches(windows, data.chunk_len, model.config.get_text_config().vocab_size))
    training = model.training
    model.eval()
    for batch in tqdm(batches, desc=f"scoring, retrieval {retrieval}", unit="batch", disable=not progress):
        losses = _losses(model, _inputs(data, batch, rows, values), data, batch)
        for (_, stop, first_new), row in zip(batch, losses, strict=True):
            bits[first_new:stop] = row[: stop - first_new]
    model.train(training)
    return ChunkScores(bits, time.perf_counter() - started)


def bits_per_byte(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    baseline: Any = None,
    window_len: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Bits per byte of held-out documents: retrieval OFF, ON, ON with random neighbors, and of a plain `baseline` LM.

    Gives {"bpb": {"lm", "retro_off", "retro_on", "retro_on_random"}, "bpb_little_overlap": the same over the chunks
    that share at most 8 tokens in a row with any of their 10 nearest neighbors, "documents", "chunks",
    "chunks_little_overlap", "bytes", "tokens", "num_neighbors", "window_len", "seconds": per column}.
    """
    k = model.config.num_neighbors if num_neighbors is None else num_neighbors
    if k < 1:
        raise ValueError(f"num_neighbors is {k}; give at least 1, RETRO[OFF] is measured anyway.")
    store = retriever.store
    data = prepare(documents, store.tokenizer, store.chunk_len, retriever, k, progress)
    window_len, _ = _window(model, data.chunk_len, window_len, None)
    given = dict(window_len=window_len, seed=seed, progress=progress)
    read = dict(store=store, retrieved_len=retriever.retrieved_len)
    scores = {} if baseline is None else {"lm": score(baseline, data, **given)}
    for column, retrieval in (("retro_off", "off"), ("retro_on", "on"), ("retro_on_random", "random")):
        scores[column] = score(model, data, retrieval, num_neighbors=k, **read, **given)
    little = data.overlap <= LITTLE_OVERLAP
    return {
        "bpb": {column: s.bits_per_byte(data) for column, s in scores.items()},
        "bpb_little_overlap": {column: s.bits_per_byte(data, little) for column, s in scores.items()},
        "documents": data.num_documents,
        "chunks": len(data.tokens),
        "chunks_little_overlap": int(little.sum()),
        "bytes": int(data.bytes_of_chunk.sum()),
        "tokens": int(data.scored.sum()),
        "num_neighbors": k,
        "window_len": window_len,
        "seconds": {column: round(s.elapsed_seconds, 2) for column, s in scores.items()},
    }


def bits_table(result: dict[str, Any]) -> str:
    """The result of `bits_per_byte` for people."""
    names = {"lm": "LM", "retro_off": "RETRO[OFF]", "retro_on": "RETRO[ON]", "retro_on_random": "RETRO[ON], random"}
    little = result["bpb_little_overlap"]
    lines = [
        f"bits per byte over {result['documents']} documents, {result['bytes']:,} bytes, k = {result['num_neighbors']}",
        f"{'':20}{'all chunks':>12}{'<= 8 shared':>14}",
    ]
    lines += [f"{names[key]:20}{value:12.4f}{little[key]:14.4f}" for key, value in result["bpb"].items()]
    lines.append(f"{'chunks':20}{result['chunks']:12,}{result['chunks_little_overlap']:14,}")
    lines.append("<= 8 shared: chunks with at most 8 tokens in a row in common with any of their 10 nearest neighbors")
    return "\n".join(lines)


def _chunks_of(document: Document, tokenizer: Any, chunk_len: int, number: int) -> tuple[np.ndarray, ...]:
    """One document's chunks: tokens, lengths, bytes and which tokens are scored, the last chunk padded."""
    from retro.retrieval.chunks import pad_token_id, tokenize_document

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


def _retrieve(retriever, tokens, lens, document_ids, num_neighbors: int, progress: bool):
    """Rows of the k nearest neighbors of every chunk, and its overlap with the 10 nearest."""
    k = min(max(num_neighbors, LEAKAGE_NEIGHBORS), retriever.index.num_rows)
    mask = np.arange(tokens.shape[1]) < lens[:, None]
    rows, overlap = [], []
    for start in tqdm(range(0, len(tokens), 512), desc="retrieving", unit="x512 chunks", disable=not progress):
        part = slice(start, start + 512)
        excluded = [{name} for name in document_ids[part]]
        found = retriever(tokens[part], k, exclude_documents=excluded, mask=mask[part])
        leak = slice(0, LEAKAGE_NEIGHBORS)
        rows.append(found.ids[:, :num_neighbors])
        overlap.append(longest_common_run(tokens[part], found.tokens[:, leak], mask[part], found.mask[:, leak]))
    return np.concatenate(rows), np.concatenate(overlap)


def _window(model: Any, chunk_len: int, window_len: int | None, stride: int | None) -> tuple[int, int]:
    if window_len is None:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        window_len = max(chunk_len, min(longest, 2048) // chunk_len * chunk_len)
    stride = stride or max(chunk_len, window_len // 2 // chunk_len * chunk_len)
    for name, value in (("window_len", window_len), ("stride", stride)):
        if value % chunk_len or value < 1:
            raise ValueError(f"{name} is {value}; it must be a multiple of the chunk length {chunk_len}.")
    if stride > window_len:
        raise ValueError(
            f"stride is {stride}, more than window_len {window_len}; tokens between windows were not scored."
        )
    return window_len, stride


def _rows_for(retrieval: str, data: EvaluationData, store: Store | None, num_neighbors: int | None, seed: int):
    """The neighbor rows of every chunk [c, k], or None for retrieval off."""
    if retrieval == "off":
        return None
    if data.rows is None or store is None:
        raise ValueError(f"retrieval is {retrieval!r}; it needs data prepared with a retriever, and store=.")
    k = data.rows.shape[1] if num_neighbors is None else num_neighbors
    if k > data.rows.shape[1]:
        raise ValueError(f"num_neighbors is {k}; the data was prepared with {data.rows.shape[1]}.")
    if retrieval == "on":
        return data.rows[:, :k]
    numbers = np.arange(len(data.rows))
    drawn = random_rows(store, numbers, np.full_like(numbers, -1), k, seed)
    return np.where(data.rows[:, :k] >= 0, drawn, -1)


def _windows(data: EvaluationData, window_chunks: int, stride_chunks: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first chunk not scored before) of each window, in chunks; windows stay inside a document."""
    borders = np.flatnonzero(np.diff(data.documents, prepend=-1, append=-1))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        start, done = first, first
        while done < end:
            stop = min(start + window_chunks, end)
            yield start, stop, done
            start, done = start + stride_chunks, stop


def _num_chunks(window: tuple[int, int, int]) -> int:
    return window[1] - window[0]


def _batches(windows: list[tuple[int, int, int]], chunk_len: int, vocab_size: int) -> Iterator[list]:
    """Windows of similar length together, as many as the logits' size allows."""
    batch: list = []
    for window in windows:
        if batch and (len(batch) + 1) * _num_chunks(window) * chunk_len * vocab_size > MAX_LOGITS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _inputs(data: EvaluationData, batch: list, rows: np.ndarray | None, values) -> dict[str, torch.Tensor]:
    """Right-padded windows and the neighbors of their whole chunks."""
    longest = max(map(_num_chunks, batch))
    places = np.array([start for start, _, _ in batch])[:, None] + np.arange(longest)
    inside = places < np.array([stop for _, stop, _ in batch])[:, None]
    places = np.where(inside, places, 0)
    lens = np.where(inside, data.lens[places], 0)
    mask = (np.arange(data.chunk_len) < lens[..., None]).reshape(len(batch), -1)
    inputs = {"input_ids": data.tokens[places].reshape(len(batch), -1), "attention_mask": mask.astype(np.int64)}
    if rows is not None:
        whole = (lens == data.chunk_len)[..., None]
        inputs["neighbor_ids"], inputs["neighbor_mask"] = values(np.where(whole, rows[places], -1))
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


@torch.inference_mode()
def _losses(model: Any, inputs: dict[str, torch.Tensor], data: EvaluationData, batch: list) -> list[np.ndarray]:
    """For each window, the bits of the scored tokens of each chunk that is new in it."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**inputs).logits[:, :-1].float()
    targets = inputs["input_ids"][:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    bits = np.pad(nats.double().cpu().numpy() / np.log(2), ((0, 0), (1, 0))).reshape(len(batch), -1, data.chunk_len)
    return [
        (row[first_new - start : stop - start] * data.scored[first_new:stop]).sum(-1)
        for (start, stop, first_new), row in zip(batch, bits, strict=True)
    ]
