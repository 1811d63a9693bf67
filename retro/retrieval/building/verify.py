"""Whether the files of a store are what its manifest says, and fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retro.common.files import check_files
from retro.common.records import load_record
from retro.retrieval.embedding.embedder import Embedder, embed_chunks
from retro.retrieval.store.format import read_manifest
from retro.retrieval.store.store import Store

LEVELS = ("quick", "full")
TOLERANCE = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}  # |key - embedded again| / |key|
_BLOCK_ROWS = 1 << 18
_EMBED_ROWS = 256
_REMEDY = "restore the shard from a copy or build the store again"


def verify_store(
    store: Store, level: str = "quick", embed: int = 0, seed: int = 0, embedder: Embedder | None = None
) -> dict[str, Any]:
    """Check an open store; ValueError names the first file or row that is wrong.

    Arguments:
        level: "quick": every file of the store (shards, tokenizer, removed, rejects, indexes, neighbor tables) has its
            checksums, which finds whatever was changed since it was written. "full": besides, the chunk table, the
            document table, the removed documents and the counts of the manifest say the same of every row, and keys
            are finite.
        embed: so many chunks, drawn with `seed`, are embedded again and compared with their keys, up to `TOLERANCE`.
        embedder: None loads the one that the manifest names.

    Returns what was checked: level, generation, documents, chunks, removed_documents, files (whose checksums were
    compared), embedded and largest_difference.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if embed < 0:
        raise ValueError(f"embed must be at least 0, not {embed}")
    try:
        files = _check_all(store, level)
    except (ValueError, FileNotFoundError):
        if read_manifest(store.path)["generation"] == store.generation:
            raise
        raise ValueError(f"{store.path} was changed while it was checked; run this again") from None
    checked = {"level": level, "generation": store.generation, "files": files}
    checked |= {"documents": store.num_live_documents, "chunks": store.num_live_chunks}
    checked |= {"removed_documents": len(store.removed_documents)}
    return checked | _embed_again(store, embed, seed, embedder)


def _check_all(store: Store, level: str) -> int:
    """Everything but the embedding; the number of files whose checksums were compared."""
    files = _check_checksums(store)
    if level == "full":
        for number in range(len(store.shards)):
            _check_tables(store, number)
        _check_removed(store)
        _check_keys(store)
    return files


def _check_tables(store: Store, number: int) -> None:
    """Compare one shard's chunk table and manifest record with its document table."""
    record = store.shards[number]
    folder = store.path / "shards" / record["name"]
    table = store.document_table(number, ["first_chunk", "num_chunks", "num_tokens", "num_bytes"])
    first, counts, tokens, sizes = (column.to_numpy() for column in table.columns)
    found = {"documents": len(first), "rows": int(counts.sum()), "tokens": int(tokens.sum()), "bytes": int(sizes.sum())}
    for name, value in found.items():
        if value != record[name]:
            raise ValueError(
                f"{folder / 'documents.parquet'} holds {value} {name}, but the manifest says {record[name]}; {_REMEDY}"
            )
    wrong = np.flatnonzero(first != np.cumsum(counts) - counts)
    if len(wrong):
        row = record["first_document"] + wrong[0]
        raise ValueError(
            f"{folder / 'documents.parquet'}: the chunks of document row {row} do not follow the last one's; {_REMEDY}"
        )
    short = 0
    for start in range(0, record["rows"], _BLOCK_ROWS):
        chunks = store.shard_arrays(number).chunks[start : start + _BLOCK_ROWS]
        short += int((chunks["length"] < store.min_chunk_len).sum())
        local = np.arange(start, start + len(chunks))
        document = np.searchsorted(first, local, side="right") - 1
        position = local - first[document]
        length = np.minimum(store.chunk_len, tokens[document] - store.chunk_len * position)
        for name, expected in (("document", document), ("position", position), ("length", length)):
            _check_equal(folder, record["first_row"] + start, name, chunks[name], expected)
    if short != record["short_chunks"]:
        raise ValueError(
            f"{folder / 'chunks.npy'} holds {short} short chunks, the manifest says {record['short_chunks']}; {_REMEDY}"
        )


def _check_equal(folder: Path, first_row: int, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{folder / 'chunks.npy'}: row {first_row + at} has {name} {found[at]}, but by documents.parquet it is "
            f"{expected[at]}; {_REMEDY}"
        )


def _check_removed(store: Store) -> None:
    """Compare the list of removed documents with the document tables."""
    rows = store.removed_documents
    if not len(rows):
        return
    file = store.path / store.manifest["removed"]["file"]
    if (np.diff(rows) <= 0).any() or rows[0] < 0 or rows[-1] >= store.num_documents:
        raise ValueError(f"{file} is no ascending list of document rows; restore it from a copy")
    first_documents = [record["first_document"] for record in store.shards]
    for number, first in enumerate(first_documents):
        low, high = np.searchsorted(rows, [first, first + store.shards[number]["documents"]])
        table = store.document_table(number, ["first_chunk", "num_chunks"])
        starts, counts = (column.to_numpy()[rows[low:high] - first] for column in table.columns)
        spans = np.stack([store.shards[number]["first_row"] + starts, counts], axis=1)
        wrong = np.flatnonzero((store.removed_spans[low:high] != spans).any(axis=1))
        if len(wrong):
            raise ValueError(
                f"{file} has other chunks for document row {rows[low + wrong[0]]} than its shard; "
                "restore it from a copy"
            )


def _check_checksums(store: Store) -> int:
    """Compare every recorded checksum; the number of files."""
    manifest, path = store.manifest, store.path
    places = [(path / "shards" / record["name"], record["files"]) for record in store.shards]
    places += [(path / "tokenizer", manifest["tokenizer"]["files"]), (path / "rejects", manifest["rejects"])]
    if removed := manifest.get("removed"):
        places.append((path, {removed["file"]: removed}))
    for records in ("index/[!.]*/index.json", "neighbors/[!.]*/neighbors.json"):
        for file in sorted(path.glob(records)):
            places.append((file.parent, load_record(file).get("files", {})))
    for folder, records in places:
        check_files(folder, records, checksums=True)
    return sum(len(records) for _, records in places)


def _check_keys(store: Store) -> None:
    for start in range(0, store.num_chunks, _BLOCK_ROWS):
        keys = store.key_block(start, min(start + _BLOCK_ROWS, store.num_chunks))
        wrong = np.flatnonzero(~np.isfinite(keys).all(axis=1))
        if len(wrong):
            raise ValueError(f"the key of row {start + wrong[0]} of {store.path} is not finite; build the store again")


def _embed_again(store: Store, count: int, seed: int, embedder: Embedder | None) -> dict[str, Any]:
    """Embed sampled chunks; ValueError names the first whose key is another."""
    from retro.retrieval.search.searchers import embedder_of, is_keyless

    if count and is_keyless(store):
        raise ValueError(f"{store.path} was built without an embedder and has no keys to compare; leave embed out")
    count = min(count, store.num_live_chunks)
    if not count:
        return {"embedded": 0}
    drawn = np.random.default_rng(seed).choice(store.num_live_chunks, count, replace=False, shuffle=False)
    rows, embedder = store.live_rows(np.sort(drawn)), embedder_of(store, embedder)
    largest, allowed = 0.0, TOLERANCE[store.manifest["key_dtype"]]
    for start in range(0, count, _EMBED_ROWS):
        part = rows[start : start + _EMBED_ROWS]
        keys, again = store.keys(part), embed_chunks(embedder, store.tokenizer, store.token_lists(part))
        differences = np.linalg.norm(again - keys, axis=1) / np.maximum(np.linalg.norm(keys, axis=1), 1e-12)
        wrong = np.flatnonzero(~(differences <= allowed))
        if len(wrong):
            raise ValueError(
                f"the key of row {part[wrong[0]]} of {store.path} is not that of its text: embedded again it differs "
                f"by {differences[wrong[0]]:.2g} of its length (allowed: {allowed:g}); build the store again"
            )
        largest = max(largest, float(differences.max()))
    return {"embedded": count, "largest_difference": largest}
