"""Training data: windows of consecutive chunks with their neighbors, in an order that any number of ranks share.

Window w of a store is its chunks [w * l, (w + 1) * l), removed documents skipped: a window may hold several documents,
told apart by `document_ids`, and the last one is padded with missing chunks. Nothing is copied ahead: a batch is one
fancy index into the memory-mapped store.

The order of windows is an endless stream: the permutation of epoch 0, then that of epoch 1, ... A step takes the next
`batch_size * accumulation * world_size` windows of the stream, whatever the number of ranks:

    stream   | micro-batch 0          | micro-batch 1          |      accumulation = 2
             | rank 0    | rank 1     | rank 0    | rank 1     |      batch_size windows each

so two ranks see at each step what one rank with twice the batch sees. The whole position is one small JSON value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch.utils.data import Dataset

from retro.retrieval.store.random_rows import hash64, random_rows

if TYPE_CHECKING:
    from retro.retrieval import NeighborTable, Store

IGNORED = -100  # the label of a token that is not predicted
_OF_DROPS = 1 << 16  # tells the draws of dropped neighbors from those of random ones
Batch = dict[str, torch.Tensor]


class Windows(Dataset):
    """Windows of n = l * m tokens over a store; with a neighbor table each chunk also brings its neighbors.

    store: whose chunks are read, in the order of its rows.
    neighbors: the table of `store`'s chunks; None is a plain language model's data.
    neighbor_store: where the table's rows point to, if not `store` itself (validation text against the training store).
    num_neighbors: k, at most the table's; all of the table's if None.
    random_seed: if given, each neighbor found is replaced by a random chunk of another document, the same at every
        reading: the control that shows whether a gain comes from what was retrieved.
    bos: what stands in the place of each window's first token, which is not predicted; None: that token itself.

    Raises ValueError if m does not divide the window, if k exceeds the table's, if the table is of another store.
    """

    def __init__(
        self,
        store: Store,
        neighbors: NeighborTable | None = None,
        *,
        window_len: int,
        num_neighbors: int | None = None,
        retrieved_len: int = 128,
        neighbor_store: Store | None = None,
        random_seed: int | None = None,
        bos: int | None = None,
    ):
        check_window(window_len, store.chunk_len)
        self.bos = bos
        self.store, self.neighbors, self.neighbor_store = store, neighbors, neighbor_store or store
        self.window_len, self.retrieved_len, self.random_seed = window_len, retrieved_len, random_seed
        if neighbors is not None:
            _check_table(neighbors, store, self.neighbor_store)
        self.num_neighbors = 0 if neighbors is None else _check_k(neighbors, num_neighbors)
        self.index: str | None = None if neighbors is None else neighbors.record.get("index")
        self.chunks_per_window = window_len // store.chunk_len

    def __len__(self) -> int:
        return -(-self.store.num_live_chunks // self.chunks_per_window)

    def __getitem__(self, window: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.batch(np.array([range(len(self))[window]])).items()}

    def __getitems__(self, windows: list[int]) -> list[Batch]:
        batch = self.batch(np.asarray(windows))
        return [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(windows))]

    def batch(self, windows: Int[np.ndarray, " b"]) -> Batch:
        """input_ids, labels, document_ids [b, n] of windows; with neighbors neighbor_ids, neighbor_mask [b, l, k, r].

        A label is -100 on padding, for the first token of a window and for the first token of a document: nothing
        before it in its document predicts it. `document_ids` is -1 on missing chunks.
        """
        rows, present = self.rows(windows)
        batch = self._tokens(rows, present)
        if self.neighbors is not None:
            found = np.where(present[..., None], self.neighbor_rows(rows), -1)
            ids, mask = self.neighbor_store.values(found, self.retrieved_len)
            batch |= {"neighbor_ids": ids.astype(np.int64, copy=False), "neighbor_mask": mask}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def rows(self, windows: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """The store's rows of the windows' chunks, and which are present (a missing one reads the first row)."""
        numbers = np.asarray(windows, np.int64)[:, None] * self.chunks_per_window + np.arange(self.chunks_per_window)
        present = numbers < self.store.num_live_chunks
        return self.store.live_rows(np.where(present, numbers, 0)), present

    def neighbor_rows(self, rows: Int[np.ndarray, "*c"]) -> Int[np.ndarray, "*c k"]:
        """The k neighbors of each chunk as rows of the neighbors' store, -1 for none."""
        found = np.asarray(self.neighbors.rows[rows][..., : self.num_neighbors], dtype=np.int64)
        if self.random_seed is None:
            return found
        own = self.store.document_rows(rows) if self.neighbor_store is self.store else np.full(rows.shape, -1)
        return np.where(
            found < 0, -1, random_rows(self.neighbor_store, rows, own, self.num_neighbors, self.random_seed)
        )

    def _tokens(self, rows: Int[np.ndarray, "b l"], present: Bool[np.ndarray, "b l"]) -> dict[str, np.ndarray]:
        chunk_len = self.store.chunk_len
        lens = np.where(present, self.store.chunk_lens(rows), 0)
        real = np.arange(chunk_len) < lens[..., None]  # [b, l, m]
        ids = np.where(real, self.store.chunks(rows), self.store.pad_token_id)
        if self.bos is not None:
            ids[:, 0, 0] = self.bos
        documents = np.where(present, self.store.document_rows(rows), -1)
        predicted = real.copy()
        predicted[..., 0] &= (rows > 0) & (self.store.document_rows(np.maximum(rows - 1, 0)) == documents)
        predicted[:, 0, 0] = False
        return {
            "input_ids": rearrange(ids, "b l m -> b (l m)").astype(np.int64),
            "labels": rearrange(np.where(predicted, ids, IGNORED), "b l m -> b (l m)").astype(np.int64),
            "document_ids": documents.repeat(chunk_len, axis=-1).astype(np.int64),  # [b, n]
        }


def check_window(window_len: int, chunk_len: int) -> None:
    """Raise ValueError unless a window is a whole number (one at least) of chunks."""
    if window_len < chunk_len or window_len % chunk_len:
        nearest = max(1, round(window_len / chunk_len)) * chunk_len
        raise ValueError(
            f"window_len: {window_len} is not a multiple of the store's chunk length m = {chunk_len}; "
            f"give for example {nearest}"
        )


def _check_table(table: NeighborTable, store: Store, neighbor_store: Store) -> None:
    """Refuse the table of another store, or of another generation: its rows may mean other chunks here."""
    num_rows = len(table.rows)
    if num_rows != store.num_chunks:
        raise ValueError(
            f"the neighbor table has {num_rows} rows, the store {store.path} {store.num_chunks} chunks; "
            "run `retro neighbors` for this store"
        )
    for name, own in (("queries", store), ("store", neighbor_store)):
        recorded = table.record.get(name, own.fingerprint)
        if recorded != own.fingerprint:
            raise ValueError(
                f"the neighbor table is of another state ({recorded[:12]}) of the store {own.path} than it "
                f"is in ({own.fingerprint[:12]}), or of another store; run `retro neighbors` again"
            )


def _check_k(table: NeighborTable, num_neighbors: int | None) -> int:
    available = table.rows.shape[1]
    if num_neighbors is not None and not 1 <= num_neighbors <= available:
        raise ValueError(
            f"num_neighbors: {num_neighbors} is not within 1..{available}, what the neighbor table holds; "
            "run `retro neighbors` with a larger k"
        )
    return available if num_neighbors is None else num_neighbors


# The order of windows


def epoch_order(num_windows: int, seed: int, epoch: int) -> Int[np.ndarray, " w"]:
    """The permutation of windows in one epoch, a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_windows)


class Loader:
    """The batches of one rank, step by step, from any position of the endless stream of windows.

    Iterating gives, for each step, the list of this rank's `accumulation` micro-batches of `batch_size` windows.
    `position` is where the next step starts, {"epoch": e, "window": i}: given to a new Loader it goes on exactly there,
    with any number of ranks. `prefetch` steps are read ahead by one background thread, which changes no result.
    `drop_neighbors` is the probability with which a chunk comes without its neighbors, a pure function of the seed and
    of the chunk's place in the stream. `pin_memory` puts batches where a GPU copies them from by itself.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        position: dict[str, int] | None = None,
        prefetch: int = 2,
        drop_neighbors: float = 0.0,
        pin_memory: bool = False,
    ):
        if not len(windows):
            raise ValueError(
                "the store holds no chunks, so there is nothing to train on; build it from documents with text"
            )
        self.windows, self.batch_size, self.seed, self.prefetch = windows, batch_size, seed, prefetch
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.drop_neighbors, self.pin_memory = drop_neighbors, pin_memory
        self.position = dict(position or {"epoch": 0, "window": 0})
        self._order: tuple[int, np.ndarray] = -1, np.empty(0, np.int64)

    @property
    def windows_per_step(self) -> int:
        """Windows in one step of all ranks together."""
        return self.batch_size * self.accumulation * self.world_size

    def after(self, position: dict[str, int]) -> dict[str, int]:
        """The position one step later."""
        epochs, window = divmod(position["window"] + self.windows_per_step, len(self.windows))
        return {"epoch": position["epoch"] + epochs, "window": window}

    def stream(self, position: dict[str, int], count: int) -> Int[np.ndarray, " w"]:
        """The next `count` windows of the stream from a position, over the borders of epochs."""
        epoch, start, taken = position["epoch"], position["window"], []
        while count > 0:
            taken.append(self._epoch(epoch)[start : start + count])
            epoch, start, count = epoch + 1, 0, count - len(taken[-1])
        return np.concatenate(taken)

    def step(self, position: dict[str, int]) -> list[Batch]:
        """This rank's micro-batches of the step that starts at a position."""
        windows = self.stream(position, self.windows_per_step)
        places = position["epoch"] * len(self.windows) + position["window"] + np.arange(len(windows))
        shares = rearrange([windows, places], "c (a w b) -> w a c b", a=self.accumulation, w=self.world_size)[self.rank]
        return [self._batch(*share) for share in shares]

    def _batch(self, windows: Int[np.ndarray, " b"], places: Int[np.ndarray, " b"]) -> Batch:
        """The batch of the windows at these places of the stream, some of their chunks without neighbors."""
        batch = self.windows.batch(windows)
        if self.drop_neighbors and "neighbor_mask" in batch:
            mask = batch["neighbor_mask"]
            chunks = places[:, None] * mask.shape[1] + np.arange(mask.shape[1])  # [b, l]
            kept = hash64(chunks, self.seed, _OF_DROPS) / 2.0**64 >= self.drop_neighbors
            batch["neighbor_mask"] = mask & torch.from_numpy(kept)[..., None, None]
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    def __iter__(self) -> Iterator[list[Batch]]:
        ahead, reads = self.position, deque()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retro-loader")
        try:
            while True:
                while len(reads) <= self.prefetch:
                    reads.append(reader.submit(self.step, ahead))
                    ahead = self.after(ahead)
                batches = reads.popleft().result()
                self.position = self.after(self.position)
                yield batches
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _epoch(self, epoch: int) -> Int[np.ndarray, " w"]:
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.windows), self.seed, epoch)
        return self._order[1]
