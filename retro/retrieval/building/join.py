"""The join of two stores: the tasks that find the neighbors of every chunk.

Each task searches a block of queries in a range of rows and writes its hits; the last one merges them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from retro.common.files import (
    TEMPORARY_PREFIX,
    delete,
    file_record,
    new_npy,
    open_npy,
    save_npy,
    write_lock,
    written_aside,
)
from retro.common.records import load_record, save_record
from retro.retrieval.building.sample import SAMPLE, fit_scale
from retro.retrieval.embedding.embedder import Embedder, embed_chunks, keys_are_queries
from retro.retrieval.executors.opening import open_executor
from retro.retrieval.executors.ranks import await_leader
from retro.retrieval.executors.tasks import Task, finished
from retro.retrieval.search import lexical
from retro.retrieval.search.dense import Scale
from retro.retrieval.search.exact import check_queries, exact_search, merge, no_hits
from retro.retrieval.search.index import ApproximateIndex
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.searchers import Searcher, embedder_of, goes_by_words, open_searcher
from retro.retrieval.store.store import Store

_QUERY_ROWS = 1024  # chunks searched at a time
_TASK_QUERIES = 16_384, 65_536  # least and most of a task: the keys are read once for all of them
_TASK_PAIRS = 1 << 32  # query-key pairs of a task, where the number of queries leaves a choice
_TASKS = 16  # as many at least, by ranges of rows where the queries are few
_SEED = 0  # of the sample by which recall is measured
_HITS = np.dtype([("row", "<i8"), ("distance", "<f4")])


# The job


class Join:
    """The tasks of one table, and how far they are."""

    def __init__(
        self, store: Store, queries: Store, settings: dict[str, Any], folder: Path, embedder: Embedder | None
    ) -> None:
        self.folder = folder / "job"
        self.here = embedder is not None
        self.num_chunks = queries.num_chunks
        self.spec = {
            "job": str(self.folder.resolve()),
            "stores": [[str(part.path.resolve()), part.fingerprint] for part in (store, queries)],
            **settings,
        }
        self.blocks = cut(queries.num_chunks, store.num_chunks, in_ranges=settings["index"] == "exact")
        self._left = {task.name: task.spec for task in self.searches()}
        self.num_pairs = sum(map(_num_pairs, self._left.values()))
        self.done_pairs = 0

    def first(self) -> list[Task]:
        """Exact search begins at once; an index is opened, or built, before any search."""
        if self.spec["index"] == "exact":
            return list(self.searches())
        return [Task("index", f"{__name__}:prepare_index", self.spec, self.here)]

    def searches(self) -> Iterator[Task]:
        """One task of each block of queries and each range of rows."""
        for (start, stop), ranges in self.blocks:
            for low, high in ranges:
                name = _hits_name((start, stop), (low, high))
                spec = {**self.spec, "queries": [start, stop], "rows": [low, high], "file": f"{name}.npy"}
                yield Task(name, f"{__name__}:search_block", spec, self.here, gpu=not goes_by_words(self.spec["index"]))

    def after(self, task: Task, record: dict[str, Any]) -> Iterable[Task]:
        """What a finished task makes possible."""
        if task.name == "index":
            self.spec = {**self.spec, "measured": record["measured"]}
            return self.searches()
        if task.name in self._left:
            self.done_pairs += _num_pairs(self._left.pop(task.name))
            if not self._left:
                blocks = [[list(block), [list(part) for part in ranges]] for block, ranges in self.blocks]
                return [Task("table", f"{__name__}:write_table", {**self.spec, "blocks": blocks})]
        return ()


def _num_pairs(spec: dict[str, Any]) -> int:
    (start, stop), (low, high) = spec["queries"], spec["rows"]
    return (stop - start) * (high - low)


Range = tuple[int, int]


def cut(num_queries: int, num_rows: int, in_ranges: bool = True) -> list[tuple[Range, list[Range]]]:
    """Blocks of queries, each with the ranges of rows that it is searched in: one, unless `in_ranges`."""
    least, most = _TASK_QUERIES
    size = min(max(_TASK_PAIRS // max(num_rows, 1), least), most)
    blocks = [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    wanted = -(-_TASKS // max(len(blocks), 1)) if in_ranges else 1
    found = []
    for start, stop in blocks:
        ranges = max(min(wanted, (stop - start) * num_rows // (_TASK_PAIRS // 2), num_rows), 1)
        borders = [number * num_rows // ranges for number in range(ranges + 1)]
        found.append(((start, stop), list(zip(borders[:-1], borders[1:], strict=True))))
    return found


def run_join(job: Join, executor: str, workers: int | None, progress: bool) -> None:
    """Do what is left of a table; its folder `job` is removed at the end."""
    ready = job.folder.parent / "neighbors.json"
    chosen = open_executor(executor, workers)
    if chosen.leads:
        ready.unlink(missing_ok=True)
        job.folder.mkdir(parents=True, exist_ok=True)
    await_leader(chosen, lambda: job.folder.is_dir() or ready.is_file(), "begun the table")
    with write_lock(job.folder) if chosen.leads else nullcontext(), _bar(job, progress and chosen.leads) as bar:

        def on_done(task: Task, record: dict[str, Any]) -> Iterable[Task]:
            following = job.after(task, record)
            bar.update(job.num_chunks * job.done_pairs // max(job.num_pairs, 1) - bar.n)
            return following

        chosen.run(job.folder, job.first(), on_done)
        if chosen.leads:
            save_record(ready, load_record(job.folder / "table.json")["table"])
            delete(job.folder, job.folder.parent)
    await_leader(chosen, ready.is_file, "written the table")


def _bar(job: Join, progress: bool) -> Any:
    """Chunks done, their rate, and the time that is left; what an earlier run did is no part of the rate."""
    from tqdm.auto import tqdm

    done = sum(_num_pairs(task.spec) for task in job.searches() if finished(job.folder, task.name) is not None)
    first = job.num_chunks * done // max(job.num_pairs, 1)
    return tqdm(
        total=job.num_chunks,
        initial=first,
        desc="neighbors",
        unit=" chunks",
        disable=not progress or None,
        smoothing=0.05,
    )


@contextmanager
def shared_with_tasks(embedder: Embedder | None) -> Iterator[None]:
    """Makes an embedder of the caller's known to tasks that run in this process, and forgets at the end what they
    opened."""
    global _own_embedder
    _own_embedder = embedder
    try:
        yield
    finally:
        _own_embedder = None
        _open_stores.cache_clear()


_own_embedder: Embedder | None = None

# The tasks


def prepare_index(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: open the index, or build it; its record holds the recall of the join and how far it looks."""
    return {"measured": _stores_of(spec).measured(spec["k"])}


def search_block(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the hits of one block of queries in one range of rows, nearest first, into a file."""
    join, (start, stop) = _stores_of(spec), spec["queries"]
    if scale := spec.get("measured", {}).get("scale"):
        join.searcher.index.scale = Scale(**scale)
    hits = np.empty((stop - start, spec["k"]), _HITS)
    hits["row"], hits["distance"] = join.search(np.arange(start, stop), spec["k"], tuple(spec["rows"]))
    path = Path(spec["job"]) / spec["file"]
    save_npy(path, hits)
    return {"chunks": stop - start, "files": {path.name: file_record(path)}}


def write_table(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: merge the hits into the table, block by block; its record is the table's."""
    job, k = Path(spec["job"]), spec["k"]
    folder, num_chunks = job.parent, spec["blocks"][-1][0][1] if spec["blocks"] else 0
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):  # of a run that was killed
        left.unlink()
    record = {name: spec[name] for name in ("k", "exclude", "index")}
    record |= {"store": spec["stores"][0][1], "queries": spec["stores"][1][1], "chunks": num_chunks}
    record |= {"missing": 0, "chunks_without_neighbors": 0, **spec.get("measured", {"recall": 1.0})}
    with (
        written_aside(folder / "rows.npy") as rows_file,
        written_aside(folder / "distances.npy") as distances_file,
    ):
        table_rows = new_npy(rows_file, "<i8", (num_chunks, k))
        table_distances = new_npy(distances_file, "<f4", (num_chunks, k))
        for (start, stop), ranges in spec["blocks"]:
            rows, distances = _merged(job, (start, stop), [(low, high) for low, high in ranges], k)
            table_rows[start:stop], table_distances[start:stop] = rows, distances
            record["missing"] += int((rows < 0).sum())
            record["chunks_without_neighbors"] += int((rows[:, 0] < 0).sum())
        for array in (table_rows, table_distances):
            array.flush()
    files = {name: file_record(folder / name) for name in ("rows.npy", "distances.npy")}
    return {"table": {**record, "files": files}, "files": {f"../{name}": of_file for name, of_file in files.items()}}


def _merged(job: Path, block: Range, ranges: list[Range], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a block's lists: rows and distances [q, k]."""
    rows, distances = no_hits(block[1] - block[0], k)
    for part in ranges:
        hits = open_npy(job / f"{_hits_name(block, part)}.npy")
        rows, distances = merge(rows, distances, hits["row"], hits["distance"].astype(np.float64), k)
    return rows, distances


def _hits_name(block: Range, part: Range) -> str:
    return "hits-{:012d}-{:012d}-{:012d}-{:012d}".format(*block, *part)


class _Stores:
    """Both stores and the search, as the tasks of one process share them."""

    def __init__(self, store: Store, queries: Store, index: str, exclude: str, embedder: Embedder | None) -> None:
        self.store, self.queries, self.index = store, queries, index
        self.excludes = exclude == "same_document"
        self._reads_tokens = ">" in index or any(part in lexical.KINDS for part in index.split("+"))
        self.given = embedder

    @cached_property
    def searcher(self) -> Searcher:
        return open_searcher(self.store, self.index, build=True)

    def measured(self, k: int) -> dict[str, Any]:
        """The recall, of a sample of the chunks where it can be measured against exact search of keys."""
        index = getattr(self.searcher, "index", None)
        if not isinstance(index, ApproximateIndex):
            return {"recall": self.searcher.recall}
        count = self.queries.num_chunks
        chunks = np.sort(np.random.default_rng(_SEED).choice(count, min(SAMPLE, count), replace=False))
        chunks = chunks[self.queries.chunk_lens(chunks) > 0]
        return fit_scale(index, self._keys(chunks), k, self._excluded(chunks))

    def search(
        self, chunks: Int64[np.ndarray, " q"], k: int, rows: Range
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """Rows and distances of the k nearest of each chunk; nothing for chunks of removed documents."""
        found, distances = no_hits(len(chunks), k)
        k = min(k, self.store.num_searchable)
        if k == 0:
            return found, distances
        alive = np.flatnonzero(self.queries.chunk_lens(chunks) > 0)
        size = len(chunks) if self.index == "exact" else _QUERY_ROWS
        for start in range(0, len(alive), size):
            places = alive[start : start + size]
            found[places, :k], scores, _ = self._search(chunks[places], k, rows)
            distances[places, :k] = -scores
        return found, distances

    def _search(self, chunks: np.ndarray, k: int, rows: Range) -> Any:
        table = self._excluded(chunks)
        keys = None if goes_by_words(self.index) else self._keys(chunks)
        if self.index == "exact":
            return exact_search(self.store, keys, k, table, rows=rows)
        excluded = None if table is None else [set(documents) - {-1} for documents in table.tolist()]
        tokens = self.queries.token_lists(chunks) if self._reads_tokens else None
        asked = Queries(self.queries.tokenizer, None, tokens, keys)
        return self.searcher.search(asked, k, excluded)

    def _excluded(self, chunks: np.ndarray) -> Int64[np.ndarray, "q 1"] | None:
        """For each chunk the document row of `store` that holds its own document, or -1; None: all may be found."""
        if not self.excludes:
            return None
        own = self.queries.document_rows(chunks)[:, None]
        if self.queries.fingerprint == self.store.fingerprint:
            return own
        unique, place = np.unique(own, return_inverse=True)
        names = [self.queries.document(row).id for row in unique.tolist()]
        row_of = self.store.find_documents(names)
        return np.asarray([row_of.get(name, -1) for name in names], np.int64)[place.reshape(own.shape)]

    @cached_property
    def _embedder(self) -> Embedder | None:
        """None where a chunk's stored key is also its query; else the embedder, checked against the store's."""
        if keys_are_queries(self.queries.manifest["embedder"]):
            return None
        return embedder_of(self.queries, self.given)

    def _keys(self, chunks: np.ndarray) -> Float32[np.ndarray, "q d"]:
        if self._embedder is None:
            return self.queries.keys(chunks)
        lists = self.queries.token_lists(chunks)
        return check_queries(embed_chunks(self._embedder, self.queries.tokenizer, lists, is_query=True), self.queries)


def _stores_of(spec: dict[str, Any]) -> _Stores:
    stores = tuple(map(tuple, spec["stores"]))
    return _open_stores(stores, spec["index"], spec["exclude"], None if _own_embedder is None else id(_own_embedder))


@lru_cache(maxsize=1)
def _open_stores(stores: tuple[tuple[str, str], ...], index: str, exclude: str, given: int | None) -> _Stores:
    store, queries = (_reopened(*stores[0]), None if stores[0] == stores[1] else _reopened(*stores[1]))
    return _Stores(store, queries or store, index, exclude, _own_embedder)


def _reopened(path: str, fingerprint: str) -> Store:
    return Store.reopen(path, fingerprint, "its neighbors were computed")
