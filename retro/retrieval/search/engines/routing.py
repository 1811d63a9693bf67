"""The lists of a routed index, made by tasks that each hold some keys only.

    train            centroids of the groups, and the codebook, from a sample
    divide, a block  half of the rows, those that train centroids, by group
    split, groups    the centroids of the lists of some groups, by k-means of their rows
    assign, a block  the two lists and the code of every row
    then             the codes in the order of their lists, with the router, as one file of faiss

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

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from retro.common.devices import torch_threads
from retro.common.files import delete, file_record, open_npy, save_npy, stable_hash
from retro.retrieval.executors.opening import open_executor
from retro.retrieval.executors.tasks import Task
from retro.retrieval.search.engines.layout import IndexLayout, Work
from retro.retrieval.search.exact import blocks
from retro.retrieval.store.store import Store

NUM_LISTS_OF_A_ROW = 2
_BLOCK_ROWS = 1 << 17
_PART_ROWS = 1 << 14  # whose distances are computed at a time
_SPLIT_ROWS = 1 << 17  # that train the centroids of one task
_SAMPLE_OF_LIST, _SAMPLE_OF_GROUP = 16, 64  # rows that train a centroid
_LEVEL_ROUNDS, _SPLIT_ROUNDS = 8, 6  # of k-means
_GROUPS_SEARCHED = 4  # for the lists of a row
_CANDIDATE_LISTS = 8  # of which the second is chosen
_SOAR = 1.5  # lambda: how much a residual along the first one counts
_LIGHT_ROWS = 1 << 18  # segments too small to start processes for


def write_lists(
    layout: IndexLayout,
    store: Store,
    rows: Int64[np.ndarray, " c"],
    file: Path,
    training_sample: int,
    seed: int,
    work: Work,
) -> None:
    """Write the lists of some store rows, as faiss reads them."""
    spec = {"store": str(store.path.resolve()), "fingerprint": store.fingerprint, "layout": asdict(layout)}
    spec |= {"sample": max(training_sample, _SAMPLE_OF_GROUP * isqrt(layout.lists)), "seed": seed, "rows": len(rows)}
    job = store.path / "index" / f".job-{stable_hash([spec, int(rows[0]), int(rows[-1])])[:16]}"
    job.mkdir(parents=True, exist_ok=True)
    save_npy(job / "rows.npy", rows)
    lists = _ListsJob(spec | {"job": str(job.resolve())})
    open_executor(work.executor, work.workers).run(job, lists.first(), lists.after)
    _write_index(job, layout, file)
    delete(job, store.path)


class _ListsJob:
    """Which task of a routed index follows which."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.light = spec, spec["rows"] < _LIGHT_ROWS
        self.blocks = list(blocks(0, spec["rows"], _BLOCK_ROWS))
        self.counts: dict[str, list[int]] = {}
        self.left: set[str] = set()

    def first(self) -> list[Task]:
        return [self._task("train", train, {})]

    def after(self, task: Task, record: dict[str, Any]) -> Iterable[Task]:
        step = task.name.partition("-")[0]
        self.left.discard(task.name)
        if step == "train":
            return self._wait_for(self._task(f"divide-{start:012d}", divide, {"block": [start, stop]})
                                  for start, stop in self.blocks)  # fmt: skip
        if step == "divide":
            self.counts[task.name] = record["counts"]
        if self.left:
            return ()
        if step == "divide":
            return self._wait_for(self._splits())
        if step == "split":
            return self._wait_for(self._task(f"assign-{start:012d}", assign, {"block": [start, stop]})
                                  for start, stop in self.blocks)  # fmt: skip
        return ()

    def _wait_for(self, tasks: Iterable[Task]) -> list[Task]:
        tasks = list(tasks)
        self.left = {task.name for task in tasks}
        return tasks

    def _splits(self) -> Iterable[Task]:
        """Runs of groups with about `_SPLIT_ROWS` rows of the sample, and the lists of each group."""
        counts = np.sum([self.counts[name] for name in sorted(self.counts)], axis=0)
        lists = apportion(counts, self.spec["layout"]["lists"])
        run = np.cumsum(counts) // _SPLIT_ROWS
        for number in np.unique(run):
            first, last = np.flatnonzero(run == number)[[0, -1]].tolist()
            name = f"split-{first:08d}"
            yield self._task(name, split, {"groups": [first, last + 1], "lists": lists[first : last + 1].tolist()})

    def _task(self, name: str, function: Any, spec: dict[str, Any]) -> Task:
        return Task(name, f"{__name__}:{function.__name__}", {**self.spec, **spec, "name": name}, light=self.light)


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
    with torch_threads(1):
        store, rows = _rows_of(spec)
        chosen = np.random.default_rng([spec["seed"], 0]).choice(
            len(rows), min(spec["sample"], len(rows)), replace=False
        )
        keys = store.keys(rows[np.sort(chosen)])
        groups = k_means(keys, isqrt(spec["layout"]["lists"]), _LEVEL_ROUNDS)
        return _written(spec, groups=groups, codebook=_codebook(spec["layout"], keys))


def divide(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the rows of a block that train centroids of lists, in the order of their groups."""
    with torch_threads(1):
        store, rows = _rows_of(spec)
        start, stop = spec["block"]
        share = min(_SAMPLE_OF_LIST * spec["layout"]["lists"] / spec["rows"], 1.0)
        draw = np.random.default_rng([spec["seed"], 1, start])
        chosen = np.sort(draw.choice(stop - start, max(round(share * (stop - start)), 1), replace=False))
        groups, keys = open_npy(_file(spec, "train", "groups")), store.keys(rows[start:stop][chosen])
        own = np.concatenate([_nearest(keys[a:b], groups, 1)[:, 0] for a, b in blocks(0, len(keys), _PART_ROWS)])
        counts = np.bincount(own, minlength=len(groups))
        keys = keys[np.argsort(own, kind="stable")].astype(np.float16)
        return _written(spec, keys=keys, counts=counts) | {"counts": counts.tolist()}


def split(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the centroids of the lists of some groups, by k-means of each group's rows."""
    with torch_threads(1):
        first, stop = spec["groups"]
        names = [f"divide-{start:012d}" for start, _ in blocks(0, spec["rows"], _BLOCK_ROWS)]
        parts = [open_npy(_file(spec, name, "keys")) for name in names]
        borders = [np.append(0, np.cumsum(open_npy(_file(spec, name, "counts")))) for name in names]
        groups, found = open_npy(_file(spec, "train", "groups")), []
        for group, lists in zip(range(first, stop), spec["lists"], strict=True):
            keys = np.concatenate([part[at[group] : at[group + 1]] for part, at in zip(parts, borders, strict=True)])
            keys = keys.astype(np.float32) if len(keys) else groups[group : group + 1]
            found.append(k_means(keys, lists, _SPLIT_ROUNDS))
        return _written(spec, centroids=np.concatenate(found), lists=np.asarray(spec["lists"]))


def assign(spec: dict[str, Any]) -> dict[str, Any]:
    """Task: the two lists and the code of every row of a block."""
    with torch_threads(1):
        store, rows = _rows_of(spec)
        start, stop = spec["block"]
        lists = Lists(Path(spec["job"]))
        codes = lists.codec(spec["layout"])
        found = [(lists.of(keys), codes.compute_codes(keys))
                 for a, b in blocks(start, stop, _PART_ROWS) for keys in [store.keys(rows[a:b])]]  # fmt: skip
        return _written(spec, lists=np.concatenate([f[0] for f in found]), codes=np.concatenate([f[1] for f in found]))


class Lists:
    """The groups and centroids of a job, as far as it is."""

    def __init__(self, job: Path) -> None:
        self.groups = np.ascontiguousarray(open_npy(job / "train.groups.npy"))
        self.codebook = np.ascontiguousarray(open_npy(job / "train.codebook.npy"))
        names = sorted(file.name.partition(".")[0] for file in job.glob("split-*.json"))
        self.centroids = np.concatenate([open_npy(job / f"{name}.centroids.npy") for name in names])
        self.sizes = np.concatenate([open_npy(job / f"{name}.lists.npy") for name in names])  # lists of each group
        self.starts = np.append(0, np.cumsum(self.sizes))

    def of(self, keys: Float32[np.ndarray, "c d"]) -> Int32[np.ndarray, "c 2"]:
        """The list of the nearest centroid in the nearest groups, and of those next to it the one of least
        |r|^2 + lambda (r . u)^2, for a key's residuals r there and u, of length 1, in the first."""
        near, distances = self._candidates(keys)
        order = np.argsort(distances, axis=1, kind="stable")[:, :_CANDIDATE_LISTS]
        near, distances = np.take_along_axis(near, order, 1), np.take_along_axis(distances, order, 1)
        if near.shape[1] == 1:
            return np.repeat(near, 2, axis=1).astype(np.int32)
        residual = keys - self.centroids[near[:, 0]]
        length = np.maximum(np.linalg.norm(residual, axis=1), 1e-12)
        others = np.maximum(near[:, 1:], 0)
        along = np.einsum("cd,cd->c", keys, residual)[:, None] - np.einsum(
            "cld,cd->cl", self.centroids[others], residual
        )
        loss = distances[:, 1:] + _SOAR * np.square(along / length[:, None])
        second = np.take_along_axis(near[:, 1:], loss.argmin(1)[:, None], 1)[:, 0]
        return np.stack([near[:, 0], np.where(second < 0, near[:, 0], second)], 1).astype(np.int32)

    def _candidates(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lists and squared distances [c, 8 of each group]; -1 and infinity where a group has fewer."""
        groups = _nearest(keys, self.groups, min(_GROUPS_SEARCHED, len(self.groups)))
        shape = (*groups.shape, _CANDIDATE_LISTS)
        near, distances = np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
        norms = np.square(keys).sum(1)
        flat = groups.reshape(-1)
        order = np.argsort(flat, kind="stable")
        for group, members in zip(*_runs(flat[order], order), strict=True):
            start, stop = self.starts[group], self.starts[group + 1]
            at, slot = np.divmod(members, groups.shape[1])
            found, scores = _nearest_and_scores(keys[at], self.centroids[start:stop], _CANDIDATE_LISTS)
            near[at, slot, : found.shape[1]] = start + found
            distances[at, slot, : found.shape[1]] = norms[at, None] - 2 * scores
        return near.reshape(len(keys), -1), distances.reshape(len(keys), -1)

    def codec(self, layout: dict[str, Any]) -> Any:
        """The product quantizer."""
        import faiss

        width = self.groups.shape[1]
        codec = faiss.ProductQuantizer(width, width // layout["block"], layout["bits"])
        faiss.copy_array_to_vector(self.codebook.reshape(-1), codec.centroids)
        return codec


def _runs(values: np.ndarray, order: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The distinct values of a sorted array, and the places of each."""
    borders = np.flatnonzero(np.diff(values, prepend=-1))
    return values[borders].tolist(), np.split(order, borders[1:])


def k_means(keys: Float32[np.ndarray, "c d"], count: int, rounds: int) -> Float32[np.ndarray, "k d"]:
    """Centroids; where there are fewer keys than these, keys are given more than once."""
    import faiss

    if len(keys) <= count:
        return np.resize(keys, (count, keys.shape[1]))
    if count == 1:
        return keys.mean(0, keepdims=True)
    means = faiss.Kmeans(
        keys.shape[1], count, niter=rounds, seed=1, min_points_per_centroid=1, max_points_per_centroid=1 << 30
    )
    means.train(np.ascontiguousarray(keys))
    return means.centroids


def _codebook(layout: dict[str, Any], keys: np.ndarray) -> Float32[np.ndarray, "blocks codes block"]:
    import faiss

    codec = trained_codec(keys, layout["block"])
    return faiss.vector_to_array(codec.centroids).reshape(codec.M, -1, layout["block"])


def trained_codec(keys: Float32[np.ndarray, "c d"], block: int) -> Any:
    """A product quantizer of 4 bits for every `block` dimensions."""
    import faiss

    codec = faiss.ProductQuantizer(keys.shape[1], keys.shape[1] // block, 4)
    codec.cp.min_points_per_centroid = 1
    codec.train(np.resize(keys, (max(len(keys), 1 << codec.nbits), keys.shape[1])))
    return codec


def _nearest(keys: np.ndarray, centroids: np.ndarray, count: int) -> Int64[np.ndarray, "c n"]:
    return _nearest_and_scores(keys, centroids, count)[0]


def _nearest_and_scores(keys: np.ndarray, centroids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroids [c, n] of each key, and key . centroid - |centroid|^2 / 2 of them, largest first."""
    import torch

    from retro.common.products import fast_products

    table = torch.from_numpy(np.array(centroids))
    with fast_products():
        scores = torch.addmm(-table.square().sum(1) / 2, torch.from_numpy(np.ascontiguousarray(keys)), table.T)
    top, places = scores.topk(min(count, len(table)), dim=1)
    return places.numpy(), top.numpy()


# Files


def _rows_of(spec: dict[str, Any]) -> tuple[Store, np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(1)
    return _opened(spec["store"], spec["fingerprint"]), open_npy(Path(spec["job"]) / "rows.npy")


@lru_cache(maxsize=1)
def _opened(path: str, fingerprint: str) -> Store:
    store = Store.open(path)
    if store.fingerprint != fingerprint:
        raise ValueError(f"{path} was changed while its index was built; run the same command again")
    return store


def _file(spec: dict[str, Any], task: str, name: str) -> Path:
    return Path(spec["job"]) / f"{task}.{name}.npy"


def _written(spec: dict[str, Any], **arrays: np.ndarray) -> dict[str, Any]:
    """Save the arrays of a task; its record."""
    files = {_file(spec, spec["name"], name): array for name, array in arrays.items()}
    for file, array in files.items():
        save_npy(file, array)
    return {"files": {file.name: file_record(file) for file in files}}


def _write_index(job: Path, layout: IndexLayout, path: Path) -> None:
    """The index of faiss: lists of codes in the order of fast scan, and the router as their quantizer."""
    import faiss

    lists = Lists(job)
    router, held = _fast(lists.groups, lists.sizes, *_router_codes(lists), np.arange(len(lists.centroids)))
    names = sorted(file.name.removesuffix(".json") for file in job.glob("assign-*.json"))
    of_rows = np.concatenate([open_npy(job / f"{name}.lists.npy") for name in names]).reshape(-1)
    codes = np.concatenate([open_npy(job / f"{name}.codes.npy") for name in names])
    ids = np.argsort(of_rows, kind="stable")
    sizes = np.bincount(of_rows, minlength=len(lists.centroids))
    ids //= NUM_LISTS_OF_A_ROW
    index, also_held = _fast(router, sizes, lists.codec(asdict(layout)), codes, ids)
    faiss.write_index(index, str(path))
    del held, also_held


def _router_codes(lists: Lists) -> tuple[Any, UInt8[np.ndarray, "lists bytes"]]:
    """Codes of the centroids, of 4 bits for at most two dimensions: fewer than the rows, so that they may be finer."""
    codec = trained_codec(lists.centroids, 2 if lists.groups.shape[1] % 2 == 0 else 1)
    return codec, codec.compute_codes(lists.centroids)


def _fast(above: Any, sizes: np.ndarray, codec: Any, codes: np.ndarray, order: np.ndarray) -> tuple[Any, Any]:
    """Lists of some sizes that hold the ids of `order` and their codes, and what must be held as long.

    above: what finds the lists of a query, or the centroids themselves.
    """
    import faiss

    quantizer = above
    if isinstance(above, np.ndarray):
        quantizer = faiss.IndexFlatL2(above.shape[1])
        quantizer.add(above)
    index = faiss.IndexIVFPQ(quantizer, codec.d, len(sizes), codec.M, codec.nbits)
    index.by_residual, index.is_trained = False, True
    faiss.copy_array_to_vector(faiss.vector_to_array(codec.centroids), index.pq.centroids)
    held, borders = index.invlists, np.append(0, np.cumsum(sizes))
    for number, (start, stop) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        if start < stop:
            ids = np.ascontiguousarray(order[start:stop], np.int64)
            own = np.ascontiguousarray(codes[ids])
            held.add_entries(number, stop - start, faiss.swig_ptr(ids), faiss.swig_ptr(own))
    index.ntotal = int(borders[-1])
    fast = faiss.IndexIVFPQFastScan(index, 32)
    return fast, (quantizer, index)  # which must outlive it
