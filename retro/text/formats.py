"""Inputs by format: how each is split into partitions, and how the records of a partition are read.

JSON Lines (also gzipped), Parquet, plain text, a dataset of `datasets`, the documentation of a package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from retro.text.documents import Document, Input, InputPartition, Reject, has_surrogates
from retro.text.packages import package_documents, package_modules

_BOM = b"\xef\xbb\xbf"
_MOST_GZIP_PARTITIONS = 64  # every partition of a compressed file is decompressed from the file's beginning


def read_partition(partition: InputPartition, text_field: str = "text") -> Iterator[Document | Reject]:
    """The records of a partition, as `read_input` gives them in their place."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "dataset": _read_dataset}
    if partition.item.kind == "package":
        return iter(package_documents([partition.item.path]))
    return readers[partition.item.kind](partition, text_field)


def split_input(item: Input, partition_bytes: int | None = None) -> tuple[dict[str, Any], list[InputPartition]]:
    """An input's record for a manifest, and its partitions in order; all partitions together hold every record once.

    partition_bytes: a partition ends at the first border between records after so many bytes; None is one partition.
    Text files and packages are one always. Reads the whole input once; ValueError if it is damaged.
    """
    size, digest, marks = _SCANS[item.kind](item, partition_bytes or sys.maxsize)
    partitions = [
        InputPartition(item, start, stop, first, stop_byte - start_byte)
        for (start, first, start_byte), (stop, _, stop_byte) in zip(marks, marks[1:], strict=False)
    ]
    return {"name": item.name, "kind": item.kind, "bytes": size, "sha256": digest}, partitions


# Inputs


def _file_digest(paths: Iterable[str], names: Sequence[str] = ()) -> str:
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Partitions: (bytes, sha256, marks) of an input. A mark is where a partition begins, as its `start`, the number of its
# record and the bytes before it; the last mark is the end.


_Mark = tuple[int | None, int, int]


def _scan_whole(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    size = os.path.getsize(item.path)
    return size, _file_digest([item.path]), [(0, 1, 0), (None, 1, size)]


def _scan_package(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    modules = package_modules(item.path)
    names, paths = [name for name, _ in modules], [str(path) for _, path in modules]
    size = sum(map(os.path.getsize, paths))
    return size, _file_digest(paths, names), [(0, 1, 0), (None, 1, size)]


def _scan_jsonl(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    if _is_gzip(item.path):
        return _scan_gzip(item, partition_bytes)
    digest, size, line = hashlib.sha256(), 0, 1
    marks: list[_Mark] = [(0, 1, 0)]
    with open(item.path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            begin = 0
            while (end := block.find(b"\n", max(marks[-1][2] + partition_bytes - size - 1, begin))) >= 0:
                line += block.count(b"\n", begin, end + 1)
                begin = end + 1
                marks.append((size + begin, line, size + begin))
            line += block.count(b"\n", begin)
            size += len(block)
    return size, digest.hexdigest(), _ended(marks, size, line, size)


def _scan_gzip(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    marks: list[_Mark] = [(0, 1, 0)]
    line = size = 0
    try:
        with gzip.open(item.path, "rb") as handle:
            for line, raw in enumerate(handle, start=1):
                size += len(raw)
                if size - marks[-1][2] >= partition_bytes:
                    marks.append((line, line + 1, size))
    except _GZIP_ERRORS as error:
        raise _damaged(item, line + 1, error) from None
    step = -(-len(marks) // _MOST_GZIP_PARTITIONS)
    marks = _ended(marks[::step], line, line + 1, size)
    return os.path.getsize(item.path), _file_digest([item.path]), marks


def _scan_parquet(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    import pyarrow.parquet as pq

    marks: list[_Mark] = [(0, 1, 0)]
    group, row, size = 0, 1, 0
    with _readable_parquet(item):
        metadata = pq.ParquetFile(item.path).metadata
        for group in range(1, metadata.num_row_groups + 1):
            row += metadata.row_group(group - 1).num_rows
            size += metadata.row_group(group - 1).total_byte_size
            if size - marks[-1][2] >= partition_bytes:
                marks.append((group, row, size))
    return os.path.getsize(item.path), _file_digest([item.path]), _ended(marks, group, row, size)


def _scan_dataset(item: Input, partition_bytes: int) -> tuple[int, str, list[_Mark]]:
    digest, size, row = hashlib.sha256(), 0, 0
    marks: list[_Mark] = [(0, 1, 0)]
    for row, record in enumerate(_load_dataset(item), start=1):
        line = json.dumps(record, sort_keys=True, default=str).encode("ascii")
        digest.update(line + b"\n")
        size += len(line) + 1
        if size - marks[-1][2] >= partition_bytes:
            marks.append((row, row + 1, size))
    return size, digest.hexdigest(), _ended(marks, row, row + 1, size)


def _ended(marks: list[_Mark], stop: int, number: int, size: int) -> list[_Mark]:
    """Marks with the end of the input, unless the last partition ends there."""
    return marks if len(marks) > 1 and marks[-1][0] == stop else [*marks, (stop, number, size)]


_SCANS = {
    "jsonl": _scan_jsonl,
    "parquet": _scan_parquet,
    "text": _scan_whole,
    "dataset": _scan_dataset,
    "package": _scan_package,
}

# Records


def document_of(record: Any, place: tuple[str, int], text_field: str = "text") -> Document | Reject:
    """One record (a mapping) to a document, or the reason why not."""
    file, line = place
    if not isinstance(record, dict):
        return Reject(
            file, line, f"the record is a {type(record).__name__}, not an object with the field {text_field!r}"
        )
    if text_field not in record:
        return Reject(
            file, line, f"the record has no field {text_field!r} (it has {', '.join(sorted(record)) or 'none'})"
        )
    text = record[text_field]
    if not isinstance(text, str):
        return Reject(file, line, f"the field {text_field!r} is a {type(text).__name__}, not a string")
    if has_surrogates(text):
        return Reject(file, line, f"the field {text_field!r} is invalid UTF-8 (it holds a lone surrogate)")

    def read(name: str) -> str:
        value = record.get(name)
        return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")

    known = {text_field, "id", "title", "source", "date"}
    extra = {key: value for key, value in record.items() if key not in known}
    where = f"{file}:{line}"
    return Document(
        read("id") or where, text, read("title"), read("source"), read("date") or None, json_safe(extra), place=where
    )


def json_safe(value: Any) -> Any:
    """A copy of `value` that JSON can hold; what it cannot (dates, bytes) becomes its string."""
    return json.loads(json.dumps(value, default=str))


_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


def _is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def _damaged(item: Input, line: int, error: Exception) -> ValueError:
    return ValueError(f"{item.name}:{line}: the compressed file is damaged ({error}); restore it from a copy")


def _read_jsonl(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    item, line = partition.item, partition.first - 1
    try:
        for line, raw in enumerate(_lines(partition), start=partition.first):
            yield _record_of_line(raw.removeprefix(_BOM) if line == 1 else raw, (item.name, line), text_field)
    except _GZIP_ERRORS as error:
        raise _damaged(item, line + 1, error) from None


def _lines(partition: InputPartition) -> Iterator[bytes]:
    """The lines of a partition; ValueError if it does not end where it ended when the input was split."""
    path, at, stop = partition.item.path, partition.start, partition.stop
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as handle:
        if _is_gzip(path):
            for raw in islice(handle, at, stop):
                at += 1
                yield raw
        else:
            handle.seek(at)
            while (stop is None or at < stop) and (raw := handle.readline()):
                at += len(raw)
                yield raw
    if stop not in (None, at):
        raise ValueError(f"{partition.item.name} has changed since the work began; start again")


def _record_of_line(raw: bytes, place: tuple[str, int], text_field: str) -> Document | Reject:
    file, line = place
    shown = raw[:200].decode("utf-8", "replace").rstrip("\r\n")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(file, line, f"the line is invalid UTF-8 (byte {error.start + 1})", shown)
    if not text.strip():
        return Document(f"{file}:{line}", "", place=f"{file}:{line}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of more than 4300 digits is a plain ValueError
        return Reject(file, line, f"the line is not JSON ({error})", shown)
    found = document_of(record, place, text_field)
    return Reject(found.file, found.line, found.reason, shown) if isinstance(found, Reject) else found


def _read_parquet(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    import pyarrow.parquet as pq

    item, row = partition.item, partition.first - 1
    with _readable_parquet(item):
        file = pq.ParquetFile(item.path)
        groups = list(range(file.num_row_groups))[partition.start : partition.stop]
        for batch in file.iter_batches(batch_size=1024, row_groups=groups):
            for record in _records_of_batch(batch):
                row += 1
                if isinstance(record, UnicodeDecodeError):
                    yield Reject(item.name, row, "the row is invalid UTF-8")
                else:
                    yield document_of(record, (item.name, row), text_field)


@contextmanager
def _readable_parquet(item: Input) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:  # a damaged page or footer is an OSError that names no file
        raise ValueError(f"{item.name} is not a readable Parquet file ({error}); restore it from a copy") from None


def _records_of_batch(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; in place of a row that is invalid UTF-8, its error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [record for row in range(batch.num_rows) for record in _records_of_batch(batch.slice(row, 1))]


def _read_text(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    item = partition.item
    raw = Path(item.path).read_bytes().removeprefix(_BOM)
    try:
        yield Document(item.name, raw.decode("utf-8"), place=item.name)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Reject(item.name, line, f"the line is invalid UTF-8 (byte {error.start + 1} of the file)")


def _load_dataset(item: Input) -> Any:
    import datasets

    try:
        saved = os.path.isdir(item.path)
        found = datasets.load_from_disk(item.path) if saved else datasets.load_dataset(item.path)
    except Exception as error:  # datasets raises many kinds: not found, offline, no permission, bad script
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{item.path} is no file or folder, and no dataset that can be loaded ({reason}); give one that is there"
        ) from None
    if isinstance(found, dict):
        split = item.split or "train"
        if split not in found:
            raise ValueError(
                f"the dataset {item.path} has no split {split!r}; it has {', '.join(found)}: write name:split"
            )
        return found[split]
    return found


def _read_dataset(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    found = _load_dataset(partition.item)
    rows = range(len(found))[partition.start : partition.stop]
    for row, record in enumerate(found.select(rows), start=partition.first):
        yield document_of(dict(record), (partition.item.name, row), text_field)
