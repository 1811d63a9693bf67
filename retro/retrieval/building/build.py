"""Documents to a store: a plan, then tasks that any executor does, then the manifest says complete, then an index.

    plan (manifest.json, "building") -> parts/ (see `merge_parts`) -> shards/ -> manifest "complete" -> index/

The bytes of a store do not depend on who does the tasks, how many do, nor on how often they are interrupted. Every file
is written aside and renamed. A build that fails over its inputs or keys leaves nothing; one that is killed leaves a
folder whose manifest says "building", which no reader opens and the same build takes up again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from retro.common.files import (
    LOCK_FILE,
    TEMPORARY_PREFIX,
    check_files,
    delete,
    folder_record,
    load_json,
    save_json,
    sync,
    write_lock,
    writing,
)
from retro.common.own import check_no_links
from retro.common.records import save_record
from retro.retrieval.building.job import PARTS, Job
from retro.retrieval.building.settings import EMBEDDER_CHOICES, LATER_CHOICES, BuildSettings, embedder_of_settings
from retro.retrieval.building.shards import merge_parts, remove_parts
from retro.retrieval.building.tasks import load_tokenizer, saved_tokenizer, signature_column, token_dtype
from retro.retrieval.embedding.embedder import Embedder, portable
from retro.retrieval.executors.opening import open_executor
from retro.retrieval.executors.ranks import await_leader
from retro.retrieval.executors.tasks import Executor
from retro.retrieval.filters import Deduplicator, FilterSettings, deduplicator_of
from retro.retrieval.search.searchers import open_searcher
from retro.retrieval.store.format import FORMAT, FORMAT_VERSION, OWN_FOLDERS, read_manifest
from retro.retrieval.store.store import Store
from retro.text.chunks import pad_token_id, tokenizer_fingerprint
from retro.text.corpus import expand_inputs
from retro.text.documents import InputPartition
from retro.text.formats import split_input

log = logging.getLogger(__name__)

PARTITION_BYTES = 8 << 20  # of an input, in a partition; of no effect on the store


def build_store(
    settings: BuildSettings, embedder: Embedder | None = None, tokenizer: Any = None, progress: bool = False
) -> Store:
    """Build the store that `settings` describe and open it.

    `embedder` and `tokenizer` may be given as objects instead of by name; such an embedder makes all keys in the
    calling process (in every rank, its own). A complete store of the same settings and inputs is opened as it is; a
    killed build of the same is taken up again.

    Writes manifest.json, tokenizer/, shards/, rejects/ and, unless settings.index is "none", index/ (see `Store`).
    Raises ValueError or OSError and leaves nothing half-written: no document in the inputs, a record that is no
    document, a duplicate id, a folder that is no store or a store built otherwise, keys that are not finite.
    """
    path, own_embedder = Path(settings.store), embedder is not None
    executor = open_executor(settings.executor, settings.workers)
    _check_folder(path, executor.leads)
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
    embedder = embedder or embedder_of_settings(settings)
    plan, partitions = _plan(settings, tokenizer, embedder)
    if not _is_complete(path, plan):
        _build(path, settings, plan, partitions, tokenizer, embedder, own_embedder, executor, progress)
    elif executor.leads:
        log.info("%s is complete already", path)
        _clean(path, plan)
    store = Store.open(path)
    if settings.index != "none" and executor.leads:
        work = {"executor": "local" if executor.shared else settings.executor, "workers": settings.workers}
        open_searcher(store, settings.index, build=True, recall=settings.recall, **work)
    return store


def plan_build(settings: BuildSettings, tokenizer: Any, embedder: Embedder) -> dict[str, Any]:
    """The manifest before any work: everything that decides the store's bytes. Reads all inputs once."""
    return _plan(settings, tokenizer, embedder)[0]


def write_shards(
    store: Store, settings: BuildSettings, plan: dict[str, Any], embedder: Embedder, progress: bool = False
) -> dict[str, Any]:
    """Read the inputs of `settings` into new shards of a store, with its tokenizer, behind those that it has.

    What an unfinished call with the same plan has done is not done again. Manifest and existing shards are not touched.

    Arguments:
        plan: of `plan_build`; its generation is that of the new shards.
        embedder: one that its description brings back is loaded by every worker; any other makes all keys here.

    Copies are looked for among the store's documents too, as far as their signatures were kept.
    Writes shards/ and rejects/ (those of a later generation in a folder of its own); parts/ holds the work in progress,
    which `remove_parts` deletes when a manifest names the shards.
    Returns {"shards": their records, "counts", "rejects": {file below rejects/: record}}.
    Raises ValueError for what inputs or keys have wrong.
    """
    records, partitions = _split(settings.inputs)
    if records != plan["inputs"]:
        raise ValueError("the inputs have changed since the plan was made; start again")
    own = not (embedder.dim == 0 or all(name in embedder.description for name in EMBEDDER_CHOICES))
    executor = open_executor(settings.executor, settings.workers)
    job, duplicates = _job(store.path, settings, plan, own), deduplicator_of(settings)
    if duplicates:
        _take_in(duplicates, store)
    return merge_parts(job, partitions, embedder, executor, duplicates, store, progress)


def _take_in(duplicates: Deduplicator, store: Store) -> None:
    """Make the documents of a store known, as far as it keeps what they are compared by."""
    column, unknown = signature_column(duplicates), 0
    for number in range(len(store.shards)):
        table = store.live_table(number, ["id", column])
        if column not in table.column_names:
            unknown += table.num_rows
            continue
        unknown += table.column(column).null_count
        for name, signature in zip(*(table.column(c).to_pylist() for c in ("id", column)), strict=True):
            if signature is not None:
                duplicates.add(name, signature)
    if unknown:
        log.warning(
            "%d of the %d documents of %s came in without this deduplicate: the new ones are not compared with them",
            *(unknown, store.num_live_documents, store.path),
        )


def _job(path: Path, settings: BuildSettings, plan: dict[str, Any], own_embedder: bool) -> Job:
    filters = {field.name: getattr(settings, field.name) for field in fields(FilterSettings)}
    named = ("text_field", "on_bad", "shard_chunks", "min_chunk_len", "batch_size", "compile")
    given = {name: getattr(settings, name) for name in named}
    return Job(path=path, plan=plan, filters=filters, own_embedder=own_embedder, **given)


# Plan


def _check_folder(path: Path, will_write: bool) -> None:
    """Refuse a path that holds something else than a store, or (OSError) nothing complete and cannot be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder; choose another path for the store")
    ours = (TEMPORARY_PREFIX, LOCK_FILE)
    if path.is_dir() and any(not item.name.startswith(ours) for item in path.iterdir()):
        if not (path / "manifest.json").is_file():
            raise ValueError(f"{path} is a folder that is no store and is not empty; choose another path for the store")
        will_write &= read_manifest(path)["state"] != "complete"
    if not will_write:
        return
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
        with suppress(OSError):  # another process may have begun to write there
            folder.rmdir()


def _plan(settings: BuildSettings, tokenizer: Any, embedder: Embedder) -> tuple[dict[str, Any], list[InputPartition]]:
    """The plan, and the partitions of the inputs that it freezes."""
    from retro.version import __version__

    left_out = {"store", "inputs", "tokenizer", "embedder", "decontaminate", "index", "recall", "batch_size"}
    left_out |= {"compile", "executor", "workers", *LATER_CHOICES}
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in left_out}
    chosen = {name: embedder.description[name] for name in kept if name in embedder.description}
    records, partitions = _split(settings.inputs)
    held_out = _split(settings.decontaminate)[0] if settings.decontaminate else []
    plan = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "generation": 1,
        "library_version": __version__,
        "state": "building",
        "settings": {**kept, **chosen},
        "inputs": records,
        "held_out": held_out,
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
            **portable(embedder.description, Path(settings.store)),
            "fingerprint": embedder.fingerprint,
        },
    }
    return plan, partitions


def _split(inputs: list[Any]) -> tuple[list[dict[str, Any]], list[InputPartition]]:
    """The frozen list of inputs and all their partitions, in order."""
    with ThreadPoolExecutor() as threads:
        split = list(threads.map(partial(split_input, partition_bytes=PARTITION_BYTES), expand_inputs(inputs)))
    return [record for record, _ in split], [partition for _, partitions in split for partition in partitions]


def _is_complete(path: Path, plan: dict[str, Any]) -> bool:
    """Whether the store is there already; ValueError if it, or one half-built, is another one."""
    if not (path / "manifest.json").exists():
        return False
    existing = read_manifest(path)
    if existing["state"] != "clearing":
        _check_same(path, existing, plan)
    return existing["state"] == "complete"


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


# Build


def _build(
    path: Path,
    settings: BuildSettings,
    plan: dict[str, Any],
    partitions: list[InputPartition],
    tokenizer: Any,
    embedder: Embedder,
    own_embedder: bool,
    executor: Executor,
    progress: bool,
) -> None:
    """Do the work of a plan; rank 0, and every other executor, holds the store's lock and writes the manifest."""
    job, duplicates = _job(path, settings, plan, own_embedder), deduplicator_of(settings)
    work = partial(merge_parts, job, partitions, embedder, executor, duplicates, progress=progress)
    if not executor.leads:
        work()
        return _await_manifest(path, executor)
    created = _missing_folders(path)
    path.mkdir(parents=True, exist_ok=True)
    check_no_links(path, *OWN_FOLDERS)
    with write_lock(path):
        if _is_complete(path, plan):  # another process has built it before this one had the lock
            return
        with _cleared_after_errors(path, created):
            plan = _begin(path, plan, tokenizer)
            written = work()
            _remove_temporary(path)
            save_record(path / "manifest.json", {**plan, **written, "state": "complete"})
            remove_parts(path)


def _clean(path: Path, plan: dict[str, Any]) -> None:
    """Delete what a build that was killed at its very end has left, unless another process writes."""
    if (path / PARTS).is_dir() or any(path.glob(f"{TEMPORARY_PREFIX}*")):
        with suppress(ValueError, OSError), write_lock(path):
            _remove_temporary(path)
            remove_parts(path, plan)


@contextmanager
def _cleared_after_errors(path: Path, created: list[Path]) -> Iterator[None]:
    """After an error of the user's (ValueError) leave nothing, after others what was done."""
    try:
        yield
    except ValueError:
        _clear(path)
        (path / LOCK_FILE).unlink(missing_ok=True)
        _remove_folders(created)
        raise


def _await_manifest(path: Path, executor: Executor) -> None:
    """In a rank above 0, wait for the manifest of rank 0."""

    def is_there() -> bool:
        return not (path / "manifest.json").exists() or read_manifest(path)["state"] == "complete"

    await_leader(executor, is_there, "written the manifest")
    if not (path / "manifest.json").exists():
        raise ChildProcessError(f"rank 0 has stopped and cleared {path}; see what it says")


def _begin(path: Path, plan: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Write the plan and the tokenizer, unless an unfinished build has; the plan with the tokenizer's files."""
    manifest = path / "manifest.json"
    existing = read_manifest(path) if manifest.exists() else None
    if existing and _is_taken_up(path, existing):
        log.info("taking up the build of %s", path)
        return {**plan, "tokenizer": existing["tokenizer"]}
    _clear(path)
    save_record(manifest, plan)
    plan = {**plan, "tokenizer": {**plan["tokenizer"], "files": _save_tokenizer(path, tokenizer)}}
    save_record(manifest, plan)
    return plan


def _is_taken_up(path: Path, existing: dict[str, Any]) -> bool:
    """Whether the work of an unfinished build can go on: its tokenizer is sound, and no older version began it."""
    if existing["state"] != "building" or "files" not in existing["tokenizer"]:
        return False
    try:
        check_files(path / "tokenizer", existing["tokenizer"]["files"], checksums=True)
    except ValueError as error:
        log.warning("starting the build again: %s", error)
        return False
    return (path / PARTS).is_dir() or not (path / "shards").exists()


def _save_tokenizer(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Save the tokenizer inside the store, without a word of where it came from; refuse one that does not survive."""
    folder, fingerprint = path / "tokenizer", tokenizer_fingerprint(tokenizer)
    with writing(folder):
        tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    content = load_json(config)
    save_json(config, {k: v for k, v in content.items() if k not in ("name_or_path", "is_local", "local_files_only")})
    if tokenizer_fingerprint(saved_tokenizer(str(folder), fingerprint)) != fingerprint:
        raise ValueError(
            "the tokenizer is another one after saving and loading; use one that save_pretrained keeps as it is"
        )
    for file in (*folder.rglob("*"), folder):
        sync(file)
    return folder_record(folder)


def _clear(path: Path) -> None:
    """Remove what an unfinished build wrote, the manifest last: killed here, it is cleared by the next build."""
    manifest = path / "manifest.json"
    if manifest.exists():
        save_record(manifest, {**read_manifest(path), "state": "clearing"})
    for name in OWN_FOLDERS:
        delete(path / name)
    manifest.unlink(missing_ok=True)
    _remove_temporary(path)


def _remove_temporary(path: Path) -> None:
    """Delete what killed processes were writing."""
    for place in (".", "shards/*", "rejects", "tokenizer"):
        for leftover in path.glob(f"{place}/{TEMPORARY_PREFIX}*"):
            delete(leftover, path)
