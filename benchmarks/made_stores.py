"""Stores of made-up keys for the benchmarks of the datastore, and how these time and print."""

import argparse
import shutil
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from synthetic import SyntheticKeys, write_synthetic_store

from retro.retrieval import Store, build_index

K = 10


def show(title: str, columns: list[str], lines: list[list[Any]]) -> None:
    """A table, its first column of words."""
    form = lambda cell: f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"  # noqa: E731
    shown = [[form(cell) if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    print(f"\n{title:44}" + "".join(f"{column:>16}" for column in columns))
    for line in shown:
        print(f"{line[0]:44}" + "".join(f"{cell:>16}" for cell in line[1:]), flush=True)


def in_turns(
    cases: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each case: medians of the rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            started = clock()
            case()
            if number:
                seconds[name].append(clock() - started)
    return {name: median(found) for name, found in seconds.items()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def made_store(arguments: argparse.Namespace, rows: int) -> Store:
    """A store of made-up keys, written unless it is there."""
    folder = arguments.work / f"{rows}x{arguments.dim}-{arguments.key_dtype}-{arguments.seed}"
    if (folder / "manifest.json").is_file():
        return Store.open(folder)
    arguments.work.mkdir(parents=True, exist_ok=True)
    return write_synthetic_store(folder, rows, arguments.dim, arguments.key_dtype, seed=arguments.seed)


def built(store: Store, kind: str, **settings: Any) -> tuple[float, Any]:
    """Seconds to build an index that is not there yet, and the index."""
    shutil.rmtree(store.path / "index", ignore_errors=True)
    return timed(lambda: build_index(store, kind, **settings))


def queries_of(arguments: argparse.Namespace, rows: int, count: int | None = None) -> np.ndarray:
    return SyntheticKeys(rows, arguments.dim, seed=arguments.seed).queries(count or arguments.queries)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """The share of the true rows [q, k] among those found."""
    return float((found[:, :, None] == true[:, None, :]).any(1).mean())
