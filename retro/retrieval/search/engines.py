"""ScaNN and faiss: the keys of a segment as codes in memory, and the candidates that they give.

    codes                        engine  in memory, of a row of d dimensions          searched
    brute                        scann   the key, 4 (d + 1) bytes                     all rows, exactly
    ah                           scann   4 bits for every 2 or more dimensions        all, from 100,000 rows on a tree
    ah-float32 -bfloat16 -int8   scann   the same and a copy of the key, to order candidates by
    flat                         faiss   the key, 4 d bytes                           all rows, exactly
    sq8, pq                      faiss   d bytes; one for every 8 dimensions          all rows
    ivf-flat, ivf-sq8, ivf-pq    faiss   the same and an 8-byte id                    some of the inverted lists

Candidates are local rows; whoever asks re-ranks them by the stored keys. ScaNN searches inner products of (q, 1) with
(x, -|x|^2 / 2), which have the order of -squared L2. It pads with row 0 and NaN, faiss with row -1; both become -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import log2
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.search.exact import blocks
from retro.retrieval.store.store import Store

SCANN_BRUTE_ROWS, SCANN_TREE_ROWS, SCANN_SOAR_ROWS = 20_000, 100_000, 5_000_000
FAISS_FLAT_ROWS = 100_000
KEYS_IN_MEMORY = 1 << 31  # bytes of keys of a segment above which only codes stay in memory
_FEW_ROWS = 1000  # too few to train codes on
_BLOCK_BYTES = 1 << 24  # of keys read at a time
_GPU_LIMIT = 2048  # of candidates and of lists, in faiss on a GPU


@dataclass(frozen=True)
class IndexLayout:
    """How the keys of one segment are held.

    lists: leaves of ScaNN's tree or inverted lists of faiss; 0 = every row is compared.
    block: dimensions of one code: of an AH block or a PQ code; 0 where keys are not cut into blocks.
    bits: of a PQ code.
    soar: whether ScaNN keeps each row in two leaves.
    """

    engine: str
    codes: str
    lists: int = 0
    block: int = 0
    bits: int = 0
    soar: bool = False

    @property
    def is_exact(self) -> bool:
        return self.codes in ("brute", "flat")

    @property
    def has_copy(self) -> bool:
        """Whether the engine orders candidates by a copy of the keys that it holds beside the codes."""
        return self.codes.startswith("ah-")

    def code_bytes(self, width: int) -> float:
        """Bytes that a search reads of each row it compares."""
        if self.engine == "scann":
            blocks = -(-(width + 1) // (self.block or 1)) / 2
            return 4.0 * (width + 1) if self.is_exact else blocks * (1 + self.soar)
        code = self.codes.removeprefix("ivf-")
        ids = 8.0 if self.lists else 0.0
        return ids + {"flat": 4 * width, "sq8": width, "pq": width // (self.block or 1)}[code]

    def row_bytes(self, width: int) -> float:
        """Bytes of memory that a row takes, by the table above."""
        copy = {"ah-float32": 4, "ah-bfloat16": 2, "ah-int8": 1}.get(self.codes, 0)
        return self.code_bytes(width) + copy * (width + 1)

    def peak_bytes(self, rows: int, width: int, training_sample: int) -> float:
        """Memory that building a segment of so many rows takes at its peak.

        ScaNN: the float32 keys twice, ours and its own, 8 rows (d + 1), its training sample, 4 sample (d + 1), and
        codes, at first of a byte for each block. faiss: what the index holds, and the float32 training sample. Both: 48
        MiB for the block of keys that is being read.
        """
        held, fixed = rows * self.row_bytes(width), 3.0 * _BLOCK_BYTES
        if self.engine == "faiss":
            sample = 0 if self.codes == "flat" else min(rows, max(training_sample, 40 * self.lists))
            return fixed + held + 4.0 * width * sample
        key = 4.0 * (width + 1)
        held -= rows * key if self.codes in ("brute", "ah-float32") else 0  # its own keys are counted already
        training = 0 if self.is_exact else min(rows, training_sample) * key + rows * -(-(width + 1) // self.block)
        return fixed + 2 * rows * key + training + held


def choose_layout(engine: str, settings: dict[str, Any], rows: int, width: int) -> IndexLayout:
    """The layout for a segment of so many rows: what the settings name, and where they leave it open

        rows from      scann                                    faiss
        0              brute                                    flat
        20,000         ah-float32                               flat
        100,000        ah-float32, a tree of sqrt(rows) leaves  ivf-flat, 4 sqrt(rows) inverted lists
        5,000,000      the same, each row in two leaves (SOAR)  ivf-flat
        keys > 2 GiB   ah in place of ah-float32                ivf-pq in place of ivf-flat

    Below 1,000 rows codes that are asked for give way to whole keys, unless leaves or lists are asked for too.
    """
    return ENGINES[engine].layout(settings, rows, width, 4 * rows * (width + 1) <= KEYS_IN_MEMORY)


def _choose_scann(settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
    leaves = settings["leaves"] or (round(rows**0.5) if rows >= SCANN_TREE_ROWS else 0)
    codes = settings["codes"]
    if not codes and rows < SCANN_BRUTE_ROWS and not leaves:
        codes = "brute"
    elif not codes:
        codes = "ah-float32" if keys_fit else "ah"
    too_few = rows < 16 or (rows < _FEW_ROWS and not settings["leaves"])
    if codes == "brute" or too_few:
        return IndexLayout("scann", "brute")
    block = max(2, -(-(width + 1) // 256))  # up to 256 blocks keep the fast path
    soar = rows >= SCANN_SOAR_ROWS if settings["soar"] is None else settings["soar"]
    return IndexLayout("scann", codes, min(leaves, rows), block, soar=bool(leaves and soar))


def _choose_faiss(settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
    codes = settings["codes"]
    if not codes and rows < FAISS_FLAT_ROWS and not settings["lists"]:
        codes = "flat"
    elif not codes:
        codes = "ivf-flat" if keys_fit else "ivf-pq"
    if rows < _FEW_ROWS and not settings["lists"]:
        codes = "flat"
    lists = min(settings["lists"] or round(4 * rows**0.5), rows) if codes.startswith("ivf") else 0
    if not codes.endswith("pq"):
        return IndexLayout("faiss", codes, lists)
    block = max(size for size in range(1, 9) if width % size == 0)
    sample = min(max(settings.get("training_sample") or rows, 40 * lists), rows)
    bits = int(min(max(log2(sample / 39), 1), 8))  # faiss wants 39 rows for each of the 2^bits centroids
    return IndexLayout("faiss", codes, lists, block, bits)


@runtime_checkable
class IndexEngine(Protocol):
    """candidates: the `wanted` local rows that the engine takes for the nearest, or all that it `considered` where it
    cannot order them well; -1 where there are fewer."""

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]: ...


def write_engine(
    layout: IndexLayout, store: Store, rows: Int64[np.ndarray, " c"], folder: Path, training_sample: int, seed: int
) -> None:
    """Write the codes of the keys of some store rows into a folder, trained on a uniform sample of them."""
    ENGINES[layout.engine].write(layout, store, rows, folder, training_sample, seed)


def open_engine(layout: IndexLayout, folder: Path) -> IndexEngine:
    """The engine of a folder that `write_engine` wrote and whose files were checked."""
    return ENGINES[layout.engine].open(layout, folder)


def _key_blocks(store: Store, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start, stop in blocks(0, len(rows), max(_BLOCK_BYTES // (4 * store.key_dim), 1)):
        yield slice(start, stop), store.keys(rows[start:stop])


# ScaNN


def _write_scann(
    layout: IndexLayout, store: Store, rows: np.ndarray, folder: Path, training_sample: int, seed: int
) -> None:
    """ScaNN draws its own uniform sample, by a fixed seed of its own."""
    import scann
    from scann.scann_ops.py.scann_builder import ReorderType

    data = np.empty((len(rows), store.key_dim + 1), np.float32)
    for part, keys in _key_blocks(store, rows):
        data[part, :-1] = keys
        data[part, -1] = -np.square(keys).sum(1) / 2
    sample = min(training_sample, len(rows))
    builder = scann.scann_ops_pybind.builder(data, min(100, len(rows)), "dot_product").set_n_training_threads(0)
    if layout.lists:
        soar = {"soar_lambda": 1.5} if layout.soar else {}
        searched = max(layout.lists // 10, 1)
        builder = builder.tree(layout.lists, searched, max(sample, layout.lists), quantize_centroids=False, **soar)
    if layout.is_exact:
        builder = builder.score_brute_force()
    else:
        builder = builder.score_ah(layout.block, anisotropic_quantization_threshold=0.2, training_sample_size=sample)
        copy = layout.codes.removeprefix("ah").removeprefix("-").upper()
        builder = builder.reorder(min(100, len(rows)), ReorderType[copy]) if copy else builder
    (folder / "scann").mkdir()
    builder.build().serialize(str(folder / "scann"), relative_path=True)


class ScannEngine:
    """A searcher of ScaNN; large batches are spread over threads."""

    _THREAD_QUERIES = 256

    def __init__(self, layout: IndexLayout, folder: Path) -> None:
        import scann

        self.layout = layout
        self._searcher = scann.scann_ops_pybind.load_searcher(str(folder / "scann"))

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]:
        """See `IndexEngine`; a copy in bfloat16 or int8 orders candidates almost: twice as many as wanted are given."""
        given = {"brute": wanted, "ah-float32": wanted, "ah": considered}
        final = given.get(self.layout.codes, min(2 * wanted + 16, considered))
        queries = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
        name = "search_batched_parallel" if len(queries) > self._THREAD_QUERIES else "search_batched"
        ids, scores = getattr(self._searcher, name)(
            queries,
            final_num_neighbors=final,
            pre_reorder_num_neighbors=None if self.layout.is_exact else considered,
            leaves_to_search=lists or None,
        )
        return np.where(np.isnan(scores), -1, ids.astype(np.int64))


# faiss


def _write_faiss(
    layout: IndexLayout, store: Store, rows: np.ndarray, folder: Path, training_sample: int, seed: int
) -> None:
    import faiss

    index = faiss.index_factory(store.key_dim, _factory(layout, store.key_dim))
    if layout.codes != "flat":
        size = min(max(training_sample, 40 * layout.lists), len(rows))
        sample = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))
        if layout.lists and _num_gpus():  # the coarse k-means is what takes long
            faiss.extract_index_ivf(index).clustering_index = faiss.index_cpu_to_all_gpus(
                faiss.IndexFlatL2(store.key_dim)
            )
        index.train(store.keys(rows[sample]))
    for _, keys in _key_blocks(store, rows):
        index.add(keys)
    faiss.write_index(index, str(folder / "faiss.index"))


def _factory(layout: IndexLayout, width: int) -> str:
    code = {"flat": "Flat", "sq8": "SQ8"}.get(layout.codes.removeprefix("ivf-"))
    code = code or f"PQ{width // layout.block}x{layout.bits}"
    return f"IVF{layout.lists},{code}" if layout.lists else code


def _num_gpus() -> int:
    import faiss

    return getattr(faiss, "get_num_gpus", lambda: 0)()


class FaissEngine:
    """An index of faiss, on all GPUs where faiss-gpu is installed and has the kind (flat and inverted lists)."""

    def __init__(self, layout: IndexLayout, folder: Path) -> None:
        import faiss

        self.layout = layout
        self._index = faiss.read_index(str(folder / "faiss.index"))

    @cached_property
    def _on_gpu(self) -> Any:
        import faiss

        if not _num_gpus() or self.layout.codes in ("sq8", "pq"):
            return None
        return faiss.index_cpu_to_all_gpus(self._index)

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]:
        """See `IndexEngine`."""
        import faiss

        count = wanted if self.layout.codes.endswith("flat") else considered
        if self._on_gpu is not None and max(count, lists) <= _GPU_LIMIT:
            if lists:
                faiss.GpuParameterSpace().set_index_parameter(self._on_gpu, "nprobe", lists)
            return self._on_gpu.search(queries, count)[1]
        params = faiss.SearchParametersIVF(nprobe=lists) if lists else None
        return self._index.search(queries, count, params=params)[1]


# The table


@dataclass(frozen=True)
class EngineKind:
    """All that is known of an engine by its name, which is that of the module it needs.

    codes: what may stand behind its name, as in "faiss:ivf-pq".
    settings: names of its own; None is the default by the number of rows.
    searched: the one of these that fixes how many lists a search visits.
    layout, write, open: see `choose_layout`, `write_engine` and `open_engine`.
    remedy: how to install it.
    """

    codes: tuple[str, ...]
    settings: tuple[str, ...]
    searched: str
    layout: Callable[[dict[str, Any], int, int, bool], IndexLayout]
    write: Callable[..., None]
    open: Callable[[IndexLayout, Path], IndexEngine]
    remedy: str


ENGINES = {  # "auto" is the first that is installed
    "scann": EngineKind(
        codes=("brute", "ah", "ah-float32", "ah-bfloat16", "ah-int8"),
        settings=("leaves", "leaves_to_search", "soar"),
        searched="leaves_to_search",
        layout=_choose_scann,
        write=_write_scann,
        open=ScannEngine,
        remedy="pip install scann (Linux)",
    ),
    "faiss": EngineKind(
        codes=("flat", "sq8", "pq", "ivf-flat", "ivf-sq8", "ivf-pq"),
        settings=("lists", "probes"),
        searched="probes",
        layout=_choose_faiss,
        write=_write_faiss,
        open=FaissEngine,
        remedy="pip install faiss-cpu, or retro-lm[gpu] for faiss-gpu",
    ),
}
