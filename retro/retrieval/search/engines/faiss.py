"""faiss: whole keys, scalar and product codes, with inverted lists or without; it pads with row -1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import log2
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.common.devices import find_device, torch_threads
from retro.common.pretrained import first_line
from retro.retrieval.search.engines.layout import BLOCK_BYTES, FEW_ROWS, EngineKind, IndexLayout, Work, key_blocks
from retro.retrieval.search.segments import StoreRows
from retro.retrieval.store.store import Store

FAISS_FLAT_ROWS = 100_000
_GPU_LIMIT = 2048  # of candidates and of lists, in faiss on a GPU


class FaissKind(EngineKind):
    """See `EngineKind`."""

    module = "faiss"
    codes = ("flat", "sq8", "pq", "ivf-flat", "ivf-sq8", "ivf-pq")
    remedy = 'pip install "retro-lm[faiss]", or "retro-lm[gpu]" for faiss on GPUs'
    settings = ("lists", "probes")
    searched = "probes"

    def layout(self, settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
        """See `choose_layout`."""
        codes = settings["codes"]
        if not codes and rows < FAISS_FLAT_ROWS and not settings["lists"]:
            codes = "flat"
        elif not codes:
            codes = "ivf-flat" if keys_fit else "ivf-pq"
        if rows < FEW_ROWS and not settings["lists"]:
            codes = "flat"
        lists = min(settings["lists"] or round(4 * rows**0.5), rows) if codes.startswith("ivf") else 0
        if not codes.endswith("pq"):
            return IndexLayout("faiss", codes, lists)
        block = max(size for size in range(1, 9) if width % size == 0)
        sample = min(max(settings.get("training_sample") or rows, 40 * lists), rows)
        bits = int(min(max(log2(sample / 39), 1), 8))  # faiss wants 39 rows for each of the 2^bits centroids
        return IndexLayout("faiss", codes, lists, block, bits)

    def write(self, layout: IndexLayout, store: Store, rows: StoreRows, folder: Path, work: Work) -> None:
        """See `EngineKind`."""
        import faiss

        index = faiss.index_factory(store.key_dim, _factory(layout, store.key_dim))
        if layout.codes != "flat":
            size = min(max(work.training_sample, 40 * layout.lists), len(rows))
            sample = np.sort(np.random.default_rng(work.seed).choice(len(rows), size, replace=False))
            if layout.lists and (gpus := faiss_gpus()):  # the coarse k-means is what takes long
                faiss.extract_index_ivf(index).clustering_index = faiss.index_cpu_to_gpus_list(
                    faiss.IndexFlatL2(store.key_dim), gpus=gpus
                )
            index.train(store.keys(rows[sample]))
        for _, keys in key_blocks(store, rows):
            index.add(keys)
        faiss.write_index(index, str(folder / "faiss.index"))

    def open(self, layout: IndexLayout, folder: Path) -> FaissEngine:
        """See `EngineKind`."""
        return FaissEngine(layout, folder)

    def code_bytes(self, layout: IndexLayout, width: int) -> float:
        """The code, and the id where there are lists."""
        code = {"flat": 4 * width, "sq8": width, "pq": width // (layout.block or 1)}
        return code[layout.codes.removeprefix("ivf-")] + (8.0 if layout.lists else 0.0)

    def peak_bytes(self, layout: IndexLayout, rows: int, width: int, training_sample: int) -> float:
        """What the index holds, and the float32 training sample; 48 MiB for the block of keys that is being read."""
        sample = 0 if layout.codes == "flat" else min(rows, max(training_sample, 40 * layout.lists))
        return 3.0 * BLOCK_BYTES + rows * self.row_bytes(layout, width) + 4.0 * width * sample

    def file_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """Codes, centroids of the lists, and the codebook."""
        codebook = 4 * width << layout.bits if layout.bits else 0
        return rows * self.row_bytes(layout, width) + layout.lists * 4 * width + codebook

    def is_exact(self, layout: IndexLayout) -> bool:
        """See `EngineKind`."""
        return layout.codes.endswith("flat")


def _factory(layout: IndexLayout, width: int) -> str:
    code = {"flat": "Flat", "sq8": "SQ8"}.get(layout.codes.removeprefix("ivf-"))
    code = code or f"PQ{width // layout.block}x{layout.bits}"
    return f"IVF{layout.lists},{code}" if layout.lists else code


def faiss_gpus() -> list[int]:
    """Where faiss-gpu runs: on all GPUs, or the one that RETRO_DEVICE names; nowhere if that is the CPU."""
    import faiss

    count = getattr(faiss, "get_num_gpus", lambda: 0)()
    device = find_device() if count else None
    if device is None or device.type != "cuda":
        return []
    return list(range(count)) if device.index is None else [device.index]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, and for faiss where it is installed."""
    with torch_threads(1):
        try:
            import faiss
        except ImportError:
            yield
            return
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(threads)


def read_index(file: Path) -> Any:
    """An index of faiss; ValueError names a file that is none."""
    import faiss

    try:
        return faiss.read_index(str(file))
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read ({first_line(error)}); build the index again") from None


class FaissEngine:
    """An index of faiss; on GPUs (`faiss_gpus`) where faiss-gpu is installed and has the kind: flat, inverted lists."""

    def __init__(self, layout: IndexLayout, folder: Path) -> None:
        self.layout, self._searching = layout, Lock()  # of a GPU's index, which takes one search at a time
        self._index = read_index(folder / "faiss.index")

    @cached_property
    def _on_gpu(self) -> Any:
        import faiss

        gpus = [] if self.layout.codes in ("sq8", "pq") else faiss_gpus()
        return faiss.index_cpu_to_gpus_list(self._index, gpus=gpus) if gpus else None

    def candidates(
        self, queries: Float32[np.ndarray, "q d"], wanted: int, considered: int, lists: int
    ) -> Int64[np.ndarray, "q c"]:
        """See `IndexEngine`."""
        import faiss

        count = wanted if self.layout.codes.endswith("flat") else considered
        with self._searching:
            if self._on_gpu is not None and max(count, lists) <= _GPU_LIMIT:
                if lists:
                    faiss.GpuParameterSpace().set_index_parameter(self._on_gpu, "nprobe", lists)
                return self._on_gpu.search(queries, count)[1]
        params = faiss.SearchParametersIVF(nprobe=lists) if lists else None
        return self._index.search(queries, count, params=params)[1]
