"""Documents to a store: a plan, then tokens and tables per shard, then keys per shard, then the manifest says complete.

Every file is written aside and renamed. A build that fails while reading its inputs leaves nothing; one that is
killed leaves a folder whose manifest says "building", which no reader opens and the same build takes up again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from retro.corpus import Document, Input, Reject, expand_inputs, read_documents, read_input
from retro.pretrained import pretrained_place
from retro.retrieval.chunks import pad_token_id, tokenize_ids, tokenizer_fingerprint
from retro.retrieval.embedder import NO_EMBEDDER, Embedder, NoEmbedder, embed_chunks, load_embedder, quiet_loading
from retro.retrieval.files import (
    TEMPORARY_PREFIX,
    check_files,
    file_record,
    folder_record,
    open_npy,
    save_json,
    save_json_lines,
    save_npy,
    sync,
    write_with,
    written_aside,
)
from retro.retrieval.filters import HeldOut
from retro.retrieval.search import open_searcher, parse_kind
from retro.retrieval.store import CHUNK_DTYPE, FORMAT, FORMAT_VERSION, Store, narrow_keys, read_manifest

log = logging.getLogger(__name__)

KEY_DTYPES = ("float32", "float16", "bfloat16")
_OWN_NAMES = {"manifest.json", "shards", "tokenizer", "rejects", "index", "neighbors"}
_TOKENIZE_DOCUMENTS = 256  # documents tokenized at a time
_EMBED_BATCHES = 16  # batches decoded and embedded at a time; sorted by length within


@dataclass
class BuildSettings:
    """What `retro build` needs to know: the one schema of a store's build.

    Arguments:
        store: the folder to write.
        inputs: see `retro.corpus.read_documents`.
        tokenizer: Hugging Face name, folder, GGUF file, or "package:NAME" for the GGUF file of an installed package.
        embedder, pooling, query_prefix, passage_prefix, max_length, normalize: see `load_embedder`; the embedder
            "none" makes a store without keys, which is searched by its words ("tfidf", "bm25").
        key_dtype: "float32", "float16" or "bfloat16".
        chunk_len: m, tokens of a chunk.
        min_chunk_len: chunks with fewer tokens keep their row, but no search returns them.
        text_field: field or column that holds the text.
        on_bad: "error" stops at the first record that is no document; "reject" lists it in rejects/.
        decontaminate: held-out inputs; documents that nearly copy one of theirs (word 13-gram Jaccard >= 0.8) are
            left out.
        index: "none", or a kind of retro.retrieval.search: "auto", "exact", "scann", "faiss", "tfidf", "bm25", or
            several joined by "+".
        shard_chunks: a shard is closed before the document that would take it beyond this many chunks.
        batch_size: chunks per forward pass of the embedder; None suits the device.
    """

    store: str
    inputs: list[str]
    tokenizer: str
    embedder: str = "minilm"
    pooling: str | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = None
    normalize: bool = True
    key_dtype: str = "float32"
    chunk_len: int = 64
    min_chunk_len: int = 8
    text_field: str = "text"
    on_bad: str = "error"
    decontaminate: list[str] = field(default_factory=list)
    index: str = "auto"
    shard_chunks: int = 1_000_000
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self.store = os.fspath(self.store)
        self.tokenizer, self.embedder = os.fspath(self.tokenizer), os.fspath(self.embedder)
        self.inputs = [os.fspath(item) for item in self.inputs]
        self.decontaminate = [os.fspath(item) for item in self.decontaminate]
        _one_of("key_dtype", self.key_dtype, KEY_DTYPES)
        _one_of("on_bad", self.on_bad, ("error", "reject"))
        if self.index != "none":
            parse_kind(self.index, keyless=self.embedder == NO_EMBEDDER)
        if not 1 <= self.chunk_len <= 65535:
            raise ValueError(f"chunk_len must be from 1 to 65535, not {self.chunk_len}")
        if not 1 <= self.min_chunk_len <= self.chunk_len:
            raise ValueError(f"min_chunk_len must be from 1 to chunk_len ({self.chunk_len}), not {self.min_chunk_len}")
        if self.shard_chunks < 1:
            raise ValueError(f"shard_chunks must be at least 1, not {self.shard_chunks}")


def build_store(
    settings: BuildSettings, embedder: Embedder | None = None, tokenizer: Any = None, progress: bool = False
) -> Store:
    """Build the store that `settings` describe and open it.

    `embedder` and `tokenizer` may be given as objects instead of by name. A complete store of the same settings and
    inputs is opened as it is; a killed build of the same is taken up again.

    Writes manifest.json, tokenizer/, shards/, rejects/ and, unless settings.index is "none", index/ (see `Store`).
    Raises ValueError or OSError and leaves nothing half-written: no document in the inputs, a record that is no
    document, a duplicate id, a folder that is no store or a store built otherwise, keys that are not finite.
    """
    path = Path(settings.store)
    _check_folder(path)
    items = expand_inputs(settings.inputs)
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
    embedder = embedder or _embedder(settings)
    plan = _plan(settings, items, tokenizer, embedder)
    existing = read_manifest(path) if (path / "manifest.json").exists() else None
    if existing and existing.get("shards"):
        _check_same(path, existing, plan)
    if existing and existing["state"] == "complete":
        log.info("%s is complete already", path)
    else:
        _build(path, settings, items, plan, existing, tokenizer, embedder, progress)
    store = Store.open(path)
    if settings.index != "none":
        open_searcher(store, settings.index, build=True)
    return store


def _embedder(settings: BuildSettings) -> Embedder:
    chosen = {n: getattr(settings, n) for n in ("pooling", "query_prefix", "passage_prefix", "max_length", "normalize")}
    if settings.embedder != NO_EMBEDDER:
        return load_embedder(settings.embedder, **chosen, batch_size=settings.batch_size)
    chosen |= {"key_dtype": settings.key_dtype, "batch_size": settings.batch_size}
    given = [name for name, value in chosen.items() if value != getattr(BuildSettings, name)]
    if given:
        raise ValueError(f"{given[0]} is given, but embedder is none; leave it out or name an embedder")
    return NoEmbedder()


def load_tokenizer(name_or_folder: str) -> Any:
    """A Hugging Face tokenizer by name, folder, GGUF file or "package:NAME"; ValueError in one sentence if none."""
    from transformers import AutoTokenizer

    place, gguf = pretrained_place(name_or_folder)
    if gguf and find_spec("gguf") is None:
        raise ValueError(f"the tokenizer {name_or_folder} is in a GGUF file, which needs gguf; pip install gguf")
    try:
        with quiet_loading():
            return AutoTokenizer.from_pretrained(place, **gguf)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        raise ValueError(
            f"the tokenizer {name_or_folder} is no folder, nor a Hugging Face tokenizer that can be loaded; "
            "train one with `retro tokenizer` or give a local folder"
        ) from None


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a token stream: uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# Plan


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_folder(path: Path) -> None:
    """Refuse a path that holds something else than a store, or (OSError) cannot be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder; choose another path for the store")
    if path.is_dir() and any(not item.name.startswith(TEMPORARY_PREFIX) for item in path.iterdir()):
        if not (path / "manifest.json").is_file():
            raise ValueError(f"{path} is a folder that is no store and is not empty; choose another path for the store")
        read_manifest(path)
    created = _missing_folders(path)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written; choose another path for the store")
    _remove_folders(created)


def _missing_folders(path: Path) -> list[Path]:
    """`path` and its parents, as far as they do not exist, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_folders(created: list[Path]) -> None:
    for folder in created:
        if folder.is_dir():
            folder.rmdir()


def _plan(settings: BuildSettings, items: list[Input], tokenizer: Any, embedder: Embedder) -> dict[str, Any]:
    """The manifest before any work: everything that decides the store's bytes."""
    from retro import __version__

    left_out = {"store", "inputs", "tokenizer", "embedder", "decontaminate", "index", "batch_size"}
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in left_out}
    chosen = {name: embedder.description[name] for name in kept if name in embedder.description}
    held_out = expand_inputs(settings.decontaminate) if settings.decontaminate else []
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "generation": 1,
        "library_version": __version__,
        "state": "building",
        "settings": {**kept, **chosen},
        "inputs": [item.record() for item in items],
        "held_out": [item.record() for item in held_out],
        "chunk_len": settings.chunk_len,
        "key_dtype": settings.key_dtype,
        "token_dtype": token_dtype(len(tokenizer)).name,
        "pad_token_id": pad_token_id(tokenizer),
        "tokenizer": {
            "name": Path(getattr(tokenizer, "name_or_path", "") or settings.tokenizer).name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        },
        "embedder": {
            **embedder.description,
            "name": _portable(str(embedder.description["name"]), Path(settings.store)),
            "fingerprint": embedder.fingerprint,
        },
    }


def _portable(name: str, store: Path) -> str:
    """An embedder's name as a store may record it: a folder, relative to the store, so that both can be moved."""
    if not Path(name).is_dir():
        return name
    return Path(os.path.relpath(Path(name).resolve(), store.resolve())).as_posix()


def _check_same(path: Path, existing: dict[str, Any], plan: dict[str, Any]) -> None:
    differing = _differences(existing, plan)
    if differing:
        raise ValueError(
            f"{path} is {'a complete store' if existing['state'] == 'complete' else 'an unfinished store'} built with "
            f"other {' and '.join(differing)}; choose another path, or delete it to build it again"
        )


def _differences(existing: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Names of what two plans differ in."""
    differing = [name for name in ("inputs", "held_out", "chunk_len", "key_dtype") if existing.get(name) != plan[name]]
    differing += [n for n in ("tokenizer", "embedder") if existing[n]["fingerprint"] != plan[n]["fingerprint"]]
    old, new = existing.get("settings", {}), plan["settings"]
    return differing + [name for name in new if old.get(name) != new[name] and name not in differing]


# The two passes


def _build(
    path: Path,
    settings: BuildSettings,
    items: list[Input],
    plan: dict[str, Any],
    existing: dict[str, Any] | None,
    tokenizer: Any,
    embedder: Embedder,
    progress: bool,
) -> None:
    created = _missing_folders(path)
    manifest = _taken_up(path, existing)
    try:
        if manifest is None:
            _clear(path)
            manifest = _write_tokens(path, settings, items, plan, tokenizer, progress)
    except Exception:  # a kill or an interrupt keeps what was done
        _clear(path)
        _remove_folders(created)
        raise
    try:
        _write_keys(path, manifest, tokenizer, embedder, progress)
    except ValueError:
        _clear(path)
        _remove_folders(created)
        raise


def _clear(path: Path) -> None:
    """Remove what an unfinished build wrote, the manifest last: killed here, it is still an unfinished build."""
    for name in _OWN_NAMES - {"manifest.json"}:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
    (path / "manifest.json").unlink(missing_ok=True)
    _remove_leftovers(path)


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of a killed build."""
    for leftover in path.rglob(f"{TEMPORARY_PREFIX}*"):
        leftover.unlink()


def _taken_up(path: Path, existing: dict[str, Any] | None) -> dict[str, Any] | None:
    """The manifest of a killed build whose tokens are written, if its files are sound."""
    if not existing or not existing.get("shards"):
        return None
    try:
        for record in existing["shards"]:
            check_files(path / "shards" / record["name"], record["files"], checksums=True)
        check_files(path / "tokenizer", existing["tokenizer"]["files"], checksums=True)
    except ValueError as error:
        log.warning("starting the build again: %s", error)
        return None
    log.info("taking up the build of %s", path)
    _remove_leftovers(path)
    return existing


def _write_tokens(
    path: Path, settings: BuildSettings, items: list[Input], plan: dict[str, Any], tokenizer: Any, progress: bool
) -> dict[str, Any]:
    """First pass: read, filter, tokenize; write tokens, chunk and document tables of every shard, and the manifest."""
    path.mkdir(parents=True, exist_ok=True)
    save_json(path / "manifest.json", plan)
    (path / "shards").mkdir()
    plan = {**plan, "tokenizer": {**plan["tokenizer"], "files": _save_tokenizer(path, tokenizer)}}
    reader = _Reader(items, settings)
    writer = _ShardWriter(path, settings, tokenizer)
    for document in _tracked(reader, progress, "tokenizing", "documents"):
        writer.add(document)
    shards = writer.close()
    if not shards:
        raise ValueError(f"the inputs hold no document with text ({reader.summary()}); give at least one")
    reader.count["empty"] += writer.num_empty
    reader.count["kept"] -= writer.num_empty
    counts = {name: reader.count[name] for name in ("read", "kept", "empty", "filtered", "rejected")}
    assert counts["read"] == sum(counts.values()) - counts["read"], counts
    for name in ("tokens", "bytes", "short_chunks"):
        counts[name] = sum(record[name] for record in shards)
    counts["chunks"] = sum(record["rows"] for record in shards)
    counts["documents"] = sum(record["documents"] for record in shards)
    manifest = {**plan, "counts": counts, "shards": shards, "rejects": reader.write_rejects(path / "rejects")}
    save_json(path / "manifest.json", manifest)
    return manifest


def _save_tokenizer(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Save the tokenizer inside the store, without a word of where it came from; refuse one that does not survive."""
    folder = path / "tokenizer"
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    save_json(config, {k: v for k, v in content.items() if k not in ("name_or_path", "is_local", "local_files_only")})
    if tokenizer_fingerprint(load_tokenizer(str(folder))) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            "the tokenizer is another one after saving and loading; use one that save_pretrained keeps as it is"
        )
    for file in (*folder.rglob("*"), folder):
        sync(file)
    return folder_record(folder)


def _write_keys(path: Path, manifest: dict[str, Any], tokenizer: Any, embedder: Embedder, progress: bool) -> None:
    """Second pass: embed every shard that has no keys yet, recording each in the manifest; then say complete."""
    total = manifest["counts"]["chunks"]
    done = sum(record["rows"] for record in manifest["shards"] if "keys.npy" in record["files"])
    with _bar(total, done, progress, "embedding", "chunks") as bar:
        for record in manifest["shards"]:
            if "keys.npy" not in record["files"]:
                _write_shard_keys(path, manifest, record, tokenizer, embedder, bar)
                save_json(path / "manifest.json", manifest)
    truncated = sum(record["truncated_chunks"] for record in manifest["shards"])
    manifest["counts"]["truncated_chunks"] = truncated
    if truncated:
        log.warning("%d of %d chunk texts were cut to the embedder's maximum length", truncated, total)
    manifest["state"] = "complete"
    save_json(path / "manifest.json", manifest)


def _write_shard_keys(
    path: Path, manifest: dict[str, Any], record: dict[str, Any], tokenizer: Any, embedder: Embedder, bar: Any
) -> None:
    """Write keys.npy of one shard and add it to the shard's record."""
    folder = path / "shards" / record["name"]
    tokens = open_npy(folder / "tokens.npy").reshape(-1, manifest["chunk_len"])
    lens = open_npy(folder / "chunks.npy")["length"]
    stored = narrow_keys(np.zeros((0, embedder.dim), np.float32), manifest["key_dtype"]).dtype
    step = _EMBED_BATCHES * (getattr(embedder, "batch_size", None) or 16)
    truncated = embedder.num_truncated
    with written_aside(folder / "keys.npy") as aside:
        keys = np.lib.format.open_memmap(aside, "w+", stored, (record["rows"], embedder.dim))
        for start in range(0, record["rows"], step):
            stop = min(start + step, record["rows"])
            chunks = [ids[:n] for ids, n in zip(tokens[start:stop], lens[start:stop], strict=True)]
            found = np.asarray(embed_chunks(embedder, tokenizer, chunks), np.float32)
            check_finite(found, record["first_row"] + start, manifest["key_dtype"])
            keys[start:stop] = narrow_keys(found, manifest["key_dtype"])
            bar.update(stop - start)
        keys.flush()
        del keys
    record["files"]["keys.npy"] = file_record(folder / "keys.npy")
    record["truncated_chunks"] = embedder.num_truncated - truncated


def check_finite(keys: np.ndarray, first_row: int, key_dtype: str) -> None:
    """Refuse keys that are NaN or infinite (or would be, as float16), naming the first row."""
    limit = np.finfo(np.float16).max if key_dtype == "float16" else np.inf
    wrong = np.flatnonzero(~np.isfinite(keys).all(axis=1) | (np.abs(keys) > limit).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"the embedder gave a key that is not a finite {key_dtype} for row {first_row + wrong[0]}; "
            "use another embedder or key_dtype"
        )


# Reading and writing


class _Reader:
    """Documents to keep, one after another, while every record is counted and what is left out is listed."""

    def __init__(self, items: list[Input], settings: BuildSettings) -> None:
        self.items, self.settings = items, settings
        self.count: Counter[str] = Counter()
        self._rejected: list[dict] = []
        self._filtered: list[dict] = []
        self._places: dict[str, str] = {}
        held_out = settings.decontaminate
        self._held_out = HeldOut(_documents(held_out, settings.text_field)) if held_out else None

    def __iter__(self) -> Iterator[Document]:
        for item in self.items:
            for record in read_input(item, self.settings.text_field):
                self.count["read"] += 1
                verdict = self._verdict(record)
                self.count[verdict] += 1
                if verdict == "kept":
                    yield record  # type: ignore[misc]

    def _verdict(self, record: Document | Reject) -> str:
        if isinstance(record, Reject):
            if self.settings.on_bad == "error":
                raise ValueError(
                    f"{record.file}:{record.line}: {record.reason}; mend or remove it, or build with on_bad=reject"
                )
            self._rejected.append(asdict(record))
            return "rejected"
        if not record.text.strip():
            return "empty"
        if record.id in self._places:
            raise ValueError(
                f"the document id {record.id!r} is given twice, at {self._places[record.id]} and {record.place}; "
                "ids must be unique"
            )
        self._places[record.id] = record.place
        found = self._held_out.find(record) if self._held_out else None
        if found is None:
            return "kept"
        self._filtered.append({"place": record.place, **asdict(found), "reason": "near copy of a held-out document"})
        return "filtered"

    def summary(self) -> str:
        return ", ".join(f"{self.count[name]} {name}" for name in ("read", "empty", "filtered", "rejected"))

    def write_rejects(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        save_json_lines(folder / "rejected.jsonl", self._rejected)
        save_json_lines(folder / "filtered.jsonl", self._filtered)
        return folder_record(folder)


def _documents(inputs: list[str], text_field: str) -> Iterator[Document]:
    return (record for record in read_documents(inputs, text_field=text_field) if isinstance(record, Document))


class _ShardWriter:
    """Cuts documents into chunks and writes a shard whenever the next document would not fit."""

    def __init__(self, path: Path, settings: BuildSettings, tokenizer: Any) -> None:
        self.path, self.settings, self.tokenizer = path, settings, tokenizer
        self.dtype, self.pad = token_dtype(len(tokenizer)), pad_token_id(tokenizer)
        self.records: list[dict[str, Any]] = []
        self.num_empty = 0
        self._waiting: list[Document] = []
        self._start_shard()

    def add(self, document: Document) -> None:
        self._waiting.append(document)
        if len(self._waiting) == _TOKENIZE_DOCUMENTS:
            self._tokenize()

    def close(self) -> list[dict[str, Any]]:
        """Write the last shard and return the records of all."""
        self._tokenize()
        self._finish_shard()
        return self.records

    def _start_shard(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []
        self._table: list[dict[str, Any]] = []
        self._rows = 0

    def _tokenize(self) -> None:
        documents, self._waiting = self._waiting, []
        if not documents:
            return
        for document, ids in zip(documents, tokenize_ids(self.tokenizer, [d.text for d in documents]), strict=True):
            if len(ids) == 0:
                self.num_empty += 1
            else:
                self._append(document, ids)

    def _append(self, document: Document, ids: np.ndarray) -> None:
        m = self.settings.chunk_len
        num_chunks = -(-len(ids) // m)
        if self._rows and self._rows + num_chunks > self.settings.shard_chunks:
            self._finish_shard()
        if ids.min() < 0 or ids.max() > np.iinfo(self.dtype).max:
            raise ValueError(
                f"the tokenizer gave the id {ids.max()} for {document.place}, which does not fit {self.dtype.name}"
            )
        chunks = np.zeros(num_chunks, CHUNK_DTYPE)
        chunks["document"], chunks["position"] = len(self._table), np.arange(num_chunks)
        chunks["length"] = np.minimum(m, len(ids) - m * np.arange(num_chunks))
        self._tokens.append(np.pad(ids, (0, num_chunks * m - len(ids)), constant_values=self.pad).astype(self.dtype))
        self._chunks.append(chunks)
        self._table.append(_table_row(document, self._rows, num_chunks, len(ids)))
        self._rows += num_chunks

    def _finish_shard(self) -> None:
        if not self._rows:
            return
        name = f"{len(self.records):05d}"
        folder = self.path / "shards" / name
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
        chunks = np.concatenate(self._chunks)
        save_npy(folder / "tokens.npy", np.concatenate(self._tokens))
        save_npy(folder / "chunks.npy", chunks)
        _write_parquet(folder / "documents.parquet", self._table)
        self.records.append(
            {
                "name": name,
                "generation": 1,
                "first_row": sum(record["rows"] for record in self.records),
                "rows": self._rows,
                "first_document": sum(record["documents"] for record in self.records),
                "documents": len(self._table),
                "tokens": int(chunks["length"].sum(dtype=np.int64)),
                "bytes": sum(row["num_bytes"] for row in self._table),
                "short_chunks": int((chunks["length"] < self.settings.min_chunk_len).sum()),
                "files": folder_record(folder),
            }
        )
        self._start_shard()


def _table_row(document: Document, first_chunk: int, num_chunks: int, num_tokens: int) -> dict[str, Any]:
    return {
        "id": document.id,
        "title": document.title,
        "source": document.source,
        "date": document.date,
        "extra": json.dumps(document.extra, sort_keys=True),
        "first_chunk": first_chunk,
        "num_chunks": num_chunks,
        "num_tokens": num_tokens,
        "num_bytes": len(document.text.encode("utf-8")),
    }


def _write_parquet(path: Path, table: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [(name, pa.string()) for name in ("id", "title", "source", "date", "extra")]
    numbers = [(name, pa.int64()) for name in ("first_chunk", "num_chunks", "num_tokens", "num_bytes")]
    arrow = pa.Table.from_pylist(table, schema=pa.schema(texts + numbers))
    write_with(path, lambda handle: pq.write_table(arrow, handle, compression="zstd"))


# Progress


def _bar(total: int | None, done: int, progress: bool, what: str, unit: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", disable=not progress, smoothing=0.05)


def _tracked(records: Iterable[Any], progress: bool, what: str, unit: str) -> Iterator[Any]:
    with _bar(None, 0, progress, what, unit) as bar:
        for record in records:
            yield record
            bar.update()
