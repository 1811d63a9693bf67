"""The files of a datastore: names, types and checks of what its folder holds.

See retro.retrieval.store.store for the folder as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

from retro.common.checksums import CheckedArray, CheckedFile, open_array, open_checked
from retro.common.files import check_files, stable_hash
from retro.common.own import check_names, check_no_links
from retro.common.records import FILES, load_record
from retro.common.values import Count, CountOrZero, Prefix, Size, check_record

FORMAT = "retro-store"
FORMAT_VERSION = 3  # the first with checksums of blocks
CHUNK_DTYPE = np.dtype([("document", "<u4"), ("position", "<u4"), ("length", "<u2")])  # document row within the shard
STORED_KEYS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
OWN_FOLDERS = ("shards", "tokenizer", "rejects", "index", "neighbors", "removed", "parts")
SHARD_FILES = ("tokens.npy", "chunks.npy", "documents.parquet", "keys.npy")
_PLAN = {
    "state": Literal["building", "clearing", "complete"],
    "generation": Count,
    "chunk_len": Size,
    "pad_token_id": CountOrZero,
    "token_dtype": Literal["uint16", "uint32"],
    "key_dtype": Literal[tuple(STORED_KEYS)],
    "settings": {"min_chunk_len": Size},
    "tokenizer": {"name": Prefix, "fingerprint": str},
    "embedder": {"name": str, "fingerprint": str, "dim": CountOrZero},
}
_COUNTS = ("first_row", "rows", "first_document", "documents", "tokens", "bytes", "short_chunks", "truncated_chunks")
_COMPLETE = {
    "counts": {"documents": CountOrZero, "chunks": CountOrZero},
    "tokenizer": {"files": FILES},
    "rejects": FILES,
    "shards": [{"name": str, "files": FILES} | dict.fromkeys(_COUNTS, CountOrZero)],
}
TABLE_TEXTS = ("id", "title", "source", "date", "extra")  # columns of documents.parquet
TABLE_NUMBERS = ("first_chunk", "num_chunks", "num_tokens", "num_bytes")


@dataclass(frozen=True)
class ShardArrays:
    """The memory maps of one shard, as stored."""

    tokens: np.ndarray | CheckedArray  # [rows, m] uint16 or uint32
    chunks: np.ndarray | CheckedArray  # [rows] CHUNK_DTYPE
    keys: np.ndarray | CheckedArray  # [rows, d] float32, float16, or uint16 holding bfloat16
    documents: CheckedFile | None  # documents.parquet

    def array(self, what: str) -> np.ndarray | CheckedArray:
        """An array, or a column of the chunk table."""
        return self._columns[what] if what in CHUNK_DTYPE.names else getattr(self, what)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray | CheckedArray]:
        return {name: self.chunks[name] for name in CHUNK_DTYPE.names}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store folder; ValueError if it is none or of a newer format."""
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a datastore (it has no manifest.json); build one with `retro build`")
    manifest = load_record(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a datastore; build one with `retro build`")
    check_record(file, manifest, {"format_version": Count})
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {manifest['format_version']}, this library reads up to {FORMAT_VERSION}; "
            "upgrade retro-lm"
        )
    check_record(file, manifest, _PLAN)
    if manifest["state"] == "complete":
        check_record(file, manifest, _COMPLETE)
    if (removed := manifest.get("removed")) is not None:
        check_record(f"removed of {file}", removed, {"file": str, "documents": CountOrZero})
    _check_manifest_names(file, manifest)
    return manifest


def _check_manifest_names(file: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest by which files outside of the store would be read, written or deleted."""
    shards, removed = manifest.get("shards", []), manifest.get("removed")
    for name in (record["name"] for record in shards):
        if not (isinstance(name, str) and name.isascii() and name.isdigit()):
            raise ValueError(f"{file} names the shard {name!r}, which is no number; restore it from a copy")
    check_names(file, [name for record in shards for name in record["files"]])
    check_names(file, [*manifest["tokenizer"].get("files", ()), *manifest.get("rejects", ())])
    check_names(file, [removed["file"]] if removed else [])


def read_tokenizer_files(path: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The files of a store's tokenizer, to be handed out; ValueError for a link, and for one that is damaged."""
    folder, files = path / "tokenizer", manifest["tokenizer"]["files"]
    check_no_links(path, folder.name)
    check_files(folder, files, checksums=True)
    return {name: (folder / name).read_bytes() for name in files}


def widen_keys(stored: np.ndarray, key_dtype: str) -> Float32[np.ndarray, "*rows d"]:
    """Stored keys to float32; bfloat16 is stored as the uint16 that holds its bits."""
    if key_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if key_dtype == "float16":
        import torch  # some 7 times as fast as NumPy

        return torch.from_numpy(stored).float().numpy()
    return stored.astype(np.float32)


def are_measurable(keys: Float32[np.ndarray, "c d"]) -> Bool[np.ndarray, " c"]:
    """Which keys are finite, and so short (9e18) that float32 holds the squared distances between them."""
    return np.square(keys, dtype=np.float64).sum(1) <= np.finfo(np.float32).max / 4


def narrow_keys(keys: Float32[np.ndarray, "c d"], key_dtype: str) -> np.ndarray:
    """Float32 keys to their stored type, rounding to nearest even."""
    if key_dtype == "bfloat16":
        bits = np.ascontiguousarray(keys, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return keys.astype(np.dtype(key_dtype))


def fingerprint_of_shard(manifest: dict[str, Any], number: int) -> str:
    files = manifest["shards"][number]["files"]
    checksums = [files[name]["xxh3"] for name in ("tokens.npy", "chunks.npy", "keys.npy")]
    return stable_hash({"files": checksums, "min_chunk_len": manifest["settings"]["min_chunk_len"]})


def open_shard(folder: Path, record: dict[str, Any], manifest: dict[str, Any]) -> ShardArrays:
    missing = [name for name in SHARD_FILES if name not in record["files"]]
    if missing:
        raise ValueError(f"the manifest records no {missing[0]} for shard {record['name']}; build the store again")
    files, rows, chunk_len = record["files"], record["rows"], manifest["chunk_len"]
    tokens = open_array(folder, "tokens.npy", files, (rows * chunk_len,), manifest["token_dtype"])
    chunks = open_array(folder, "chunks.npy", files, (rows,), CHUNK_DTYPE)
    width, key_dtype = manifest["embedder"]["dim"], STORED_KEYS[manifest["key_dtype"]]
    keys = open_array(folder, "keys.npy", files, (rows, width), key_dtype)
    documents = open_checked(folder, "documents.parquet", files)
    return ShardArrays(tokens.view(lambda array: array.reshape(rows, chunk_len)), chunks, keys, documents)


def open_removed(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Document row, first chunk and number of chunks of every removed document [removed, 3]."""
    record = manifest.get("removed")
    if not record:
        return np.zeros((0, 3), np.int64)
    shape = (record["documents"], 3)
    return np.asarray(open_array(path, record["file"], {record["file"]: record}, shape, np.int64))
