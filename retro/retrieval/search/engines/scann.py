"""ScaNN, which searches inner products of (q, 1) with (x, -|x|^2 / 2): these have the order of -squared L2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.retrieval.search.engines.layout import BLOCK_BYTES, FEW_ROWS, EngineKind, IndexLayout, Work, key_blocks
from retro.retrieval.search.segments import StoreRows
from retro.retrieval.store.store import Store

BRUTE_ROWS, TREE_ROWS, SOAR_ROWS = 20_000, 100_000, 5_000_000
_COPIES = {"ah-float32": 4, "ah-bfloat16": 2, "ah-int8": 1}  # bytes of a dimension


class ScannKind(EngineKind):
    """See `EngineKind`."""

    module = "scann"
    codes = ("brute", "ah", "ah-float32", "ah-bfloat16", "ah-int8")
    remedy = "pip install scann (Linux)"
    settings = ("leaves", "leaves_to_search", "soar")
    searched = "leaves_to_search"

    def layout(self, settings: dict[str, Any], rows: int, width: int, keys_fit: bool) -> IndexLayout:
        """See `choose_layout`."""
        leaves = settings["leaves"] or (round(rows**0.5) if rows >= TREE_ROWS else 0)
        codes = settings["codes"]
        if not codes and rows < BRUTE_ROWS and not leaves:
            codes = "brute"
        elif not codes:
            codes = "ah-float32" if keys_fit else "ah"
        too_few = rows < 16 or (rows < FEW_ROWS and not settings["leaves"])
        if codes == "brute" or too_few:
            return IndexLayout("scann", "brute")
        block = max(2, -(-(width + 1) // 256))  # up to 256 blocks keep the fast path
        soar = rows >= SOAR_ROWS if settings["soar"] is None else settings["soar"]
        return IndexLayout("scann", codes, min(leaves, rows), block, soar=bool(leaves and soar))

    def write(self, layout: IndexLayout, store: Store, rows: StoreRows, folder: Path, work: Work) -> None:
        """ScaNN draws its own uniform sample, by a fixed seed of its own."""
        import scann
        from scann.scann_ops.py.scann_builder import ReorderType

        data = np.empty((len(rows), store.key_dim + 1), np.float32)
        for part, keys in key_blocks(store, rows):
            data[part, :-1] = keys
            data[part, -1] = -np.square(keys).sum(1) / 2
        sample = min(work.training_sample, len(rows))
        builder = scann.scann_ops_pybind.builder(data, min(100, len(rows)), "dot_product").set_n_training_threads(0)
        if layout.lists:
            soar = {"soar_lambda": 1.5} if layout.soar else {}
            searched = max(layout.lists // 10, 1)
            builder = builder.tree(layout.lists, searched, max(sample, layout.lists), quantize_centroids=False, **soar)
        if self.is_exact(layout):
            builder = builder.score_brute_force()
        else:
            builder = builder.score_ah(
                layout.block, anisotropic_quantization_threshold=0.2, training_sample_size=sample
            )
            copy = layout.codes.removeprefix("ah").removeprefix("-").upper()
            builder = builder.reorder(min(100, len(rows)), ReorderType[copy]) if copy else builder
        (folder / "scann").mkdir()
        builder.build().serialize(str(folder / "scann"), relative_path=True)

    def open(self, layout: IndexLayout, folder: Path) -> ScannEngine:
        """See `EngineKind`."""
        return ScannEngine(layout, folder)

    def code_bytes(self, layout: IndexLayout, width: int) -> float:
        """4 bits for each block, twice with SOAR; a key, and its norm."""
        blocks = -(-(width + 1) // (layout.block or 1)) / 2
        return 4.0 * (width + 1) if self.is_exact(layout) else blocks * (1 + layout.soar)

    def row_bytes(self, layout: IndexLayout, width: int) -> float:
        """Code and copy."""
        return self.code_bytes(layout, width) + _COPIES.get(layout.codes, 0) * (width + 1)

    def peak_bytes(self, layout: IndexLayout, rows: int, width: int, training_sample: int) -> float:
        """The float32 keys twice, ours and its own, 8 rows (d + 1), its training sample, 4 sample (d + 1), and codes,
        at first of a byte for each block; 48 MiB for the block of keys that is being read."""
        key, held = 4.0 * (width + 1), rows * self.row_bytes(layout, width)
        held -= rows * key if layout.codes in ("brute", "ah-float32") else 0  # its own keys are counted already
        training = 0.0
        if not self.is_exact(layout):
            training = min(rows, training_sample) * key + rows * -(-(width + 1) // layout.block)
        return 3.0 * BLOCK_BYTES + 2 * rows * key + training + held

    def file_bytes(self, layout: IndexLayout, rows: int, width: int) -> float:
        """Codes of a byte for each block, the copy of the keys, leaves, and the rows of each."""
        held = self.row_bytes(layout, width)
        if not self.is_exact(layout):
            held += -(-(width + 1) // layout.block) / 2 * (1 - layout.soar) + 4 * (1 + layout.soar) * bool(layout.lists)
        return rows * held + layout.lists * 8 * (width + 1)

    def is_exact(self, layout: IndexLayout) -> bool:
        """See `EngineKind`."""
        return layout.codes == "brute"

    def has_copy(self, layout: IndexLayout) -> bool:
        """See `EngineKind`."""
        return layout.codes in _COPIES


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
        """See `IndexEngine`; a copy in bfloat16 or int8 orders candidates almost: twice as many as wanted are given.

        ScaNN pads with row 0 and NaN.
        """
        codes = self.layout.codes
        given = {"brute": wanted, "ah-float32": wanted, "ah": considered}
        final = given.get(codes, min(2 * wanted + 16, considered))
        queries = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
        name = "search_batched_parallel" if len(queries) > self._THREAD_QUERIES else "search_batched"
        ids, scores = getattr(self._searcher, name)(
            queries,
            final_num_neighbors=final,
            pre_reorder_num_neighbors=None if codes == "brute" else considered,
            leaves_to_search=lists or None,
        )
        return np.where(np.isnan(scores), -1, ids.astype(np.int64))
