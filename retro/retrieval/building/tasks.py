"""The tasks of a build: read a part of the inputs, write the tables of a shard, embed a block of it, join its blocks.

Each is a function of its spec alone (see `retro.retrieval.executors.tasks`), so that it may run anywhere and again.
Files, in the job's folder parts/ of the store:

    read-<number>-<hash>.parquet      every document with text: its fields, place, tokens, and why it is left out
    read-<number>-<hash>.npy          the tokens of the documents that are kept
    read-<number>-<hash>.jsonl        the records that are no document
    keys-<shard>-<start>-<stop>.npy   keys of a block of rows
    ../shards/<shard>/                the shard, as `Store` reads it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.common import files
from retro.common.devices import torch_threads
from retro.common.extras import check_installed
from retro.common.files import file_record, open_npy, save_json_lines, save_npy, sync, write_with, written_aside
from retro.common.pretrained import own_code, pretrained_place
from retro.retrieval.building.losses import LOSSES, look_for_losses
from retro.retrieval.embedding.embedder import (
    NO_EMBEDDER,
    Embedder,
    NoEmbedder,
    embed_chunks,
    embedder_from,
    quiet_loading,
)
from retro.retrieval.filters import Deduplicator, DocumentFilter, FilterSettings, deduplicator_of, filters_of
from retro.retrieval.store.format import CHUNK_DTYPE, TABLE_NUMBERS, TABLE_TEXTS, are_measurable, narrow_keys
from retro.text.chunks import tokenize_ids
from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.formats import read_partition

_GROUP_ROWS = 4096  # of documents.parquet, which are read together
_TOKENIZE_DOCUMENTS = 256  # documents tokenized at a time
_given_embedders: dict[str, Embedder] = {}  # objects of this process, by fingerprint


def load_tokenizer(name_or_folder: str) -> Any:
    """A Hugging Face tokenizer by name, folder, GGUF file or "package:NAME"; ValueError in one sentence if none."""
    from transformers import AutoTokenizer

    place, gguf = pretrained_place(name_or_folder)
    if gguf:
        check_installed("gguf", f"the tokenizer {name_or_folder}, a GGUF file,")
    try:
        with quiet_loading():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **gguf)
    except Exception:  # tokenizers raises no other
        raise ValueError(
            own_code(place)
            or f"the tokenizer {name_or_folder} is no folder, nor a Hugging Face tokenizer that can be loaded; "
            "train one with `retro tokenizer` or give a local folder"
        ) from None


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a token stream: uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# Read


@dataclass
class _TokenizedRange:
    """What reading a part of the inputs gives; every record is counted or has a row."""

    count: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    lost: dict[str, str] | None = None


def read_part(spec: dict[str, Any]) -> dict[str, Any]:
    """Read, reject, filter and tokenize some partitions of the inputs.

    Raises ValueError for a record that is no document, unless on_bad is "reject", and for a token id that does not fit.
    """
    filters, duplicates = _filters(json.dumps(spec["filters"]), json.dumps(spec["held_out"]), spec["text_field"])
    tokenizer, part = saved_tokenizer(spec["tokenizer"], spec["tokenizer_fingerprint"]), _TokenizedRange()
    waiting: list[tuple[dict[str, Any], Document]] = []
    for document in _documents(spec, part):
        row = _row(document, filters)
        part.rows.append(row)
        if row["filtered"] is None:
            row["signature"] = duplicates and duplicates.signature(document)
            waiting.append((row, document))
        if len(waiting) == _TOKENIZE_DOCUMENTS:
            _tokenize(tokenizer, waiting, part, spec["token_dtype"])
    _tokenize(tokenizer, waiting, part, spec["token_dtype"])
    return _save_part(Path(spec["folder"]), spec["name"], part, spec["token_dtype"])


def partitions_to_spec(partitions: Sequence[InputPartition]) -> list[dict[str, Any]]:
    """Partitions as JSON holds them."""
    return [asdict(partition) for partition in partitions]


def _documents(spec: dict[str, Any], part: _TokenizedRange) -> Iterator[Document]:
    """Documents with text; what is none is counted, and listed if it is rejected."""
    for partition in spec["partitions"]:
        for record in read_partition(
            InputPartition(**{**partition, "item": Input(**partition["item"])}), spec["text_field"]
        ):
            part.count["read"] += 1
            if isinstance(record, Reject):
                if spec["on_bad"] == "error":
                    raise ValueError(
                        f"{record.file}:{record.line}: {record.reason}; mend or remove it, or build with on_bad=reject"
                    )
                part.count["rejected"] += 1
                part.rejected.append(asdict(record))
            elif not record.text.strip():
                part.count["empty"] += 1
            else:
                yield record


def _row(document: Document, filters: Sequence[DocumentFilter]) -> dict[str, Any]:
    verdicts = (one.verdict(document) for one in filters)
    verdict = next((found for found in verdicts if found is not None), None)
    return {
        "id": document.id,
        "title": document.title,
        "source": document.source,
        "date": document.date,
        "extra": json.dumps(document.extra, sort_keys=True),
        "place": document.place,
        "filtered": None if verdict is None else json.dumps(verdict),
        "signature": None,
        "num_tokens": 0,
        "num_bytes": len(document.text.encode("utf-8")),
    }


def _tokenize(
    tokenizer: Any, waiting: list[tuple[dict[str, Any], Document]], part: _TokenizedRange, dtype: str
) -> None:
    """Tokenize what waits; a document without any token keeps none."""
    texts, limit = [document.text for _, document in waiting], np.iinfo(dtype).max
    for (row, document), ids in zip(waiting, tokenize_ids(tokenizer, texts) if texts else (), strict=True):
        if len(ids) and (ids.min() < 0 or ids.max() > limit):
            raise ValueError(f"the tokenizer gave the id {ids.max()} for {document.place}, which does not fit {dtype}")
        row["num_tokens"] = len(ids)
        part.tokens.append(ids.astype(dtype))
        lost = look_for_losses(tokenizer, document, ids, part.count)
        part.lost = part.lost or lost
    waiting.clear()


def _save_part(folder: Path, name: str, part: _TokenizedRange, dtype: str) -> dict[str, Any]:
    tokens = np.concatenate([np.zeros(0, dtype), *part.tokens])
    save_npy(folder / f"{name}.npy", tokens)
    _save_table(folder / f"{name}.parquet", part.rows, _part_schema())
    save_json_lines(folder / f"{name}.jsonl", part.rejected)
    files = [folder / f"{name}.{suffix}" for suffix in ("npy", "parquet", "jsonl")]
    count = {key: part.count[key] for key in ("read", "empty", "rejected", *LOSSES)}
    return {
        "count": count,
        "lost": part.lost,
        "tokens": len(tokens),
        "files": {file.name: file_record(file) for file in files},
    }


def signature_column(duplicates: Deduplicator) -> str:
    """The column of documents.parquet that keeps signatures, named by what they can be compared with."""
    return f"signature_{duplicates.by}" + (f"_{duplicates.ngram}" if duplicates.by == "minhash" else "")


def _part_schema() -> Any:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in (*TABLE_TEXTS, "place", "filtered")]
    return pa.schema([*texts, ("signature", pa.binary()), ("num_tokens", pa.int64()), ("num_bytes", pa.int64())])


def _save_table(path: Path, rows: list[dict[str, Any]], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=schema)
    write_with(path, lambda handle: pq.write_table(table, handle, compression="zstd"))


@lru_cache(maxsize=2)
def saved_tokenizer(folder: str, fingerprint: str) -> Any:
    """A store's tokenizer; its fingerprint tells one that has replaced it in the same folder."""
    return load_tokenizer(folder)


@lru_cache(maxsize=1)
def _filters(settings: str, held_out: str, text_field: str) -> tuple[list[DocumentFilter], Deduplicator | None]:
    """held_out: checksums of the held-out inputs, since these may change under the same name."""
    given = FilterSettings(**json.loads(settings))
    return filters_of(given, text_field), deduplicator_of(given)


# Tables


def write_tables(spec: dict[str, Any]) -> dict[str, Any]:
    """Write tokens, chunk table and document table of a shard.

    spec["runs"]: the shard's documents, in order: [part, first row, end row] of parts' tables.
    spec["signature"]: the name of the column that keeps what `Deduplicator.signature` gave, or None.
    """
    import pyarrow as pa

    folder, m = Path(spec["folder"]), spec["chunk_len"]
    runs, kept = list(_by_part(spec["runs"])), [*TABLE_TEXTS, "num_tokens", "num_bytes", "signature"]
    table = pa.concat_tables(_kept(folder, of_part, kept if spec["signature"] else kept[:-1]) for of_part in runs)
    lens = table.column("num_tokens").to_numpy().astype(np.int64)
    counts = -(-lens // m)
    shard = folder.parent / "shards" / spec["shard"]
    shard.mkdir(parents=True, exist_ok=True)
    sync(shard.parent)
    chunks = _chunk_table(lens, counts, m)
    _write_tokens(shard / "tokens.npy", folder, runs, spec, len(chunks) * m)
    save_npy(shard / "chunks.npy", chunks)
    columns = {name: table.column(name) for name in TABLE_TEXTS}
    columns |= {"first_chunk": np.cumsum(counts) - counts, "num_chunks": counts, "num_tokens": lens}
    columns |= {"num_bytes": table.column("num_bytes")}
    if spec["signature"]:
        columns |= {spec["signature"]: table.column("signature")}
    write_documents(shard / "documents.parquet", pa.table(columns, schema=_document_schema(spec["signature"])))
    return {
        "rows": len(chunks),
        "documents": len(lens),
        "tokens": int(lens.sum()),
        "bytes": int(table.column("num_bytes").to_numpy().sum()),
        "short_chunks": int((chunks["length"] < spec["min_chunk_len"]).sum()),
        "files": {_beside(folder, file): file_record(file) for file in sorted(_shard_files(shard))},
    }


def write_documents(path: Path, table: Any) -> None:
    """Write a table as documents.parquet, in groups of rows that can be read alone.

    The bytes do not depend on how the table lies in memory.
    """
    import pyarrow.parquet as pq

    def write(handle: IO[bytes]) -> None:
        with pq.ParquetWriter(handle, table.schema, compression="zstd") as writer:
            for start in range(0, table.num_rows, _GROUP_ROWS):
                writer.write_table(table.slice(start, _GROUP_ROWS).combine_chunks())

    write_with(path, write)


def _shard_files(shard: Path) -> list[Path]:
    return [shard / name for name in ("tokens.npy", "chunks.npy", "documents.parquet")]


def _beside(folder: Path, file: Path) -> str:
    """A file of the store, relative to the folder of the parts."""
    return f"../{file.relative_to(folder.parent).as_posix()}"


def _by_part(runs: Iterable[Sequence[Any]]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Runs of each part, in order."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part, start, stop in runs:
        found.setdefault(part, []).append((start, stop))
    return iter(found.items())


def _kept(folder: Path, runs: tuple[str, list[tuple[int, int]]], columns: list[str]) -> Any:
    """The rows of a part's table that runs name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(folder / f"{runs[0]}.parquet", columns=columns)
    return pa.concat_tables(table.slice(start, stop - start) for start, stop in runs[1])


def _write_tokens(
    file: Path, folder: Path, runs: list[tuple[str, list[tuple[int, int]]]], spec: dict[str, Any], size: int
) -> None:
    """Write tokens.npy, one part after another."""
    m, at = spec["chunk_len"], 0
    with written_aside(file) as aside:
        out = files.new_npy(aside, spec["token_dtype"], (size,))
        for of_part in runs:
            tokens, lens = _tokens(folder, of_part)
            padded = _padded(tokens, lens, -(-lens // m) * m, spec["pad_token_id"])
            out[at : at + len(padded)] = padded
            at += len(padded)
        out.flush()
        del out
    assert at == size


def _tokens(folder: Path, runs: tuple[str, list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the rows that runs name, and how many each has."""
    import pyarrow.parquet as pq

    lens = pq.read_table(folder / f"{runs[0]}.parquet", columns=["num_tokens"]).column("num_tokens").to_numpy()
    bounds = np.concatenate([[0], np.cumsum(lens)])
    stream = open_npy(folder / f"{runs[0]}.npy")
    tokens = [stream[bounds[start] : bounds[stop]] for start, stop in runs[1]]
    return np.concatenate(tokens), np.concatenate([lens[start:stop] for start, stop in runs[1]])


def _chunk_table(lens: Int64[np.ndarray, " d"], counts: Int64[np.ndarray, " d"], m: int) -> np.ndarray:
    """One row for each chunk of documents of `lens` tokens in `counts` chunks."""
    chunks = np.zeros(int(counts.sum()), CHUNK_DTYPE)
    document = np.repeat(np.arange(len(lens)), counts)
    position = np.arange(len(chunks)) - np.repeat(np.cumsum(counts) - counts, counts)
    chunks["document"], chunks["position"] = document, position
    chunks["length"] = np.minimum(m, lens[document] - m * position)
    return chunks


def _padded(tokens: np.ndarray, lens: np.ndarray, places: np.ndarray, pad: int) -> np.ndarray:
    """Documents' tokens one after another, each in as many places as it is given."""
    padded = np.full(int(places.sum()), pad, tokens.dtype)
    shift = np.cumsum(places - lens) - (places - lens)  # how far padding has moved each document
    padded[np.arange(len(tokens)) + np.repeat(shift, lens)] = tokens
    return padded


def _document_schema(signature: str | None) -> Any:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in TABLE_TEXTS]
    texts += [(name, pa.int64()) for name in TABLE_NUMBERS]
    return pa.schema(texts + ([(signature, pa.binary())] if signature else []))


# Keys


@contextmanager
def embedder_at_hand(embedder: Embedder) -> Iterator[None]:
    """While this lasts, `embed_block` in this process takes the embedder itself instead of loading it."""
    _given_embedders[embedder.fingerprint] = embedder
    try:
        yield
    finally:
        _given_embedders.pop(embedder.fingerprint, None)


def embed_block(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the keys of the rows start .. stop - 1 of a shard.

    An embedder that is loaded by name runs in one thread of a CPU, so that the keys are the same however many there
    are. Raises ValueError for keys that are not finite, and OSError for an embedder that is another one here or none.
    """
    folder, name, start, stop = Path(spec["folder"]), spec["name"], spec["start"], spec["stop"]
    shard = folder.parent / "shards" / spec["shard"]
    embedder = _embedder(spec)
    truncated, keys = embedder.num_truncated, np.zeros((stop - start, 0), np.float32)
    if embedder.dim:
        tokens = open_npy(shard / "tokens.npy").reshape(-1, spec["chunk_len"])[start:stop]
        lens = open_npy(shard / "chunks.npy")["length"][start:stop]
        chunks = [ids[:n] for ids, n in zip(tokens, lens, strict=True)]
        with torch_threads(None if spec["own_threads"] else 1):
            tokenizer = saved_tokenizer(spec["tokenizer"], spec["tokenizer_fingerprint"])
            keys = np.asarray(embed_chunks(embedder, tokenizer, chunks), np.float32)
    check_finite(keys, spec["first_row"] + start, spec["key_dtype"])
    file = folder / f"{name}.npy"
    save_npy(file, narrow_keys(keys, spec["key_dtype"]))
    return {"truncated_chunks": embedder.num_truncated - truncated, "files": {file.name: file_record(file)}}


def check_finite(keys: Float32[np.ndarray, "c d"], first_row: int, key_dtype: str) -> None:
    """Refuse keys that are NaN, infinite (or would be, as float16) or longer than 9e18, naming the first row."""
    limit = np.finfo(np.float16).max if key_dtype == "float16" else np.inf
    wrong = np.flatnonzero(~are_measurable(keys) | (np.abs(keys) > limit).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"the embedder gave a key that is not a finite {key_dtype}, or too long, for row {first_row + wrong[0]}; "
            "use another embedder or key_dtype"
        )


def _embedder(spec: dict[str, Any]) -> Embedder:
    fingerprint, described = spec["embedder"]["fingerprint"], spec["embedder"]
    if fingerprint in _given_embedders:
        return _given_embedders[fingerprint]
    store = str(Path(spec["folder"]).parent)
    try:
        embedder = _load_embedder(json.dumps(described, sort_keys=True), store, spec["batch_size"], spec["compile"])
    except ValueError as error:  # it was there when the build was planned: the inputs are not to blame
        raise OSError(f"the embedder cannot be loaded here: {error}") from None
    if embedder.fingerprint != fingerprint:
        raise OSError(
            f"the embedder {described['name']} is another one here ({embedder.fingerprint[:12]}) than where the build "
            f"was planned ({fingerprint[:12]}); give every machine the same files"
        )
    return embedder


@lru_cache(maxsize=1)
def _load_embedder(described: str, store: str, batch_size: int | None, compile: bool) -> Embedder:
    description = json.loads(described)
    if description["name"] == NO_EMBEDDER:
        return NoEmbedder()
    return embedder_from(description, Path(store), batch_size=batch_size, compile=compile)


def join_keys(spec: dict[str, Any]) -> dict[str, Any]:
    """Write keys.npy of a shard from its blocks, which are opened one after another."""
    folder = Path(spec["folder"])
    shard = folder.parent / "shards" / spec["shard"]
    first, row = open_npy(folder / f"{spec['blocks'][0]}.npy"), 0
    with written_aside(shard / "keys.npy") as aside:
        keys = files.new_npy(aside, first.dtype, (spec["rows"], first.shape[1]))
        for name in spec["blocks"]:
            block = open_npy(folder / f"{name}.npy")
            keys[row : row + len(block)] = block
            row += len(block)
        keys.flush()
        del keys
    assert row == spec["rows"]
    file = shard / "keys.npy"
    return {"truncated_chunks": spec["truncated_chunks"], "files": {_beside(folder, file): file_record(file)}}
