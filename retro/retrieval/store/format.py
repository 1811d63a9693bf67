"""The files of a datastore: names, types and checks of what its folder holds.

See retro.retrieval.store.store for the folder as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from retro.common.files import check_files, load_json, map_bytes, open_npy, stable_hash
from retro.common.own import check_names, check_no_links

FORMAT = "retro-store"
FORMAT_VERSION = 2  # 1 had one generation only
CHUNK_DTYPE = np.dtype([("document", "<u4"), ("position", "<u4"), ("length", "<u2")])  # document row within the shard
STORED_KEYS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
OWN_FOLDERS = ("shards", "tokenizer", "rejects", "index", "neighbors", "removed", "parts")
SHARD_FILES = ("tokens.npy", "chunks.npy", "documents.parquet", "keys.npy")
TABLE_TEXTS = ("id", "title", "source", "date", "extra")  # columns of documents.parquet
TABLE_NUMBERS = ("first_chunk", "num_chunks", "num_tokens", "num_bytes")


@dataclass(frozen=True)
class ShardArrays:
    """The memory maps of one shard, as stored."""

    tokens: np.ndarray  # [rows, m] uint16 or uint32
    chunks: np.ndarray  # [rows] CHUNK_DTYPE
    keys: np.ndarray  # [rows, d] float32, float16, or uint16 holding bfloat16
    documents: np.ndarray  # [bytes] of documents.parquet

    def array(self, what: str) -> np.ndarray:
        """An array, or a column of the chunk table, without the costs of a np.memmap."""
        return np.asarray(getattr(self, what) if what in ("tokens", "keys", "chunks") else self.chunks[what])


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


def narrow_keys(keys: Float32[np.ndarray, "c d"], key_dtype: str) -> np.ndarray:
    """Float32 keys to their stored type, rounding to nearest even."""
    if key_dtype == "bfloat16":
        bits = np.ascontiguousarray(keys, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return keys.astype(np.dtype(key_dtype))


def fingerprint_of_shard(manifest: dict[str, Any], number: int) -> str:
    files = manifest["shards"][number]["files"]
    checksums = [files[name]["sha256"] for name in ("tokens.npy", "chunks.npy", "keys.npy")]
    return stable_hash({"files": checksums, "min_chunk_len": manifest["settings"]["min_chunk_len"]})


def open_shard(folder: Path, record: dict[str, Any], manifest: dict[str, Any]) -> ShardArrays:
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
            raise ValueError(
                f"{folder / name} has shape {array.shape}, but the manifest says {expected[name]}; "
                "restore it from a copy"
            )
    documents = map_bytes(folder / "documents.parquet")
    return ShardArrays(tokens.reshape(rows, chunk_len), chunks, keys, documents)


def open_removed(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Document row, first chunk and number of chunks of every removed document [removed, 3]."""
    record = manifest.get("removed")
    if not record:
        return np.zeros((0, 3), np.int64)
    check_files(path, {record["file"]: record}, checksums=False)
    removed = open_npy(path / record["file"])
    if removed.shape != (record["documents"], 3) or removed.dtype != np.int64:
        raise ValueError(
            f"{path / record['file']} is no list of {record['documents']} documents; restore it from a copy"
        )
    return removed
