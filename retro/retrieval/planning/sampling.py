"""The size of a corpus from a sample of it: what `retro plan` does with inputs."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retro.retrieval.planning.plan import Corpus
from retro.text.chunks import decode_chunks, tokenize_ids
from retro.text.corpus import expand_inputs, read_input
from retro.text.documents import Document, Input

READ_BYTES = 256 << 20  # of files; beyond that, files are drawn, and large ones read from their beginning
TOKENIZED_BYTES = 8 << 20
_DECODED_CHUNKS = 1000
_BLOCK = 1 << 20


def sample_corpus(
    inputs: list[str],
    tokenizer: Any,
    embedder_tokenizer: Any = None,
    passage_prefix: str = "",
    chunk_len: int = 64,
    text_field: str = "text",
    read_bytes: int = READ_BYTES,
    tokenized_bytes: int = TOKENIZED_BYTES,
    seed: int = 0,
) -> Corpus:
    """How large the inputs are: documents and bytes are counted, tokens and chunks estimated from a drawn part.

    Files of more than `read_bytes` altogether are drawn (seeded) until there are so many, the last one read from its
    beginning. Filters, duplicates and rejected records are not foreseen. ValueError if there is no text.
    """
    read, share = _read(expand_inputs(inputs), text_field, read_bytes, tokenized_bytes, seed)
    if not read.kept:
        raise ValueError(f"the inputs {', '.join(map(str, inputs))} hold no text; give others")
    texts = [document.text for _, document in read.kept]
    sampled = sum(len(text.encode()) for text in texts)
    ids = tokenize_ids(tokenizer, texts)
    counts = np.asarray([len(line) for line in ids])
    waste = float(np.mean(-(-counts // chunk_len) - counts / chunk_len))  # of a document's last chunk
    tokens = read.bytes / sampled * counts.sum() / share
    documents = round(read.documents / share)
    corpus = Corpus(
        documents,
        round(tokens),
        round(tokens / chunk_len + waste * documents),
        round(read.bytes / share),
        chunk_len,
        *_table_sizes([document for _, document in read.kept]),
        tokenizer_bytes=_tokenizer_bytes(tokenizer),
        sampled_bytes=sampled,
        assumed=() if share == 1 else (f"{share:.2%} of the inputs stand for all",),
    )
    if embedder_tokenizer is None:
        return corpus
    return replace(corpus, embedder_tokens=_read_of_chunk(ids, tokenizer, embedder_tokenizer, passage_prefix, corpus))


@dataclass
class _InputSample:
    """Documents counted, and some of them kept with the number they drew."""

    documents: int = 0
    bytes: int = 0
    kept: list[tuple[float, Document]] | None = None


def _read(items: list[Input], text_field: str, limit: int, keep_bytes: int, seed: int) -> tuple[_InputSample, float]:
    """What was read, and which share of all it is."""
    sizes = [Path(item.path).stat().st_size if item.kind in ("jsonl", "parquet", "text") else 0 for item in items]
    draw, left, done = np.random.default_rng(seed), limit, 0.0
    order = range(len(items)) if sum(sizes) <= limit else draw.permutation(len(items)).tolist()
    reading, threshold, kept_bytes = _InputSample(kept=[]), 1.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in order:
            if sizes[number] and left <= 0:
                continue
            records, share = _records(items[number], sizes[number], left, text_field, Path(folder))
            left -= sizes[number]
            done += sizes[number] * share
            for document in records:
                if not isinstance(document, Document) or not document.text.strip():
                    continue
                size = len(document.text.encode())
                reading.documents += 1
                reading.bytes += size
                drawn = draw.random()
                if drawn < threshold:
                    reading.kept.append((drawn, document))
                    kept_bytes += size
                while kept_bytes > keep_bytes and len(reading.kept) > 1:
                    threshold /= 2
                    reading.kept = [pair for pair in reading.kept if pair[0] < threshold] or reading.kept[:1]
                    kept_bytes = sum(len(document.text.encode()) for _, document in reading.kept)
    return reading, done / sum(sizes) if sum(sizes) else 1.0


def _records(item: Input, size: int, limit: int, text_field: str, folder: Path) -> tuple[Iterator[Any], float]:
    """The records of a file, or those of its first `limit` bytes with the share that these are."""
    if size <= limit or item.kind == "text":
        return read_input(item, text_field), 1.0
    if item.kind == "parquet":
        import pyarrow.parquet as pq

        rows = pq.ParquetFile(item.path).metadata.num_rows
        wanted = max(1, round(rows * limit / size))
        return islice(read_input(item, text_field), wanted), min(1.0, wanted / rows)
    beginning = folder / "beginning.jsonl"
    with open(item.path, "rb") as handle:
        raw = handle.read(limit)
    content = _unpacked(raw) if item.path.lower().endswith(".gz") else raw
    beginning.write_bytes(content[: content.rfind(b"\n") + 1])
    return read_input(replace(item, path=str(beginning)), text_field), limit / size


def _unpacked(raw: bytes) -> bytes:
    """What the beginning of a gzip file holds."""
    parts = []
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as handle:
        try:
            while block := handle.read1(_BLOCK):
                parts.append(block)
        except EOFError:
            pass
    return b"".join(parts)


def _table_sizes(documents: list[Document]) -> tuple[float, float]:
    """Of a document's row in documents.parquet, and of the same in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, counts = ("id", "title", "source", "date"), np.arange(len(documents))
    columns = {name: [getattr(document, name) for document in documents] for name in names}
    columns["extra"] = [json.dumps(document.extra, sort_keys=True) for document in documents]
    columns |= {name: counts for name in ("first_chunk", "num_chunks", "num_tokens", "num_bytes")}
    table, sizes = pa.table(columns), []
    for part in (table, table.slice(0, 0)):
        written = io.BytesIO()
        pq.write_table(part, written, compression="zstd")
        sizes.append(len(written.getvalue()))
    return (sizes[0] - sizes[1]) / len(documents), table.nbytes / len(documents)


def _tokenizer_bytes(tokenizer: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _read_of_chunk(ids: list[np.ndarray], tokenizer: Any, reader: Any, prefix: str, corpus: Corpus) -> float:
    """Tokens that the embedder reads of a chunk on average."""
    chunks = [line[i : i + corpus.chunk_len] for line in ids for i in range(0, len(line), corpus.chunk_len)]
    drawn = np.random.default_rng(0).permutation(len(chunks))[:_DECODED_CHUNKS]
    texts = [prefix + text for text in decode_chunks(tokenizer, [chunks[i] for i in drawn])]
    return float(np.mean([len(line) for line in reader(texts, verbose=False)["input_ids"]]))
