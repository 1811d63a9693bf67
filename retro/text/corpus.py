"""Documents in: JSON Lines, Parquet, plain text, a `datasets` name or folder, the documentation of installed packages.

Every record read is accounted for: it becomes a `Document` (with empty text if it has none to offer, as a blank
line), or a `Reject` that names file, line and reason.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.formats import read_partition

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json.gz": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}


def read_documents(
    inputs: Sequence[str], on_bad: Literal["error", "reject"] = "error", text_field: str = "text"
) -> Iterator[Document | Reject]:
    """All records of `inputs`, in the order of their frozen names.

    Arguments:
        inputs: files (.jsonl, .json, .ndjson, each also .gz; .parquet; .txt, .md, .rst), folders of those, a
            `datasets` name or saved folder (optionally ":split", else "train"), or "package:NAME" for an installed
            package's documentation.
        on_bad: "error" raises ValueError at the first bad record, naming file and line; "reject" yields it as a
            `Reject`.
        text_field: the field or column that holds the text.

    A document without an id is called "<file>:<line>"; fields other than id, text, title, source and date go to
    `extra`.
    """
    if on_bad not in ("error", "reject"):
        raise ValueError(f"on_bad must be 'error' or 'reject', not {on_bad!r}")
    for item in expand_inputs(inputs):
        for record in read_input(item, text_field):
            if isinstance(record, Reject) and on_bad == "error":
                raise ValueError(f"{record.file}:{record.line}: {record.reason}; mend or remove it")
            yield record


def expand_inputs(inputs: Sequence[str]) -> list[Input]:
    """The frozen list: folders opened, names relative to the files' common folder, sorted; ValueError if empty."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    found: list[Input] = []
    for given in map(os.fspath, inputs):
        found += _expand_one(given)
    if not found:
        raise ValueError("no input was given; name at least one file, folder, dataset or package:NAME")
    found = _relative_names(found)
    name, count = Counter(item.name for item in found).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the input {name} is given twice; name it once")
    return sorted(found, key=lambda item: item.name)


def read_input(item: Input, text_field: str = "text") -> Iterator[Document | Reject]:
    """All records of one frozen input."""
    return read_partition(InputPartition(item), text_field)


# Inputs


def _kind_of_file(path: str) -> str | None:
    name = os.path.basename(path).lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def _expand_one(given: str) -> list[Input]:
    if given.startswith("package:"):
        return [Input(given, "package", given.removeprefix("package:"))]
    if os.path.isfile(given):
        kind = _kind_of_file(given)
        if kind is None:
            raise ValueError(f"{given} is of no known kind; known endings are {', '.join(_SUFFIXES)}")
        return [Input(os.path.abspath(given), kind, given)]
    path, _, split = given.partition(":") if not os.path.exists(given) else (given, "", "")
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json")):
            return [Input(os.path.abspath(given), "dataset", path, split)]
        if not split:
            return _expand_folder(path)
    if _kind_of_file(given) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", given):
        raise FileNotFoundError(f"{given} does not exist")
    return [Input(given, "dataset", path, split)]


def _expand_folder(folder: str) -> list[Input]:
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if (kind := _kind_of_file(name)) and not name.startswith("."):
                found.append(Input(os.path.abspath(path), kind, path))
    if not found:
        raise ValueError(f"the folder {folder} holds no document files; known endings are {', '.join(_SUFFIXES)}")
    return found


def _raise(error: OSError) -> None:
    raise error


def _relative_names(found: list[Input]) -> list[Input]:
    """Absolute names cut to what follows their common folder, with forward slashes."""
    local = [item.name for item in found if os.path.isabs(item.name)]
    common = os.path.commonpath([os.path.dirname(name) for name in local]) if local else ""

    def relative(item: Input) -> str:
        return Path(item.name).relative_to(common).as_posix() if os.path.isabs(item.name) else item.name

    return [Input(relative(item), item.kind, item.path, item.split) for item in found]
