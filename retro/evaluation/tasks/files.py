"""Records of a task's file: JSON Lines, one JSON array (FiD, DPR), or CSV and TSV, compressed or not."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retro.common.files import check_regular
from retro.text.compression import DAMAGE, ending_of, open_bytes
from retro.text.lines import read_rows


def read_records(path: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, record n", record) for every record of a file; ValueError for what is none.

    columns: of CSV and TSV files whose first line names none of these. A cell that is a list holds several texts.
    """
    path = Path(path)
    check_regular(path)
    if path.name.removesuffix(ending_of(path)).endswith((".csv", ".tsv")):
        yield from _table(path, columns)
        return
    try:
        with open_bytes(path) as file:
            text = file.read().decode("utf-8-sig")
    except (UnicodeDecodeError, *DAMAGE) as error:
        if getattr(error, "errno", None):
            raise
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


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    names = list(columns)
    for number, (line, row) in enumerate(read_rows(path)):
        place = f"{path}, line {line}"
        if number == 0 and set(row) & set(columns):
            names = row
        elif len(row) != len(names):
            raise ValueError(f"{place}: {len(row)} cells in place of {', '.join(names)}; mend it, or name the columns.")
        else:
            yield place, {name: _cell(place, cell) for name, cell in zip(names, row, strict=True)}


def _cell(place: str, cell: str) -> str | list[str]:
    """A text, or a list of texts as JSON or Python writes it."""
    if not re.match(r"\[.*\]$|\[['\"]", cell, re.DOTALL):
        return cell
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        raise ValueError(f"{place}: {cell[:40]!r} is no list of texts; write ['...'].") from None
    return found if isinstance(found, list) else cell


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); write JSON Lines or a JSON array.") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}); mend the line.") from None
