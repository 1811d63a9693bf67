"""Stores of made-up chunks, in the format of real ones: for calibration and benchmarks, where only sizes matter."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from retro.common.files import file_record, save_npy, write_with, written_aside
from retro.common.records import save_record
from retro.retrieval.building.build import build_store
from retro.retrieval.building.settings import BuildSettings
from retro.retrieval.store.format import CHUNK_DTYPE, narrow_keys, read_manifest
from retro.retrieval.store.store import Store

VOCAB_SIZE = 4096
LATENT_DIM = 32  # intrinsic dimension of the keys, as of text embeddings
_BLOCK_ROWS = 1 << 16


class MadeUpEmbedder:
    """An embedder that costs nothing: the first of `ready` keys, whatever the texts; one fixed key without them."""

    def __init__(self, dim: int, ready: Float32[np.ndarray, "c d"] | None = None) -> None:
        self.dim, self.ready, self.num_truncated, self.batch_size = dim, ready, 0, 1024
        self.description = {"name": "synthetic", "dim": dim}
        self.fingerprint = hashlib.sha256(f"synthetic {dim}".encode()).hexdigest()

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c d"]:
        """A key for each text."""
        if self.ready is not None:
            return self.ready[: len(texts)]
        return np.full((len(texts), self.dim), self.dim**-0.5, np.float32)


def write_synthetic_store(
    path: str | Path,
    rows: int,
    dim: int,
    key_dtype: str = "float32",
    chunk_len: int = 64,
    document_chunks: int = 16,
    shard_chunks: int = 1_000_000,
    seed: int = 0,
    keys: SyntheticKeys | TreeKeys | None = None,
) -> Store:
    """Write a complete store of `rows` full chunks of random tokens with clustered keys, and open it.

    Arguments:
        document_chunks: chunks of a document; the last one of a shard may have fewer.
        keys: None: `SyntheticKeys`.

    Its tokenizer and manifest come from a real build of one document, so that they are of the present format.
    """
    path = Path(path)
    _build_one_document(path, dim, key_dtype, chunk_len, shard_chunks)
    manifest = read_manifest(path)
    (template,) = manifest["shards"]
    keys, shards, first_document = keys or SyntheticKeys(rows, dim, seed=seed), [], 0
    for number, first_row in enumerate(range(0, rows, shard_chunks)):
        count = min(shard_chunks, rows - first_row)
        record = {**template, "name": f"{number:05d}", "first_row": first_row, "first_document": first_document}
        record |= {"rows": count, "documents": -(-count // document_chunks), "tokens": count * chunk_len}
        record |= {"bytes": 4 * count * chunk_len, "short_chunks": 0}
        _write_shard(path / "shards" / record["name"], record, manifest, keys, document_chunks, seed)
        shards.append(record)
        first_document += record["documents"]
    return _with_shards(path, manifest, shards)


def without_last_shards(store: Store, count: int) -> tuple[Store, Callable[[], Store]]:
    """The store as it was before its last shards were added, and what adds them again."""
    manifest, shards = store.manifest, store.manifest["shards"]
    return _with_shards(store.path, manifest, shards[:-count]), lambda: _with_shards(store.path, manifest, shards)


def _with_shards(path: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> Store:
    totals = {name: sum(record[name] for record in shards) for name in ("documents", "tokens", "bytes", "rows")}
    kept = {"read": totals["documents"], "kept": totals["documents"], "short_chunks": 0, "chunks": totals.pop("rows")}
    save_record(path / "manifest.json", manifest | {"shards": shards, "counts": manifest["counts"] | totals | kept})
    return Store.open(path)


class SyntheticKeys:
    """Keys of length 1, the same for the same arguments, in whatever order they are asked for.

    Each is the center of its cluster (default: one for about 100 rows) plus as much again of its own, drawn in 32
    dimensions, mapped linearly to `dim`, with a tenth of noise in all of them.
    """

    def __init__(self, rows: int, dim: int, clusters: int | None = None, seed: int = 0) -> None:
        draw, latent = np.random.default_rng([seed, 0]), min(LATENT_DIM, dim)
        self.dim, self.seed, self.clusters = dim, seed, clusters or max(1, rows // 100)
        self._centers = draw.standard_normal((self.clusters, latent), np.float32)
        self._map = draw.standard_normal((latent, dim), np.float32) / np.float32(latent**0.5)
        self._block = lru_cache(maxsize=1)(self._draw_block)

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "c d"]:
        """The keys of the rows start .. stop - 1."""
        parts = []
        for number in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
            first = number * _BLOCK_ROWS
            parts.append(self._block(number)[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def queries(self, count: int) -> Float32[np.ndarray, "q d"]:
        """Keys of the same clusters that belong to no row."""
        return self._draw(np.random.default_rng([self.seed, 1]), count)

    def _draw_block(self, number: int) -> np.ndarray:
        return self._draw(np.random.default_rng([self.seed, 2, number]), _BLOCK_ROWS)

    def _draw(self, draw: np.random.Generator, count: int) -> np.ndarray:
        own = draw.standard_normal((count, self._centers.shape[1]), np.float32)
        own += self._centers[draw.integers(self.clusters, size=count)]
        keys = own @ self._map + np.float32(0.1) * draw.standard_normal((count, self.dim), np.float32)
        return keys / np.linalg.norm(keys, axis=1, keepdims=True)


class TreeKeys:
    """Keys of length 1 as text has them, topics within topics: the same for the same seed, in whatever order.

    A row goes down a tree of 10 levels, at each into one of 8 branches, the i-th with a probability ~ 1 / i; a branch
    moves it by a vector of its own, 0.91 times as long as those of the level above, and what is left below moves it at
    random. Drawn in 32 dimensions, mapped linearly to `dim`, with a tenth of noise in all of them.

    Near to MiniLM's keys of cpp-docs: a routed index compares 927 rows among 5,000 and 2,008 among 40,000 to reach
    recall@10 of 0.95, there 1,283 and 2,364; exponents 0.36 and 0.30, of CPU milliseconds 0.10 and 0.06.
    """

    LEVELS, BRANCHES, SHRINK, TABLE = 10, 8, 0.91, 4096

    def __init__(self, dim: int, seed: int = 0) -> None:
        draw, latent = np.random.default_rng([seed, 3]), min(LATENT_DIM, dim)
        self.dim, self.seed = dim, seed
        self._steps = draw.standard_normal((self.LEVELS, self.TABLE, latent), np.float32)  # of a branch, by its hash
        self._map = draw.standard_normal((latent, dim), np.float32) / np.float32(latent**0.5)
        self._shares = np.cumsum(1 / np.arange(1, self.BRANCHES + 1)) / sum(1 / np.arange(1, self.BRANCHES + 1))

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "c d"]:
        """The keys of the rows start .. stop - 1."""
        first, last = start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)
        parts = [self._draw(np.random.default_rng([self.seed, 4, number])) for number in range(first, last)]
        return np.concatenate(parts)[start - first * _BLOCK_ROWS : stop - first * _BLOCK_ROWS]

    def _draw(self, draw: np.random.Generator) -> np.ndarray:
        keys = np.zeros((_BLOCK_ROWS, self._map.shape[0]), np.float32)
        branch, length = np.zeros(_BLOCK_ROWS, np.uint64), np.float32(1)
        for steps in self._steps:
            chosen = np.searchsorted(self._shares[:-1], draw.random(_BLOCK_ROWS)).astype(np.uint64)
            branch = (branch * np.uint64(self.BRANCHES) + chosen + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            branch ^= branch >> np.uint64(29)
            keys += length * steps[(branch >> np.uint64(40)) % np.uint64(self.TABLE)]
            length *= np.float32(self.SHRINK)
        keys += length / np.float32(1 - self.SHRINK**2) ** 0.5 * draw.standard_normal(keys.shape, np.float32)
        keys = keys @ self._map + np.float32(0.1) * draw.standard_normal((len(keys), self.dim), np.float32)
        return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def made_up_tokenizer(vocab_size: int = VOCAB_SIZE) -> Any:
    """One token per word w0, w1, ...; eos at the end of a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _build_one_document(path: Path, dim: int, key_dtype: str, chunk_len: int, shard_chunks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "synthetic.txt"
        text.write_text("w3 " * chunk_len)
        settings = BuildSettings(
            str(path),
            [str(text)],
            "synthetic",
            chunk_len=chunk_len,
            min_chunk_len=1,
            key_dtype=key_dtype,
            index="none",
            shard_chunks=shard_chunks,
        )
        build_store(settings, MadeUpEmbedder(dim), made_up_tokenizer())


def _write_shard(
    folder: Path,
    record: dict[str, Any],
    manifest: dict[str, Any],
    keys: SyntheticKeys | TreeKeys,
    document_chunks: int,
    seed: int,
) -> None:
    """The four files of a shard; `record["files"]` is filled in."""
    rows, chunk_len = record["rows"], manifest["chunk_len"]
    schema = _schema(folder.parent)
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng([seed, 1 << 31, record["first_row"]])
    save_npy(folder / "tokens.npy", draw.integers(3, VOCAB_SIZE, rows * chunk_len, manifest["token_dtype"]))
    chunks = np.zeros(rows, CHUNK_DTYPE)
    chunks["document"], chunks["position"] = np.divmod(np.arange(rows), document_chunks)
    chunks["length"] = chunk_len
    save_npy(folder / "chunks.npy", chunks)
    _write_documents(folder / "documents.parquet", schema, record, chunk_len, document_chunks)
    _write_keys(folder / "keys.npy", record, manifest, keys)
    record["files"] = {name: file_record(folder / name) for name in record["files"]}


def _schema(shards: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(shards / "00000" / "documents.parquet")


def _write_documents(path: Path, schema: Any, record: dict[str, Any], chunk_len: int, document_chunks: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, first = record["documents"], record["first_document"]
    num_chunks = np.full(count, document_chunks)
    num_chunks[-1] = record["rows"] - document_chunks * (count - 1)
    known = {
        "id": [f"document {first + i}" for i in range(count)],
        "title": [f"Document {first + i}" for i in range(count)],
        "source": ["synthetic"] * count,
        "extra": ["{}"] * count,
        "first_chunk": document_chunks * np.arange(count),
        "num_chunks": num_chunks,
        "num_tokens": num_chunks * chunk_len,
        "num_bytes": 4 * num_chunks * chunk_len,
    }
    columns = [pa.array(known.get(field.name, [None] * count), field.type) for field in schema]
    table = pa.Table.from_arrays(columns, schema=schema)
    write_with(path, lambda handle: pq.write_table(table, handle, compression="zstd"))


def _write_keys(path: Path, record: dict[str, Any], manifest: dict[str, Any], keys: SyntheticKeys | TreeKeys) -> None:
    first, rows, key_dtype = record["first_row"], record["rows"], manifest["key_dtype"]
    stored = narrow_keys(np.zeros((0, keys.dim), np.float32), key_dtype).dtype
    with written_aside(path) as aside:
        written = np.lib.format.open_memmap(aside, "w+", stored, (rows, keys.dim))
        for start in range(0, rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, rows)
            written[start:stop] = narrow_keys(keys.rows(first + start, first + stop), key_dtype)
        written.flush()
        del written
