"""The lists of a routed index, made by tasks that each hold some keys only.

    train            the axes along which keys vary most, centroids of the groups, and the codebook, from a sample
    divide, a block  half of the rows, those that train centroids, by group
    split, groups    the centroids of the lists of some groups, by k-means of their rows
    assign, a block  the two lists and the code of every row, in the order of the lists
    pack, lists      some lists, from all blocks
    then             the lists, one after another, in one file; and the centroids, in another one

Keys are projected on these axes, half as many as they have dimensions, and all of this is done there: codes of 4 bits
for two axes tell keys apart better than codes of as many bytes for all dimensions, and all products are half as long.

Rows that are added later are only assigned: the centroids, and the codes of the others, stay.

All that is drawn is drawn by the number of a block or a group, and every task runs on one thread: the file does not
depend on who did the tasks, nor on kills. Other processors may round a distance otherwise, and so put a row that lies
between two lists into the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from jaxtyping import Float32, Int32, Int64

from retro.common.files import JOB_PREFIX, delete, new_npy, open_npy, save_npy, stable_hash, write_lock
from retro.common.records import load_record, save_record
from retro.retrieval.executors.opening import open_executor
from retro.retrieval.executors.tasks import Task
from retro.retrieval.search.engines.clustering import (
    codebook_of,
    k_means,
    nearest,
    one_fast_thread,
    places_of_distinct,
    principal_axes,
    project,
    trained_codec,
)
from retro.retrieval.search.engines.faiss import one_thread
from retro.retrieval.search.engines.files import (
    ROUTER_CODEBOOK,
    ROUTER_CODES,
    TABLES,
    TRAINED,
    bytes_of_code,
    join_centroids,
    lengths_of,
    pack_lists,
    rows_of,
    saved,
    task_file,
    write_files,
    written,
)
from retro.retrieval.search.engines.layout import IndexLayout, Work
from retro.retrieval.search.engines.packing import list_borders, pack
from retro.retrieval.search.exact import blocks
from retro.retrieval.search.segments import StoreRows
from retro.retrieval.store.store import Store

NUM_LISTS_OF_A_ROW = 2
_BLOCK_ROWS = 1 << 17
_PART_ROWS = 1 << 15  # whose distances are computed at a time
_SPLIT_ROWS = 1 << 17  # that train the centroids of one task
_SAMPLE_OF_LIST, SAMPLE_OF_GROUP = 16, 64  # rows that train a centroid
_LEVEL_ROUNDS, _SPLIT_ROUNDS = 8, 4  # of k-means
_GROUPS_SEARCHED = 4  # for the lists of a row
_OF_A_GROUP = 2  # of its nearest lists
_CANDIDATE_LISTS = 5  # of all these, of which the second is chosen
_DRIFT = 1.25  # how much farther from their centroids rows may lie that are added to what was there
_SOAR = 1.5  # lambda: how much a residual along the first one counts
_PART_BYTES = 1 << 26  # of lists that are packed at a time
_CODEC_CENTROIDS = 1 << 16  # that train the router's codebook
_LIGHT_ROWS = 1 << 18  # segments too small to start processes for
_given: WeakValueDictionary[tuple[str, str], Store] = WeakValueDictionary()  # open in this process, by path and state


def write_lists(
    layout: IndexLayout, store: Store, rows: StoreRows, folder: Path, work: Work, base: Path | None = None
) -> bool:
    """Write the lists of some store rows into a folder.

    base: the folder of an index whose centroids and codes are kept; its rows that are still there are the first of
    these, and only the others are assigned. False, and nothing written, where these lie much farther from the
    centroids.
    """
    spec: dict[str, Any] = {"store": str(store.path.resolve()), "fingerprint": store.fingerprint}
    _given[spec["store"], store.fingerprint] = store
    spec |= {"layout": asdict(layout), "seed": work.seed, "block_rows": _BLOCK_ROWS}
    spec |= {"sample": max(work.training_sample, SAMPLE_OF_GROUP * isqrt(layout.lists))}
    kept = 0 if base is None else rows.count_to(int(rows_of(base)[-1]))
    spec |= {"base": base and str(base.resolve()), "kept": kept}
    spec |= {"rows": len(rows) - spec["kept"], "first_row": rows.first}
    ends = [rows[row : row + 1].tolist() for row in (0, spec["kept"], len(rows) - 1)]
    job = store.path / "index" / f"{JOB_PREFIX}{stable_hash([spec, ends])[:16]}"
    job.mkdir(parents=True, exist_ok=True)
    with write_lock(job):
        all_rows = new_npy(job / "rows.npy", np.int64, (len(rows),))
        for start, stop in blocks(0, len(rows), _BLOCK_ROWS):
            all_rows[start:stop] = rows[start:stop]
        all_rows.flush()
        tasks = _ListsJob(spec | {"job": str(job.resolve())})
        open_executor(work.executor, work.workers).run(job, tasks.first(), tasks.after)
        if tasks.fits:
            trained = {"rows": len(rows), "mean_distance": tasks.mean_distance} if base is None else tasks.trained
            save_record(folder / TRAINED, trained)
            write_files(job, folder, base, tasks.packs)
            if base is None:
                _write_router(folder)
        delete(job, store.path)
    return tasks.fits


class _ListsJob:
    """Which task of a routed index follows which."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.light = spec, spec["rows"] < _LIGHT_ROWS
        self.blocks = list(blocks(0, spec["rows"], spec["block_rows"]))
        self.counts = np.zeros(1, np.int64)  # rows of the sample in each group
        self.distances: dict[str, float] = {}
        self.left: set[str] = set()
        self.packs: list[str] = []
        self.trained = load_record(Path(spec["base"]) / TRAINED) if spec["base"] else None

    def first(self) -> list[Task]:
        return [self._task("train", train, {})] if self.spec["base"] is None else self._over("assign", assign)

    @property
    def mean_distance(self) -> float:
        return sum(self.distances[name] for name in sorted(self.distances)) / max(self.spec["rows"], 1)

    @property
    def fits(self) -> bool:
        """Whether the rows that are added lie near enough to the centroids that are there."""
        return self.trained is None or self.mean_distance <= _DRIFT * self.trained["mean_distance"]

    def after(self, task: Task, record: dict[str, Any]) -> Iterable[Task]:
        step = task.name.partition("-")[0]
        self.left.discard(task.name)
        if step == "train":
            return self._over("divide", divide)
        if step == "divide":
            self.counts = self.counts + record["counts"]
        if step == "assign":
            self.distances[task.name] = record["distance"]
        if self.left:
            return ()
        if step == "divide":
            return self._wait_for(self._splits())
        if step == "split":
            join_centroids(Path(self.spec["job"]))
            return self._over("assign", assign)
        if step == "assign" and self.fits:
            return self._wait_for(self._packs())
        return ()

    def _over(self, step: str, function: Any) -> list[Task]:
        """A task for every block of rows."""
        return self._wait_for(self._task(f"{step}-{start:012d}", function, {"block": [start, stop]})
                              for start, stop in self.blocks)  # fmt: skip

    def _wait_for(self, tasks: Iterable[Task]) -> list[Task]:
        tasks = list(tasks)
        self.left = {task.name for task in tasks}
        return tasks

    def _splits(self) -> Iterable[Task]:
        """Runs of groups with about `_SPLIT_ROWS` rows of the sample, and the lists of each group."""
        lists = apportion(self.counts, self.spec["layout"]["lists"])
        run = np.cumsum(self.counts) // _SPLIT_ROWS
        for number in np.unique(run):
            first, last = np.flatnonzero(run == number)[[0, -1]].tolist()
            name = f"split-{first:08d}"
            yield self._task(name, split, {"groups": [first, last + 1], "lists": lists[first : last + 1].tolist()})

    def _packs(self) -> Iterable[Task]:
        """Runs of lists with about `_PART_BYTES` of rows and codes."""
        job, base, lists = Path(self.spec["job"]), self.spec["base"], self.spec["layout"]["lists"]
        lengths = lengths_of(Path(base)) if base else np.zeros(lists, np.int64)
        for name in sorted(self.distances):
            found, counts = np.unique(open_npy(job / f"{name}.lists.npy"), return_counts=True)
            lengths[found] += counts
        run = list_borders(lengths, bytes_of_code(Path(base or job)))[:-1] // _PART_BYTES
        starts = np.flatnonzero(np.diff(run, prepend=-1)).tolist()
        for first, stop in zip(starts, [*starts[1:], lists], strict=True):
            self.packs.append(f"pack-{first:012d}")
            yield self._task(self.packs[-1], pack_lists, {"lists": [first, stop]})

    def _task(self, name: str, function: Any, spec: dict[str, Any]) -> Task:
        spec = {**self.spec, **spec, "name": name}
        return Task(name, f"{function.__module__}:{function.__name__}", spec, light=self.light)


def apportion(counts: Int64[np.ndarray, " g"], total: int) -> Int64[np.ndarray, " g"]:
    """`total` lists shared among groups by their rows, at least one each; by the largest remainder."""
    wanted = counts * ((total - len(counts)) / max(counts.sum(), 1))
    lists = wanted.astype(np.int64)
    order = np.argsort(lists - wanted, kind="stable")
    lists[order[: total - len(counts) - lists.sum()]] += 1
    return lists + 1


# The tasks


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the centroids of the groups and the codebook."""
    with one_fast_thread():
        store, rows = _rows_of(spec)
        chosen = np.random.default_rng([spec["seed"], 0]).choice(
            len(rows), min(spec["sample"], len(rows)), replace=False
        )
        keys = store.keys(rows[np.sort(chosen)])
        codes = keys.shape[1] // spec["layout"]["block"]
        axes = principal_axes(keys, codes)
        keys = project(keys, axes)
        groups = k_means(keys[places_of_distinct(keys)], isqrt(spec["layout"]["lists"]), _LEVEL_ROUNDS)
        tables = {"axes": axes, "groups": groups, "codebook": codebook_of(trained_codec(keys, codes))}
        files = {Path(spec["job"]) / f"{name}.npy": table for name, table in tables.items()}
        return saved(files)


def divide(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the rows of a block that train centroids of lists, in the order of their groups."""
    with one_fast_thread():
        store, rows = _rows_of(spec)
        start, stop = spec["block"]
        share = min(_SAMPLE_OF_LIST * spec["layout"]["lists"] / spec["rows"], 1.0)
        draw = np.random.default_rng([spec["seed"], 1, start])
        chosen = np.sort(draw.choice(stop - start, max(round(share * (stop - start)), 1), replace=False))
        axes, groups = (np.array(open_npy(Path(spec["job"]) / f"{name}.npy")) for name in ("axes", "groups"))
        parts = [store.keys(rows[start:stop][chosen[slice(*part)]]) for part in blocks(0, len(chosen), _PART_ROWS)]
        keys = np.concatenate([project(part, axes) for part in parts])
        keys = keys[places_of_distinct(keys)]
        parts = blocks(0, len(keys), _PART_ROWS)
        own = np.concatenate([nearest(keys[slice(*part)], groups, 1)[0][:, 0] for part in parts])
        counts = np.bincount(own, minlength=len(groups))
        keys = keys[np.argsort(own, kind="stable")]
        return written(spec, keys=keys, counts=counts) | {"counts": counts.tolist()}


def split(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the centroids of the lists of some groups, by k-means of each group's rows."""
    with one_fast_thread():
        first, stop = spec["groups"]
        parts, borders = [], []
        for start, _ in blocks(0, spec["rows"], spec["block_rows"]):
            keys, counts = (open_npy(task_file(spec, f"divide-{start:012d}", name)) for name in ("keys", "counts"))
            at = np.append(0, np.cumsum(counts))[first : stop + 1]
            parts.append(np.array(keys[at[0] : at[-1]]))
            borders.append(at - at[0])
        groups, found = open_npy(Path(spec["job"]) / "groups.npy"), []
        for group, lists in zip(range(first, stop), spec["lists"], strict=True):
            own = slice(group - first, group - first + 2)
            keys = np.concatenate([part[slice(*at[own])] for part, at in zip(parts, borders, strict=True)])
            keys = keys if len(keys) else groups[group : group + 1]
            found.append(k_means(keys, lists, _SPLIT_ROUNDS))
        return written(spec, centroids=np.concatenate(found), sizes=np.asarray(spec["lists"]))


def assign(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the two lists and the code of every row of a block."""
    with one_thread():
        store, rows = _rows_of(spec)
        lists = Lists(Path(spec["base"] or spec["job"]))
        codec, found, distance = lists.codec(), [], 0.0
        for part in blocks(*spec["block"], _PART_ROWS):
            with one_fast_thread():
                keys = project(store.keys(rows[slice(*part)]), lists.axes)
            of_rows, distances = lists.of(keys)
            found.append((of_rows, codec.compute_codes(keys)))
            distance += float(distances.sum(dtype=np.float64))
        of_rows, codes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(of_rows, axis=None, kind="stable")
        own = (order // NUM_LISTS_OF_A_ROW).astype(np.int32)
        return written(spec, lists=of_rows.reshape(-1)[order], rows=own, codes=codes[own]) | {"distance": distance}


class Lists:
    """The tables of a job or of an index: groups, and the centroids of their lists."""

    def __init__(self, folder: Path) -> None:
        tables = {name: open_npy(folder / f"{name}.npy") for name in TABLES}
        self.axes, self.groups, self.codebook, self.sizes = (
            np.array(tables[name]) for name in ("axes", "groups", "codebook", "sizes")
        )
        self.centroids = tables["centroids"]  # memory-mapped: they take more than all else
        self.starts = np.append(0, np.cumsum(self.sizes))

    def of(self, keys: Float32[np.ndarray, "c d"]) -> tuple[Int32[np.ndarray, "c 2"], Float32[np.ndarray, " c"]]:
        """The two lists of each key, and its squared distance to the centroid of the first.

        The first is that of the nearest centroid in the nearest groups; the second, of those next to it, the one of
        least |r|^2 + lambda (r . u)^2, for the residuals r there and u, of length 1, in the first.
        """
        near, distances = self._candidates(keys)
        order = np.argsort(distances, axis=1, kind="stable")[:, :_CANDIDATE_LISTS]
        near, distances = np.take_along_axis(near, order, 1), np.take_along_axis(distances, order, 1)
        if near.shape[1] == 1:
            return np.repeat(near, 2, axis=1).astype(np.int32), np.maximum(distances[:, 0], 0)
        residual = keys - self.centroids[near[:, 0]]
        length = np.maximum(np.linalg.norm(residual, axis=1), 1e-12)
        others = np.maximum(near[:, 1:], 0)
        along = np.einsum("cd,cd->c", keys, residual)[:, None] - np.einsum(
            "cld,cd->cl", self.centroids[others], residual
        )
        loss = distances[:, 1:] + _SOAR * np.square(along / length[:, None])
        second = np.take_along_axis(near[:, 1:], loss.argmin(1)[:, None], 1)[:, 0]
        both = np.stack([near[:, 0], np.where(second < 0, near[:, 0], second)], 1)
        return both.astype(np.int32), np.maximum(distances[:, 0], 0)

    def _candidates(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lists and squared distances [c, 2 of each group]; -1 and infinity where a group has fewer."""
        with one_fast_thread():  # not below, where each shape would be compiled anew, and kept: 0.7 GB
            groups = nearest(keys, self.groups, _GROUPS_SEARCHED)[0]
        shape = (*groups.shape, _OF_A_GROUP)
        near, distances = np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
        norms = np.square(keys).sum(1)
        flat = groups.reshape(-1)
        order = np.argsort(flat, kind="stable")
        for group, members in zip(*_runs(flat[order], order), strict=True):
            start, stop = self.starts[group], self.starts[group + 1]
            at, slot = np.divmod(members, groups.shape[1])
            found, scores = nearest(keys[at], self.centroids[start:stop], _OF_A_GROUP)
            near[at, slot, : found.shape[1]] = start + found
            distances[at, slot, : found.shape[1]] = norms[at, None] - 2 * scores
        return near.reshape(len(keys), -1), distances.reshape(len(keys), -1)

    def codec(self) -> Any:
        """The product quantizer."""
        import faiss

        codec = faiss.ProductQuantizer(self.groups.shape[1], len(self.codebook), 4)
        faiss.copy_array_to_vector(self.codebook.reshape(-1), codec.centroids)
        codec.sync_transposed_centroids()
        return codec


def _runs(values: np.ndarray, order: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The distinct values of a sorted array, and the places of each."""
    borders = np.flatnonzero(np.diff(values, prepend=-1))
    return values[borders].tolist(), np.split(order, borders[1:])


# Files


def _rows_of(spec: dict[str, Any]) -> tuple[Store, np.ndarray]:
    store = _given.get((spec["store"], spec["fingerprint"])) or _opened(spec["store"], spec["fingerprint"])
    return store, open_npy(Path(spec["job"]) / "rows.npy")[spec["kept"] :]


@lru_cache(maxsize=1)
def _opened(path: str, fingerprint: str) -> Store:
    return Store.reopen(path, fingerprint, "its index was built")


def _write_router(folder: Path) -> None:
    """The centroids as lists of codes, a list for each group."""
    lists = Lists(folder)
    step = -(-len(lists.centroids) // _CODEC_CENTROIDS)
    codec = trained_codec(np.array(lists.centroids[::step]), len(lists.codebook))
    save_npy(folder / ROUTER_CODEBOOK, codebook_of(codec))
    with open(folder / ROUTER_CODES, "wb") as file:
        for first, stop in blocks(0, len(lists.sizes), max(_BLOCK_ROWS // int(lists.sizes.max()), 1)):
            rows = np.arange(lists.starts[first], lists.starts[stop])
            codes = codec.compute_codes(np.array(lists.centroids[rows[0] : rows[-1] + 1]))
            pack(lists.sizes[first:stop], rows, codes).tofile(file)
