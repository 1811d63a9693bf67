"""Partitions of an input: (bytes, sha256, marks) of it. A mark is where a partition begins, as its `start`, the number
of its record and the bytes before it; the last mark is the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

from retro.text.documents import Input

Mark = tuple[int | None, int, int]
Scan = tuple[int, str, list[Mark]]


def file_digest(paths: Iterable[str], names: Sequence[str] = ()) -> str:
    """The checksum of files, and of names, one after another."""
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def scan_whole(item: Input, partition_bytes: int) -> Scan:
    """Of a file that is one partition always."""
    size = os.path.getsize(item.path)
    return size, file_digest([item.path]), [(0, 1, 0), (None, 1, size)]


def ended(marks: list[Mark], stop: int, number: int, size: int) -> list[Mark]:
    """Marks with the end of the input, unless the last partition ends there."""
    return marks if len(marks) > 1 and marks[-1][0] == stop else [*marks, (stop, number, size)]
