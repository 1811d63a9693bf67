"""Records that are rows of `datasets`: by name, streamed, saved in a folder, or objects of this process.

NAME, NAME:SPLIT, NAME:CONFIGURATION:SPLIT    of the Hub, or a folder that `datasets` loads; a split may be a slice
stream:NAME...                                the same without a copy on disk: read twice, in order
Dataset, IterableDataset                      objects, known by their content
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

from retro.text.documents import Document, Input, InputPartition, Reject
from retro.text.partitions import Mark, Scan, ended
from retro.text.records import document_of

STREAM = "stream:"
_SPLIT = r"\w[\w.-]*(\[[-\d:%]*\])?"
_NAME = re.compile(rf"(?P<name>.+?)(:(?P<config>[\w.-]+))??(:(?P<split>{_SPLIT}(\+{_SPLIT})*))?")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_given: WeakValueDictionary[str, Any] = WeakValueDictionary()  # objects, by the path of their inputs
_open_streams: dict[str, tuple[int, Iterator[Any]]] = {}  # by path: how many rows were read, and the others


def parse_name(given: str) -> tuple[str, str, str]:
    """NAME, configuration and split ("" where not given)."""
    found = _NAME.fullmatch(given)
    return (given, "", "") if found is None else (found["name"], found["config"] or "", found["split"] or "")


def is_saved(folder: str) -> bool:
    """Whether `datasets` has saved a folder."""
    return any(os.path.exists(os.path.join(folder, name)) for name in _SAVED)


def is_dataset(given: Any) -> bool:
    """Whether an input is an object of `datasets`, several splits included."""
    return type(given).__module__.partition(".")[0] == "datasets"


def input_of(dataset: Any) -> Input:
    """The input that an object is; ValueError for several splits."""
    if isinstance(dataset, dict):
        raise ValueError(f"the dataset has the splits {', '.join(dataset)}; give one of them, as in dataset['train']")
    about = ":".join(str(part) for part in (dataset.info.dataset_name or "dataset", dataset.split) if part)
    path = f"{about}#{id(dataset)}"
    _given[path] = dataset
    return Input(about, "object", path)


def scan_dataset(item: Input, partition_bytes: int) -> Scan:
    digest, size, row = hashlib.sha256(), 0, 0
    marks: list[Mark] = [(0, 1, 0)]
    for row, record in enumerate(_load(item), start=1):
        line = json.dumps(record, sort_keys=True, default=str).encode("ascii")
        digest.update(line + b"\n")
        size += len(line) + 1
        if size - marks[-1][2] >= partition_bytes:
            marks.append((row, row + 1, size))
    return size, digest.hexdigest(), ended(marks, row, row + 1, size)


def read_dataset(partition: InputPartition, text_field: str) -> Iterator[Document | Reject]:
    name, row = partition.item.name, partition.first - 1
    for row, record in enumerate(_rows(partition), start=partition.first):
        yield document_of(dict(record), (name, row), text_field)
    if partition.stop is not None and row - partition.first + 1 != partition.stop - partition.start:
        raise ValueError(f"{name} has changed since the work began; start again")


def _rows(partition: InputPartition) -> Iterator[Any]:
    """Those of a stream go on where the last partition ended, if that was the one before."""
    item, start, stop = partition.item, partition.start, partition.stop
    at, rest = _open_streams.pop(item.path, (0, None))
    if rest is None or at != start:
        found = _load(item)
        if hasattr(found, "__len__"):
            yield from found.select(range(len(found))[start:stop])
            return
        rest = islice(found, start, None)
    yield from islice(rest, None if stop is None else stop - start)
    if stop is not None:
        _open_streams[item.path] = stop, rest


def _load(item: Input) -> Any:
    if item.kind == "object":
        if item.path not in _given:
            raise ValueError(f"the dataset {item.name} is an object of another process; save it, and give its folder")
        found = _given[item.path]
        return found.with_format(None) if hasattr(found, "__len__") else found
    import datasets

    try:
        if os.path.isdir(item.path) and is_saved(item.path):
            found = datasets.load_from_disk(item.path)
        else:
            given = {"name": item.config or None, "split": item.split or None, "streaming": item.kind == "stream"}
            found = datasets.load_dataset(item.path, **given)
    except Exception as error:  # datasets raises many kinds: not found, offline, no permission, bad script
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{item.path} is no file or folder, and no dataset that can be loaded ({reason}); give one that is there, "
            "as name, name:split or name:configuration:split"
        ) from None
    split = item.split or "train"
    if isinstance(found, dict) and split not in found:
        raise ValueError(f"the dataset {item.path} has no split {split!r}; it has {', '.join(found)}: write name:split")
    return found[split] if isinstance(found, dict) else found
