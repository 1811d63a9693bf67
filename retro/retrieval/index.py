"""Nearest keys: exact search, ScaNN and faiss behind one protocol.

Every index answers with store rows, scores = -squared L2 distance computed from the stored keys (higher is closer),
and a mask: a hit that an engine could not find is masked, never another row. Approximate indexes are folders,
index/<hash>/, keyed by settings and store fingerprint; their recall against exact search, measured on a seeded
sample, is in index.json.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from retro.retrieval.files import (
    check_files,
    folder_record,
    folder_written_aside,
    load_json,
    open_npy,
    save_json,
    save_npy,
    stable_hash,
)
from retro.retrieval.store import Store

log = logging.getLogger(__name__)

KINDS = ("exact", "scann", "faiss")
MAX_PART_ROWS = 30_000_000  # ScaNN peaks at about twice the float size; its ids are uint32 besides
SCANN_BRUTE_ROWS, SCANN_TREE_ROWS = 20_000, 100_000
FAISS_FLAT_ROWS = 100_000
_OVER_SELECT = 16  # candidates kept beyond k, so that rounding of the matrix product cannot displace a true neighbor
_BLOCK_SCORES = 1 << 24  # scores held at a time by exact search
_RESCORED_PAIRS = 1 << 14

Hits = tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"], Bool[np.ndarray, "q k"]]


@runtime_checkable
class Index(Protocol):
    """search [q, d], k -> store rows [q, k] (-1 where missing), scores (-squared L2; -inf where missing), mask."""

    kind: str
    num_rows: int

    def search(self, queries: Float[np.ndarray, "q d"], k: int) -> Hits: ...


def build_index(store: Store, kind: str = "auto", **settings: Any) -> Index:
    """Build an index of the store's searchable rows, or open the same one if it is there already.

    Arguments:
        kind: "auto" (scann if importable, else faiss, else exact), "exact" (nothing to build), "scann" or "faiss".
        settings: scann: leaves, leaves_to_search, reorder, training_sample; faiss: lists, probes, training_sample;
            both: max_part_rows, seed. Each has a default by the number of rows; an unknown name raises ValueError.

    Writes index/<hash>/{index.json, 00000/...}; recall@10 on up to 256 sampled rows is stored in index.json.
    """
    kind = resolve_kind(kind)
    if kind == "exact":
        _refuse_unknown(settings, {})
        return ExactIndex(store)
    chosen = _settings(kind, settings)
    folder = store.path / "index" / _key(store, kind, chosen)
    if (folder / "index.json").is_file():
        try:
            return _open_folder(store, folder)
        except ValueError as error:
            log.warning("building the index again: %s", error)
            shutil.rmtree(folder)
    _write_index(store, kind, chosen, folder)
    return _open_folder(store, folder)


def open_index(store: Store, kind: str = "auto") -> Index:
    """Open an index that `build_index` wrote; "auto" takes ScaNN, else faiss, else exact search.

    Of several of a kind, the one of the highest recall is opened.
    Raises ValueError if none of that kind is there for this state of the store, or a file of it is missing or damaged.
    """
    if kind == "exact":
        return ExactIndex(store)
    wanted = [name for name in ("scann", "faiss") if kind == name or (kind == "auto" and _importable(name))]
    if kind != "auto":
        resolve_kind(kind)
    for name in wanted:
        found = [
            (record["recall"]["recall"], file.parent)
            for file in (store.path / "index").glob("[!.]*/index.json")
            if (record := load_json(file))["kind"] == name and record["store"] == store.fingerprint
        ]
        if found:
            return _open_folder(store, max(found)[1])
    if kind == "auto":
        return ExactIndex(store)
    raise ValueError(
        f"{store.path} has no {kind} index for its present state; build one with `retro build --index {kind}`"
    )


def resolve_kind(kind: str) -> str:
    """The kind that "auto" stands for here; ValueError for an unknown kind or one that is not installed."""
    if kind == "auto":
        return next((name for name in ("scann", "faiss") if _importable(name)), "exact")
    if kind not in KINDS:
        raise ValueError(f"the index kind must be auto, {', '.join(KINDS)}, tfidf or bm25, not {kind!r}")
    if not _importable(kind):
        remedy = {
            "scann": "pip install scann (Linux)",
            "faiss": "pip install faiss-cpu, or retro-lm[gpu] for faiss-gpu",
        }
        raise ValueError(f"the index kind {kind} needs a library that is not installed; {remedy[kind]}")
    return kind


def _importable(kind: str) -> bool:
    return kind == "exact" or find_spec(kind) is not None


# Exact search


class ExactIndex:
    """Blocked matrix product and top-k over all searchable rows; ties go to the lower row."""

    kind = "exact"

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_rows = len(store.searchable_rows)

    def search(self, queries: Float[np.ndarray, "q d"], k: int) -> Hits:
        """The k nearest rows of each query."""
        return exact_search(self.store, check_queries(queries, self.store), k)


def check_queries(queries: Any, store: Store) -> Float32[np.ndarray, "q d"]:
    """Queries as float32; ValueError names the first row that is not finite, or the width if it is not the store's."""
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != store.key_dim:
        raise ValueError(f"queries must be [q, {store.key_dim}], as the store's keys, not {list(queries.shape)}")
    wrong = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(wrong):
        raise ValueError(f"query row {wrong[0]} is not finite; a query must hold numbers only")
    return queries


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def exact_search(
    store: Store,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    query_documents: Int64[np.ndarray, " q"] | None = None,
    on_block: Callable[[int], Any] = lambda rows: None,
) -> Hits:
    """The k nearest searchable rows of each query, in bounded memory.

    The matrix product only proposes candidates; distances are computed anew from the differences, so that the order
    does not depend on how the work was cut, and equal distances are ordered by row.

    Arguments:
        query_documents: rows of this document row are left out for the query (-1: nothing is).
        on_block: called with the number of query-key pairs done.
    """
    import torch

    check_k(k)
    num_queries = min(len(queries), 1024) or 1
    block = max(_BLOCK_SCORES // num_queries, 1024)
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float64)
    for start, stop in _blocks(store.num_chunks, block):
        found = _KeyBlock(store, start, stop, torch)
        for low in range(0, len(queries), num_queries):
            part = slice(low, low + num_queries)
            documents = None if query_documents is None else query_documents[part]
            new_rows, new_distances = found.nearest(queries[part], k, documents, distances[part, -1])
            rows[part], distances[part] = _merge(rows[part], distances[part], new_rows, new_distances, k)
            on_block(len(queries[part]) * (stop - start))
    return rows, (-distances).astype(np.float32), rows >= 0


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


class _KeyBlock:
    """The searchable keys of a range of rows, ready for many queries."""

    def __init__(self, store: Store, start: int, stop: int, torch: Any) -> None:
        searchable = store.searchable_rows
        low, high = np.searchsorted(searchable, [start, stop])
        self.rows = searchable[low:high]
        keys = store.key_block(start, stop)
        self.keys = keys if len(self.rows) == stop - start else keys[self.rows - start]
        self.documents = store.document_rows(self.rows)
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.matrix = torch.from_numpy(np.ascontiguousarray(self.keys)).to(self.device)
        self.halves = self.matrix.square().sum(1) / 2
        self.scale = float(self.halves.max()) if len(self.rows) else 0.0

    def nearest(
        self, queries: np.ndarray, k: int, documents: np.ndarray | None, border: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates [q, up to k + 16] with their exact squared distances.

        Infinite where excluded, or certainly beyond `border` [q], the k-th distance found so far.
        """
        if not len(self.rows):
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0))
        scores = self._scores(queries, documents)
        top, chosen = (x.cpu().numpy() for x in scores.topk(min(k + _OVER_SELECT, len(self.rows)), dim=1))
        norms = np.square(queries).sum(1)
        tolerance = 1e-5 * (self.scale + np.sqrt(norms * 2 * self.scale)) + 1e-30  # more than rounding can move a score
        needed = np.isfinite(top) & (norms[:, None] - 2 * top <= (border + 4 * tolerance)[:, None])
        distances = self._distances(queries, chosen, needed)
        rows = self.rows[chosen]
        for q in self._uncertain(top, needed, tolerance, k):
            rows[q], distances[q] = self._all_close(
                queries[q], scores[q], top[q, k - 1] - 3 * tolerance[q], top.shape[1]
            )
        return rows, distances

    def _scores(self, queries: np.ndarray, documents: np.ndarray | None) -> Any:
        """Inner product - |key|^2 / 2 [q, c]: the order of -squared L2; -inf where the document is excluded."""
        batch = self.torch.from_numpy(queries).to(self.device)
        scores = self.torch.addmm(-self.halves, batch, self.matrix.T)
        if documents is not None and len(documents) and documents.max() >= 0:
            present = documents[documents >= 0]
            if self.documents[0] <= present.max() and self.documents[-1] >= present.min():
                same = self.torch.from_numpy(documents[:, None] == self.documents[None]).to(self.device)
                scores.masked_fill_(same, -self.torch.inf)
        return scores

    def _distances(self, queries: np.ndarray, chosen: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Squared distances [q, c] where needed, else infinite; each depends on its two vectors only."""
        torch = self.torch
        distances = np.full(chosen.shape, np.inf)
        pairs = np.argwhere(needed)
        for start in range(0, len(pairs), _RESCORED_PAIRS):
            q, c = pairs[start : start + _RESCORED_PAIRS].T
            differences = torch.from_numpy(self.keys[chosen[q, c]]) - torch.from_numpy(queries[q])
            distances[q, c] = differences.square_().sum(-1, dtype=torch.float64).numpy()
        return distances

    def _uncertain(self, top: np.ndarray, needed: np.ndarray, tolerance: np.ndarray, k: int) -> list[int]:
        """Queries with more rows near the k-th score than candidates were kept (many duplicates)."""
        if top.shape[1] == len(self.rows) or top.shape[1] <= k:
            return []
        gap = np.where(needed[:, -1], top[:, k - 1] - np.where(needed[:, -1], top[:, -1], 0), np.inf)
        return np.flatnonzero(gap <= 2 * tolerance).tolist()

    def _all_close(
        self, query: np.ndarray, scores: Any, least: float | np.floating, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `width` nearest of all rows whose score is at least `least`."""
        close = (scores >= float(least)).nonzero()[:, 0].cpu().numpy()
        distances = self._distances(query[None], close[None], np.ones((1, len(close)), bool))[0]
        order = np.lexsort((close, distances))[:width]
        return self.rows[close[order]], distances[order]


def _merge(
    rows: np.ndarray, distances: np.ndarray, new_rows: np.ndarray, new_distances: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of two lists, by distance, then row; infinite distances become row -1."""
    rows, distances = np.concatenate([rows, new_rows], 1), np.concatenate([distances, new_distances], 1)
    rows = np.where(np.isfinite(distances), rows, -1)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


# Approximate indexes


class ApproximateIndex:
    """Parts of consecutive rows, each served by ScaNN or faiss; candidates are re-scored with the stored keys."""

    def __init__(self, store: Store, folder: Path, record: dict[str, Any], parts: list[tuple[np.ndarray, Any]]) -> None:
        self.store, self.folder, self.record, self.parts = store, folder, record, parts
        self.kind: str = record["kind"]
        self.recall: float = record["recall"]["recall"]
        self.num_rows = sum(len(rows) for rows, _ in parts)

    def search(self, queries: Float[np.ndarray, "q d"], k: int) -> Hits:
        """The k nearest rows of each query that the engine finds."""
        check_k(k)
        queries = check_queries(queries, self.store)
        rows = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf)
        if not len(queries):
            return rows, (-distances).astype(np.float32), rows >= 0
        for part_rows, search in self.parts:
            local = search(queries, min(k, len(part_rows)))
            found = np.where(local >= 0, part_rows[np.maximum(local, 0)], -1)
            rows, distances = _merge(rows, distances, found, rescore(self.store, queries, found), k)
        return rows, (-distances).astype(np.float32), rows >= 0


def rescore(store: Store, queries: Float32[np.ndarray, "q d"], rows: Int64[np.ndarray, "q k"]) -> np.ndarray:
    """Squared distances [q, k] of each query to the stored keys of its rows; infinite where the row is -1."""
    distances = np.full(rows.shape, np.inf)
    pairs = np.argwhere(rows >= 0)
    for start in range(0, len(pairs), _RESCORED_PAIRS):
        q, c = pairs[start : start + _RESCORED_PAIRS].T
        differences = store.keys(rows[q, c]).astype(np.float64) - queries[q]
        distances[q, c] = np.einsum("pd,pd->p", differences, differences)
    return distances


def _settings(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a kind; None is the default by the number of rows of the part."""
    common = {"training_sample": 100_000, "max_part_rows": MAX_PART_ROWS, "seed": 0}
    own = {
        "scann": {"leaves": None, "leaves_to_search": None, "reorder": None},
        "faiss": {"lists": None, "probes": None},
    }
    defaults = {**own[kind], **common}
    _refuse_unknown(given, defaults)
    chosen = {**defaults, **given}
    if chosen["max_part_rows"] >= 1 << 32:
        raise ValueError(
            f"max_part_rows must be below 2^32, not {chosen['max_part_rows']}: ScaNN numbers rows with 32 bits"
        )
    for name, value in chosen.items():
        if name != "seed" and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return chosen


def _refuse_unknown(given: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the index takes no setting {unknown[0]!r}; it takes {', '.join(known) or 'none'}")


def _key(store: Store, kind: str, chosen: dict[str, Any]) -> str:
    """The folder's name: settings and the state of the store (its generation and the checksums of its keys)."""
    return stable_hash({"kind": kind, "settings": chosen, "store": store.fingerprint})[:16]


def check_searchable(store: Store) -> None:
    """ValueError for a store of which no chunk is long enough to be found."""
    if not len(store.searchable_rows):
        raise ValueError(
            f"{store.path} has no chunk of at least {store.min_chunk_len} tokens to index; "
            "build it with a smaller min_chunk_len"
        )


def _write_index(store: Store, kind: str, chosen: dict[str, Any], folder: Path) -> None:
    check_searchable(store)
    with folder_written_aside(folder) as aside:
        for number, (start, stop) in enumerate(_blocks(len(store.searchable_rows), chosen["max_part_rows"])):
            part = aside / f"{number:05d}"
            part.mkdir()
            _write_part(store, kind, chosen, store.searchable_rows[start:stop], part)
        record = {"kind": kind, "settings": chosen, "store": store.fingerprint, "rows": len(store.searchable_rows)}
        record |= {"parts": sorted(part.name for part in aside.iterdir()), "files": folder_record(aside)}
        index = _open_parts(store, aside, {**record, "recall": {"recall": 0.0}})
        record["recall"] = measure_recall(index, store, seed=chosen["seed"])
        save_json(aside / "index.json", record)
    log.info(
        "%s index of %d rows: recall@%d %.4f", kind, record["rows"], record["recall"]["k"], record["recall"]["recall"]
    )


def measure_recall(index: Any, store: Store, k: int = 10, sample: int = 256, seed: int = 0) -> dict[str, Any]:
    """Share of the true k nearest rows that the index finds, over sampled rows as queries, each without itself.

    A row found counts if it is no farther than the k-th true one (up to rounding), so that equal distances do not lower
    the figure.
    """
    rows = store.searchable_rows
    chosen = np.sort(np.random.default_rng(seed).choice(rows, min(sample, len(rows)), replace=False))
    k = min(k, len(rows) - 1)
    if k < 1:
        return {"k": 1, "queries": 0, "recall": 1.0, "seed": seed}
    queries = store.keys(chosen)
    exact = _without_self(exact_search(store, queries, k + 1), chosen, k)
    found = _without_self(index.search(queries, k + 1), chosen, k)
    recall = float((found >= exact[:, -1:] * (1 + 1e-6)).mean())  # scores are negative
    return {"k": k, "queries": len(chosen), "recall": recall, "seed": seed}


def _without_self(hits: Hits, own: np.ndarray, k: int) -> np.ndarray:
    """Scores [q, k] of the hits that are not the query's own row (-inf where fewer)."""
    rows, scores, _ = hits
    scores = np.where(rows == own[:, None], -np.inf, scores)
    return -np.sort(-scores, axis=1)[:, :k]


def _open_folder(store: Store, folder: Path) -> ApproximateIndex:
    return _open_parts(store, folder, load_json(folder / "index.json"))


def _open_parts(store: Store, folder: Path, record: dict[str, Any]) -> ApproximateIndex:
    """Open every part; checksums are compared first, since ScaNN aborts the process on a missing or damaged file."""
    check_files(folder, record["files"], checksums=True)
    opener = {"scann": _open_scann, "faiss": _open_faiss}[record["kind"]]
    parts = []
    for name in record["parts"]:
        rows = open_npy(folder / name / "rows.npy")
        parts.append((rows, opener(store, folder / name, len(rows), record["settings"])))
    return ApproximateIndex(store, folder, record, parts)


def _write_part(store: Store, kind: str, chosen: dict[str, Any], rows: np.ndarray, part: Path) -> None:
    save_npy(part / "rows.npy", rows)
    keys = np.empty((len(rows), store.key_dim), np.float32)
    for start, stop in _blocks(len(rows), 1 << 16):
        keys[start:stop] = store.keys(rows[start:stop])
    writer = {"scann": _write_scann, "faiss": _write_faiss}[kind]
    writer(keys, part, chosen)


# ScaNN


def _write_scann(keys: np.ndarray, part: Path, chosen: dict[str, Any]) -> None:
    """Brute force below 20k rows, quantised codes with re-ranking below 100k, a tree in front of them above."""
    import scann

    rows = len(keys)
    data = _with_norms(keys)
    default_k = min(100, rows)
    builder = scann.scann_ops_pybind.builder(data, default_k, "dot_product").set_n_training_threads(0)
    tree = rows >= SCANN_TREE_ROWS or chosen["leaves"] is not None
    if tree:
        leaves = chosen["leaves"] or round(rows**0.5)
        search = chosen["leaves_to_search"] or max(leaves // 10, min(leaves, 20))
        builder = builder.tree(leaves, search, min(chosen["training_sample"], rows), quantize_centroids=False)
    if rows < SCANN_BRUTE_ROWS and not tree:
        builder = builder.score_brute_force()
    else:
        per_block = max(2, -(-data.shape[1] // 256))  # up to 256 blocks keep the fast path
        sample = min(chosen["training_sample"], rows)
        builder = builder.score_ah(per_block, anisotropic_quantization_threshold=0.2, training_sample_size=sample)
        builder = builder.reorder(min(chosen["reorder"] or 200, rows))
    folder = part / "scann"
    folder.mkdir()
    builder.build().serialize(str(folder), relative_path=True)


def _with_norms(keys: np.ndarray) -> np.ndarray:
    """Keys with -|x|^2 / 2 appended: inner products with (q, 1) then have the order of -squared L2."""
    return np.concatenate([keys, -np.square(keys).sum(1, keepdims=True) / 2], axis=1, dtype=np.float32)


def _open_scann(store: Store, part: Path, rows: int, chosen: dict[str, Any]) -> Callable[[np.ndarray, int], np.ndarray]:
    import scann

    searcher = scann.scann_ops_pybind.load_searcher(str(part / "scann"))

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        ones = np.ones((len(queries), 1), np.float32)
        reorder = max(k, min(chosen["reorder"] or 200, rows))
        ids, scores = searcher.search_batched(
            np.concatenate([queries, ones], axis=1), final_num_neighbors=k, pre_reorder_num_neighbors=reorder
        )
        return _padded(np.where(np.isnan(scores), -1, ids.astype(np.int64)), k)

    return search


def _padded(ids: np.ndarray, k: int) -> np.ndarray:
    return np.pad(ids[:, :k], ((0, 0), (0, max(k - ids.shape[1], 0))), constant_values=-1)


# faiss


def _write_faiss(keys: np.ndarray, part: Path, chosen: dict[str, Any]) -> None:
    """Flat (exact) below 100k rows, else inverted lists trained on a uniform seeded sample."""
    import faiss

    rows, width = keys.shape
    if rows < FAISS_FLAT_ROWS and chosen["lists"] is None:
        index = faiss.IndexFlatL2(width)
    else:
        lists = min(chosen["lists"] or round(4 * rows**0.5), rows)
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists)
        size = min(max(chosen["training_sample"], 40 * lists), rows)
        index.train(keys[np.sort(np.random.default_rng(chosen["seed"]).choice(rows, size, replace=False))])
        index.nprobe = min(chosen["probes"] or max(lists // 20, 16), lists)
    index.add(keys)
    faiss.write_index(index, str(part / "faiss.index"))


def _open_faiss(store: Store, part: Path, rows: int, chosen: dict[str, Any]) -> Callable[[np.ndarray, int], np.ndarray]:
    import faiss

    index = faiss.read_index(str(part / "faiss.index"))
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_all_gpus(index)
    return lambda queries, k: _padded(index.search(queries, k)[1], k)
