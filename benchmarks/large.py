"""A routed index of many keys, made up as text has them: each step in a process of its own, which says what it took.

    build     of the store but for its last shard, with tuning
    search    opened; 256 keys that it does not hold, in one batch, beside exact search
    join      the two neighbors of some chunks of its documents, which lie in another store
    add       the last shard, to the lists that are there
    search    again

CPU seconds are those of the process and its workers. Memory is what they hold beside mapped files, and with them, the
most of ten looks a second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from made_stores import K, recall, show
from synthetic import TreeKeys, without_last_shards, write_synthetic_store

from retro.retrieval import Store, build_index, build_neighbors, open_index
from retro.retrieval.search.engines.faiss import one_thread
from retro.retrieval.search.index import exact_search

QUERIES = 256
CHUNK_LEN = 4  # of tokens, which are not read here
_SHARDS = 100


def large(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds, memory and files of each step."""
    rows, dim, keys = arguments.large_rows, arguments.dim, TreeKeys(arguments.dim, arguments.seed)
    write = lambda name, count: write_synthetic_store(  # noqa: E731
        arguments.work / name, count, dim, arguments.key_dtype, CHUNK_LEN, shard_chunks=-(-rows // _SHARDS), keys=keys
    )
    found: dict[str, Any] = {"rows": rows, "dim": dim, "key_dtype": arguments.key_dtype}
    joined = write("joined", arguments.large_joined)
    store, add = without_last_shards(write("large", rows), 1)
    asked = keys.rows(rows, rows + QUERIES)
    for name, step in ORDER.items():
        if name == "add":
            store = add()
        if step == "search":
            np.savez(store.path / "asked.npz", keys=asked, rows=exact_search(store, asked, K)[0])
        found[name] = in_own_process(step, store.path, joined.path)
        if name == "build":
            found["index_bytes"] = sum(file.stat().st_size for file in (store.path / "index").rglob("*"))
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    lines = [[name, one["seconds"], one["cpu_seconds"], one["memory"] / 1e9, one["with_files"] / 1e9]
             for name, one in found.items() if isinstance(one, dict)]  # fmt: skip
    show(f"{rows:,} keys of {dim}", ["s", "CPU s", "GB", "GB with files"], lines)
    return found


def in_own_process(step: str, store: Path, joined: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, step, str(store), str(joined)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True)
    return json.loads(done.stdout)


def build(store: Path, joined: Path) -> dict[str, Any]:
    (segment,) = build_index(Store.open(store), "routed", workers=1).segments
    return {"recall": segment.record["recall"], "base": segment.record.get("base"), "lists": segment.layout.lists}


def search(store: Path, joined: Path) -> dict[str, Any]:
    """Seconds to open, milliseconds of one thread a query, recall; files that were read are in memory."""
    opened, started, times = Store.open(store), time.perf_counter(), []
    index, given = open_index(opened, "routed"), np.load(store / "asked.npz")
    seconds = time.perf_counter() - started
    with one_thread():
        for _ in range(6):
            started = time.process_time()
            rows = index.search(given["keys"], K)[0]
            times.append(1000 * (time.process_time() - started) / QUERIES)
        compared = index.segments[0].rows_compared(given["keys"], index.segments[0].effort)
    found = {"open_seconds": seconds, "recall": recall(rows, given["rows"]), "rows_compared": compared}
    return found | {"first_ms": times[0], "ms": float(np.median(times[1:]))}


def join(store: Path, joined: Path) -> dict[str, Any]:
    queries, started = Store.open(joined), time.process_time()
    table = build_neighbors(Store.open(store), 2, queries, index="routed", workers=1)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() - started + children.ru_utime + children.ru_stime
    return {"chunks_per_cpu_second": queries.num_chunks / seconds, "recall": table.record["recall"]}


ORDER = {"build": "build", "search": "search", "join": "join", "add": "build", "again": "search"}
STEPS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"build": build, "search": search, "join": join}


class Watch(threading.Thread):
    """The most memory that this process and its workers hold at a time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.memory = self.with_files = 0
        self.start()

    def run(self) -> None:
        while True:
            held = [memory_of(folder) for folder in Path("/proc").glob("[0-9]*")]
            self.memory = max(self.memory, sum(own for own, _ in held))
            self.with_files = max(self.with_files, sum(own + files for own, files in held))
            time.sleep(0.1)


def memory_of(process: Path) -> tuple[int, int]:
    """Bytes that a process of this group holds itself, and of mapped files."""
    try:
        if os.getpgid(int(process.name)) != os.getpgid(0):
            return 0, 0
        told = dict(line.split(":") for line in (process / "status").read_text().splitlines())
        own, files = (int(told[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
        return own, files
    except (OSError, KeyError):
        return 0, 0


def main() -> None:
    step, store, joined = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    watch, started = Watch(), time.perf_counter()
    found = STEPS[step](store, joined)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found |= {"seconds": time.perf_counter() - started, "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in used)}
    print(json.dumps(found | {"memory": watch.memory, "with_files": watch.with_files}))


if __name__ == "__main__":
    main()
