"""Checksums of files by blocks, which are compared when a block is first read.

    {"bytes": 393344, "xxh3": "iBGN1...=="}      what a record says of a file: xxh3_64 of each 128 KiB, in base64

Whoever writes an artefact puts `file_record` or `folder_record` (retro.common.files) of its files into its record;
whoever reads it opens its arrays by `open_array` and its other files by `open_checked`, which take what was recorded.
A block that was found sound is not looked at again by that process; one that is not raises ValueError, whoever asks.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import xxhash
from numpy.lib.mixins import NDArrayOperatorsMixin

_SHIFT = 17
BLOCK_BYTES = 1 << _SHIFT  # as much as Linux reads ahead
_REMEDY = "restore it from a copy or build it again"


def block_sums(path: Path) -> str:
    """The checksums of a file's blocks, as its record holds them."""
    with open(path, "rb", buffering=0) as handle:
        blocks = iter(lambda: handle.read(BLOCK_BYTES), b"")
        sums = np.fromiter(map(xxhash.xxh3_64_intdigest, blocks), "<u8")
    return base64.b64encode(sums).decode("ascii")


class CheckedFile:
    """A file, memory-mapped, of which blocks are compared with their checksums before anything of them is used.

    Raises ValueError, naming the file, if it is missing or of another size, or has other checksums at its ends.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = path
        self._sums = _decoded(path, record)
        try:
            if (size := path.stat().st_size) != record["bytes"]:
                raise ValueError(f"{path} has {size} bytes, but {record['bytes']} are recorded; {_REMEDY}")
            self.bytes = np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.zeros(0, np.uint8)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing; {_REMEDY}") from None
        self._memory = memoryview(self.bytes)
        self._is_checked = np.zeros(len(self._sums), bool)
        self.is_sound = not size  # all of it
        self.check(np.asarray([0, len(self._sums) - 1][: len(self._sums)]))

    def check(self, blocks: np.ndarray | slice = slice(None)) -> None:
        """Compare the blocks of these numbers, those alone that were not compared yet."""
        if self.is_sound or (checked := self._is_checked[blocks]).all():
            return
        numbers = np.arange(len(self._sums))[blocks][~checked]
        for number in np.unique(numbers).tolist():
            start = number << _SHIFT
            if xxhash.xxh3_64_intdigest(self._memory[start : start + BLOCK_BYTES]) != self._sums[number]:
                raise ValueError(f"{self.path} is damaged: its checksum is not the recorded one; {_REMEDY}")
            self._is_checked[number] = True
        self.is_sound = bool(self._is_checked.all())

    def check_bytes(self, start: int, stop: int) -> None:
        """Compare the blocks that hold the bytes start .. stop - 1."""
        if start < stop:
            self.check(slice(start >> _SHIFT, ((stop - 1) >> _SHIFT) + 1))

    def opened(self) -> io.RawIOBase:
        """The file as one that is open for reading."""
        return _OpenedFile(self)


class _OpenedFile(io.RawIOBase):
    def __init__(self, file: CheckedFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._file.bytes)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._file.bytes[self._at : self._at + len(buffer)]
        self._file.check_bytes(self._at, self._at + len(part))
        buffer[: len(part)] = part.data
        self._at += len(part)
        return len(part)


class CheckedArray(NDArrayOperatorsMixin):
    """An array in a `CheckedFile`. What rows [...] give is checked, and numpy's own functions check all of it."""

    def __init__(self, array: np.ndarray, file: CheckedFile) -> None:
        self._array, self.file = array, file
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self._start = array.__array_interface__["data"][0] - file.bytes.__array_interface__["data"][0]
        self._row_bytes = array.strides[0]
        inner = zip(array.shape[1:], array.strides[1:], strict=True)
        self._extent = sum((size - 1) * stride for size, stride in inner) + array.itemsize if array.size else 0

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **how: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(one) for one in inputs), **how)

    def __getitem__(self, key: Any) -> Any:
        """Rows, as numpy gives them; of a table's column, by its name, an array that is still to be checked."""
        if isinstance(key, str):
            return self.view(lambda array: array[key])
        if not self.file.is_sound:
            self.check_rows(key[0] if isinstance(key, tuple) else key)
        return self._array[key]

    def view(self, change: Callable[[np.ndarray], np.ndarray]) -> CheckedArray:
        """Another view of the same bytes, unchecked as yet, such as one of fewer columns."""
        return CheckedArray(change(self._array), self.file)

    @property
    def unchecked(self) -> np.ndarray:
        """The array itself, for what does not index by rows; what is read of it is to be checked before, see below."""
        return self._array

    def check_ranges(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Compare what the rows start .. stop - 1 of each of many ranges lie in."""
        if self.file.is_sound or not (filled := stops > starts).any():
            return
        first = (self._start + self._row_bytes * starts[filled]) >> _SHIFT
        sizes = ((self._start + self._row_bytes * (stops[filled] - 1) + self._extent - 1) >> _SHIFT) - first + 1
        ends = np.cumsum(sizes)
        self.file.check(np.arange(ends[-1]) + np.repeat(first - ends + sizes, sizes))

    def check_rows(self, rows: Any) -> None:
        """Compare what the rows lie in, given as numpy takes them."""
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
            if rows and self._extent:
                first, last = sorted((rows[0], rows[-1]))
                start = self._start + self._row_bytes * first
                self.file.check_bytes(start, start + self._row_bytes * (last - first) + self._extent)
            return
        rows = np.asarray(np.arange(len(self))[rows] if rows is None or rows is Ellipsis else rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.reshape(-1)
        if not rows.size or not self._extent:
            return
        if rows.min() < 0:
            rows = np.where(rows < 0, rows + len(self), rows)
        inside = np.clip(rows, 0, len(self) - 1)  # numpy will refuse the others
        places = self._start + self._row_bytes * inside.astype(np.int64)
        for at in {*range(0, self._extent, BLOCK_BYTES), self._extent - 1}:
            self.file.check((places + at) >> _SHIFT)


def open_checked(folder: Path, name: str, files: Mapping[str, Any]) -> CheckedFile:
    """One of the files of a folder, of which a record says `files`; ValueError as of `CheckedFile`."""
    if name not in files:
        raise ValueError(f"no checksum of {folder / name} is recorded; {_REMEDY}")
    return CheckedFile(folder / name, files[name])


def open_array(
    folder: Path, name: str, files: Mapping[str, Any], shape: tuple[int, ...] | None = None, dtype: Any = None
) -> CheckedArray:
    """One of the .npy of a folder, of which a record says `files`, read-only and memory-mapped.

    shape, dtype: those it must have. ValueError names a file that is missing, damaged, or has others.
    """
    file = open_checked(folder, name, files)
    array = _as_array(file)
    if shape not in (None, array.shape) or (dtype is not None and array.dtype != dtype):
        wanted = array.shape if shape is None else shape, array.dtype if dtype is None else np.dtype(dtype)
        said = f"has shape {array.shape} of {array.dtype}, but is recorded as {wanted[0]} of {wanted[1]}"
        raise ValueError(f"{file.path} {said}; {_REMEDY}")
    return CheckedArray(array, file)


def _as_array(file: CheckedFile) -> np.ndarray:
    """The array of a .npy, of which the head is read from a block that was checked."""
    try:
        head = io.BytesIO(file.bytes[:BLOCK_BYTES].tobytes())
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(head)](head)
        if dtype.hasobject or fortran:
            raise ValueError("its values are pickled or in an order of their own")
        return np.ndarray(shape, dtype, file.bytes, head.tell())
    except (KeyError, ValueError, TypeError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise ValueError(f"{file.path} cannot be read ({error}); {_REMEDY}") from None


def _decoded(path: Path, record: Mapping[str, Any]) -> np.ndarray:
    """The checksums of a record; ValueError for one that does not fit."""
    try:
        sums = np.frombuffer(base64.b64decode(record["xxh3"], validate=True), "<u8")
        if len(sums) == -(-record["bytes"] // BLOCK_BYTES):
            return sums
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"no checksums that fit {path} are recorded; {_REMEDY}")
