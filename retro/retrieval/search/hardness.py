"""How the cost of a search grows with the store: measured on samples of its own keys, and carried on to larger ones.

A sample in a drawn order is cut into nested stores, in memory, from an eighth of it to all. Each gets an index that is
tuned to a recall by keys that it does not hold, and what a search costs there is fitted by a power of the rows. How
hard keys are is a property of the text and its embedder: the exponent is near 0 where the neighbors of a key stand
apart from all others, and near 1 where nothing less than a fixed share of all rows finds them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float32

from retro.retrieval.search.dense import TUNED_NEIGHBORS, Effort, QuerySample, Segment, tune
from retro.retrieval.search.engines import ENGINES, Work, choose_layout, engine_of
from retro.retrieval.search.engines.faiss import one_thread
from retro.retrieval.search.engines.routed import FEWEST_GROUPS, ROWS_OF_A_LIST
from retro.retrieval.search.exact import exact_search
from retro.retrieval.search.segments import ShardRange, StoreRows
from retro.retrieval.store.format import CHUNK_DTYPE, ShardArrays, narrow_keys
from retro.retrieval.store.store import Store

HELD_OUT = 1024  # keys that are searched for
FEWEST_KEYS = 8192 + HELD_OUT  # an eighth of fewer is too little to be cut into lists
MOST_KEYS = 1 << 17
_RUN_ROWS = 64  # of a store, that are drawn together
_HALF_OCTAVES = 6  # from the smallest store to the largest
_STUDENT_T = 2.571  # 95%, of as many degrees of freedom as there are stores less 2
_BATCH, _ROUNDS = 256, 3


@dataclass(frozen=True)
class Cost:
    """Of a search among so many rows, at the least effort that reaches the recall, the mean of the queries.

    rows_compared: as codes or keys; cpu_ms: of one thread, in batches of 256; ms_of_row: what each further row adds;
    recall: of the 10 nearest; lists, candidates: the effort. Candidates are half as many again as tuning takes among
    all keys, and the same among fewer, so that lists decide the recall.
    """

    kind: str
    rows: int
    recall: float
    rows_compared: float
    cpu_ms: float
    ms_of_row: float
    lists: int = 0
    candidates: int = 0


@dataclass(frozen=True)
class Power:
    """factor * rows ** exponent, and the 95% interval of the exponent."""

    factor: float
    exponent: float
    low: float
    high: float

    def at(self, rows: float | int) -> float:
        """The forecast."""
        return self.factor * rows**self.exponent


def fit(rows: Sequence[int], costs: Sequence[float | int]) -> Power:
    """The line through the logarithms, by least squares; its interval is that of the slope, for seven points."""
    x, y = np.log(rows), np.log(costs)
    (slope, start), spread = np.polyfit(x, y, 1), np.square(x - x.mean()).sum()
    rest = np.square(y - slope * x - start).sum() / max(len(x) - 2, 1)
    error = _STUDENT_T * float(np.sqrt(rest / spread))
    return Power(float(np.exp(start)), float(slope), float(slope) - error, float(slope) + error)


@dataclass(frozen=True)
class Growth:
    """How a search through routed lists grows, and what it is beside exact search.

    largest, exact: costs among all rows of the sample; rows_compared, cpu_ms: fitted to those of nested parts.
    """

    largest: Cost
    exact: Cost
    rows_compared: Power
    cpu_ms: Power

    def cpu_ms_at(self, rows: int, lists: int) -> float:
        """Milliseconds of a search of one index: what the sample takes, the rows that are compared beyond that, and
        the router: centroids of groups, compared as keys are, and those in the groups that are looked into, as rows
        are."""
        further = self.rows_compared.at(rows) - self.rows_compared.at(self.largest.rows)
        groups = isqrt(lists) - isqrt(self.largest.rows // ROWS_OF_A_LIST)
        of_group = self.exact.ms_of_row + FEWEST_GROUPS * self.largest.ms_of_row
        return self.largest.cpu_ms + self.largest.ms_of_row * further + of_group * groups


def measure_growth(keys: Float32[np.ndarray, "c d"], recall: float, key_dtype: str = "float16") -> Growth:
    """Measure it on keys in a drawn order; ValueError for fewer than `FEWEST_KEYS`."""
    if len(keys) < FEWEST_KEYS:
        raise ValueError(f"how search grows is measured on at least {FEWEST_KEYS:,} keys, not {len(keys):,}")
    costs = [cost for cost, _, _ in measure(["routed"], keys, recall, key_dtype)]
    (exact, _, _) = next(measure(["exact"], keys, recall, key_dtype))
    rows = [cost.rows for cost in costs]
    fits = (fit(rows, [getattr(cost, name) for cost in costs]) for name in ("rows_compared", "cpu_ms"))
    return Growth(costs[0], exact, *fits)


def sample_keys(store: Store, most: int = MOST_KEYS, seed: int = 0) -> Float32[np.ndarray, "c d"]:
    """Keys of searchable rows, in runs of neighbors as documents are, the runs in a drawn order."""
    draw = np.random.default_rng(seed)
    count = -(-store.num_chunks // _RUN_ROWS)
    chosen = draw.choice(count, min(count, -(-most // _RUN_ROWS)), replace=False)
    runs = [(int(run) * _RUN_ROWS, min((int(run) + 1) * _RUN_ROWS, store.num_chunks)) for run in chosen]
    return store.keys(np.concatenate([store.searchable_in(*run) for run in runs])[:most])


def nested_sizes(rows: int) -> list[int]:
    """An eighth of the rows to all of them, each 1.4 times the one before."""
    return [round(rows / 2 ** (step / 2)) for step in range(_HALF_OCTAVES, -1, -1)]


def measure(
    kinds: Sequence[str],
    keys: Float32[np.ndarray, "c d"],
    recall: float,
    key_dtype: str = "float16",
    settings: Callable[[str, int], dict[str, Any]] = lambda kind, rows: {},
) -> Iterator[tuple[Cost, Segment | None, QuerySample]]:
    """The cost of each kind over nested stores of the keys but the last 1,024, which are searched for.

    keys: in a drawn order. settings: of the index of a kind over so many rows. From the largest store on; with each
    cost goes the segment that was searched (None: exactly), and what it found.
    """
    held_out = np.ascontiguousarray(keys[-HELD_OUT:])
    sizes = nested_sizes(len(keys) - HELD_OUT)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        store = KeySample(Path(folder), keys[:-HELD_OUT], sizes, key_dtype)
        for kind in kinds:
            candidates = None
            for stop, rows in reversed(list(enumerate(sizes, 1))):
                shards = ShardRange(0, stop, Path(folder) / f"{kind}-{stop}".replace(":", "-"))
                if kind == "exact":
                    yield _exactly(store, rows, held_out), None, None
                else:
                    given = settings(kind, rows) | {"candidates": candidates}
                    found = _through(store, shards, rows, kind, held_out, recall, given)
                    candidates = found[0].candidates
                    yield found


class KeySample(Store):
    """Keys as a store in memory, cut into shards at some rows; its chunks have no text."""

    def __init__(self, path: Path, keys: Float32[np.ndarray, "c d"], cuts: Sequence[int], key_dtype: str) -> None:
        records, shards = [], []
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            chunks = np.zeros(stop - start, CHUNK_DTYPE)
            chunks["document"], chunks["length"] = np.arange(stop - start), 1
            records.append({"first_row": start, "rows": stop - start, "first_document": start, "short_chunks": 0})
            records[-1]["documents"] = stop - start
            tokens = np.zeros((stop - start, 1), np.uint16)
            shards.append(ShardArrays(tokens, chunks, narrow_keys(keys[start:stop], key_dtype), None))
        manifest = {"shards": records, "chunk_len": 1, "pad_token_id": 0, "settings": {"min_chunk_len": 1}}
        manifest |= {"embedder": {"dim": keys.shape[1]}, "key_dtype": key_dtype}
        super().__init__(path, manifest, shards, np.zeros((0, 3), np.int64))

    @property
    def fingerprint(self) -> str:
        """Of this object."""
        return f"sample {id(self)}"


def _through(
    store: Store,
    shards: ShardRange,
    rows: int,
    kind: str,
    held_out: np.ndarray,
    recall: float,
    given: dict[str, Any],
) -> tuple[Cost, Segment, QuerySample]:
    """The cost of an index of the first rows."""
    name, _, codes = kind.partition(":")
    settings = {**dict.fromkeys(ENGINES[name].settings), "codes": codes or None, "seed": 0} | given
    layout = choose_layout(name, settings, rows, store.key_dim)
    shards.folder.mkdir()
    own = np.arange(rows, dtype=np.uint32)
    np.save(shards.folder / "rows.npy", own)
    engine_of(layout).write(layout, store, StoreRows(0, own), shards.folder, Work(ENGINES[name].training_sample))
    record = {"layout": asdict(layout), "settings": settings}
    segment = Segment(store, ShardRange(0, shards.stop, shards.folder, record))
    sample = QuerySample(segment, held_out)
    found = tune(segment, recall, sample)
    effort = Effort(found["lists_searched"], found["candidates"])
    if given["candidates"] is None and not engine_of(layout).is_exact(layout):
        effort = replace(effort, candidates=3 * effort.candidates // 2)
    effort = _fewest_lists(sample, effort, recall)
    ms = _cpu_ms(partial(segment.attempt, k=TUNED_NEIGHBORS, effort=effort), held_out)
    compared = segment.rows_compared(held_out, effort)
    ms_of_row, wide = ms / rows, replace(effort, lists=min(4 * effort.lists, layout.lists))
    if more := segment.rows_compared(held_out, wide) - compared:
        ms_of_row = (_cpu_ms(partial(segment.attempt, k=TUNED_NEIGHBORS, effort=wide), held_out) - ms) / more
    cost = Cost(kind, rows, sample.recall(effort), compared, ms, max(ms_of_row, 0.0), effort.lists, effort.candidates)
    return cost, segment, sample


def _exactly(store: Store, rows: int, held_out: np.ndarray) -> Cost:
    """The cost of comparing all of the first rows."""
    search = partial(exact_search, store, k=TUNED_NEIGHBORS, rows=(0, rows), device="cpu")
    ms = _cpu_ms(search, held_out[:_BATCH])
    return Cost("exact", rows, 1.0, float(rows), ms, ms / rows)


def _fewest_lists(sample: QuerySample, effort: Effort, recall: float) -> Effort:
    """The least number of lists that reaches the recall with as many candidates: tuning leaves steps of 1.4."""
    low, high = effort.lists // 2, effort.lists
    while high - low > 1:
        middle = Effort((low + high) // 2, effort.candidates)
        if sample.recall(middle) >= recall:
            high = middle.lists
        else:
            low = middle.lists
    return Effort(high, effort.candidates)


def _cpu_ms(search: Any, queries: np.ndarray) -> float:
    """CPU milliseconds of this process a query: the median of some rounds after one that does not count."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.process_time()
        for start in range(0, len(queries), _BATCH):
            search(queries[start : start + _BATCH])
        seconds.append(time.process_time() - started)
    return 1000 * median(seconds[1:]) / len(queries)
