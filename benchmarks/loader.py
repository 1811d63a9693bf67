"""Windows a second of the loader, against what the model takes.

Batches of windows with their neighbors from a datastore that is memory-mapped: by the loader, whose every batch is one
fancy index, and chunk by chunk, one neighbor at a time. The model is that of configs/train_small.yaml, in forward,
backward and AdamW over the loader's batches; how long it waits for them is measured with reading ahead and without.
All take turns; each figure is the median of the rounds. Without --store a datastore of random tokens and random
neighbors is written to a temporary folder.

    python benchmarks/loader.py --json loader.json
    python benchmarks/loader.py --store demo/store --window 2048
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import machine
from synthetic import write_synthetic_store

from retro.common.settings import find_config, read_yaml
from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import NeighborTable, Store, open_neighbors
from retro.training.memory import keep_freed_memory
from retro.training.windows import Loader, Windows


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[tuple[Store, NeighborTable]]:
    """The datastore and its neighbor table, or made-up ones."""
    if arguments.store:
        store = Store.open(arguments.store)
        yield store, open_neighbors(store, k=arguments.k)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = write_synthetic_store(Path(folder) / "store", arguments.rows, dim=8, seed=arguments.seed)
        rows = np.random.default_rng(arguments.seed).integers(0, arguments.rows, (arguments.rows, arguments.k))
        np.save(Path(folder) / "rows.npy", rows)
        mapped = np.load(Path(folder) / "rows.npy", mmap_mode="r")
        yield store, NeighborTable(mapped, np.zeros(rows.shape, np.float32), {}, Path(folder))


def by_loader(loader: Loader, steps: int) -> float:
    """Windows a second of one thread."""
    position, started = {"epoch": 0, "window": 0}, time.perf_counter()
    for _ in range(steps):
        loader.step(position)
        position = loader.after(position)
    return steps * loader.batch_size / (time.perf_counter() - started)


def by_chunk(windows: Windows, steps: int, batch_size: int) -> float:
    """The same tokens, read for each chunk and each of its neighbors by itself."""
    store, count, started = windows.store, min(steps * batch_size, len(windows)), time.perf_counter()
    for window in range(count):
        rows, present = windows.rows(np.array([window]))
        for row in rows[present]:
            store.chunks(row), store.chunk_lens(row), store.document_rows(row)
            for neighbor in windows.neighbors.rows[row]:
                store.values(np.array(neighbor), windows.retrieved_len)
    return count / (time.perf_counter() - started)


def by_model(model: RetroForCausalLM, loader: Loader, steps: int) -> tuple[float, float]:
    """Windows a second of training, and the share of its time that it waits for batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    waited, started = 0.0, time.perf_counter()
    with closing(iter(loader)) as batches:
        for _ in range(steps):
            asked = time.perf_counter()
            (batch,) = next(batches)
            waited += time.perf_counter() - asked
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
    return steps * loader.batch_size / seconds, waited / seconds


def small_model(store: Store, window_len: int) -> RetroForCausalLM:
    fields = read_yaml(find_config("train_small", "train"))["model"]
    sizes = dict(vocab_size=len(store.tokenizer), chunk_len=store.chunk_len, max_position_embeddings=window_len)
    return RetroForCausalLM(RetroConfig(**fields, **sizes)).train()


def measure(arguments: argparse.Namespace) -> dict:
    keep_freed_memory()
    with opened(arguments) as (store, table):
        model = small_model(store, arguments.window)
        windows = Windows(store, table, window_len=arguments.window, num_neighbors=arguments.k)
        make: Callable[[int], Loader] = lambda ahead: Loader(  # noqa: E731
            windows, arguments.batch, seed=arguments.seed, prefetch=ahead
        )
        found: dict[str, list[float]] = {}
        for number in range(arguments.rounds + 1):
            taken, waited = by_model(model, make(2), arguments.model_steps)
            _, waited_without = by_model(model, make(0), arguments.model_steps)
            one = {
                "loader": by_loader(make(0), arguments.steps),
                "chunk by chunk": by_chunk(windows, max(1, arguments.steps // 32), arguments.batch),
                "model": taken,
                "share waited, reading ahead": waited,
                "share waited, not reading ahead": waited_without,
            }
            for name, value in one.items():
                if number:
                    found.setdefault(name, []).append(value)
    figures = {name: {"min": min(x), "median": median(x), "max": max(x)} for name, x in found.items()}
    middle = {name: figure["median"] for name, figure in figures.items()}
    return {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "windows_per_second": {name: figures[name] for name in ("loader", "chunk by chunk", "model")},
        "share_waited": {name.removeprefix("share waited, "): f for name, f in figures.items() if "waited" in name},
        "ratios": {
            "loader / model": middle["loader"] / middle["model"],
            "loader / chunk by chunk": middle["loader"] / middle["chunk by chunk"],
        },
    }


def show(results: dict) -> None:
    print(f"{'windows a second':40}{'min':>12}{'median':>12}{'max':>12}")
    for name, figure in results["windows_per_second"].items():
        print(f"{name:40}" + "".join(f"{value:12,.1f}" for value in figure.values()))
    for name, figure in results["share_waited"].items():
        print(f"{'% of a step waited, ' + name:40}" + "".join(f"{100 * value:12.2f}" for value in figure.values()))
    for name, ratio in results["ratios"].items():
        print(f"{name:40}{'':12}{ratio:12,.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a datastore with a neighbor table; default: a made-up one")
    parser.add_argument("--rows", type=int, default=200_000, help="chunks of the made-up datastore")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64, help="batches read in a round")
    parser.add_argument("--model-steps", type=int, default=3, help="steps of the model in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    results = measure(arguments)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
