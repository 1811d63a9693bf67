"""Files that are compressed, read as the bytes that they hold."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OPEN: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda source: _zstd(source),
}
ENDINGS = tuple(_OPEN)
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what reading on in a damaged file raises


def ending_of(path: str | Path) -> str:
    """The ending that says how a file is compressed; "" for one that is not."""
    return next((ending for ending in ENDINGS if str(path).lower().endswith(ending)), "")


def open_bytes(path: str | Path, source: Any = None) -> io.BufferedIOBase:
    """The bytes of a file, decompressed where its ending says so. source: the beginning of the file, in its place."""
    ending = ending_of(path)
    if not ending:
        return open(path, "rb") if source is None else source
    return _OPEN[ending](path if source is None else source)


def _zstd(source: Any) -> io.BufferedReader:
    """By pyarrow; Python has zstd from 3.14 on."""
    import pyarrow as pa

    if isinstance(source, (str, Path)):
        source = open(source, "rb")  # noqa: SIM115
    return io.BufferedReader(pa.CompressedInputStream(source, "zstd"), 1 << 20)
