"""The size of a corpus from a part of it, before it is built into a datastore."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retro.text.chunks import TokenIds, tokenize_ids
from retro.text.compression import DAMAGE, ending_of, open_bytes
from retro.text.corpus import expand_inputs
from retro.text.documents import Document, Input, InputPartition
from retro.text.formats import read_partition

READ_BYTES = 256 << 20  # of files; of more, every file gives its beginning
TOKENIZED_BYTES = 8 << 20


@dataclass(frozen=True)
class Estimate:
    """How large a corpus is.

    Arguments:
        bytes: of its text in UTF-8.
        share: of the inputs that was read; 1 if documents and bytes were counted, not estimated.
        documents_read: those that were tokenized; chunk_ids: their chunks in a drawn order, without padding.
    """

    documents: int
    bytes: int
    tokens: int
    chunks: int
    share: float
    documents_read: Sequence[Document] = field(repr=False)
    chunk_ids: Sequence[TokenIds] = field(repr=False, compare=False)


def estimate_corpus(
    inputs: Sequence[str],
    tokenizer: Any,
    chunk_len: int = 64,
    text_field: str = "text",
    read_bytes: int = READ_BYTES,
    tokenized_bytes: int = TOKENIZED_BYTES,
) -> Estimate:
    """How large the inputs are: of files of up to `read_bytes` altogether every document is read, of larger ones the
    beginning of each; tokens and chunks are those of drawn documents of `tokenized_bytes`, carried over to all.

    Filters, duplicates and rejected records are not foreseen. ValueError if there is no text.
    """
    items, draw = expand_inputs(inputs), np.random.default_rng(0)
    sizes = [os.path.getsize(item.path) if os.path.isfile(item.path) else 0 for item in items]
    wanted, read = min(1.0, read_bytes / max(sum(sizes), 1)), 0.0
    documents = num_bytes = kept_bytes = 0
    kept: list[tuple[float, Document]] = []
    threshold = 1.0
    for item, size in zip(items, sizes, strict=True):
        if size and item.kind == "text" and draw.random() >= wanted:
            continue
        partition, share = _beginning(item, size, wanted)
        read += size * share
        for document in _with_text(read_partition(partition, text_field)):
            length, drawn = len(document.text.encode()), draw.random()
            documents, num_bytes = documents + 1, num_bytes + length
            if drawn < threshold:
                kept.append((drawn, document))
                kept_bytes += length
            while kept_bytes > tokenized_bytes and len(kept) > 1:
                threshold /= 2
                kept = [pair for pair in kept if pair[0] < threshold] or kept[:1]
                kept_bytes = sum(len(document.text.encode()) for _, document in kept)
    if not kept:
        raise ValueError(f"the inputs {', '.join(map(str, inputs))} hold no text; give others")
    share = read / sum(sizes) if sum(sizes) else 1.0
    ids = tokenize_ids(tokenizer, [document.text for _, document in kept])
    lengths = np.array([len(line) for line in ids])
    waste = float(np.mean(-(-lengths // chunk_len) - lengths / chunk_len))  # of a document's last chunk
    tokens = num_bytes / kept_bytes * lengths.sum() / share
    chunks = [line[i : i + chunk_len] for line in ids for i in range(0, len(line), chunk_len)]
    return Estimate(
        round(documents / share),
        round(num_bytes / share),
        round(tokens),
        round(tokens / chunk_len + waste * documents / share),
        share,
        [document for _, document in kept],
        [chunks[i] for i in draw.permutation(len(chunks))],
    )


def _with_text(records: Iterator[Any]) -> Iterator[Document]:
    return (record for record in records if isinstance(record, Document) and record.text.strip())


def _beginning(item: Input, size: int, wanted: float) -> tuple[InputPartition, float]:
    """The first records of a file, of about so large a share of its bytes, and the share that they are."""
    if wanted == 1 or item.kind not in ("jsonl", "csv", "parquet"):
        return InputPartition(item), 1.0
    if item.kind == "parquet":
        import pyarrow.parquet as pq

        metadata = pq.ParquetFile(item.path).metadata
        rows = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        stop = int(np.searchsorted(rows, wanted * metadata.num_rows)) + 1
        return InputPartition(item, 0, stop), float(rows[stop - 1] / metadata.num_rows)
    with open(item.path, "rb") as raw:
        if not ending_of(item.path):
            raw.seek(int(wanted * size))
            raw.readline()
            return InputPartition(item, 0, raw.tell()), raw.tell() / size
        packed, lines = io.BytesIO(raw.read(int(wanted * size))), 0
    with suppress(*DAMAGE), open_bytes(item.path, packed) as handle:
        for lines, _ in enumerate(handle, start=1):  # noqa: B007
            pass
    return InputPartition(item, 0, lines), packed.tell() / size
