"""Records of a task's file: JSON Lines, or one JSON array (FiD, DPR), gzipped or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, record n", record) for every JSON object of a file; ValueError for what is none."""
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            text = file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); write JSON Lines or a JSON array.") from None
    for place, record in _array(path, text) if text.lstrip().startswith("[") else _lines(path, text):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a {type(record).__name__}, no JSON object; write one object a record.")
        yield place, record


def field_of(record: dict[str, Any], name: str, place: str) -> str:
    """A field that must hold text; ValueError if it does not."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{place}: no text in "{name}"; write it, or leave the record out.')
    return value


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error}); write JSON Lines or a JSON array.") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}); mend the line.") from None
