"""What a datastore, and a model that reads from it, will cost: disk, memory, operations, hours.

Sizes follow from the file formats and a sample of the inputs. Hours are operations over one rate: what the embedder
reaches here, or a given one. An index takes less than the exact search that the neighbors are planned with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from retro.common.checksums import BLOCK_BYTES
from retro.common.devices import torch_threads
from retro.common.pretrained import check_folder
from retro.common.values import Range
from retro.retrieval.building.settings import BuildSettings, ChunkSettings
from retro.retrieval.building.tasks import load_tokenizer, token_dtype
from retro.retrieval.embedding.embedder import NO_EMBEDDER, Embedder, NoEmbedder, embed_chunks, load_embedder
from retro.retrieval.executors.local import num_devices
from retro.retrieval.search import lexical
from retro.retrieval.search.engines import ENGINES, choose_layout
from retro.retrieval.search.index import resolve_kind
from retro.retrieval.store.format import CHUNK_DTYPE
from retro.text.chunks import TokenIds
from retro.text.estimate import Estimate, estimate_corpus

NUM_NEIGHBORS = 2  # of the neighbor table, as in the paper
SHARD_CHUNKS = BuildSettings.shard_chunks
NPY_HEADER, MANIFEST_BYTES, TABLE_BYTES = 128, 1500, 3000  # of a shard: each array, its record, its table without rows
SUM_BYTES = 32 / 3  # in the manifest, of each block
STATE_BYTES = 16  # of a parameter in training: float32 weight, gradient and two moments of AdamW
MEASURED_SECONDS = 10.0
_BLOCK_CHUNKS = 256  # embedded between two looks at the clock


@dataclass
class PlanSettings(ChunkSettings):
    """What is to be built, from what, and what is trained on it.

    Arguments:
        inputs: Documents, as for `retro build`; a part of the corpus will do.
        tokenizer: The tokenizer of the datastore, as for `retro build`.
        embedder: What turns a chunk into its key, as for `retro build`.
        index: The index of keys to build, as for `retro build`; "none" plans no index.
        tokens: Tokens of the corpus that the inputs are a part of, such as 1e12. Default: those of the inputs.
        model: A RETRO to train once on these tokens: 172m, 425m, 1.5b or 7.5b, each alone or with -modern behind it, or
            a folder with its config.json. Default: nothing is trained.
        tflops: TFLOP/s that all machines together reach. Default: what embedding reaches here, measured for ten
            seconds.
    """

    inputs: list[str]
    tokenizer: str
    embedder: str = "minilm"
    index: str = "auto"
    tokens: Annotated[float, Range(ge=1, lt=1e30)] | None = None
    model: str | None = None
    tflops: Annotated[float, Range(ge=1e-12, lt=1e30)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index in lexical.KINDS:
            raise ValueError(f"index is {self.index!r}, a lexical index, which is not planned; give none")
        if self.index != "none":
            resolve_kind(self.index)


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """A plan as one JSON-able value: corpus, disk, memory, flops, index, flops_per_second, hours, model.

    hours is None where nothing was measured (no embedder) and no rate is given.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    config = None if settings.model is None else _config(settings.model, len(tokenizer))
    embedder = NoEmbedder() if settings.embedder == NO_EMBEDDER else load_embedder(settings.embedder)
    estimate = estimate_corpus(settings.inputs, tokenizer, settings.chunk_len, settings.text_field)
    times = 1.0 if settings.tokens is None else settings.tokens / estimate.tokens
    names = ("documents", "bytes", "tokens", "chunks")
    corpus = {name: max(round(times * getattr(estimate, name)), 1) for name in names}
    index = index_plan(settings.index, corpus["chunks"], embedder.dim)
    width = embedder.dim * (4 if settings.key_dtype == "float32" else 2)
    disk, table_memory = disk_bytes(corpus, estimate, settings.chunk_len, token_dtype(len(tokenizer)).itemsize, width)
    disk["index"] = index["disk"]
    memory = {"building_a_segment_of_the_index": index["peak"], "serving_the_index": index["memory"]}
    memory["serving_the_documents'_table"] = round(corpus["documents"] * table_memory)
    of_a_chunk, rate = flops_of_chunk(embedder, tokenizer, estimate.chunk_ids), 1e12 * (settings.tflops or 0.0)
    if embedder.dim and not rate:
        rate = of_a_chunk * chunks_per_second(embedder, tokenizer, estimate.chunk_ids)
    flops = {"embedding": corpus["chunks"] * of_a_chunk, "exact_neighbors": 2.0 * embedder.dim * corpus["chunks"] ** 2}
    if config is not None:
        parameters, forward = model_size(config)
        flops["training"] = 3 * forward * corpus["tokens"]
        memory["weights_and_optimizer"] = STATE_BYTES * parameters
    hours = {name: count / rate / 3600 for name, count in flops.items() if count} if rate else None
    return {
        "settings": asdict(settings),
        "corpus": corpus | {"share_read": estimate.share},
        "disk": disk | {"total": sum(disk.values())},
        "memory": memory,
        "flops": flops,
        "index": index | {"layout": index["layout"] and asdict(index["layout"])},
        "model": config and {"parameters": parameters, "forward_flops_per_token": forward},
        "flops_per_second": rate or None,
        "hours": hours and hours | {"total": sum(hours.values())},
    }


def disk_bytes(
    corpus: dict[str, int], estimate: Estimate, chunk_len: int, token_bytes: int, key_bytes: int
) -> tuple[dict[str, int], float]:
    """Bytes of the store's files by what they hold, indexes and tokenizer apart; memory of a row of documents.parquet.

    token_bytes, key_bytes: of a stored token and of a key.
    """
    chunks, shards = corpus["chunks"], -(-corpus["chunks"] // SHARD_CHUNKS)
    array = lambda width: NPY_HEADER * shards + chunks * width  # noqa: E731
    on_disk, in_memory = _table_row(estimate.documents_read)
    found = {
        "tokens": array(chunk_len * token_bytes),
        "chunk_table": array(CHUNK_DTYPE.itemsize),
        "document_table": round(corpus["documents"] * on_disk) + TABLE_BYTES * shards,
        "keys": array(key_bytes),
        "neighbors": 2 * NPY_HEADER + chunks * NUM_NEIGHBORS * 12,
    }
    sums = sum(found.values()) * SUM_BYTES / BLOCK_BYTES
    return found | {"manifest": MANIFEST_BYTES * shards + round(sums)}, in_memory


def _table_row(documents: Sequence[Any]) -> tuple[float, float]:
    """Bytes of a document's row in documents.parquet, on disk and in memory."""
    import io
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        name: [getattr(document, name) for document in documents] for name in ("id", "title", "source", "date")
    }
    columns["extra"] = [json.dumps(document.extra, sort_keys=True) for document in documents]
    num_bytes = np.array([len(document.text.encode()) for document in documents])
    columns |= {"first_chunk": num_bytes.cumsum(), "num_chunks": num_bytes // 256, "num_tokens": num_bytes // 4}
    columns["num_bytes"] = num_bytes
    table, sizes = pa.table(columns), []
    for part in (table, table.slice(0, 0)):
        written = io.BytesIO()
        pq.write_table(part, written, compression="zstd")
        sizes.append(len(written.getvalue()))
    return (sizes[0] - sizes[1]) / len(documents), table.nbytes / len(documents)


def index_plan(kind: str, chunks: int, dim: int) -> dict[str, Any]:
    """The index of so many keys as `build_index` would lay it out: kind, segments, rows (of a segment), its layout;
    disk, memory: bytes of all segments, on disk and while they are searched; peak: while the largest is built."""
    kind = resolve_kind(kind, chunks) if dim and kind != "none" else "none"
    if kind in ("none", "exact"):
        return {"kind": kind, "segments": 0, "rows": 0, "layout": None, "disk": 0, "memory": 0, "peak": 0}
    engine, _, codes = kind.partition(":")
    of_engine = ENGINES[engine]
    rows = min(chunks, of_engine.most_rows // SHARD_CHUNKS * SHARD_CHUNKS)
    layout = choose_layout(engine, {**dict.fromkeys(of_engine.settings), "codes": codes or None}, rows, dim)
    return {
        "kind": kind,
        "segments": -(-chunks // rows),
        "rows": rows,
        "layout": layout,
        "disk": round((of_engine.file_bytes(layout, rows, dim) + 4 * rows) * chunks / rows),  # and row numbers
        "memory": round(chunks * (of_engine.row_bytes(layout, dim) + 4 * layout.lists * dim / rows)),
        "peak": round(of_engine.peak_bytes(layout, rows, dim, of_engine.training_sample)),
    }


def flops_of_chunk(embedder: Embedder, tokenizer: Any, chunks: Sequence[TokenIds]) -> float:
    """Operations to embed a chunk, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    block = chunks[:_BLOCK_CHUNKS]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a fused kernel is not counted
        embed_chunks(embedder, tokenizer, block)
    return counter.get_total_flops() / len(block)


def chunks_per_second(embedder: Embedder, tokenizer: Any, chunks: Sequence[TokenIds]) -> float:
    """What a build embeds here: as many as one thread, or one GPU, does in some seconds for each of its workers."""
    started, done = time.perf_counter(), 0
    with torch_threads(1):
        while not done or time.perf_counter() - started < MEASURED_SECONDS:
            embed_chunks(embedder, tokenizer, [chunks[i % len(chunks)] for i in range(done, done + _BLOCK_CHUNKS)])
            done += _BLOCK_CHUNKS
    return done / (time.perf_counter() - started) * num_devices()


def model_size(config: Any) -> tuple[int, float]:
    """Parameters of a model, and operations of a forward pass for each token, with all its neighbors."""
    import torch

    from retro.evaluation.baselines.costs import retro_flops
    from retro.model import RetroForCausalLM

    with torch.device("meta"):
        model = RetroForCausalLM(config)
    n = config.max_position_embeddings
    return sum(p.numel() for p in model.parameters()), retro_flops(model, n, n, config.num_neighbors) / n


def _config(name: str, vocab_size: int) -> Any:
    from transformers import AutoConfig

    from retro.model import RetroConfig
    from retro.model.config import MODERN, PRESETS

    if name.removesuffix(MODERN) in PRESETS:
        return RetroConfig.from_preset(name, vocab_size=vocab_size, num_neighbors=NUM_NEIGHBORS)
    if (Path(name) / "config.json").is_file():
        check_folder(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not isinstance(config, RetroConfig):
            raise ValueError(f"model is {name}, of the type {config.model_type}, which is not planned; give a RETRO")
        return config
    known = f"one of {', '.join(PRESETS)}, alone or with {MODERN} behind it, or a folder with config.json"
    raise ValueError(f"model is {name!r}; give {known}")


def plan_table(result: dict[str, Any]) -> str:
    """A plan to read."""
    corpus, index, model = result["corpus"], result["index"], result["model"]
    shown = ["{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens, {chunks:,} chunks".format(**corpus)]
    if corpus["share_read"] < 1:
        shown.append(f"estimated from {corpus['share_read']:.2%} of the inputs")
    shown += ["disk", *_rows(result["disk"], _bytes), "memory", *_rows(result["memory"], _bytes)]
    if index["layout"]:
        lists = f", {index['layout']['lists']:,} lists" if index["layout"]["lists"] else ""
        shown.append(f"index {index['kind']}: {index['segments']:,} segments of {index['rows']:,} rows, ")
        shown[-1] += f"codes {index['layout']['codes']}{lists}"
    if model:
        shown.append("model: {parameters:,} parameters, {forward_flops_per_token:.3g} FLOP a token".format(**model))
    shown += ["operations", *_rows(result["flops"], lambda count: f"{count:.3g} FLOP")]
    if result["hours"] is None:
        return "\n".join([*shown, "no hours: nothing is embedded here; give --tflops"])
    shown.append(f"time at {result['flops_per_second'] / 1e12:,.3g} TFLOP/s")
    return "\n".join(shown + _rows(result["hours"], _duration))


def _rows(values: dict[str, Any], form: Any) -> list[str]:
    return [f"  {name.replace('_', ' '):34}{form(value):>16}" for name, value in values.items()]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    return f"{count:,.2f} PB"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:,.1f} h" if hours < 1000 else f"{hours / 24:,.0f} days"
