"""The files of a routed index, and those of the tasks that make it: no step holds more than a part of them.

axes.npy                                    on which keys are projected; all else is there
groups.npy  sizes.npy (lists of each group)  router.npy (codebook)  router.codes    the centroids as a search
lengths.npy int32 (rows of each list)  codebook.npy  lists.codes                    reads them, and the rows
trained.json                                rows, and their mean squared distance to the centroid
centroids.npy                               by which rows are assigned that are added
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from retro.common.files import delete, file_record, new_npy, open_npy, save_npy
from retro.retrieval.search.engines.packing import list_borders, pack, unpack
from retro.retrieval.search.exact import blocks

TRAINED, LENGTHS, ROUTER_CODEBOOK = "trained.json", "lengths.npy", "router.npy"
ROUTER_CODES, LIST_CODES = "router.codes", "lists.codes"
TABLES = "axes", "groups", "codebook", "centroids", "sizes"


def task_file(spec: dict[str, Any], task: str, name: str) -> Path:
    return Path(spec["job"]) / f"{task}.{name}.npy"


def written(spec: dict[str, Any], **arrays: np.ndarray) -> dict[str, Any]:
    """Save the arrays of a task; its record."""
    return saved({task_file(spec, spec["name"], name): array for name, array in arrays.items()})


def saved(files: dict[Path, np.ndarray]) -> dict[str, Any]:
    for file, array in files.items():
        save_npy(file, array)
    return {"files": {file.name: file_record(file) for file in files}}


def join_centroids(job: Path) -> None:
    """The centroids of all groups, and how many each has."""
    names = sorted(file.name.removesuffix(".json") for file in job.glob("split-*.json"))
    sizes = np.concatenate([np.array(open_npy(job / f"{name}.sizes.npy")) for name in names])
    save_npy(job / "sizes.npy", sizes)
    width = open_npy(job / "groups.npy").shape[1]
    joined, at = new_npy(job / "centroids.npy", np.float32, (int(sizes.sum()), width)), 0
    for name in names:
        part = open_npy(job / f"{name}.centroids.npy")
        joined[at : at + len(part)] = part
        at += len(part)
    joined.flush()


def pack_lists(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: some lists, as they lie in the file: the rows of an index that is there, then those of each block."""
    first, stop = spec["lists"]
    found = [_kept(spec)] if spec["base"] else []
    for start, _ in blocks(0, spec["rows"], spec["block_rows"]):
        lists, rows, codes = (open_npy(task_file(spec, f"assign-{start:012d}", n)) for n in ("lists", "rows", "codes"))
        part = slice(*np.searchsorted(lists, [first, stop]).tolist())  # copied, so that the files are closed
        found.append((np.array(lists[part]), spec["kept"] + start + rows[part].astype(np.int64), np.array(codes[part])))
    lists, rows, codes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order, lengths = np.argsort(lists, kind="stable"), np.bincount(lists - first, minlength=stop - first)
    return written(spec, packed=pack(lengths, rows[order], codes[order]), lengths=lengths.astype(np.int32))


def _kept(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List, row and code of what the lists of an index hold of rows that are still there."""
    base, (first, stop) = Path(spec["base"]), spec["lists"]
    lists, old, codes = read_lists(base, first, stop)
    kept = spec["first_row"] + rows_of(base)[old].astype(np.int64)
    rows = open_npy(Path(spec["job"]) / "rows.npy")
    places = np.minimum(np.searchsorted(rows, kept), len(rows) - 1)
    are_there = rows[places] == kept
    return lists[are_there], places[are_there], codes[are_there]


def read_lists(
    folder: Path, first: int, stop: int
) -> tuple[Int64[np.ndarray, " c"], Int64[np.ndarray, " c"], UInt8[np.ndarray, "c bytes"]]:
    """List, row of the segment and code of what some lists of an index hold."""
    lengths, size = lengths_of(folder), bytes_of_code(folder)
    start, end = list_borders(lengths, size)[[first, stop]].tolist()
    packed = np.memmap(folder / LIST_CODES, np.uint8, "r")[start:end] if start < end else np.zeros(0, np.uint8)
    rows, codes = unpack(lengths[first:stop], np.asarray(packed), size)
    return np.repeat(np.arange(first, stop), lengths[first:stop]), rows, codes


def lengths_of(folder: Path) -> Int64[np.ndarray, " lists"]:
    """The rows of each list."""
    return open_npy(folder / LENGTHS).astype(np.int64)


def rows_of(folder: Path) -> np.ndarray:
    """The rows of a segment, counted from the first of its shards."""
    return open_npy(folder / "rows.npy")


def bytes_of_code(folder: Path) -> int:
    """Of 4 bits for each part of the codebook, in pairs."""
    return -(-len(open_npy(folder / "codebook.npy")) // 2)


def write_files(job: Path, folder: Path, base: Path | None, packs: list[str]) -> None:
    """The tables, the router if it is there, and the lists as they were packed, whose own files go."""
    for table in TABLES:
        save_npy(folder / f"{table}.npy", open_npy((base or job) / f"{table}.npy"))
    if base is not None:
        for name in (ROUTER_CODES, ROUTER_CODEBOOK):
            shutil.copyfile(base / name, folder / name)
    lengths = [np.array(open_npy(job / f"{name}.lengths.npy")) for name in packs]
    save_npy(folder / LENGTHS, np.concatenate(lengths))
    with open(folder / LIST_CODES, "wb") as file:
        for name in packs:
            open_npy(job / f"{name}.packed.npy").tofile(file)
            delete(job / f"{name}.packed.npy")
