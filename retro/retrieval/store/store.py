"""A datastore opened: chunks, values [N, F] and keys by one row id, memory-mapped and read-only.

    store/
      manifest.json            format, generation, settings, inputs, fingerprints, counts, one record per shard, updates
      shards/00000/            tokens.npy [rows * m]   chunks.npy [rows]   documents.parquet   keys.npy [rows, d]
                               documents.parquet also keeps a signature of each text, if copies were looked for
      removed/<generation>.npy the documents that were removed: row, first chunk, number of chunks [documents, 3]
      tokenizer/               the Hugging Face tokenizer the chunks were cut with
      index/<hash>/            approximate indexes (retro.retrieval.search.index)
      neighbors/<hash>/        neighbor tables (retro.retrieval.building.neighbors)
      rejects/                 rejected.jsonl, filtered.jsonl: what was left out, and why

A document starts on a chunk border and its last chunk is padded, so the token stream of a shard is [rows, m] and the
continuation F of chunk i is chunk i + 1, if that belongs to the same document.

A store has generations: `add_documents`, `remove_documents` and `compact` (retro.retrieval.building.updates) each write
the next one, by one new manifest over files that are never changed. An open store is of one generation, and stays so.
Rows keep their number until `compact`; the chunks of a removed document are empty and no search returns them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float32, Int, Int64

from retro.common.files import allow_open_files, check_files, stable_hash
from retro.retrieval.store.documents import DocumentTables
from retro.retrieval.store.format import (
    CHUNK_DTYPE,
    SHARD_FILES,
    STORED_KEYS,
    ShardArrays,
    fingerprint_of_shard,
    open_removed,
    open_shard,
    read_manifest,
    widen_keys,
)
from retro.text.chunks import bos_of, decode_chunks, num_embeddings, tokenizer_fingerprint
from retro.text.tokenizer import open_tokenizer


class Store(DocumentTables):
    """A complete datastore, read-only. Build one with `build_store`, open one with `Store.open`."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], shards: list[ShardArrays], removed: Int64[np.ndarray, "removed 3"]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = shards
        self._first_rows = np.asarray([record["first_row"] for record in manifest["shards"]], np.int64)
        self._first_documents = np.asarray([record["first_document"] for record in manifest["shards"]], np.int64)
        self._tables: dict[tuple[int, int], Any] = {}  # by shard and group of rows
        self._table_groups: dict[int, Any] = {}  # by shard: metadata of its table, and where the groups begin
        self._removed = removed
        self.chunk_len: int = manifest["chunk_len"]
        self.pad_token_id: int = manifest["pad_token_id"]
        self.num_chunks: int = sum(record["rows"] for record in manifest["shards"])
        self.num_documents: int = sum(record["documents"] for record in manifest["shards"])
        self.min_chunk_len: int = manifest["settings"]["min_chunk_len"]
        self.key_dim: int = manifest["embedder"]["dim"]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store; sizes, row counts and the ends of files are checked, the rest when it is first read.

        Every file of the generation is mapped here, so that one which `compact` deletes later stays readable.
        Raises ValueError, naming the file, when the folder is no complete store or a file is missing, cut or
        inconsistent.
        """
        if str(path).startswith(("http://", "https://")):
            raise ValueError(
                f"{path} is the address of a server; name the folder of a datastore, which this reads itself"
            )
        path = Path(path)
        while True:
            manifest = read_manifest(path)
            if manifest["state"] != "complete":
                raise ValueError(f"{path} is a store whose build has not finished; run the same `retro build` again")
            try:
                return cls._open(path, manifest)
            except ValueError:
                if read_manifest(path)["generation"] == manifest["generation"]:
                    raise  # else another process has just compacted the store
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise ValueError(
                    f"{path} has {len(manifest['shards'])} shards of {len(SHARD_FILES)} files, more than this process "
                    "may have open; raise the limit with `ulimit -n`, then `retro compact` merges small shards"
                ) from None

    @classmethod
    def _open(cls, path: Path, manifest: dict[str, Any]) -> Store:
        allow_open_files(len(SHARD_FILES) * len(manifest["shards"]))
        check_files(path / "tokenizer", manifest["tokenizer"]["files"], checksums=False)
        shards = [open_shard(path / "shards" / record["name"], record, manifest) for record in manifest["shards"]]
        store = cls(path, manifest, shards, open_removed(path, manifest))
        _check_bounds(store)
        return store

    # Identity

    @classmethod
    def reopen(cls, path: str | Path, fingerprint: str, meanwhile: str) -> Store:
        """Open a store for a task of a job that began with this state; ValueError if it was changed since.

        meanwhile: what the job does, for that sentence.
        """
        store = cls.open(path)
        if store.fingerprint != fingerprint:
            raise ValueError(f"{path} was changed while {meanwhile}; run the same command again")
        return store

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the store holds: chunks, documents, keys, tokenizer and embedder."""
        manifest, removed = self.manifest, self.manifest.get("removed")
        content = {
            "format_version": manifest["format_version"],
            "generation": manifest["generation"],
            "chunk_len": manifest["chunk_len"],
            "min_chunk_len": self.min_chunk_len,
            "tokenizer": manifest["tokenizer"]["fingerprint"],
            "embedder": manifest["embedder"]["fingerprint"],
            "shards": [{n: f["xxh3"] for n, f in record["files"].items()} for record in manifest["shards"]],
        }
        return stable_hash(content | ({"removed": removed["xxh3"]} if removed else {}))

    @property
    def generation(self) -> int:
        """1 as built; every update adds 1."""
        return self.manifest["generation"]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """The manifest's record of each shard: first_row, rows, first_document, documents, files, ..."""
        return self.manifest["shards"]

    def shard_arrays(self, number: int) -> ShardArrays:
        """One shard as it is stored, removed documents included."""
        return self._shards[number]

    def shard_fingerprint(self, number: int) -> str:
        """A hash of what an index of one shard depends on: its tokens, chunks and keys, and `min_chunk_len`.

        Not on where the shard stands: after `compact` the same shard may begin at another row.
        """
        return fingerprint_of_shard(self.manifest, number)

    def check_on_disk(self, numbers: Iterable[int] | None = None) -> None:
        """ValueError if `compact` or another build has deleted some of the shards (None: any) since this was opened.

        Whoever writes what is made of their text asks this before, and once more when it is in its place: so it is
        refused, taken back, or there before the new manifest, and then `compact` deletes it.
        """
        manifest = read_manifest(self.path)
        there = {fingerprint_of_shard(manifest, number) for number in range(len(manifest.get("shards", ())))}
        numbers = range(len(self.shards)) if numbers is None else numbers
        if any(fingerprint_of_shard(self.manifest, number) not in there for number in numbers):
            raise ValueError(
                f"{self.path} was compacted or built again since it was opened, so that nothing made of its old text "
                "is written there; open it again"
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
        check_files(self.path / "tokenizer", self.manifest["tokenizer"]["files"], checksums=True)
        return open_tokenizer(self.path / "tokenizer")

    @cached_property
    def bos_token_id(self) -> int | None:
        """The id that the tokenizer itself puts before a text; None where it puts none."""
        return bos_of(self.tokenizer)

    @cached_property
    def num_embeddings(self) -> int:
        """How many embeddings a model of these tokens needs."""
        return num_embeddings(self.tokenizer)

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
        """Token ids of chunks, padded with `pad_token_id`; nothing but padding where the document was removed."""
        ids = self._gather("tokens", rows, np.int64, (self.chunk_len,))
        if len(self._removed):
            ids[self.is_removed(rows)] = self.pad_token_id
        return ids

    def chunk_lens(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """Real tokens in each chunk, 1 .. m; 0 where the document was removed."""
        lens = self._gather("length", rows, np.int64)
        return np.where(self.is_removed(rows), 0, lens) if len(self._removed) else lens

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
        flat = np.asarray(rows).reshape(-1)
        present = flat >= 0
        if not present.any():
            shape = (*np.shape(rows), retrieved_len)
            return np.full(shape, self.pad_token_id, np.int64), np.zeros(shape, bool)
        steps = np.arange(-(-retrieved_len // self.chunk_len))
        following = self._checked(np.where(present, flat, 0))[:, None] + steps  # [q, steps]
        inside = np.minimum(following, self.num_chunks - 1)
        chunks = self._read("chunks", inside, CHUNK_DTYPE)
        real = chunks["position"] == chunks["position"][:, :1] + steps  # a document, and so a shard, begins at 0
        real &= (following < self.num_chunks) & present[:, None]
        if len(self._removed):
            real &= ~self.is_removed(inside)
        lens = (chunks["length"] * real).sum(1, dtype=np.int64)  # only the last chunk of a document can be short
        mask = np.arange(retrieved_len) < lens[:, None]
        ids = self._read("tokens", inside, np.int64, (self.chunk_len,))
        ids = rearrange(ids, "q steps m -> q (steps m)")[:, :retrieved_len]
        np.copyto(ids, self.pad_token_id, where=~mask)
        shape = (*np.shape(rows), retrieved_len)
        return ids.reshape(shape), mask.reshape(shape)

    def keys(self, rows: Int[np.ndarray, "*rows"]) -> Float32[np.ndarray, "*rows d"]:
        """Keys of chunks as float32, whatever the stored type."""
        stored = self._gather("keys", rows, STORED_KEYS[self.manifest["key_dtype"]], (self.key_dim,))
        return widen_keys(stored, self.manifest["key_dtype"])

    def key_block(self, start: int, stop: int) -> Float32[np.ndarray, "c d"]:
        """Keys of the rows start .. stop - 1, read sequentially."""
        blocks = [np.zeros((0, self.key_dim), STORED_KEYS[self.manifest["key_dtype"]])]
        blocks += [self._shards[number].keys[part] for number, part in self._parts(start, stop)]
        return widen_keys(np.concatenate(blocks), self.manifest["key_dtype"])

    @cached_property
    def searchable_rows(self) -> Int64[np.ndarray, " c"]:
        """Rows that a search may return: chunks of at least `min_chunk_len` tokens whose document is not removed.

        8 bytes a row, made at first use; `searchable_in` and `num_searchable` do without.
        """
        found = [np.zeros(0, np.int64)]
        found += [self._searchable_in(first, first + rows) for first, rows in _bounds(self.shards)]
        return np.concatenate(found)

    def searchable_in(self, start: int, stop: int) -> Int64[np.ndarray, " c"]:
        """The searchable rows among start .. stop - 1."""
        if "searchable_rows" not in vars(self):
            return self._searchable_in(start, stop)
        low, high = np.searchsorted(self.searchable_rows, [start, stop])
        return self.searchable_rows[low:high]

    def _searchable_in(self, start: int, stop: int) -> np.ndarray:
        lens = [np.zeros(0, np.uint16)]
        lens += [self._shards[number].array("length")[part] for number, part in self._parts(start, stop)]
        rows = start + np.flatnonzero(np.concatenate(lens) >= self.min_chunk_len)
        return rows[~self.is_removed(rows)] if len(self._removed) else rows

    @property
    def num_searchable(self) -> int:
        """How many rows are searchable, without a look at them."""
        if "searchable_rows" in vars(self):
            return len(self.searchable_rows)
        last = self._removed[:, 1] + self._removed[:, 2] - 1  # only the last chunk of a document can be short
        short = self._gather("length", last, np.int64) < self.min_chunk_len
        removed = int(self._removed[:, 2].sum() - short.sum())
        return self.num_chunks - sum(record["short_chunks"] for record in self.shards) - removed

    def text(self, rows: Int[np.ndarray, "*rows"]) -> list[str]:
        """Decoded text of chunks (flattened), as their keys were made from it."""
        return decode_chunks(self.tokenizer, self.token_lists(rows))

    def token_lists(self, rows: Int[np.ndarray, "*rows"]) -> list[Int64[np.ndarray, " t"]]:
        """Token ids of chunks (flattened) without padding."""
        flat = np.asarray(rows).reshape(-1)
        return [ids[:n] for ids, n in zip(self.chunks(flat), self.chunk_lens(flat), strict=True)]

    # Removed documents

    @cached_property
    def removed_documents(self) -> Int64[np.ndarray, " removed"]:
        """The document rows that were removed, ascending."""
        return np.ascontiguousarray(self._removed[:, 0])

    @property
    def removed_spans(self) -> Int64[np.ndarray, "removed 2"]:
        """First row and number of chunks of each of the `removed_documents`."""
        return self._removed[:, 1:]

    def is_removed(self, rows: Int[np.ndarray, "*rows"]) -> Bool[np.ndarray, "*rows"]:
        """Which chunks belong to a removed document."""
        if not len(self._removed):
            return np.zeros(np.shape(rows), bool)
        first, count = self._removed[:, 1], self._removed[:, 2]
        span = np.searchsorted(first, rows, side="right") - 1
        return (span >= 0) & (rows < (first + count)[span])

    @property
    def num_live_documents(self) -> int:
        """Documents that are not removed."""
        return self.num_documents - len(self._removed)

    @property
    def num_live_chunks(self) -> int:
        """Chunks of the documents that are not removed."""
        return self.num_chunks - int(self._removed[:, 2].sum())

    def live_rows(self, numbers: Int[np.ndarray, "*numbers"]) -> Int64[np.ndarray, "*numbers"]:
        """The rows of the chunks 0 .. `num_live_chunks` - 1 that are counted when removed documents are skipped."""
        first, count = self._removed[:, 1], self._removed[:, 2]
        skipped = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
        return numbers + skipped[np.searchsorted(first - skipped[:-1], numbers, side="right")]

    # Gathers over shards

    def _checked(self, rows: Any) -> np.ndarray:
        flat = np.asarray(rows).reshape(-1).astype(np.int64, copy=False)
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.num_chunks:
            wrong = np.flatnonzero((flat < 0) | (flat >= self.num_chunks))
            raise ValueError(f"row {flat[wrong[0]]} is outside the store's 0 .. {self.num_chunks - 1}")
        return flat

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The shards that rows start .. stop - 1 touch, and which of their own rows."""
        for number, (first, rows) in enumerate(_bounds(self.shards)):
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                yield number, slice(low, high)

    def _shard_of(self, flat: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_rows, flat, side="right") - 1

    def _gather(self, what: str, rows: Any, dtype: Any, tail: Sequence[int] = ()) -> np.ndarray:
        """Rows of `what`, an array of the shards or a column of their chunk tables; ValueError for one outside."""
        return self._read(what, self._checked(rows), dtype, tail).reshape((*np.shape(rows), *tail))

    def _read(self, what: str, rows: np.ndarray, dtype: Any, tail: Sequence[int] = ()) -> np.ndarray:
        """One fancy-indexed read per shard touched, of rows that are inside the store."""
        if len(self._shards) == 1:
            return self._shards[0].array(what)[rows].astype(dtype, copy=False)
        out = np.empty((*rows.shape, *tail), dtype)
        shard_of = self._shard_of(rows)
        for number in np.unique(shard_of):
            chosen = shard_of == number
            out[chosen] = self._shards[number].array(what)[rows[chosen] - self._first_rows[number]]
        return out


def _bounds(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(record["first_row"], record["rows"]) for record in records]


def _check_bounds(store: Store) -> None:
    """Refuse a manifest whose shards are not one after another or are fewer than were counted, naming the shard."""
    manifest, row, document = store.path / "manifest.json", 0, 0
    for record in store.shards:
        if (record["first_row"], record["first_document"]) != (row, document):
            raise ValueError(
                f"{manifest} puts shard {record['name']} at row {record['first_row']}, but the shards before it end at "
                f"row {row}: one is missing or out of place; restore the manifest from a copy"
            )
        row, document = row + record["rows"], document + record["documents"]
    counted = store.manifest["counts"]["chunks"]
    if store.num_live_chunks != counted:
        last = f", up to {store.shards[-1]['name']}," if store.shards else ""
        raise ValueError(
            f"{manifest} counts {counted} chunks, but its shards{last} hold {store.num_live_chunks}: one is missing; "
            "restore the manifest from a copy"
        )


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
