"""How much of the gain of retrieval is copying: bits per byte against overlap with the training data.

For each evaluation chunk C take its 10 nearest neighbors in the training data, each with what follows it. With s the
longest token substring that C has in common with any of them,

    r(C) = s / tokens of C
    bpb(alpha) = bits over the chunks with r(C) <= alpha / bytes of those chunks

bpb(1) is the plain figure; bpb(0.125) is over the chunks that share at most an eighth of their tokens in a row.

Source: RETRO, section 2.6 and figure 6.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from retro.evaluation.bits import COLUMNS, ChunkScores, bpb_interval, gains_of, score_documents
from retro.evaluation.data import EvaluationData
from retro.evaluation.settings import DEFAULT, ScoringSettings
from retro.text.documents import Document
from retro.text.overlap import common_runs

if TYPE_CHECKING:
    from retro.retrieval import Retriever

log = logging.getLogger(__name__)
ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
BANDS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of r(C), an example of each


def measure_leakage(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    baseline: Any = None,
    scoring: ScoringSettings = DEFAULT,
    alphas: Sequence[float] = ALPHAS,
    exclude: str = "same_document",
) -> dict[str, Any]:
    """bpb(alpha) of a plain `baseline` LM, RETRO[OFF], RETRO[ON] and RETRO[ON] with random neighbors, with examples.

    Args:
        retriever: Over the training data of the model.
        num_neighbors: k that the model reads; overlap is always measured against 10.
        exclude: Whether documents of the store with the id of an evaluation document are left out ("same_document")
            or count as the leak that they are ("none").

    Gives {"points": one a alpha, see `leakage_points`; "examples": see `examples`; "documents", "documents_in_store":
    how many have the id of a stored one; "chunks", "bytes", "tokens", "num_neighbors", "window_len", "stride",
    "exclude", "seconds", and what it was measured with}.
    """
    data, scores, about = score_documents(model, documents, retriever, num_neighbors, baseline, scoring, exclude)
    shared = len(set(data.document_ids) & set(retriever.store.document_ids))
    if shared:
        log.warning("%d evaluation documents have the id of a document of the store: were they trained on?", shared)
    return about | {
        "points": leakage_points(scores, data, alphas, scoring.seed),
        "examples": examples(data, retriever, scores, scoring.seed),
        "documents_in_store": shared,
        "chunks": int((data.bytes_of_chunk > 0).sum()),
        "exclude": exclude,
    }


def leakage_points(
    scores: dict[str, ChunkScores], data: EvaluationData, alphas: Sequence[float] = ALPHAS, seed: int = 0
) -> list[dict[str, Any]]:
    """bpb(alpha) of each column with 95% intervals, and how far RETRO[ON] is below each.

    One {"alpha", "chunks", "documents", "bytes", "bpb": {column: value}, "interval": {column: [low, high]},
    "gain": {column: [value, low, high]}} an alpha: gain = 1 - bpb of RETRO[ON] / bpb of the column. Chunks that hold no
    scored text (a lone end of text) are not counted.
    """
    points = []
    for alpha in alphas:
        below = (data.overlap_ratio <= alpha) & (data.bytes_of_chunk > 0)
        point = {
            "alpha": alpha,
            "chunks": int(below.sum()),
            "documents": len(np.unique(data.documents[below])),
            "bytes": int(data.bytes_of_chunk[below].sum()),
            "bpb": {column: found.bits_per_byte(data, below) for column, found in scores.items()},
            "interval": {column: bpb_interval(found, data, seed, below) for column, found in scores.items()},
            "gain": gains_of(scores, data, seed, below),
        }
        points.append(point)
    return points


def examples(
    data: EvaluationData, retriever: Retriever, scores: dict[str, ChunkScores], seed: int = 0
) -> list[dict[str, Any]]:
    """One whole chunk drawn from each band of r(C), beside the neighbor that it has the longest run in common with.

    Each {"document_id", "chunk": its number in the document, "ratio", "common_tokens", "bytes", "bits": {column: bits},
    "text": [before, common, after], "neighbor": where it came from, "neighbor_text": [before, common, after]}.
    """
    generator, found = np.random.default_rng(seed), []
    usable = (data.bytes_of_chunk > 0) & (data.lens == data.chunk_len) & (data.overlap > 0)
    for low, high in zip(BANDS[:-1], BANDS[1:], strict=True):
        candidates = np.flatnonzero(usable & (data.overlap_ratio > low) & (data.overlap_ratio <= high))
        if len(candidates):
            found.append(_example(data, retriever, scores, int(generator.choice(candidates))))
    return found


def _example(data: EvaluationData, retriever: Retriever, scores: dict[str, ChunkScores], chunk: int) -> dict[str, Any]:
    store, rows = retriever.store, data.leak_rows[chunk]
    values, mask = store.values(rows, 2 * store.chunk_len)
    tokens = data.tokens[chunk, : data.lens[chunk]]
    runs = common_runs(tokens[None], values[None], np.ones((1, len(tokens)), bool), mask[None])
    best = int(runs.lengths[0].argmax())
    length, start, there = (int(x[0, best]) for x in (runs.lengths, runs.starts, runs.neighbor_starts))
    (source,) = retriever.sources(rows[None, best : best + 1])[0]
    document = int(data.documents[chunk])
    return {
        "document_id": data.document_ids[document],
        "chunk": chunk - int(np.searchsorted(data.documents, document)),
        "ratio": float(data.overlap_ratio[chunk]),
        "common_tokens": length,
        "bytes": int(data.bytes_of_chunk[chunk]),
        "bits": {column: float(found.bits[chunk]) for column, found in scores.items()},
        "text": marked(store.tokenizer, tokens, start, length),
        "neighbor": asdict(source),
        "neighbor_text": marked(store.tokenizer, values[best][mask[best]], there, length),
    }


def marked(tokenizer: Any, ids: Int[np.ndarray, " t"], start: int, length: int) -> list[str]:
    """The text of tokens in three parts: before a run, the run, after it."""
    from retro.text.chunks import decode_chunks

    *cuts, whole = decode_chunks(tokenizer, [ids[:start], ids[: start + length], ids])
    first, last = map(len, cuts)
    return [whole[:first], whole[first:last], whole[last:]]


def told_examples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of `measure_leakage` in words: "head", "here" and "there", "text" and "neighbor_text" in parts."""
    told = []
    for one in result["examples"]:
        bits = ", ".join(f"{COLUMNS[column]} {value:,.0f} bits" for column, value in one["bits"].items())
        head = f"r(C) = {one['ratio']:.1%}, {one['common_tokens']:,} tokens in common; {bits}"
        neighbor = one["neighbor"]
        here = f"{one['document_id']}, chunk {one['chunk'] + 1}"
        there = f"{neighbor['title'] or neighbor['document_id']}, chunk {neighbor['position'] + 1}"
        texts = {name: one[name] for name in ("text", "neighbor_text")}
        told.append({"head": head, "here": here, "there": there} | texts)
    return told


def examples_page(result: dict[str, Any]) -> str:
    """The examples of `measure_leakage` for people, the common run in [[ ]]."""
    lines = []
    for one in told_examples(result):
        here, there = _with_marks(one["text"]), _with_marks(one["neighbor_text"])
        lines += [one["head"], f"  {one['here']}: {here}", f"  {one['there']}: {there}", ""]
    return "\n".join(lines)


def _with_marks(parts: list[str]) -> str:
    before, common, after = parts
    return " ".join(f"{before}[[{common}]]{after}".split())
