"""A datastore opened: chunks, values [N, F] and keys by one row id, memory-mapped and read-only.

    store/
      manifest.json            format, generation, settings, inputs, fingerprints, counts, one record per shard
      shards/00000/            tokens.npy [rows * m]   chunks.npy [rows]   documents.parquet   keys.npy [rows, d]
      tokenizer/               the Hugging Face tokenizer the chunks were cut with
      index/<hash>/            approximate indexes (retro.retrieval.index)
      neighbors/<hash>/        neighbor tables (retro.retrieval.neighbors)
      rejects/                 rejected.jsonl, filtered.jsonl: what was left out, and why

A document starts on a chunk border and its last chunk is padded, so the token stream of a shard is [rows, m] and the
continuation F of chunk i is chunk i + 1, if that belongs to the same document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float32, Int, Int64

from retro.retrieval.chunks import decode_chunks, tokenizer_fingerprint
from retro.retrieval.files import check_files, load_json, open_npy, stable_hash

FORMAT = "retro-store"
FORMAT_VERSION = 1
CHUNK_DTYPE = np.dtype([("document", "<u4"), ("position", "<u4"), ("length", "<u2")])  # document row within the shard
SHARD_FILES = ("tokens.npy", "chunks.npy", "documents.parquet", "keys.npy")


@dataclass(frozen=True)
class DocumentRecord:
    """A stored document without its text; its chunks are rows first_row .. first_row + num_chunks - 1."""

    id: str
    title: str
    source: str
    date: str | None
    extra: dict = field(hash=False)
    first_row: int
    num_chunks: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class _Shard:
    """The memory maps of one shard."""

    tokens: np.ndarray  # [rows, m] uint16 or uint32
    chunks: np.ndarray  # [rows] CHUNK_DTYPE
    keys: np.ndarray  # [rows, d] float32, float16, or uint16 holding bfloat16


class Store:
    """A complete datastore, read-only. Build one with `build_store`, open one with `Store.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any], shards: list[_Shard]) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = shards
        self._first_rows = np.asarray([record["first_row"] for record in manifest["shards"]], np.int64)
        self._first_documents = np.asarray([record["first_document"] for record in manifest["shards"]], np.int64)
        self.chunk_len: int = manifest["chunk_len"]
        self.pad_token_id: int = manifest["pad_token_id"]
        self.num_chunks: int = sum(record["rows"] for record in manifest["shards"])
        self.num_documents: int = sum(record["documents"] for record in manifest["shards"])
        self.min_chunk_len: int = manifest["settings"]["min_chunk_len"]
        self.key_dim: int = manifest["embedder"]["dim"]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store; sizes and row counts are checked, checksums by `verify`.

        Raises ValueError, naming the file, when the folder is no complete store or a file is missing, cut or
        inconsistent.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest["state"] != "complete":
            raise ValueError(f"{path} is a store whose build has not finished; run the same `retro build` again")
        check_files(path / "tokenizer", manifest["tokenizer"]["files"], checksums=False)
        shards = [_open_shard(path / "shards" / record["name"], record, manifest) for record in manifest["shards"]]
        return cls(path, manifest, shards)

    def verify(self) -> None:
        """Compare every file with its recorded checksum; ValueError names the first that differs."""
        check_files(self.path / "tokenizer", self.manifest["tokenizer"]["files"], checksums=True)
        for record in self.manifest["shards"]:
            check_files(self.path / "shards" / record["name"], record["files"], checksums=True)
        check_files(self.path / "rejects", self.manifest["rejects"], checksums=True)

    # Identity

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the store holds: chunks, documents, keys, tokenizer and embedder."""
        manifest = self.manifest
        return stable_hash(
            {
                "format_version": manifest["format_version"],
                "generation": manifest["generation"],
                "chunk_len": manifest["chunk_len"],
                "min_chunk_len": self.min_chunk_len,
                "tokenizer": manifest["tokenizer"]["fingerprint"],
                "embedder": manifest["embedder"]["fingerprint"],
                "shards": [{n: f["sha256"] for n, f in record["files"].items()} for record in manifest["shards"]],
            }
        )

    @property
    def tokenizer_fingerprint(self) -> str:
        """The fingerprint of the tokenizer the chunks were cut with."""
        return self.manifest["tokenizer"]["fingerprint"]

    @property
    def embedder_fingerprint(self) -> str:
        """The fingerprint of the embedder that made the keys."""
        return self.manifest["embedder"]["fingerprint"]

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer saved inside the store."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / "tokenizer")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that is not the one the store was built with, naming both."""
        found = tokenizer_fingerprint(tokenizer)
        if found != self.tokenizer_fingerprint:
            raise ValueError(
                f"the store {self.path} was built with the tokenizer {self.manifest['tokenizer']['name']} "
                f"({self.tokenizer_fingerprint[:12]}), not with {_name_of(tokenizer)} ({found[:12]}); "
                f"use the tokenizer in {self.path / 'tokenizer'} or build another store"
            )

    def check_embedder(self, embedder: Any) -> None:
        """Refuse an embedder that is not the one the store was built with, naming both."""
        if embedder.fingerprint != self.embedder_fingerprint:
            mine, other = self.manifest["embedder"], dict(embedder.description)
            differing = sorted(k for k in other if k in mine and mine[k] != other[k])
            sides = (
                "; ".join(f"{k}: {mine[k]!r} in the store, {other[k]!r} given" for k in differing) or "other weights"
            )
            raise ValueError(
                f"the keys of {self.path} come from the embedder {mine['name']} ({self.embedder_fingerprint[:12]}), "
                f"not from {other.get('name', '?')} ({embedder.fingerprint[:12]}): {sides}; use the store's embedder"
            )

    # Rows

    def chunks(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows m"]:
        """Token ids of chunks, padded with `pad_token_id`."""
        return self._gather("tokens", rows, np.int64, (self.chunk_len,))

    def chunk_lens(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """Real tokens in each chunk, 1 .. m."""
        return self._gather("length", rows, np.int64)

    def positions(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """Index of each chunk inside its document, from 0."""
        return self._gather("position", rows, np.int64)

    def document_rows(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """The document row of each chunk; a document's chunks are contiguous rows."""
        flat = self._checked(rows)
        local = self._gather("document", flat, np.int64)
        return (local + self._first_documents[self._shard_of(flat)]).reshape(np.shape(rows))

    def values(
        self, rows: Int[np.ndarray, "*rows"], retrieved_len: int
    ) -> tuple[Int64[np.ndarray, "*rows r"], Bool[np.ndarray, "*rows r"]]:
        """The values [N, F] of chunks: the chunk and what follows it in its document, cut to `retrieved_len` tokens.

        Row -1 is a missing neighbor: its mask is all False. The mask is a prefix (True = real token); ids are
        `pad_token_id` where it is False.
        """
        rows = np.asarray(rows)
        flat = rows.reshape(-1).astype(np.int64)
        present = flat >= 0
        first = self._checked(np.where(present, flat, 0))
        steps = -(-retrieved_len // self.chunk_len)
        following = first[:, None] + np.arange(steps)  # [q, steps]
        inside = np.minimum(following, self.num_chunks - 1)
        documents = self.document_rows(inside)
        real = (documents == documents[:, :1]) & (following < self.num_chunks) & present[:, None]
        lens = np.where(real, self.chunk_lens(inside), 0)
        mask = np.arange(self.chunk_len) < lens[..., None]
        mask, ids = (rearrange(x, "q steps m -> q (steps m)")[:, :retrieved_len] for x in (mask, self.chunks(inside)))
        shape = (*rows.shape, retrieved_len)
        return np.where(mask, ids, self.pad_token_id).reshape(shape), mask.reshape(shape)

    def keys(self, rows: Int[np.ndarray, "*rows"]) -> Float32[np.ndarray, "*rows d"]:
        """Keys of chunks as float32, whatever the stored type."""
        stored = self._gather("keys", rows, self._shards[0].keys.dtype, (self.key_dim,))
        return widen_keys(stored, self.manifest["key_dtype"])

    def key_block(self, start: int, stop: int) -> Float32[np.ndarray, "c d"]:
        """Keys of the rows start .. stop - 1, read sequentially."""
        blocks = []
        for shard, first in zip(self._shards, self._first_rows, strict=True):
            low, high = max(start - first, 0), min(stop - first, len(shard.chunks))
            if low < high:
                blocks.append(np.asarray(shard.keys[low:high]))
        return widen_keys(np.concatenate(blocks), self.manifest["key_dtype"])

    @cached_property
    def searchable_rows(self) -> Int64[np.ndarray, " c"]:
        """Rows that indexes and neighbor tables may return: chunks of at least `min_chunk_len` tokens."""
        lens = [np.asarray(shard.chunks["length"]) for shard in self._shards]
        return np.flatnonzero(np.concatenate(lens) >= self.min_chunk_len).astype(np.int64)

    def text(self, rows: Int[np.ndarray, "*rows"]) -> list[str]:
        """Decoded text of chunks (flattened), as their keys were made from it."""
        return decode_chunks(self.tokenizer, self.token_lists(rows))

    def token_lists(self, rows: Int[np.ndarray, "*rows"]) -> list[Int64[np.ndarray, " t"]]:
        """Token ids of chunks (flattened) without padding."""
        flat = np.asarray(rows).reshape(-1)
        return [ids[:n] for ids, n in zip(self.chunks(flat), self.chunk_lens(flat), strict=True)]

    # Documents

    @cached_property
    def _documents(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folders = [self.path / "shards" / record["name"] for record in self.manifest["shards"]]
        return pa.concat_tables([pq.read_table(folder / "documents.parquet") for folder in folders]).combine_chunks()

    def document(self, document_row: int | np.integer) -> DocumentRecord:
        """What is recorded of one document, without its text."""
        if not 0 <= document_row < self.num_documents:
            raise ValueError(f"document row {document_row} is outside the store's 0 .. {self.num_documents - 1}")
        record = {
            name: self._documents.column(name)[int(document_row)].as_py() for name in self._documents.column_names
        }
        shard = np.searchsorted(self._first_documents, document_row, side="right") - 1
        record["first_row"] = record.pop("first_chunk") + int(self._first_rows[shard])
        return DocumentRecord(**{**record, "extra": json.loads(record["extra"])})

    @cached_property
    def document_ids(self) -> list[str]:
        """The ids of all documents, by document row."""
        return self._documents.column("id").to_pylist()

    @cached_property
    def document_spans(self) -> Int64[np.ndarray, "documents 2"]:
        """First row and number of chunks of every document, by document row."""
        counts = self._documents.column("num_chunks").to_numpy().astype(np.int64)
        return np.stack([np.cumsum(counts) - counts, counts], axis=1)

    # Gathers over shards

    def _checked(self, rows: Any) -> np.ndarray:
        flat = np.asarray(rows).reshape(-1).astype(np.int64)
        wrong = np.flatnonzero((flat < 0) | (flat >= self.num_chunks))
        if len(wrong):
            raise ValueError(f"row {flat[wrong[0]]} is outside the store's 0 .. {self.num_chunks - 1}")
        return flat

    def _shard_of(self, flat: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_rows, flat, side="right") - 1

    def _gather(self, what: str, rows: Any, dtype: Any, tail: Sequence[int] = ()) -> np.ndarray:
        """One fancy-indexed read per shard touched; `what` is an array of the shard or a column of its chunk table."""
        flat = self._checked(rows)
        out = np.empty((len(flat), *tail), dtype)
        shard_of = self._shard_of(flat)
        for number in np.unique(shard_of):
            chosen = np.flatnonzero(shard_of == number)
            shard = self._shards[number]
            array = getattr(shard, what) if what in ("tokens", "keys") else shard.chunks[what]
            out[chosen] = array[flat[chosen] - self._first_rows[number]]
        return out.reshape((*np.shape(rows), *tail))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store folder; ValueError if it is none or of a newer format."""
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a datastore (it has no manifest.json); build one with `retro build`")
    manifest = load_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a datastore; build one with `retro build`")
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {manifest['format_version']}, this library reads up to {FORMAT_VERSION}; "
            "upgrade retro-lm"
        )
    return manifest


def widen_keys(stored: np.ndarray, key_dtype: str) -> Float32[np.ndarray, "*rows d"]:
    """Stored keys to float32; bfloat16 is stored as the uint16 that holds its bits."""
    if key_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def narrow_keys(keys: Float32[np.ndarray, "c d"], key_dtype: str) -> np.ndarray:
    """Float32 keys to their stored type, rounding to nearest even."""
    if key_dtype == "bfloat16":
        bits = np.ascontiguousarray(keys, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return keys.astype(np.dtype(key_dtype))


def _open_shard(folder: Path, record: dict[str, Any], manifest: dict[str, Any]) -> _Shard:
    missing = [name for name in SHARD_FILES if name not in record["files"]]
    if missing:
        raise ValueError(f"the manifest records no {missing[0]} for shard {record['name']}; build the store again")
    check_files(folder, record["files"], checksums=False)
    tokens, chunks, keys = (open_npy(folder / name) for name in ("tokens.npy", "chunks.npy", "keys.npy"))
    rows, chunk_len = record["rows"], manifest["chunk_len"]
    expected = {
        "tokens.npy": (rows * chunk_len,),
        "chunks.npy": (rows,),
        "keys.npy": (rows, manifest["embedder"]["dim"]),
    }
    for name, array in (("tokens.npy", tokens), ("chunks.npy", chunks), ("keys.npy", keys)):
        if array.shape != expected[name]:
            raise ValueError(f"{folder / name} has shape {array.shape}, but the manifest says {expected[name]}")
    return _Shard(tokens.reshape(rows, chunk_len), chunks, keys)


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
