"""The document tables of a datastore: one Parquet file for each shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from retro.retrieval.store.format import TABLE_NUMBERS, TABLE_TEXTS, ShardArrays

_KEPT_BYTES = 256 << 20  # of document tables that an open store keeps in memory
_KEPT_GROUPS = 256  # shards
_KEPT_BORDERS = 64  # shards


@dataclass(frozen=True)
class DocumentRecord:
    """A stored document without its text; its chunks are rows first_row .. first_row + num_chunks - 1."""

    id: str
    title: str
    source: str
    date: str | None
    extra: dict = field(hash=False)
    first_row: int
    num_chunks: int
    num_tokens: int
    num_bytes: int


class DocumentTables:
    """What a `Store` knows of its documents. Tables are read by groups of rows when they are asked for, and kept."""

    path: Path
    num_documents: int
    shards: list[dict[str, Any]]
    removed_documents: Int64[np.ndarray, " removed"]
    _shards: list[ShardArrays]
    _first_rows: np.ndarray
    _first_documents: np.ndarray
    _removed: np.ndarray
    _tables: dict[tuple[int, int], Any]
    _table_groups: dict[int, Any]

    def document(self, document_row: int | np.integer) -> DocumentRecord:
        """What is recorded of one document, without its text; ValueError if it was removed."""
        names = (*TABLE_TEXTS, *TABLE_NUMBERS)
        (fields,) = self.document_fields(np.asarray([document_row], np.int64), names)
        record = dict(zip(names, fields, strict=True))
        number = self._shard_of_document(document_row)
        record["first_row"] = record.pop("first_chunk") + int(self._first_rows[number])
        return DocumentRecord(**{**record, "extra": json.loads(record["extra"])})

    def document_fields(
        self, document_rows: Int64[np.ndarray, " documents"], names: Sequence[str]
    ) -> list[tuple[Any, ...]]:
        """Some columns of the document tables as stored, for many documents at once; ValueError as for `document`."""
        self._check_documents(document_rows)
        numbers = self._shard_of_document(document_rows)
        found: list[tuple[Any, ...]] = [()] * len(document_rows)
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            local = document_rows[places] - self._first_documents[number]
            groups = np.searchsorted(self._groups_of(number)[1], local, side="right") - 1
            for group in np.unique(groups).tolist():
                table, start = self._table_group(number, group)
                taken = table.select(list(names)).take(local[groups == group] - start)
                columns = (column.to_pylist() for column in taken.columns)
                for place, fields in zip(places[groups == group].tolist(), zip(*columns, strict=True), strict=True):
                    found[place] = fields
        return found

    def _check_documents(self, document_rows: np.ndarray) -> None:
        wrong = document_rows[(document_rows < 0) | (document_rows >= self.num_documents)]
        if len(wrong):
            raise ValueError(f"document row {wrong[0]} is outside the store's 0 .. {self.num_documents - 1}")
        removed = document_rows[np.isin(document_rows, self.removed_documents)] if len(self._removed) else []
        if len(removed):
            raise ValueError(f"document row {removed[0]} was removed from {self.path}; ask for one that is there")

    def _shard_of_document(self, document_rows: Any) -> Any:
        return np.searchsorted(self._first_documents, document_rows, side="right") - 1

    def _table_group(self, number: int, group: int) -> tuple[Any, int]:
        """A group of rows of a shard's document table, and where it begins; read whole and kept."""
        metadata, starts = self._groups_of(number)
        if (table := self._tables.get((number, group))) is None:
            if sum(kept.nbytes for kept in list(self._tables.values())) > _KEPT_BYTES:
                self._tables.clear()
            table = self._table_file(number, metadata).read_row_group(group, [*TABLE_TEXTS, *TABLE_NUMBERS])
            self._tables[number, group] = table
        return table, int(starts[group])

    def _groups_of(self, number: int) -> tuple[Any, np.ndarray]:
        """The metadata of a shard's document table, and where its groups of rows begin."""
        if (found := self._table_groups.get(number)) is None:
            if len(self._table_groups) >= _KEPT_GROUPS:
                self._table_groups.clear()
            metadata = self._table_file(number).metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            starts = np.cumsum([0, *counts[:-1]])
            self._table_groups[number] = found = metadata, starts
        return found

    def _table_file(self, number: int, metadata: Any = None) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.ParquetFile(pa.PythonFile(self._shards[number].documents.opened(), "r"), metadata=metadata)

    def document_table(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """The Arrow table of one shard's documents, the removed ones included; first_chunk counts from the shard.

        columns: which ones; one that is not there is left out.
        """
        return self._table_file(number).read(None if columns is None else list(columns))

    @cached_property
    def document_ids(self) -> list[str]:
        """The ids of all documents, by document row; "" for a removed one."""
        names = [name for number in range(len(self._shards)) for name in self._ids_of(number).to_pylist()]
        for row in self.removed_documents.tolist():
            names[row] = ""
        return names

    def find_documents(self, names: Collection[str], removed: bool = False) -> dict[str, int]:
        """The document rows of ids, without a list of all ids; an id that is not there is left out.

        removed: look among the removed documents instead; the last of several of one id is found.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted, found = pa.array(list(names), pa.string()), {}
        for number, first in enumerate(self._first_documents.tolist()):
            ids = self._ids_of(number)
            local = np.flatnonzero(pc.is_in(ids, wanted).to_numpy(zero_copy_only=False))
            chosen = local[np.isin(first + local, self.removed_documents) == removed]
            found |= dict(zip(ids.take(pa.array(chosen)).to_pylist(), (first + chosen).tolist(), strict=True))
        return found

    def live_ids(self, number: int) -> list[str]:
        """The ids of one shard's documents that are not removed."""
        return self.live_table(number, ["id"]).column("id").to_pylist()

    def live_table(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """As `document_table`, without the removed documents."""
        table, first = self.document_table(number, columns), self.shards[number]["first_document"]
        low, high = np.searchsorted(self.removed_documents, [first, first + table.num_rows])
        if low == high:
            return table
        return table.take(np.delete(np.arange(table.num_rows), self.removed_documents[low:high] - first))

    def _ids_of(self, number: int) -> Any:
        return self.document_table(number, ["id"]).column("id").combine_chunks()

    @cached_property
    def document_spans(self) -> Int64[np.ndarray, "documents 2"]:
        """First row and number of chunks of every document, by document row; a removed one has 0 chunks."""
        borders = [self._borders_of(number) for number in range(len(self._shards))]
        firsts = np.concatenate([np.zeros(0, np.int64), *(of_shard[:-1] for of_shard in borders)])
        counts = np.concatenate([np.zeros(0, np.int64), *map(np.diff, borders)])
        counts[self.removed_documents] = 0
        return np.stack([firsts, counts], axis=1)

    def row_ranges(self, documents: Int[np.ndarray, "*documents"]) -> Int64[np.ndarray, "*documents 2"]:
        """The first row of each document row and the first behind it, removed or not; 0 and 0 for -1."""
        ranges = np.zeros((*np.shape(documents), 2), np.int64)
        shards = np.searchsorted(self._first_documents, documents, side="right") - 1
        for number in np.unique(shards[shards >= 0]).tolist():
            there, borders = shards == number, self._borders_of(number)
            local = documents[there] - self._first_documents[number]
            ranges[there] = np.stack([borders[local], borders[local + 1]], axis=-1)
        return ranges

    @cached_property
    def _borders_of(self) -> Callable[[int], Int64[np.ndarray, " borders"]]:
        """The first row of every document of a shard, and the first behind the last, by the number of the shard."""

        def read(number: int) -> np.ndarray:
            counts = self.document_table(number, ["num_chunks"]).column(0).to_numpy()
            return self.shards[number]["first_row"] + np.append(0, np.cumsum(counts, dtype=np.int64))

        return lru_cache(_KEPT_BORDERS)(read)
