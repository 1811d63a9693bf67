"""From one generation of a store to the next: the lock, the manifest, what is cleared away."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro.common.files import JOB_PREFIX, TEMPORARY_PREFIX, delete, is_abandoned, is_locked, write_lock
from retro.common.own import check_no_links
from retro.common.records import load_record, save_record
from retro.retrieval.building.job import PARTS
from retro.retrieval.search import continuation
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.index import build_index
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.store.format import OWN_FOLDERS
from retro.retrieval.store.store import Store

log = logging.getLogger(__name__)


@contextmanager
def writing(path: Path, keep_work: bool = False) -> Iterator[Store]:
    """Hold the store's lock, clear away what a killed writer left, and give the present generation.

    keep_work: leave what an unfinished addition has done, which the same addition takes up.
    """
    Store.open(path)  # else the lock would be written into a folder that is no store
    check_no_links(path, *OWN_FOLDERS)
    with write_lock(path):
        store = Store.open(path)
        clear_leftovers(store, keep_work)
        yield store


def clear_leftovers(store: Store, keep_work: bool = False, readers: bool = False) -> None:
    """Delete temporary files, and what no manifest came to name or none names any more.

    readers: also of indexes that processes are building, who then say that the store was compacted.
    """
    path, generation = store.path, store.generation
    updates = store.manifest.get("updates", [])
    compacted = max((update["generation"] for update in updates if update["verb"] == "compact"), default=0)
    stale = [file for file in _numbered(path / "removed", ".npy") if not compacted < int(file.stem) <= generation]
    stale += (folder for folder in _numbered(path / "rejects") if int(folder.name) > generation)
    for place in (".", "removed", "shards", "shards/*", "rejects", "rejects/*"):
        stale += path.glob(f"{place}/{TEMPORARY_PREFIX}*")
    for place in ("index", "neighbors"):  # whoever searches may write here, without the lock
        stale += (left for left in path.glob(f"{place}/{TEMPORARY_PREFIX}*") if readers or is_abandoned(left))
    stale += (job for job in path.glob(f"index/{JOB_PREFIX}*") if readers or not is_locked(job))
    if not keep_work:
        named = {record["name"] for record in store.shards}
        stale += (folder for folder in _numbered(path / "shards") if folder.name not in named)
        stale += path.glob(PARTS)
    for leftover in stale:
        log.info("deleting %s", leftover)
        delete(leftover, path)


def _numbered(folder: Path, suffix: str = "") -> list[Path]:
    """What of a folder has a name that we give; what else lies there is not ours to delete."""
    return [path for path in folder.glob("*") if re.fullmatch(r"[0-9]{5,}" + re.escape(suffix), path.name)]


def save_generation(store: Store, verb: str, changes: dict[str, Any], said: dict[str, Any]) -> None:
    """Write the manifest of the next generation: this is the moment of the update."""
    generation = store.generation + 1
    updates = [*store.manifest.get("updates", []), {"generation": generation, "verb": verb, **said}]
    manifest = {**store.manifest, **changes, "generation": generation, "updates": updates}
    save_record(store.path / "manifest.json", manifest)


def open_generation(path: Path, index: bool) -> Store:
    """The new generation, with the indexes that the last one had brought up to date."""
    store = Store.open(path)
    if index and store.num_searchable:
        for kind, settings in sorted(_indexes(path)):
            try:
                _build_index(store, kind, json.loads(settings))
            except ValueError as error:
                log.warning("the %s index of %s is left behind: %s", kind, path, error)
    return store


def _indexes(path: Path) -> set[tuple[str, str]]:
    """Kinds of the indexes in a store, each with its settings as JSON."""
    records = [record for file in path.glob("index/[!.]*/index.json") if "kind" in (record := read_record(file))]
    dense = {(r["kind"], json.dumps(r["settings"], sort_keys=True)) for r in records if r["kind"] in ENGINES}
    return dense | {(record["kind"], "{}") for record in records if record["kind"] not in ENGINES}


def read_record(file: Path) -> dict[str, Any]:
    """The record of an index or a table; nothing where it is damaged."""
    try:
        return load_record(file)
    except (ValueError, FileNotFoundError) as error:
        log.warning("%s is left out: %s", file.parent, error)
        return {}


def _build_index(store: Store, kind: str, settings: dict[str, Any]) -> None:
    if kind in ENGINES:
        build_index(store, kind, **settings)
    elif kind == continuation.KIND:
        continuation.build_continuation(store)
    else:
        build_lexical(store, kind)
