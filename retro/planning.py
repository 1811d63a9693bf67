"""What a datastore, and a model that reads from it, will cost: disk, memory, operations, hours.

Sizes follow from the file formats and a sample of the inputs. Hours are operations over one rate: what the embedder
reaches here, or a given one. How search grows is measured on keys of the sample, or of a store that is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32

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
from retro.retrieval.search.hardness import FEWEST_KEYS, Growth, measure_growth, sample_keys
from retro.retrieval.search.index import RECALL, resolve_kind
from retro.retrieval.store.format import CHUNK_DTYPE
from retro.retrieval.store.store import Store
from retro.text.chunks import TokenIds
from retro.text.estimate import Estimate, estimate_corpus

NUM_NEIGHBORS = 2  # of the neighbor table, as in the paper
SHARD_CHUNKS = BuildSettings.shard_chunks
NPY_HEADER, MANIFEST_BYTES, TABLE_BYTES = 128, 1500, 3000  # of a shard: each array, its record, its table without rows
SUM_BYTES = 32 / 3  # in the manifest, of each block
STATE_BYTES = 16  # of a parameter in training: float32 weight, gradient and two moments of AdamW
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
        tflops: TFLOP/s that all machines together reach. Default: what embedding reaches here.
        seconds: How long embedding is measured, which also gives the keys on which the growth of search is measured.
        store: A store of such text that is there already, with keys of this embedder: the growth of search is measured
            on these. Default: on the keys that are embedded.
    """

    inputs: list[str]
    tokenizer: str
    embedder: str = "minilm"
    index: str = "auto"
    tokens: Annotated[float, Range(ge=1, lt=1e30)] | None = None
    model: str | None = None
    tflops: Annotated[float, Range(ge=1e-12, lt=1e30)] | None = None
    seconds: Annotated[float, Range(ge=0, lt=1e6)] = 10.0
    store: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index in lexical.KINDS:
            raise ValueError(f"index is {self.index!r}, a lexical index, which is not planned; give none")
        if self.index != "none":
            resolve_kind(self.index)


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """A plan as one JSON-able value: corpus, disk, memory, flops, index, growth, flops_per_second, hours, model.

    hours is None where nothing was measured (no embedder) and no rate is given; growth (see `growth_plan`) where there
    are no keys, or no routed index is to be built of them.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    config = None if settings.model is None else _config(settings.model, len(tokenizer))
    embedder = NoEmbedder() if settings.embedder == NO_EMBEDDER else load_embedder(settings.embedder)
    store = None if settings.store is None else Store.open(settings.store)
    if store is not None:
        store.check_embedder(embedder)
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
    keys = None if store is None else sample_keys(store)
    if embedder.dim and not rate:
        per_second, embedded = chunks_per_second(embedder, tokenizer, estimate.chunk_ids, settings.seconds)
        rate, keys = of_a_chunk * per_second, embedded if keys is None else keys
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
        "growth": growth_plan(settings, keys, corpus["chunks"], embedder.dim),
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
        "memory": round(of_engine.memory_bytes(layout, rows, dim) * chunks / rows),
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


def chunks_per_second(
    embedder: Embedder, tokenizer: Any, chunks: Sequence[TokenIds], seconds: float
) -> tuple[float, Float32[np.ndarray, "c d"]]:
    """What a build embeds here: as many as one thread, or one GPU, does in some seconds for each of its workers; and
    the keys of the chunks that were embedded, each once."""
    started, done, keys = time.perf_counter(), 0, []
    with torch_threads(1):
        while not done or time.perf_counter() - started < seconds:
            block = [chunks[i % len(chunks)] for i in range(done, done + _BLOCK_CHUNKS)]
            keys.append(embed_chunks(embedder, tokenizer, block)[: max(len(chunks) - done, 0)])
            done += _BLOCK_CHUNKS
    return done / (time.perf_counter() - started) * num_devices(), np.concatenate(keys)


# How search grows


def growth_plan(settings: PlanSettings, keys: np.ndarray | None, chunks: int, dim: int) -> dict[str, Any] | None:
    """What a search through a routed index takes among so many chunks, 10 and 100 times as many.

    keys: how many were measured; needed: how many that takes, and then no more where there are fewer; recall;
    rows_compared, cpu_ms: exponents with their intervals; forecast: for each number of chunks what a search compares
    and takes, and the CPU hours of a join by such searches, and by exact ones.
    """
    if keys is None or settings.index not in ("auto", "routed") or find_spec(ENGINES["routed"].module) is None:
        return None
    found: dict[str, Any] = {"keys": len(keys), "needed": FEWEST_KEYS}
    if len(keys) < FEWEST_KEYS:
        return found
    growth = measure_growth(keys, RECALL, settings.key_dtype)
    found |= {"recall": RECALL, "rows_compared": asdict(growth.rows_compared), "cpu_ms": asdict(growth.cpu_ms)}
    return found | {"forecast": [forecast(growth, times * chunks, dim) for times in (1, 10, 100)]}


def forecast(growth: Growth, chunks: int, dim: int) -> dict[str, float]:
    """What is to be expected of a routed index of so many chunks, in the segments it is built in."""
    index = index_plan("routed", chunks, dim)
    segments, layout = chunks / index["rows"], index["layout"]
    ms, exact_ms = segments * growth.cpu_ms_at(index["rows"], layout.lists), growth.exact.ms_of_row * chunks
    return {
        "chunks": chunks,
        "rows_compared": segments * min(growth.rows_compared.at(index["rows"]), index["rows"]),
        "cpu_ms": ms,
        "join_cpu_hours": chunks * ms / 3.6e6,
        "exact_join_cpu_hours": chunks * exact_ms / 3.6e6,
    }


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
    shown += _growth_lines(result["growth"])
    shown += ["operations", *_rows(result["flops"], lambda count: f"{count:.3g} FLOP")]
    if result["hours"] is None:
        return "\n".join([*shown, "no hours: nothing is embedded here; give --tflops"])
    shown.append(f"time at {result['flops_per_second'] / 1e12:,.3g} TFLOP/s")
    return "\n".join(shown + _rows(result["hours"], _duration))


def _growth_lines(growth: dict[str, Any] | None) -> list[str]:
    """How search grows, or why that is not said."""
    if growth is None:
        return []
    if "forecast" not in growth:
        few = "how search grows: {keys:,} keys were embedded, too few to say; {needed:,} are needed".format(**growth)
        return [f"{few}: give --store, a store of such text, or more --seconds"]
    rows, ms = ("{exponent:.2f} ({low:.2f} to {high:.2f})".format(**growth[n]) for n in ("rows_compared", "cpu_ms"))
    shown = ["search through a routed index, recall@10 of {recall:g}, fitted to {keys:,} keys:".format(**growth)]
    shown.append(f"  rows compared ~ chunks^{rows}, CPU ms ~ chunks^{ms}; extrapolated:")
    shown.append(f"  {'chunks':>18}{'rows compared':>16}{'CPU ms':>10}{'join, CPU time':>18}{'exact':>18}")
    for line in growth["forecast"]:
        joins = [_duration(line[name]) for name in ("join_cpu_hours", "exact_join_cpu_hours")]
        shown.append("  {chunks:>18,}{rows_compared:>16,.0f}{cpu_ms:>10,.2f}".format(**line))
        shown[-1] += "".join(f"{join:>18}" for join in joins)
    return shown


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
