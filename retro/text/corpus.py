"""Documents in: files of many kinds, folders of them, `datasets`, the documentation of installed packages.

Every record read is accounted for: it becomes a `Document` (with empty text if it has none to offer, as a blank
line), or a `Reject` that names file, line and reason.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

from retro.common.files import check_regular
from retro.text.compression import ENDINGS, ending_of
from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.formats import read_partition
from retro.text.hugging_face import STREAM, input_of, is_dataset, is_saved, parse_name
from retro.text.lines import is_whole_json

Inputs = Any  # a name or path, an object of `datasets`, or several of these

_LINES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
_KINDS = _LINES | dict.fromkeys((".txt", ".md", ".rst"), "text")  # these may be compressed
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_KNOWN = f"{', '.join(_KINDS)} (also with {', '.join(ENDINGS)} behind it), {', '.join(_TABLES)}"
_SHOWN_FILES = 5

log = logging.getLogger(__name__)


def read_documents(
    inputs: Inputs, on_bad: Literal["error", "reject"] = "error", text_field: str = "text"
) -> Iterator[Document | Reject]:
    """All records of `inputs`, in the order of their frozen names.

    Arguments:
        inputs: files (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .rst, each also .gz, .bz2, .xz or .zst; .parquet,
            .arrow, .feather), folders of those, patterns with "*" or "**", "package:NAME" for an installed
            package's documentation, and `datasets`: names, saved folders or objects (see `retro.text.hugging_face`).
            A .json file may hold arrays, and objects over several lines.
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


def as_list(inputs: Inputs) -> list[Any]:
    """One input, or several, as a list of names and of objects of `datasets`."""
    several = isinstance(inputs, Iterable) and not isinstance(inputs, (str, os.PathLike)) and not is_dataset(inputs)
    return [one if is_dataset(one) else _as_name(one) for one in (inputs if several else [inputs])]


def _as_name(given: Any) -> str:
    if not isinstance(given, (str, os.PathLike)):
        kind = type(given).__name__
        raise ValueError(f"an input is a {kind}; name a file, or give what datasets.Dataset.from_list makes of records")
    return os.fspath(given)


def expand_inputs(inputs: Inputs) -> list[Input]:
    """The frozen list: folders opened, names relative to the files' common folder, sorted; ValueError if empty."""
    found: list[Input] = []
    for given in as_list(inputs):
        found += _expand_object(given, found) if is_dataset(given) else _expand_one(given)
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
    """By the name alone; a file that is "jsonl" may turn out to be one array (see `_input_of_file`)."""
    name = os.path.basename(path).lower()
    base = name.removesuffix(ending_of(name))
    return (_KINDS if base != name else _KINDS | _TABLES).get(os.path.splitext(base)[1])


def _input_of_file(path: str, kind: str) -> Input:
    return Input(os.path.abspath(path), "json" if kind == "jsonl" and is_whole_json(path) else kind, path)


def _expand_object(given: Any, others: Sequence[Input]) -> list[Input]:
    item = input_of(given)
    names = [one.name for one in others if one.kind == "object" and one.path != item.path]
    count = sum(name.partition("#")[0] == item.name for name in names)
    return [replace(item, name=f"{item.name}#{count + 1}") if count else item]


def _expand_one(given: str) -> list[Input]:
    if given.startswith("package:"):
        return [Input(given, "package", given.removeprefix("package:"))]
    if not given or "\0" in given:
        raise ValueError(f"the input {given!r} is no name; name a file, folder, dataset or package:NAME")
    if re.search("[*?]", given) and not os.path.lexists(given):  # [ is in splits of datasets, too
        paths = sorted(glob(given, recursive=True))
        if not paths:
            raise FileNotFoundError(f"no file is named as in {given}")
        return [item for path in paths for item in _expand_one(path)]
    check_regular(given)
    if os.path.isfile(given):
        kind = _kind_of_file(given)
        if kind is None:
            raise ValueError(f"{given} is of no known kind; known endings are {_KNOWN}")
        return [_input_of_file(given, kind)]
    kind = "stream" if given.startswith(STREAM) else "dataset"
    name = given.removeprefix(STREAM)
    path, config, split = (name, "", "") if os.path.exists(name) else parse_name(name)
    if os.path.isdir(path) and (kind == "stream" or split or is_saved(path)):
        if is_saved(path) and (kind == "stream" or config):
            raise ValueError(
                f"{path} is a saved dataset, which is neither streamed nor has configurations; leave that out"
            )
        return [Input(os.path.abspath(path) + name.removeprefix(path), kind, path, split, config)]
    if os.path.isdir(path):
        return _expand_folder(path)
    if _kind_of_file(given) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise FileNotFoundError(f"{given} does not exist")
    return [Input(given, kind, path, split, config)]


def _expand_folder(folder: str) -> list[Input]:
    found, left_out = [], []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        left_out += [os.path.join(parent, name, "") for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if (kind := _kind_of_file(name)) and not name.startswith("."):
                check_regular(path)
                found.append(_input_of_file(path, kind))
            else:
                left_out.append(path)
    if not found:
        raise ValueError(f"the folder {folder} holds no document files; known endings are {_KNOWN}")
    if left_out:
        shown = ", ".join(os.path.relpath(path, folder) for path in sorted(left_out)[:_SHOWN_FILES])
        more = ", ..." if len(left_out) > _SHOWN_FILES else ""
        log.warning(
            "%d of the %d files of the folder %s are left out, being of no known kind or hidden: %s",
            *(len(left_out), len(left_out) + len(found), folder, shown + more),
        )
    return found


def _raise(error: OSError) -> None:
    raise error


def _relative_names(found: list[Input]) -> list[Input]:
    """Absolute names cut to what follows their common folder, with forward slashes."""
    local = [item.name for item in found if os.path.isabs(item.name)]
    common = os.path.commonpath([os.path.dirname(name) for name in local]) if local else ""

    def relative(item: Input) -> str:
        return Path(item.name).relative_to(common).as_posix() if os.path.isabs(item.name) else item.name

    return [replace(item, name=relative(item)) for item in found]
