"""Records: JSON objects of ours that have a checksum of what they say, and know which fields they must have.

record   {"rows": 12, "files": {"rows.npy": {"bytes": ..., "xxh3": ...}}, "checksum": "9a74e5..."}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro.common.files import check_files, folder_record, load_json, save_json, stable_hash
from retro.common.values import CountOrZero, Prefix, check_record

SUMS_FILE = "checksums.json"
FILES = {str: {"bytes": CountOrZero, "xxh3": Prefix}}  # the fields of "files", see `check_record`
_CHECKSUM = "checksum"
_sound: set[str] = set()  # folders that `check_sums` has compared


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record of ours as JSON, atomically, with a checksum of what it says."""
    save_json(path, {**record, _CHECKSUM: stable_hash(record)})


def load_record(path: Path, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what `save_record` wrote; ValueError names the file if it is damaged or was changed by hand, and a field
    that is missing or not of its type in `fields` (see `check_record`)."""
    record = load_json(path)
    if not isinstance(record, dict) or _CHECKSUM not in record:
        raise ValueError(f"{path} is no record with a checksum, as this version writes them; build it again")
    if record.pop(_CHECKSUM) != stable_hash(record):
        raise ValueError(
            f"{path} is damaged: what it says does not have its checksum; restore it from a copy or build it again"
        )
    return check_record(path, record, fields or {})


def save_sums(folder: Path) -> None:
    """Write the checksums of a folder's files into it, for `check_sums`."""
    save_record(folder / SUMS_FILE, {"files": folder_record(folder)})


def forget_sums(folder: str | Path) -> None:
    """Before a folder's files are written anew: take away the checksums of those that it had."""
    (Path(folder) / SUMS_FILE).unlink(missing_ok=True)


def check_sums(folder: Path) -> None:
    """Compare a folder's files with the checksums in it, if it has some; ValueError names one that differs.

    Files that are as they were at the last call are not read again.
    """
    if (folder / SUMS_FILE).is_file():
        try:
            _check_once(folder, load_record(folder / SUMS_FILE, {"files": FILES})["files"])
        except ValueError as error:
            raise ValueError(f"{error}; where you changed it yourself, delete {folder / SUMS_FILE}") from None


def _check_once(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    states = [path.stat() if (path := folder / name).is_file() else None for name in records]
    stamps = [state and [state.st_ino, state.st_size, state.st_mtime_ns] for state in states]
    if (seen := stable_hash([str(folder.resolve()), records, stamps])) not in _sound:
        check_files(folder, records, checksums=True)
        _sound.add(seen)
