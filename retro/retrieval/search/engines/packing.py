"""Lists of codes of 4 bits, all in one file, which faiss searches where it lies (fast scan), memory-mapped.

list after list, in blocks of 32 rows    the codes of all its blocks, as fast scan reads them; its row numbers, int64

The last block of a list is filled up with rows of number -1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer, UInt8

BLOCK_ROWS = 32  # rows, and bytes of a register
_NUMBERS = 8  # registers of the row numbers of a block
_ORDER = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])  # of 16 rows in half a register


def list_borders(lengths: Integer[np.ndarray, " lists"], code_bytes: int) -> Int64[np.ndarray, " lists+1"]:
    """Where each list begins in the file, and its end."""
    return np.append(0, np.cumsum(_num_blocks(lengths))) * (BLOCK_ROWS * (code_bytes + _NUMBERS))


def pack(
    lengths: Integer[np.ndarray, " lists"], rows: Integer[np.ndarray, " c"], codes: UInt8[np.ndarray, "c bytes"]
) -> UInt8[np.ndarray, " size"]:
    """Lists of some lengths, the rows of which come one list after another, as they lie in the file."""
    count, code_bytes, places = int(_num_blocks(lengths).sum()), codes.shape[1], _places(lengths)
    filled = np.zeros((count * BLOCK_ROWS, code_bytes), np.uint8)
    filled[places] = codes
    numbers = np.full(count * BLOCK_ROWS, -1, np.int64)
    numbers[places] = rows
    low, high = np.moveaxis(filled.reshape(count, 2, 16, code_bytes)[:, :, _ORDER], 1, 0)
    halves = np.stack([low & 15 | high << 4, low >> 4 | high & 240], 1)  # [block, half of a byte, row, byte]
    packed = np.empty((count * (code_bytes + _NUMBERS), BLOCK_ROWS), np.uint8)
    of_codes, of_numbers = _registers(lengths, code_bytes)
    packed[of_codes] = np.moveaxis(halves, 3, 1).reshape(count, code_bytes, BLOCK_ROWS)
    packed[of_numbers] = numbers.view(np.uint8).reshape(count, _NUMBERS, BLOCK_ROWS)
    return packed.reshape(-1)


def unpack(
    lengths: Integer[np.ndarray, " lists"], packed: UInt8[np.ndarray, " size"], code_bytes: int
) -> tuple[Int64[np.ndarray, " c"], UInt8[np.ndarray, "c bytes"]]:
    """The rows and codes of lists of some lengths, one list after another."""
    of_codes, of_numbers = _registers(lengths, code_bytes)
    registers = packed.reshape(-1, BLOCK_ROWS)
    halves = registers[of_codes].reshape(-1, code_bytes, 2, 16)
    low, high = halves[:, :, 0] & 15 | halves[:, :, 1] << 4, halves[:, :, 0] >> 4 | halves[:, :, 1] & 240
    filled = np.empty((len(halves), 2, 16, code_bytes), np.uint8)
    filled[:, :, _ORDER] = np.moveaxis(np.stack([low, high], 1), 2, 3)
    places, numbers = _places(lengths), registers[of_numbers].reshape(-1).view(np.int64)
    return numbers[places], filled.reshape(-1, code_bytes)[places]


def open_lists(
    quantizer: Any,
    codebook: Float32[np.ndarray, "blocks 16 block"],
    file: Path,
    lengths: Integer[np.ndarray, " lists"],
    held: Bool[np.ndarray, " lists"] | None = None,
) -> Any:
    """An index of faiss over the lists of a file, which it reads when it searches them.

    quantizer: what finds the lists of a query; it becomes part of the index. held: the others are taken to be empty.
    Raises ValueError for a file of another size.
    """
    import faiss

    blocks, _, block = codebook.shape
    metric, own_lists = faiss.METRIC_L2, False
    index = faiss.IndexIVFPQFastScan(quantizer, blocks * block, len(lengths), blocks, 4, metric, BLOCK_ROWS, own_lists)
    quantizer.this.disown()
    index.own_fields, index.by_residual, index.is_trained, index.ntotal = True, False, True, int(lengths.sum())
    faiss.copy_array_to_vector(np.ascontiguousarray(codebook).reshape(-1), index.pq.centroids)
    borders = list_borders(lengths, index.code_size)
    if (size := file.stat().st_size) != borders[-1]:
        raise ValueError(f"{file} has {size} bytes, but its lists take {borders[-1]}; build the index again")
    lists = faiss.OnDiskInvertedLists(len(lengths), index.code_size, str(file))
    lists.read_only, lists.totsize, lists.prefetch_nthread = True, int(size), 0
    lists.do_mmap()
    sizes = lengths if held is None else np.where(held, lengths, 0)
    table = np.stack([sizes, _num_blocks(lengths) * BLOCK_ROWS, borders[:-1]], 1).astype(np.uint64)
    faiss.memcpy(lists.lists.data(), faiss.swig_ptr(table), table.nbytes)
    index.replace_invlists(lists, True)
    lists.this.disown()
    return index


def _num_blocks(lengths: np.ndarray) -> Int64[np.ndarray, " lists"]:
    return -(-lengths.astype(np.int64) // BLOCK_ROWS)


def _places(lengths: np.ndarray) -> Int64[np.ndarray, " c"]:
    """Where each row stands once all lists are filled up to whole blocks."""
    filled = BLOCK_ROWS * _num_blocks(lengths)
    gaps = np.cumsum(filled - lengths) - (filled - lengths)
    return np.arange(lengths.sum()) + np.repeat(gaps, lengths)


def _registers(lengths: np.ndarray, code_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the codes [blocks, bytes] and the row numbers [blocks, 8] of each block lie, in registers."""
    blocks = _num_blocks(lengths)
    first, count = np.repeat(np.cumsum(blocks) - blocks, blocks), np.repeat(blocks, blocks)
    start, at = first * (code_bytes + _NUMBERS), np.arange(blocks.sum()) - first
    codes, numbers = start + at * code_bytes, start + count * code_bytes + at * _NUMBERS
    return codes[:, None] + np.arange(code_bytes), numbers[:, None] + np.arange(_NUMBERS)
