"""Records that are rows of columns: Parquet, and Arrow in either of its forms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.partitions import Mark, Scan, ended, file_digest
from retro.text.records import document_of


def scan_table(item: Input, partition_bytes: int) -> Scan:
    """A partition is row groups of a Parquet file, or batches of an Arrow one."""
    marks: list[Mark] = [(0, 1, 0)]
    group, row, size = 0, 1, 0
    with _readable(item):
        for group, (num_rows, num_bytes) in enumerate(_groups(item), start=1):
            row, size = row + num_rows, size + num_bytes
            if size - marks[-1][2] >= partition_bytes:
                marks.append((group, row, size))
    return os.path.getsize(item.path), file_digest([item.path]), ended(marks, group, row, size)


def _groups(item: Input) -> Iterator[tuple[int, int]]:
    """Rows and bytes of each."""
    if item.kind == "arrow":
        yield from ((batch.num_rows, batch.nbytes) for batch in _arrow_batches(item))
        return
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(item.path).metadata
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield group.num_rows, group.total_byte_size


def read_table(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    item, row = partition.item, partition.first - 1
    with _readable(item):
        for batch in _batches(partition):
            for record in _records_of_batch(batch):
                row += 1
                if isinstance(record, UnicodeDecodeError):
                    yield Reject(item.name, row, "the row is invalid UTF-8")
                else:
                    yield document_of(record, (item.name, row), text_field)


def _batches(partition: InputPartition) -> Iterator[Any]:
    if partition.item.kind == "arrow":
        for batch in islice(_arrow_batches(partition.item), partition.start, partition.stop):
            yield from (batch.slice(start, 1024) for start in range(0, batch.num_rows, 1024))
        return
    import pyarrow.parquet as pq

    file = pq.ParquetFile(partition.item.path)
    groups = list(range(file.num_row_groups))[partition.start : partition.stop]
    yield from file.iter_batches(batch_size=1024, row_groups=groups)


def _arrow_batches(item: Input) -> Iterator[Any]:
    """Of a file (Feather) or a stream (as `datasets` writes them); what is skipped is mapped, not read."""
    import pyarrow as pa

    with pa.memory_map(item.path) as source:
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
        else:
            yield from map(file.get_batch, range(file.num_record_batches))


@contextmanager
def _readable(item: Input) -> Iterator[None]:
    import pyarrow as pa

    kind = {"parquet": "Parquet", "arrow": "Arrow"}[item.kind]
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:  # a damaged page or footer is an OSError that names no file
        raise ValueError(f"{item.name} is not a readable {kind} file ({error}); restore it from a copy") from None


def _records_of_batch(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; in place of a row that is invalid UTF-8, its error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [record for row in range(batch.num_rows) for record in _records_of_batch(batch.slice(row, 1))]
