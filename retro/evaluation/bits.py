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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from retro.corpus import Document
from retro.data import random_rows
from retro.evaluation.intervals import interval, ratio, resampled_sums
from retro.evaluation.neighbors import neighbor_rows
from retro.evaluation.overlap import longest_common_run
from retro.products import fast_products
from retro.provenance import versions

if TYPE_CHECKING:
    from retro.retrieval import Retriever, Store

LEAKAGE_NEIGHBORS = 10  # neighbors of a chunk that its overlap is measured against
LITTLE_OVERLAP = 0.125  # r(C): 8 tokens of a chunk of 64
RETRIEVAL = ("off", "on", "random")
EXCLUDE = ("same_document", "none")
COLUMNS = {"lm": "LM", "retro_off": "RETRO[OFF]", "retro_on": "RETRO[ON]", "retro_on_random": "RETRO[ON], random"}
MAX_LOGITS, MAX_NEIGHBOR_TOKENS = 2**25, 2**17  # of one batch


@dataclass(frozen=True)
class EvaluationData:
    """Held-out documents cut into chunks, with what each chunk retrieves. Chunks of all documents stand in one row.

    `rows` are the neighbors in the store, nearest first, -1 = none; `overlap` is s, the longest token run that a chunk
    shares with any of `leak_rows`, its 10 nearest neighbors with what follows them (2 m tokens each). `words` and
    `line_ends` are counted per document.
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
    exclude: str = "same_document",
    cache: str | Path | bool = True,
) -> EvaluationData:
    """Tokenize and chunk documents and search the neighbors of every chunk.

    Args:
        exclude: "same_document" leaves out neighbors from a document of the same id, "none" nothing.
        cache: Where the neighbors are kept: True in the store, a folder, or False nowhere (see `neighbor_rows`).

    Raises ValueError if there is no document, or no text in them.
    """
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude is {exclude!r}; choose one of {', '.join(EXCLUDE)}.")
    pieces, ids, words, line_ends = [], [], [], []
    for number, document in enumerate(tqdm(documents, desc="reading", unit="document", disable=not progress)):
        pieces.append(_chunks_of(document, tokenizer, chunk_len, number))
        ids.append(document.id)
        words.append(len(document.text.split()))
        line_ends.append(document.text.count("\n"))
    if not any(len(piece[0]) for piece in pieces):
        raise ValueError("there is no text to evaluate; give at least one document")
    tokens, lens, num_bytes, scored, numbers = (np.concatenate(part) for part in zip(*pieces, strict=True))
    data = EvaluationData(
        tokens, lens, num_bytes, scored, numbers, None, None, None, ids, np.array(words), np.array(line_ends)
    )
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
        window_len, stride: n and the step between windows, multiples of the chunk length; see `window_of`.
    """
    if retrieval not in RETRIEVAL:
        raise ValueError(f"retrieval is {retrieval!r}; choose one of {', '.join(RETRIEVAL)}.")
    window_len, stride = window_of([model], data.chunk_len, window_len, stride)
    rows = _rows_for(retrieval, data, store, num_neighbors, seed)
    values = None if rows is None else lambda places: store.values(places, retrieved_len)
    started, bits = time.perf_counter(), np.zeros(len(data.tokens))
    windows = sorted(windows_of(data, window_len // data.chunk_len, stride // data.chunk_len), key=_num_chunks)
    neighbor_tokens = 0 if rows is None else rows.shape[1] * retrieved_len
    batches = list(_batches(windows, data.chunk_len * model.config.get_text_config().vocab_size, neighbor_tokens))
    training = model.training
    model.eval()
    for batch in tqdm(batches, desc=f"scoring, retrieval {retrieval}", unit="batch", disable=not progress):
        losses = _losses(model, _inputs(data, batch, rows, values), data, batch)
        for (_, stop, first_new), row in zip(batch, losses, strict=True):
            bits[first_new:stop] = row[: stop - first_new]
    model.train(training)
    return ChunkScores(bits, time.perf_counter() - started)


def reads_neighbors(model: Any) -> bool:
    """Whether a causal LM is one of this library's that reads neighbors."""
    return hasattr(model.config, "num_neighbors") and getattr(model.config, "cca_layers", None) != []


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
    read = dict(store=store, retrieved_len=model.config.retrieved_len, num_neighbors=num_neighbors)
    columns = {"retro_off": "off", "retro_on": "on"} | ({"retro_on_random": "random"} if random else {})
    for column, retrieval in columns.items():
        scores[column] = score(model, data, retrieval, **read, **given)
    return scores


def bits_per_byte(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    baseline: Any = None,
    window_len: int | None = None,
    seed: int = 0,
    progress: bool = False,
    stride: int | None = None,
    cache: str | Path | bool = True,
) -> dict[str, Any]:
    """Bits per byte of held-out documents: retrieval OFF, ON, ON with random neighbors, and of a plain `baseline` LM.

    Gives {"bpb": {"lm", "retro_off", "retro_on", "retro_on_random"}, "interval": [low, high] of each,
    "bpb_little_overlap": bpb over the chunks with r(C) <= 12.5%, "perplexity": {"token", "word", "word_with_line_ends"}
    of each, "gain": how far RETRO[ON] is below each other column with its interval, "gain_little_overlap": the same
    over the chunks with r(C) <= 12.5%, "off_below_lm": how far RETRO[OFF] is below the baseline, "documents", "chunks",
    "chunks_little_overlap", "chunks_without_neighbors", "bytes", "tokens", "words", "line_ends", "num_neighbors",
    "window_len", "stride", "seed", "seconds" of each, and what it was measured with (`measured_with`)}.
    """
    k, store = neighbors_of(model, num_neighbors), retriever.store
    models = [one for one in (model, baseline) if one is not None]
    data = prepare(documents, store.tokenizer, store.chunk_len, retriever, k, progress, cache=cache)
    window_len, stride = window_of(models, data.chunk_len, window_len, stride)
    given = dict(window_len=window_len, stride=stride, seed=seed, progress=progress)
    scores = score_columns(model, data, store, k, baseline, **given)
    little, pair = data.overlap_ratio <= LITTLE_OVERLAP, [scores.get("retro_off"), scores.get("lm")]
    off_below_lm = {"off_below_lm": gain(*pair, data, seed)} if all(pair) else {}
    return {
        "bpb": {column: s.bits_per_byte(data) for column, s in scores.items()},
        "interval": {column: bpb_interval(s, data, seed) for column, s in scores.items()},
        "bpb_little_overlap": {column: s.bits_per_byte(data, little) for column, s in scores.items()},
        "perplexity": {column: perplexity(s, data) for column, s in scores.items()},
        "gain": gains_of(scores, data, seed),
        "gain_little_overlap": gains_of(scores, data, seed, little),
        **off_below_lm,
        "documents": data.num_documents,
        "chunks": len(data.tokens),
        "chunks_little_overlap": int(little.sum()),
        "chunks_without_neighbors": int((data.rows[:, 0] < 0).sum()),
        "bytes": int(data.bytes_of_chunk.sum()),
        "tokens": int(data.scored.sum()),
        "words": int(data.words.sum()),
        "line_ends": int(data.line_ends.sum()),
        "num_neighbors": k,
        "window_len": window_len,
        "stride": stride,
        "seed": seed,
        "seconds": {column: round(s.elapsed_seconds, 2) for column, s in scores.items()},
        **measured_with(model, retriever, baseline),
    }


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


def bpb_interval(scores: ChunkScores, data: EvaluationData, seed: int = 0) -> list[float]:
    """Low and high end of the bits per byte over documents drawn anew."""
    drawn = resampled_sums(_per_document(data, scores.bits, data.bytes_of_chunk), seed=seed)
    return [float(end) for end in interval(ratio(drawn[:, 0], drawn[:, 1]))]


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
    counted = 1 if chunks is None else chunks
    sums = _per_document(data, scores.bits * counted, other.bits * counted)
    drawn, total = resampled_sums(sums, seed=seed), sums.sum(0, keepdims=True)
    saved = lambda x: 1 - ratio(x[:, 0], x[:, 1])  # noqa: E731
    return [float(saved(total)[0]), *map(float, interval(saved(drawn)))]


def gains_of(
    scores: dict[str, ChunkScores],
    data: EvaluationData,
    seed: int = 0,
    chunks: Bool[np.ndarray, " c"] | None = None,
) -> dict[str, list[float]]:
    """How far RETRO[ON] is below each other column, see `gain`; nothing of a plain LM alone."""
    on = scores.get("retro_on")
    return {name: gain(on, other, data, seed, chunks) for name, other in scores.items() if on and other is not on}


def _per_document(data: EvaluationData, *values: np.ndarray) -> Float[np.ndarray, "d v"]:
    return np.stack([np.bincount(data.documents, x, data.num_documents) for x in values], axis=1)


def perplexity(scores: ChunkScores, data: EvaluationData) -> dict[str, float]:
    """exp(total nats / scored tokens), / words of the documents, and / words and line ends."""
    nats, words = float(scores.bits.sum()) * math.log(2), int(data.words.sum())
    counts = {"token": int(data.scored.sum()), "word": words, "word_with_line_ends": words + int(data.line_ends.sum())}
    return {name: _exp(nats / count) if count else math.nan for name, count in counts.items()}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def bits_table(result: dict[str, Any]) -> str:
    """The result of `bits_per_byte` for people."""
    little = result["bpb_little_overlap"]
    lines = [
        f"bits per byte over {result['documents']} documents, {result['bytes']:,} bytes, k = {result['num_neighbors']}",
        f"{'':20}{'all chunks':>12}{'r <= 12.5%':>14}",
    ]
    lines += [f"{COLUMNS[key]:20}{value:12.4f}{little[key]:14.4f}" for key, value in result["bpb"].items()]
    lines.append(f"{'chunks':20}{result['chunks']:12,}{result['chunks_little_overlap']:14,}")
    lines.append(f"{'below it, in % (95%)':32}{'all chunks':>24}{'r <= 12.5%':>24}")
    for column, found in result["gain"].items():
        cells = f"{_percent(found):>24}{_percent(result['gain_little_overlap'][column]):>24}"
        lines.append(f"{f'RETRO[ON] below {COLUMNS[column]}':32}{cells}")
    if "off_below_lm" in result:
        lines.append(f"{'RETRO[OFF] below LM':32}{_percent(result['off_below_lm']):>24}")
    lines.append("r <= 12.5%: at most an eighth of the chunk in one run in common with any of its 10 nearest neighbors")
    return "\n".join(lines)


def _percent(gain: Sequence[float]) -> str:
    value, low, high = (100 * one for one in gain)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def perplexity_table(result: dict[str, Any]) -> str:
    """The perplexities of `bits_per_byte` and its intervals, for people."""
    lines = [
        f"over {result['tokens']:,} tokens, {result['words']:,} words, {result['line_ends']:,} line ends",
        f"{'perplexity':20}{'token':>12}{'word':>14}{'word or line end':>18}{'bits per byte, 95%':>22}",
    ]
    for column, found in result["perplexity"].items():
        low, high = result["interval"][column]
        lines.append(
            f"{COLUMNS[column]:20}{found['token']:12.3f}{found['word']:14.3f}{found['word_with_line_ends']:18.3f}"
            f"{f'{low:.4f} to {high:.4f}':>22}"
        )
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
    stride = stride or max(chunk_len, window_len // 2 // chunk_len * chunk_len)
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


def windows_of(data: EvaluationData, window_chunks: int, stride_chunks: int) -> Iterator[tuple[int, int, int]]:
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


def _batches(windows: list[tuple[int, int, int]], logits: int, neighbor_tokens: int) -> Iterator[list]:
    """Windows of similar length together, as many as the logits and neighbors of their chunks leave room for."""
    chunks = max(1, min(MAX_LOGITS // logits, MAX_NEIGHBOR_TOKENS // max(1, neighbor_tokens)))
    batch: list = []
    for window in windows:
        if batch and (len(batch) + 1) * _num_chunks(window) > chunks:
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
@fast_products()
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
