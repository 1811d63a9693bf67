"""Artefacts on disk: written to a temporary name in the same folder, fsynced, renamed; sizes and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from retro.common.checksums import block_sums, open_checked
from retro.common.own import check_inside, check_names

TEMPORARY_PREFIX = ".tmp-"
JOB_PREFIX = ".job-"
LOCK_FILE = ".lock"
READ_ONLY = errno.EACCES, errno.EPERM, errno.EROFS  # of OSErrors where nothing may be written
_HEAD_BYTES = 4096
_ABANDONED_SECONDS = 24 * 3600
_ZEROS = 1 << 20
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_SPARE_FILES = 256  # for what else a process opens
_numbers = count()  # tell apart what the threads of this process write


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """While a file is written: what Python, or the error of a library, says of a full disk becomes an OSError that
    names the file."""
    try:
        yield
    except Exception as error:  # tokenizers raises no other
        said = str(error)
        code = next((code for code in _DISK_ERRORS if os.strerror(code) in said), None)
        if code is None and isinstance(error, OSError) and " requested and " in said:
            code = errno.ENOSPC  # numpy's word for a file that took less than it was given
        if code is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def os_error_text(error: OSError) -> str:
    """An OSError in one sentence with the remedy."""
    if not error.strerror or error.filename is None:
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.filename}: {error.strerror}; {'make room and run this again' if full else 'give another path'}."


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync and rename it to `path`, on failure delete it."""
    aside = _aside(path)
    aside.unlink(missing_ok=True)  # never through a link of that name
    try:
        with writing(path):
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success fsync and rename it, on failure delete it.

    Several processes or threads may do so at once with the same content: the quickest one's folder stays.
    """
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)  # of a dead process with this one's number
    aside.mkdir(parents=True)
    try:
        with writing(folder):
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


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a store's writers; a killed holder's is free. ValueError if another process or thread has it."""
    from filelock import FileLock, Timeout

    check_inside(folder / LOCK_FILE, folder)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is being written by another process; wait until that is done and run this again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether somebody holds the lock of a folder."""
    try:
        with write_lock(folder):
            return False
    except ValueError:
        return True


def delete(path: Path, root: Path | None = None) -> None:
    """Delete a file or folder below `root` (None: the folder it lies in) for good; of a link, the link alone.

    A folder is renamed first, so that it is there whole or not at all. ValueError if a link on the way leads elsewhere.
    """
    check_inside(path.parent, root or path.parent)
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            path = path.rename(_aside(path))
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """A temporary name of a file or folder, which says the process and the machine that write it."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}.{_machine()}-{next(_numbers)}-{path.name}")


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file or folder has ended; one of another machine has after a day."""
    process, _, machine = path.name.removeprefix(TEMPORARY_PREFIX).partition("-")[0].partition(".")
    if machine != _machine():
        try:
            return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except FileNotFoundError:  # its writer has just renamed it
            return False
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return True
    except PermissionError:  # it runs, for another user
        return False
    return False


def clear_abandoned(folder: Path, root: Path) -> None:
    """Delete temporary files and folders in a folder below `root` whose writers were killed."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if is_abandoned(left):
            delete(left, root)


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


def new_npy(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy to write into, memory-mapped. Its space is reserved first, so that a full disk is an OSError here and
    no signal later."""
    if 0 in shape:  # which cannot be mapped
        save_npy(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype).view(np.memmap)
    with writing(path):
        array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
        with open(path, "r+b") as handle:
            _reserve(handle, path.stat().st_size)
    return array


def _reserve(handle: IO[bytes], size: int) -> None:
    """Give a file, of which nothing but the beginning is written, its blocks on the disk."""
    try:
        return os.posix_fallocate(handle.fileno(), 0, size)
    except AttributeError:  # not on every platform
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # not on every file system
            raise
    for start in range(handle.seek(min(_HEAD_BYTES, size)), size, _ZEROS):
        handle.write(bytes(min(_ZEROS, size - start)))


def save_npy(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, atomically, never pickled."""
    write_with(path, lambda handle: np.save(handle, array, allow_pickle=False))


def save_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically, with sorted keys and a final newline."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_with(path, lambda handle: handle.write(text.encode("utf-8")) and None)


def save_json_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object a line, atomically."""
    write_with(path, lambda handle: handle.write(json_lines(records)) and None)


def json_lines(records: list[dict]) -> bytes:
    """One JSON object a line."""
    text = "".join(json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "replace")


def write_result(file: str | Path, value: Any) -> None:
    """Write a result where a user wants it, in its own order; what is no number becomes null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(file, text + "\n")


def write_text(file: str | Path, text: str) -> None:
    """Write a file where a user wants it, whole or not at all, unless it is a device or a pipe."""
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        with writing(path):
            path.write_text(text, encoding="utf-8")
    else:
        write_with(path, lambda handle: handle.write(text.encode("utf-8")) and None)


def finite(value: Any) -> Any:
    """A value of which no number is infinite or NaN: these become null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: str | Path) -> str:
    """The text of a file that a user wrote, without a byte order mark; ValueError names a file that is not UTF-8."""
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text; write it in UTF-8.") from None


def check_regular(path: str | Path) -> None:
    """Raise ValueError for a pipe, socket or device, which may never end, in the place of a file."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is a pipe, a socket or a device; give a file.")


def load_json(path: Path) -> Any:
    """Read one JSON file; ValueError names the file if it is not JSON."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of too many digits; lists in lists
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy or build it again") from None


def allow_open_files(number: int) -> None:
    """Let this process open so many files more, each memory map being one, as far as its hard limit goes."""
    try:
        import resource
    except ImportError:  # where there is no such limit
        return
    with suppress(ValueError, OSError):  # the system may allow less than the hard limit says
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = len(os.listdir("/dev/fd")) + number + _SPARE_FILES
        if resource.RLIM_INFINITY != soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_npy(path: Path) -> np.ndarray:
    """Open one .npy read-only and memory-mapped; ValueError names the file if it is missing or damaged."""
    try:
        return np.lib.format.open_memmap(path, "r")  # which reads neither pickles nor archives
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; restore it from a copy or build it again") from None
    except (ValueError, EOFError, OverflowError, SyntaxError, MemoryError, RecursionError, TokenError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy or build it again") from None


def file_record(path: Path) -> dict[str, Any]:
    """What a record says of one file: its bytes, and their checksums (see retro.common.checksums)."""
    return {"bytes": path.stat().st_size, "xxh3": block_sums(path)}


def folder_record(folder: Path) -> dict[str, dict[str, Any]]:
    """One `file_record` per file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_record(path) for path in files}


def check_files(folder: Path, records: dict[str, dict[str, Any]], checksums: bool) -> None:
    """Refuse, naming the file, when a recorded file is missing or its size or ends (or checksums, if asked) differ.

    So are names that lead out of the folder.
    """
    check_names(f"a record of {folder}", records)
    for name in records:
        file = open_checked(folder, name, records)
        if checksums:
            file.check()


def stable_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, the same on every platform."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
