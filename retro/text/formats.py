"""Inputs by format: how each is split into partitions, and how the records of a partition are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from retro.text import hugging_face, lines, tables
from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.packages import package_documents, package_modules
from retro.text.partitions import Scan, file_digest

Read = Callable[[InputPartition, str], Iterator[Document | Reject]]


def read_partition(partition: InputPartition, text_field: str = "text") -> Iterator[Document | Reject]:
    """The records of a partition, as `read_input` gives them in their place."""
    return _KINDS[partition.item.kind][1](partition, text_field)


def split_input(item: Input, partition_bytes: int | None = None) -> tuple[dict[str, Any], list[InputPartition]]:
    """An input's record for a manifest, and its partitions in order; all partitions together hold every record once.

    partition_bytes: a partition ends at the first border between records after so many bytes; None is one partition.
    Text, JSON arrays and packages are one always. Reads the whole input once; ValueError if it is damaged.
    """
    size, digest, marks = _KINDS[item.kind][0](item, partition_bytes or sys.maxsize)
    partitions = [
        InputPartition(item, start, stop, first, stop_byte - start_byte)
        for (start, first, start_byte), (stop, _, stop_byte) in zip(marks, marks[1:], strict=False)
    ]
    return {"name": item.name, "kind": item.kind, "bytes": size, "sha256": digest}, partitions


def _scan_package(item: Input, partition_bytes: int) -> Scan:
    modules = package_modules(item.path)
    names, paths = [name for name, _ in modules], [str(path) for _, path in modules]
    size = sum(map(os.path.getsize, paths))
    return size, file_digest(paths, names), [(0, 1, 0), (None, 1, size)]


def _read_package(partition: InputPartition, text_field: str) -> Iterator[Document]:
    return package_documents([partition.item.path])


_KINDS: dict[str, tuple[Callable[[Input, int], Scan], Read]] = {
    "jsonl": (lines.scan_jsonl, lines.read_jsonl),
    "json": (lines.scan_json, lines.read_json),
    "csv": (lines.scan_csv, lines.read_csv),
    "text": (lines.scan_text, lines.read_text),
    **dict.fromkeys(("parquet", "arrow"), (tables.scan_table, tables.read_table)),
    **dict.fromkeys(("dataset", "stream", "object"), (hugging_face.scan_dataset, hugging_face.read_dataset)),
    "package": (_scan_package, _read_package),
}
