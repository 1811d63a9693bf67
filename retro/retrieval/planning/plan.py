"""What a datastore will cost before it is built: disk, memory, floating-point operations and hours.

Sizes follow from the file formats, operations from the embedder's shape, hours from constants measured on a machine
(`retro.retrieval.planning.calibration`); without them a plan gives no hours. What was not given but assumed is listed.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from retro.retrieval.building.settings import KEY_DTYPES
from retro.retrieval.building.tasks import token_dtype
from retro.retrieval.planning.calibration import INDEX_ROWS, Calibration
from retro.retrieval.planning.shapes import EmbedderShape
from retro.retrieval.search.engines import IndexLayout, choose_layout
from retro.retrieval.search.index import MAX_SEGMENT_ROWS, resolve_kind
from retro.retrieval.store.format import CHUNK_DTYPE

BYTES_PER_TOKEN = 4.0  # of English text, where a plan is not told
TOKENS_PER_DOCUMENT = 1000
TABLE_BYTES, TABLE_MEMORY = 60.0, 150.0  # of a document in documents.parquet, on disk and read
EMBEDDER_TOKENS = 1.15  # of a word-piece tokenizer, for each token of a larger vocabulary
TOKENIZER_BYTES = 2_000_000
MANIFEST_BYTES, TABLE_FILE_BYTES = 1500, 3000  # of a shard's record, and of its documents.parquet without rows
EXACT_JOIN_CHUNKS = 5_000_000  # above which a plan takes the neighbors from the index
TRAINING_SAMPLE, KMEANS_ROUNDS, TUNING_QUERIES = 100_000, 12, 256  # of an index's segment

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BYTES |= {f"{prefix}i": 1 << 10 * power for power, prefix in enumerate("kmgtp", start=1)}


def parse_count(text: str, name: str = "the number") -> int:
    """ "28B", "1.5M", "10k", "2e9", "1,000,000" to a whole number of at least 1; ValueError names what is wrong."""
    return _parse(text, name, _COUNTS, r"[kmgbt]?", "10k, 1.5M, 28B or 1.8T")


def parse_bytes(text: str, name: str = "the size") -> int:
    """ "40GB", "1.5T", "24GiB", "1e12" to a whole number of bytes, at least 1; ValueError names what is wrong."""
    return _parse(text, name, _BYTES, r"(?:[kmgtp]i?)?", "512M, 40GB, 24GiB or 1.5T", suffix="b?")


def _parse(text: str, name: str, units: dict[str, int], pattern: str, examples: str, suffix: str = "") -> int:
    cleaned = str(text).strip().lower().replace(",", "").replace("_", "")
    match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*({pattern}){suffix}", cleaned)
    value = float(match[1] + (match[2] or "")) * units[match[3]] if match else math.nan
    if not 1 <= value < 2**63:
        raise ValueError(f"{name} is {text!r}; give a number of at least 1, as {examples}")
    return round(value)


@dataclass(frozen=True)
class Corpus:
    """How large a corpus is.

    Arguments:
        bytes: of its text in UTF-8.
        table_bytes, table_memory: of a document's row in documents.parquet, on disk and read.
        tokenizer_bytes: of its folder.
        embedder_tokens: what the embedder reads of a chunk on average, its special tokens included.
        sampled_bytes: of the text that was tokenized to know this; 0 where numbers were given.
        assumed: what was neither given nor measured, in words.
    """

    documents: int
    tokens: int
    chunks: int
    bytes: int
    chunk_len: int = 64
    table_bytes: float = TABLE_BYTES
    table_memory: float = TABLE_MEMORY
    tokenizer_bytes: int = TOKENIZER_BYTES
    embedder_tokens: float = 0.0
    sampled_bytes: int = 0
    assumed: tuple[str, ...] = ()


def corpus_of_numbers(
    documents: int | None = None,
    tokens: int | None = None,
    chunks: int | None = None,
    bytes: int | None = None,
    chunk_len: int = 64,
) -> Corpus:
    """A corpus of which some numbers are known; the others follow, and what they follow from is listed.

    The last chunk of a document is half full on average. ValueError if nothing is given, or numbers contradict.
    """
    if tokens is None and chunks is None and bytes is None:
        raise ValueError("a plan needs inputs, or one of tokens, chunks and bytes; give at least one")
    assumed = []
    waste = (chunk_len - 1) / (2 * chunk_len)  # of a chunk, for each document
    if tokens is None and chunks is None:
        tokens = round(bytes / BYTES_PER_TOKEN)
        assumed.append(f"{BYTES_PER_TOKEN:g} bytes a token")
    if documents is None:
        documents = max(1, round((tokens or chunks * chunk_len) / TOKENS_PER_DOCUMENT))
        assumed.append(f"{TOKENS_PER_DOCUMENT} tokens a document")
    if tokens is None:
        tokens = round(chunk_len * max(chunks - waste * documents, documents / chunk_len))
        assumed.append("last chunks half full")
    if chunks is None:
        chunks = math.ceil(tokens / chunk_len + waste * documents)
        assumed.append("last chunks half full")
    if bytes is None:
        bytes = round(tokens * BYTES_PER_TOKEN)
        assumed.append(f"{BYTES_PER_TOKEN:g} bytes a token")
    if not tokens / chunk_len <= chunks <= tokens / chunk_len + documents or documents > tokens:
        raise ValueError(
            f"{tokens} tokens of {documents} documents do not make {chunks} chunks of {chunk_len}; leave one out"
        )
    read = EMBEDDER_TOKENS * tokens / chunks + 2
    assumed.append(f"{read:.0f} embedder tokens a chunk")
    return Corpus(documents, tokens, chunks, bytes, chunk_len, embedder_tokens=read, assumed=tuple(assumed))


@dataclass(frozen=True)
class PlanSettings:
    """What is to be built, and with what.

    Arguments:
        vocab_size: of the store's tokenizer.
        key_dtype, shard_chunks, index: as in `BuildSettings`; index "none" plans none.
        num_neighbors: k of the neighbor table; 0 plans none.
        workers: processes that build; None is as many as the calibrated machine ran at once.
        gpus, gpu_tflops, mfu: embed on so many GPUs of so many TFLOP/s (of the dtype used), at this share of them.
        memory: bytes of a machine that builds a segment of the index or serves one; None is the calibrated machine's.
    """

    vocab_size: int = 32_000
    key_dtype: str = "float32"
    shard_chunks: int = 1_000_000
    index: str = "auto"
    num_neighbors: int = 2
    workers: int | None = None
    gpus: int = 0
    gpu_tflops: float | None = None
    mfu: float = 0.4
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.key_dtype not in KEY_DTYPES:
            raise ValueError(f"key_dtype must be one of {', '.join(KEY_DTYPES)}, not {self.key_dtype!r}")
        for name, least in (("vocab_size", 1), ("shard_chunks", 1), ("num_neighbors", 0), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        if bool(self.gpus) != bool(self.gpu_tflops):
            raise ValueError("gpus and gpu_tflops go together: how many GPUs, and TFLOP/s of one; give both or neither")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is the share of a GPU's rate that is reached, above 0 and at most 1, not {self.mfu}")


# Disk


def npy_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """The size of a .npy file."""
    header, dtype = io.BytesIO(), np.dtype(dtype)
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return len(header.getvalue()) + math.prod(shape) * dtype.itemsize


def shard_rows(chunks: int, shard_chunks: int) -> list[int]:
    """Rows of each shard, as if documents were cut at their borders."""
    whole, rest = divmod(chunks, shard_chunks)
    return [shard_chunks] * whole + [rest] * (rest > 0)


def disk_bytes(corpus: Corpus, settings: PlanSettings, dim: int) -> dict[str, int]:
    """Bytes of the store's files by what they hold, without its indexes."""
    m, rows = corpus.chunk_len, shard_rows(corpus.chunks, settings.shard_chunks)
    key_dtype = "<u2" if settings.key_dtype == "bfloat16" else settings.key_dtype
    sizes = Counter(rows)
    total = lambda size: sum(count * size(n) for n, count in sizes.items())  # noqa: E731
    neighbors = [npy_bytes((corpus.chunks, settings.num_neighbors), dtype) for dtype in ("<i8", "<f4")]
    return {
        "tokens": total(lambda n: npy_bytes((n * m,), token_dtype(settings.vocab_size))),
        "chunk_table": total(lambda n: npy_bytes((n,), CHUNK_DTYPE)),
        "document_table": round(corpus.documents * corpus.table_bytes) + TABLE_FILE_BYTES * len(rows),
        "keys": total(lambda n: npy_bytes((n, dim), key_dtype)),
        "tokenizer": corpus.tokenizer_bytes,
        "manifest": MANIFEST_BYTES * len(rows),
        "neighbors": sum(neighbors) if settings.num_neighbors else 0,
    }


# Index


@dataclass(frozen=True)
class IndexPlan:
    """Segments of an index, and the layout of the largest.

    Arguments:
        disk, memory: bytes of all segments, on disk and while they are searched.
        peak: bytes of memory while the largest is built.
    """

    kind: str
    segments: int
    rows_per_segment: int
    layout: IndexLayout | None
    disk: int
    memory: int
    peak: int


def index_plan(chunks: int, settings: PlanSettings, dim: int, memory: int | None = None) -> IndexPlan:
    """The index of `chunks` keys as `build_index` would lay it out, in segments of whole shards.

    With `memory`, segments are made small enough for one to be built in so many bytes, down to one shard.
    """
    kind = resolve_kind(settings.index) if dim and settings.index != "none" else "none"
    if kind in ("none", "exact"):
        return IndexPlan(kind, 0, 0, None, 0, 0, 0)
    engine, _, codes = kind.partition(":")
    chosen = {**dict.fromkeys(("leaves", "lists", "soar")), "codes": codes or None}
    most = max(MAX_SEGMENT_ROWS // settings.shard_chunks, 1)
    while True:
        rows = min(chunks, most * settings.shard_chunks)
        layout = choose_layout(engine, chosen, rows, dim)
        peak = round(layout.peak_bytes(rows, dim, TRAINING_SAMPLE))
        if most == 1 or memory is None or peak <= memory:
            break
        most = -(-most // 2)
    per_row = [segment_bytes(layout, rows, dim) / rows, layout.row_bytes(dim) + 4 * layout.lists * dim / rows]
    disk, held = (round(each * chunks) for each in per_row)
    return IndexPlan(kind, -(-chunks // rows), rows, layout, disk, held, peak)


def segment_bytes(layout: IndexLayout, rows: int, dim: int) -> int:
    """What a segment's files hold: codes (ScaNN's: a byte for each block), its copy of keys, leaves, row numbers."""
    held = layout.row_bytes(dim)
    if layout.engine == "scann" and not layout.is_exact:
        held = held + -(-(dim + 1) // layout.block) / 2 * (1 - layout.soar) + 4 * (1 + layout.soar) * bool(layout.lists)
    centroid = 8 * (dim + 1) if layout.engine == "scann" else 4 * dim
    codebook = 4 * dim << layout.bits if layout.bits else 0
    return round(rows * (held + 4) + layout.lists * centroid + codebook)


# Memory


def memory_bytes(
    corpus: Corpus, index: IndexPlan, settings: PlanSettings, constants: Calibration | None
) -> dict[str, int]:
    """Bytes of memory by what takes them; tokens and keys are mapped from disk and not counted.

    workers: of all processes that embed, as one of the calibrated machine; index segment: while the largest is built;
    serving: the codes of all segments, and the documents' table for the sources of answers.
    """
    found = {"index segment, building": index.peak, "index, serving": index.memory}
    found["document table, serving"] = round(corpus.documents * corpus.table_memory)
    if constants is None or not constants.worker_bytes:
        return found
    return {"workers, building": (settings.workers or constants.processes) * constants.worker_bytes, **found}


# Hours


def embedding_flops(corpus: Corpus, shape: EmbedderShape) -> float:
    """Operations to embed every chunk."""
    return corpus.chunks * shape.flops(corpus.embedder_tokens)


def hours(
    corpus: Corpus,
    settings: PlanSettings,
    shape: EmbedderShape,
    index: IndexPlan,
    disk: dict[str, int],
    constants: Calibration,
) -> dict[str, float]:
    """Hours of each stage with `settings.workers` processes.

    Another embedder, or chunks of another length, take as many operations a second as the calibrated one did.
    """
    workers = settings.workers or constants.processes
    machines = max(1.0, workers / constants.processes)
    seconds = {"starting": 2 * constants.start_seconds}  # the calling process, then its workers
    seconds["reading and tokenizing"] = corpus.bytes * _per_byte(constants) / workers
    if shape.dim:
        seconds["embedding"] = embedding_flops(corpus, shape) / embedding_rate(settings, constants)
    written = 2 * (sum(disk.values()) - disk["neighbors"])  # parts and blocks of keys, then shards
    seconds["writing and checksums"] = written * (1 / constants.write_rate + 1 / constants.checksum_rate) / machines
    if index.segments:
        seconds["index"] = _index_seconds(index, shape.dim, constants) / min(machines, index.segments)
    if settings.num_neighbors and shape.dim:
        exact = corpus.chunks <= EXACT_JOIN_CHUNKS or not index.segments
        name = f"neighbors, {'exact' if exact else index.kind}"
        join = _join_seconds(corpus.chunks, shape.dim, constants) if exact else _index_join_seconds(index, constants)
        seconds[name] = join / machines
    return {name: value / 3600 for name, value in seconds.items()}


def embedding_rate(settings: PlanSettings, constants: Calibration) -> float:
    """Operations a second of all that embed together."""
    if settings.gpus:
        return gpu_flops(settings)
    each = constants.embedder_flops
    workers = settings.workers or constants.processes
    if workers == 1:
        return constants.chunks_per_second_one * each
    return constants.chunks_per_second_all / constants.processes * workers * each


def gpu_flops(settings: PlanSettings) -> float:
    """Operations a second of the GPUs that were given."""
    return settings.gpus * (settings.gpu_tflops or 0.0) * 1e12 * settings.mfu


def _per_byte(constants: Calibration) -> float:
    return 1 / constants.reading_rate + 1 / constants.tokenizing_rate


def _join_seconds(chunks: int, dim: int, constants: Calibration) -> float:
    """Of the exact join on the calibrated machine: every pair of chunks."""
    return chunks**2 * (constants.pair_seconds + dim * constants.pair_dim_seconds)


def _index_join_seconds(index: IndexPlan, constants: Calibration) -> float:
    """Of a search of every segment for every chunk, taken to grow with the root of a segment's rows, as its leaves do.

    A rough figure: how far an index must be searched depends on the keys.
    """
    queries = index.segments * index.rows_per_segment
    slower = index.segments * (index.rows_per_segment / INDEX_ROWS[1]) ** 0.5
    return queries * slower / constants.queries_per_second


def _index_seconds(index: IndexPlan, dim: int, constants: Calibration) -> float:
    """Of all segments, one after another: training, codes, and the comparison of keys with leaves.

    Leaves are found by k-means in 12 rounds over the training sample.
    """
    rows, layout = index.rows_per_segment, index.layout
    sample = min(TRAINING_SAMPLE, rows)
    coded = 0.0 if layout.is_exact else sample * constants.codebook_seconds + rows * constants.encode_seconds
    each = constants.index_seconds + dim * coded
    compared = (KMEANS_ROUNDS * max(sample, layout.lists) + rows) * layout.lists
    tuned = TUNING_QUERIES * rows * (constants.pair_seconds + dim * constants.pair_dim_seconds)
    return index.segments * (each + compared * dim * constants.pair_dim_seconds + tuned)


# The plan


def make_plan(
    corpus: Corpus,
    settings: PlanSettings,
    shape: EmbedderShape,
    constants: Calibration | None = None,
) -> dict[str, Any]:
    """Everything above as one JSON-able value, for an embedder of a shape.

    Its parts: corpus, settings, embedder, disk, memory, flops, index, shards, hours (None without constants),
    calibration (which machine), assumed.
    """
    if constants and not settings.gpus and shape.dim and not constants.chunks_per_second_all:
        raise ValueError("the calibration was made without an embedder; measure again with `retro plan --calibrate`")
    index = index_plan(corpus.chunks, settings, shape.dim, _memory(settings, constants))
    disk = disk_bytes(corpus, settings, shape.dim) | {"index": index.disk}
    parts = corpus.tokens * token_dtype(settings.vocab_size).itemsize + 2 * disk["document_table"]
    blocks = disk["keys"] * min(1.0, settings.shard_chunks / corpus.chunks)  # of the keys of a shard
    flops = {"embedding": embedding_flops(corpus, shape)}
    if settings.num_neighbors and shape.dim:
        flops["neighbors, by exact search"] = 2.0 * shape.dim * corpus.chunks**2
    took = {"embedding": flops["embedding"] / gpu_flops(settings) / 3600} if settings.gpus else None
    if constants:
        took = hours(corpus, settings, shape, index, disk, constants)
    return {
        "corpus": asdict(corpus),
        "settings": asdict(settings),
        "embedder": asdict(shape),
        "shards": len(shard_rows(corpus.chunks, settings.shard_chunks)),
        "disk": {**disk, "total": sum(disk.values()), "peak": round(sum(disk.values()) + parts + blocks)},
        "memory": memory_bytes(corpus, index, settings, constants),
        "flops": flops,
        "index": asdict(index),
        "hours": took and {**took, "total": sum(took.values())},
        "calibration": constants and constants.describe(),
        "assumed": [*corpus.assumed, *(["an index of words is not counted"] if not shape.dim else [])],
    }


def _memory(settings: PlanSettings, constants: Calibration | None) -> int | None:
    return settings.memory or (constants.machine["memory_bytes"] if constants else None)
