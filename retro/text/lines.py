"""Records that are lines, or begin on one: JSON Lines, CSV and TSV, also compressed; JSON files and plain text."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from retro.text.compression import DAMAGE, ending_of, open_bytes
from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.partitions import Mark, Scan, ended, file_digest, scan_whole
from retro.text.records import document_of

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 22  # in which the first of several objects is looked for
_MOST_PARTITIONS = 64  # of a compressed file, every one of which is decompressed from the file's beginning


# Lines


def read_lines(partition: InputPartition) -> Iterator[bytes]:
    """The lines of a partition; ValueError if it does not end where it ended when the input was split."""
    item, at, stop = partition.item, partition.start, partition.stop
    if not ending_of(item.path):
        with open(item.path, "rb") as handle:
            handle.seek(at)
            while (stop is None or at < stop) and (raw := handle.readline()):
                at += len(raw)
                yield raw
    else:
        seen = 0
        try:
            with open_bytes(item.path) as handle:
                for seen, raw in enumerate(islice(handle, stop), start=1):
                    if seen > at:
                        yield raw
        except DAMAGE as error:
            raise _damaged(item, seen + 1, error) from None
        at = max(at, seen)
    if stop not in (None, at):
        raise ValueError(f"{item.name} has changed since the work began; start again")


def _damaged(item: Input, line: int, error: Exception) -> Exception:
    if not ending_of(item.path) or getattr(error, "errno", None):  # not there, or no permission
        return error
    return ValueError(f"{item.name}:{line}: the compressed file is damaged ({error}); restore it from a copy")


def _scan_records(item: Input, partition_bytes: int, records: Iterable[tuple[int, int]]) -> Scan:
    """records: lines and bytes before the end of each record, from the beginning of the input."""
    marks: list[Mark] = [(0, 1, 0)]
    line = size = 0
    compressed = bool(ending_of(item.path))
    for line, size in records:
        if size - marks[-1][2] >= partition_bytes:
            marks.append((line if compressed else size, line + 1, size))
    if compressed:
        marks = marks[:: -(-len(marks) // _MOST_PARTITIONS)]
    marks = ended(marks, line if compressed else size, line + 1, size)
    return Path(item.path).stat().st_size, file_digest([item.path]), marks


# JSON Lines


def scan_jsonl(item: Input, partition_bytes: int) -> Scan:
    if ending_of(item.path):
        return _scan_records(item, partition_bytes, _line_ends(item))
    digest, size, line = hashlib.sha256(), 0, 1
    marks: list[Mark] = [(0, 1, 0)]
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
    return size, digest.hexdigest(), ended(marks, size, line, size)


def _line_ends(item: Input) -> Iterator[tuple[int, int]]:
    size = 0
    for line, raw in enumerate(read_lines(InputPartition(item)), start=1):
        size += len(raw)
        yield line, size


def read_jsonl(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    for line, raw in enumerate(read_lines(partition), start=partition.first):
        yield _record_of_line(raw.removeprefix(_BOM) if line == 1 else raw, (partition.item.name, line), text_field)


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


# JSON: arrays of records, or records over several lines


def is_whole_json(path: str) -> bool:
    """Whether a file of JSON is to be read as a whole: its first value is an array of objects (in a file that is not
    named as JSON Lines any array), or an object over several lines."""
    try:
        with open_bytes(path) as handle:
            head = handle.read(_HEAD_BYTES).removeprefix(_BOM).decode("utf-8", "replace").lstrip()
    except DAMAGE:
        return False
    if not head.startswith("{"):
        return head.startswith("[") and (".json" in Path(path.lower()).suffixes or bool(re.match(r"\[\s*{", head)))
    try:
        return "\n" in head[: json.JSONDecoder().raw_decode(head)[1]]
    except (ValueError, RecursionError):
        return False


def _records(text: str) -> Iterator[Any]:
    """What stands in arrays, and between them, one after the other."""
    decoder, space, at = json.JSONDecoder(), re.compile(r"\s*"), 0
    while (at := space.match(text, at).end()) < len(text):
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]


def read_json(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    item = partition.item
    try:
        with open_bytes(item.path) as handle:
            raw = handle.read().removeprefix(_BOM)
    except DAMAGE as error:
        raise _damaged(item, 1, error) from None
    try:
        for number, record in enumerate(_records(raw.decode("utf-8")), start=1):
            yield document_of(record, (item.name, number), text_field)
    except (ValueError, RecursionError) as error:
        yield Reject(item.name, getattr(error, "lineno", 1), f"the file is no JSON array, nor objects ({error})")


# CSV and TSV


class _Counted:
    """Lines as text, with how many there were, and their bytes."""

    def __init__(self, lines: Iterator[bytes], first: int = 1) -> None:
        self.lines, self.line, self.bytes = lines, first - 1, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        raw = next(self.lines)
        self.line, self.bytes = self.line + 1, self.bytes + len(raw)
        return (raw.removeprefix(_BOM) if self.line == 1 else raw).decode("utf-8", "surrogateescape")


def _rows(lines: _Counted, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Rows, or what is wrong with them, and the line on which each begins; `lines` stand where the row ends."""
    csv.field_size_limit((1 << 31) - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = lines.line + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        yield first, row


def _delimiter(item: Input) -> str:
    """Of a table: a tab where its first line with text has one, else the one of , and ; that it has more of."""
    first = next((line for line in read_lines(InputPartition(item)) if line.strip()), b"")
    return "\t" if b"\t" in first else ";" if first.count(b";") > first.count(b",") else ","


def read_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV or TSV file that are not empty, and the line on which each begins; ValueError for a bad one."""
    item = Input(str(path), "csv", str(path))
    for line, row in _rows(_Counted(read_lines(InputPartition(item))), _delimiter(item)):
        if isinstance(row, csv.Error):
            raise ValueError(f"{path}, line {line}: no row of CSV ({row}); mend it.")
        if row:
            yield line, row


def scan_csv(item: Input, partition_bytes: int) -> Scan:
    lines = _Counted(read_lines(InputPartition(item)))
    return _scan_records(item, partition_bytes, ((lines.line, lines.bytes) for _ in _rows(lines, _delimiter(item))))


def read_csv(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    """The first row names the columns."""
    item = partition.item
    delimiter, name = _delimiter(item), item.name
    _, columns = next(_rows(_Counted(read_lines(InputPartition(item))), delimiter), (1, []))
    if isinstance(columns, csv.Error):
        raise ValueError(f"{name}:1: the line does not name columns ({columns}); write their names there")
    columns = [column.strip() for column in columns]
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}:1: the line names two columns {twice!r}; give each a name of its own")
    for line, row in _rows(_Counted(read_lines(partition), partition.first), delimiter):
        if line == 1:
            continue
        if isinstance(row, csv.Error):
            yield Reject(name, line, f"the row is no CSV ({row})")
        elif not row:
            yield Document(f"{name}:{line}", "", place=f"{name}:{line}")
        elif len(row) != len(columns):
            yield Reject(name, line, f"the row has {len(row)} fields, the first line names {len(columns)} columns")
        else:
            yield document_of(dict(zip(columns, row, strict=True)), (name, line), text_field)


# Text


scan_text = scan_json = scan_whole


def read_text(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    item = partition.item
    try:
        with open_bytes(item.path) as handle:
            raw = handle.read().removeprefix(_BOM)
    except DAMAGE as error:
        raise _damaged(item, 1, error) from None
    try:
        yield Document(item.name, raw.decode("utf-8"), place=item.name)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Reject(item.name, line, f"the line is invalid UTF-8 (byte {error.start + 1} of the file)")
