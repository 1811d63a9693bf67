"""Bits per byte and perplexity of whole documents, with and without retrieval.

    bits per byte            sum of the token losses in bits / UTF-8 bytes of exactly the scored text
    perplexity of a token    exp(sum of the token losses in nats / scored tokens)
    perplexity of a word     exp(the same sum / words of the documents), words being what white space separates; with
                             line ends, every newline counts too, as in the published figures of Wikitext103

Sums in float64, never means of means. A document's first token is scored where the tokenizer puts a bos before it; the
end of text is not scored. Intervals are of the bootstrap over documents, 95%.

Source: RETRO, sections 2.6 and 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retro.evaluation.data import EvaluationData, texts_of, window_of, window_start, windows_of
from retro.evaluation.intervals import quotient
from retro.evaluation.neighbors import random_neighbors
from retro.evaluation.scorer import joined, reads_neighbors, score_tokens
from retro.evaluation.settings import DEFAULT, ScoringSettings
from retro.provenance import versions
from retro.text.documents import Document

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store

LITTLE_OVERLAP = 0.125  # r(C): 8 tokens of a chunk of 64
RETRIEVAL = {"retro_off": "off", "retro_on": "on", "retro_on_random": "random"}  # by column
COLUMNS = {"lm": "LM", "retro_off": "RETRO[OFF]", "retro_on": "RETRO[ON]", "retro_on_random": "RETRO[ON], random"}


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


def score(
    model: Any,
    data: EvaluationData,
    retrieval: str = "off",
    store: Store | None = None,
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
        num_neighbors: k, at most what `data` holds; default all.
        window_len, stride: n and the step between windows, multiples of the chunk length; see `window_of`.
    """
    if retrieval not in RETRIEVAL.values():
        raise ValueError(f"retrieval is {retrieval!r}; choose one of {', '.join(RETRIEVAL.values())}.")
    window_len, stride = window_of([model], data.chunk_len, window_len, stride)
    rows, started = _rows_for(retrieval, data, store, num_neighbors, seed), time.perf_counter()
    windows = list(windows_of(data, window_len // data.chunk_len, stride // data.chunk_len))
    texts, places, chunks = texts_of(data, windows)
    rows = None if rows is None else [rows[start:stop] for start, stop, _ in windows]
    label = f"scoring, retrieval {retrieval}" if progress else None
    bos = window_start(model, data.bos)
    log_p = joined(score_tokens(model, texts, places, rows, store, bos=bos, progress=label))
    return ChunkScores(bits_of_chunks(log_p, chunks, data), time.perf_counter() - started)


def bits_of_chunks(
    log_p: Float[np.ndarray, " t"], chunks: Int[np.ndarray, " t"], data: EvaluationData
) -> Float[np.ndarray, " c"]:
    """The sum over the tokens of each chunk, from nats."""
    return np.bincount(chunks, -log_p / math.log(2), minlength=len(data.tokens))


def _rows_for(retrieval: str, data: EvaluationData, store: Store | None, num_neighbors: int | None, seed: int):
    """The neighbor rows of every chunk [c, k], or None for retrieval off."""
    if retrieval == "off":
        return None
    if data.rows is None or store is None:
        raise ValueError(f"retrieval is {retrieval!r}; it needs data prepared with a retriever, and store=.")
    k = data.rows.shape[1] if num_neighbors is None else num_neighbors
    if k > data.rows.shape[1]:
        raise ValueError(f"num_neighbors is {k}; the data was prepared with {data.rows.shape[1]}.")
    rows = data.rows[:, :k]
    return rows if retrieval == "on" else random_neighbors(store, rows, seed)


def score_columns(
    model: Any,
    data: EvaluationData,
    store: Store,
    num_neighbors: int,
    baseline: Any = None,
    random: bool = True,
    **given: Any,
) -> dict[str, ChunkScores]:
    """Scores by column: "lm" of a plain LM, "retro_off", "retro_on" and "retro_on_random" of one that reads neighbors.

    Args:
        model: Either; a plain LM is the only column.
        baseline: The plain LM beside it.
        random: Whether random neighbors are a column.
        given: As for `score`: window_len, stride, seed, progress.

    Raises ValueError for a baseline beside a plain LM.
    """
    if not reads_neighbors(model):
        if baseline is not None:
            raise ValueError("the model reads no neighbors, so that there would be two plain LMs; leave one out.")
        return {"lm": score(model, data, **given)}
    scores = {} if baseline is None else {"lm": score(baseline, data, **given)}
    for column, retrieval in RETRIEVAL.items():
        if random or retrieval != "random":
            scores[column] = score(model, data, retrieval, store, num_neighbors, **given)
    return scores


def bits_per_byte(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    baseline: Any = None,
    scoring: ScoringSettings = DEFAULT,
) -> dict[str, Any]:
    """Bits per byte of held-out documents: retrieval OFF, ON, ON with random neighbors, and of a plain `baseline` LM.

    Gives {"bpb": {"lm", "retro_off", "retro_on", "retro_on_random"}, "interval": [low, high] of each,
    "bpb_little_overlap": bpb over the chunks with r(C) <= 12.5%, "perplexity": {"token", "word", "word_with_line_ends"}
    of each, "gain": how far RETRO[ON] is below each other column with its interval, "gain_little_overlap": the same
    over the chunks with r(C) <= 12.5%, "off_below_lm": how far RETRO[OFF] is below the baseline, "documents", "chunks",
    "chunks_little_overlap", "chunks_without_neighbors", "bytes", "tokens", "words", "line_ends", "num_neighbors",
    "window_len", "stride", "seed", "seconds" of each, and what it was measured with (`measured_with`)}.
    """
    data, scores, about = score_documents(model, documents, retriever, num_neighbors, baseline, scoring)
    seed, little, pair = scoring.seed, data.overlap_ratio <= LITTLE_OVERLAP, [scores.get("retro_off"), scores.get("lm")]
    off_below_lm = {"off_below_lm": gain(*pair, data, seed)} if all(pair) else {}
    return {
        "bpb": {column: s.bits_per_byte(data) for column, s in scores.items()},
        "interval": {column: bpb_interval(s, data, seed) for column, s in scores.items()},
        "bpb_little_overlap": {column: s.bits_per_byte(data, little) for column, s in scores.items()},
        "perplexity": {column: perplexity(s, data) for column, s in scores.items()},
        "gain": gains_of(scores, data, seed),
        "gain_little_overlap": gains_of(scores, data, seed, little),
        **off_below_lm,
        "chunks_without_neighbors": int((data.rows[:, 0] < 0).sum()),
        "words": int(data.words.sum()),
        "line_ends": int(data.line_ends.sum()),
        **about,
    }


def score_documents(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None,
    baseline: Any,
    scoring: ScoringSettings,
    exclude: str = "same_document",
) -> tuple[EvaluationData, dict[str, ChunkScores], dict[str, Any]]:
    """The documents with their neighbors, scores by column, and what a result says of both."""
    k = neighbors_of(model, num_neighbors)
    data = scoring.prepare(documents, retriever, k, exclude)
    given = scoring.given(data, model, baseline)
    scores = score_columns(model, data, retriever.store, k, baseline, **given)
    seconds = {column: round(found.elapsed_seconds, 2) for column, found in scores.items()}
    about = {"num_neighbors": k, "seconds": seconds} | described(data, given)
    return data, scores, about | measured_with(model, retriever, baseline)


def described(data: EvaluationData, given: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its data and how it was read."""
    little = int((data.overlap_ratio <= LITTLE_OVERLAP).sum())
    counts = {"documents": data.num_documents, "chunks": len(data.tokens), "chunks_little_overlap": little}
    sizes = {"bytes": int(data.bytes_of_chunk.sum()), "tokens": int(data.scored.sum())}
    return counts | sizes | {name: given[name] for name in ("window_len", "stride", "seed")}


def measured_with(model: Any, retriever: Retriever, baseline: Any = None) -> dict[str, Any]:
    """What a result says of its models (None: of none), store and code."""
    name, lm = (one and (getattr(one.config, "name_or_path", "") or type(one).__name__) for one in (model, baseline))
    return {
        "model": name,
        "lm": lm,
        "store_fingerprint": retriever.store.fingerprint,
        "index": retriever.index.kind,
        "index_recall": retriever.index.recall,
        "versions": versions(),
    }


def neighbors_of(model: Any, num_neighbors: int | None) -> int:
    """k as given, else the model's; ValueError below 1."""
    k = getattr(model.config, "num_neighbors", 1) if num_neighbors is None else num_neighbors
    if k < 1:
        raise ValueError(f"num_neighbors is {k}; give at least 1, RETRO[OFF] is measured anyway.")
    return k


def bpb_interval(
    scores: ChunkScores, data: EvaluationData, seed: int = 0, chunks: Bool[np.ndarray, " c"] | None = None
) -> list[float]:
    """Low and high end of the bits per byte over documents drawn anew. chunks: those that count; default all."""
    return quotient(*_per_document(data, chunks, scores.bits, data.bytes_of_chunk), seed)[1:]


def gain(
    scores: ChunkScores,
    other: ChunkScores,
    data: EvaluationData,
    seed: int = 0,
    chunks: Bool[np.ndarray, " c"] | None = None,
) -> list[float]:
    """By which share `scores` costs fewer bits than `other`, with the low and high end over documents drawn anew.

    chunks: those that count; default all.
    """
    own, others = _per_document(data, chunks, scores.bits, other.bits)
    return quotient(others - own, others, seed)


def gains_of(
    scores: dict[str, ChunkScores],
    data: EvaluationData,
    seed: int = 0,
    chunks: Bool[np.ndarray, " c"] | None = None,
) -> dict[str, list[float]]:
    """How far RETRO[ON] is below each other column, see `gain`; nothing of a plain LM alone."""
    on = scores.get("retro_on")
    return {name: gain(on, other, data, seed, chunks) for name, other in scores.items() if on and other is not on}


def _per_document(
    data: EvaluationData, chunks: Bool[np.ndarray, " c"] | None, *values: np.ndarray
) -> list[Float[np.ndarray, " d"]]:
    counted = 1 if chunks is None else chunks
    return [np.bincount(data.documents, x * counted, data.num_documents) for x in values]


def perplexity(scores: ChunkScores, data: EvaluationData) -> dict[str, float]:
    """exp(total nats / scored tokens), / words of the documents, and / words and line ends."""
    nats, words = float(scores.bits.sum()) * math.log(2), int(data.words.sum())
    counts = {"token": int(data.scored.sum()), "word": words, "word_with_line_ends": words + int(data.line_ends.sum())}
    return {name: _exp(nats / count) if count else math.nan for name, count in counts.items()}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
