"""Artefacts on disk: written to a temporary name in the same folder, fsynced, renamed; sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync and rename it to `path`, on failure delete it."""
    aside = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success fsync and rename it, on failure delete it.

    Several processes may do so at once with the same content: the quickest one's folder stays.
    """
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync one file or folder (folders cannot be opened on every platform; then this is a no-op)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_with(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write one file atomically through `write(handle)`."""
    with written_aside(path) as aside, open(aside, "wb") as handle:
        write(handle)


def save_npy(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, atomically, never pickled."""
    write_with(path, lambda handle: np.save(handle, array, allow_pickle=False))


def save_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically, with sorted keys and a final newline."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_with(path, lambda handle: handle.write(text.encode("utf-8")) and None)


def save_json_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object a line, atomically."""
    text = "".join(json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n" for record in records)
    write_with(path, lambda handle: handle.write(text.encode("utf-8", "replace")) and None)


def load_json(path: Path) -> Any:
    """Read one JSON file; ValueError names the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy or build it again") from None


def open_npy(path: Path) -> np.ndarray:
    """Open one .npy read-only and memory-mapped; ValueError names the file if it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; restore it from a copy or build it again") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy or build it again") from None


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest records of one file: its bytes and checksum."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def folder_record(folder: Path) -> dict[str, dict[str, Any]]:
    """One `file_record` per file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_record(path) for path in files}


def check_files(folder: Path, records: dict[str, dict[str, Any]], checksums: bool) -> None:
    """Refuse, naming the file, when a recorded file is missing or its size (and checksum, if asked) differs."""
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; restore it from a copy or build it again")
        if path.stat().st_size != record["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but {record['bytes']} are recorded; "
                "restore it from a copy or build it again"
            )
        if checksums and sha256_file(path) != record["sha256"]:
            raise ValueError(
                f"{path} is damaged: its checksum is not the recorded one; restore it from a copy or build it again"
            )


def stable_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, the same on every platform."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
