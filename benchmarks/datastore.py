"""The datastore against its peers and its own size: embedding, search, the kNN join, a store of ten million chunks.

    embed      chunks a second of the embedder and of sentence-transformers' encode, in turns over the same chunks
    curve      recall@10 and queries a second, one thread: ScaNN, faiss IVF-PQ (codes re-ranked alike), exact search
    overhead   a Retriever over an index beside the engine of that index alone, by batch size
    join       chunks a second of the neighbor table by the index it is searched through
    size       bytes a chunk, time to open, resident memory of a store with made-up keys
    growth     time to build an index and to search it over stores of growing size, drawn if --plot is given
    shards     how many shards of a distributed search a query asks
    text       CPU ms and rows compared of a search among keys of text, those of --store or made-up ones (hardness.py)
    large      a routed index of --large-rows: built, opened, searched, joined, extended: CPU time, memory (large.py)

Keys are made up, clustered and of length 1 (synthetic.py), the same for the same --seed. The
stores in --work are deleted at the end unless --keep is given; 10 million chunks of 384 float16 take 9.2 GB. Each
figure is the median of the rounds.

    python benchmarks/datastore.py --json datastore.json --plot growth.png
    python benchmarks/datastore.py --parts embed curve --rows 100000
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from hardness import text
from large import large
from machine import machine
from made_stores import K, built, in_turns, made_store, queries_of, recall, show, timed
from shards import shards
from synthetic import MadeUpEmbedder

from retro.evaluation.plots import OTHER_LOOKS, picture, short
from retro.retrieval import Retriever, build_index, build_neighbors, load_embedder
from retro.retrieval.search.index import exact_search
from retro.text.chunks import decode_chunks, tokenize_ids
from retro.text.corpus import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="keys of curve and overhead")
    parser.add_argument("--join-rows", type=int, default=100_000)
    parser.add_argument("--size-rows", type=int, default=10_000_000)
    parser.add_argument("--growth-rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=384, help="width of keys")
    parser.add_argument("--key-dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--join-kinds", nargs="+", default=["exact", "scann", "faiss", "routed"])
    parser.add_argument("--growth-kinds", nargs="+", default=["exact", "scann"])
    parser.add_argument("--store", help="whose keys are searched by text and shards; default: made-up ones")
    parser.add_argument("--shards", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--text-rows", type=int, default=150_000)
    parser.add_argument("--text-kinds", nargs="+", default=["exact", "scann", "faiss", "routed"])
    parser.add_argument("--text-plot", type=Path, help="draw text (.png, .svg, .pdf)")
    parser.add_argument("--large-rows", type=int, default=10_000_000)
    parser.add_argument("--large-joined", type=int, default=16_384, help="chunks that are joined, of another store")
    parser.add_argument("--segment-rows", type=int, default=2_000_000, help="of growth: ScaNN needs twice its keys")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--inputs", nargs="+", default=["package:numpy"], help="whose chunks are embedded")
    parser.add_argument("--chunks", type=int, default=512, help="embedded in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/datastore"), help="where stores are written")
    parser.add_argument("--keep", action="store_true", help="leave the stores in --work")
    parser.add_argument("--plot", type=Path, help="draw growth (.png, .svg, .pdf)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "settings": {n: str(v) for n, v in vars(arguments).items()}}
    for name in arguments.parts:
        started = time.perf_counter()
        results[name] = PARTS[name](arguments)
        results[name]["elapsed_seconds"] = time.perf_counter() - started
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if not arguments.keep:
        shutil.rmtree(arguments.work, ignore_errors=True)


# Embedding


def embed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Chunks a second, both at their best batch size of those tried."""
    import torch
    from sentence_transformers import SentenceTransformer

    embedder = load_embedder(arguments.embedder)
    texts = chunk_texts(arguments, embedder.tokenizer)
    peer = SentenceTransformer(embedder.model.name_or_path, device=str(embedder.passages.device))
    peer.max_seq_length = embedder.chosen.max_length
    options = {"normalize_embeddings": embedder.chosen.normalize, "show_progress_bar": False}
    cases: dict[str, Callable[[], Any]] = {"retro": lambda: embedder.embed(texts)}
    for size in (16, 32, 64):  # 32 is encode's own
        cases[f"sentence-transformers, batches of {size}"] = lambda size=size: peer.encode(
            texts, batch_size=size, **options
        )
    difference = float(np.abs(embedder.embed(texts) - peer.encode(texts, **options)).max())
    rates = {name: len(texts) / seconds for name, seconds in in_turns(cases, arguments.rounds).items()}
    best = max(rate for name, rate in rates.items() if name != "retro")
    show("embedding", ["chunks / s", "retro's ratio"], [[n, rate, rates["retro"] / rate] for n, rate in rates.items()])
    print(f"largest difference of the keys {difference:.2g}; {torch.get_num_threads()} threads")
    threads = {"threads": torch.get_num_threads(), "largest_difference": difference}
    return {"chunks_per_second": rates, "ratio": rates["retro"] / best, **threads}


def chunk_texts(arguments: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Texts of chunks of 64 tokens, drawn from the inputs."""
    documents = [d.text for d in read_documents(arguments.inputs, on_bad="reject") if getattr(d, "text", "").strip()]
    order = np.random.default_rng(arguments.seed).permutation(len(documents))
    ids = tokenize_ids(tokenizer, [documents[i] for i in order[: 4 * arguments.chunks]])
    chunks = [line[i : i + 64] for line in ids for i in range(0, len(line), 64)]
    drawn = np.random.default_rng(arguments.seed).permutation(len(chunks))[: arguments.chunks]
    return [text for text in decode_chunks(tokenizer, [chunks[i] for i in drawn]) if text.strip()]


# Search


def curve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Points of each engine, built once; the number of candidates that are re-ranked with whole keys is the same."""
    import faiss
    import torch

    store, queries = made_store(arguments, arguments.rows), queries_of(arguments, arguments.rows)
    rows = arguments.rows
    keys = store.key_block(0, rows)
    threads = torch.get_num_threads()
    true = exact_search(store, queries, K)[0]
    points: list[dict[str, Any]] = []
    for name, make in ENGINES.items():
        faiss.omp_set_num_threads(threads)
        build_seconds, leaves, search = make(keys, arguments.seed)
        faiss.omp_set_num_threads(1)
        for probed in sorted({max(1, round(share * leaves)) for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)}):
            seconds = in_turns({name: lambda: search(queries, probed)}, arguments.rounds)[name]  # noqa: B023
            point = {"engine": name, "leaves": leaves, "probed": probed, "build_seconds": build_seconds}
            point["recall"] = recall(search(queries, probed), true)
            points.append(point | {"queries_per_second": len(queries) / seconds})
    few = queries[:64]
    torch.set_num_threads(1)
    seconds = in_turns({"exact": lambda: exact_search(store, few, K)}, arguments.rounds)["exact"]
    exact = {"engine": "exact", "recall": 1.0, "queries_per_second": len(few) / seconds, "build_seconds": 0.0}
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    points.append(exact | {"leaves": 0, "probed": 0})
    columns = ["probed", "recall@10", "queries / s", "times exact", "build s"]
    lines = [
        [f"{p['engine']}, {p['leaves']} leaves", p["probed"], p["recall"], p["queries_per_second"]]
        + [p["queries_per_second"] / exact["queries_per_second"], p["build_seconds"]]
        for p in points
    ]
    show(f"{rows:,} keys of {arguments.dim}, one thread", columns, lines)
    return {"rows": rows, "points": points, "ratios": at_equal_recall(points)}


def at_equal_recall(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Queries a second of each engine at its fastest point that reaches a recall, over ScaNN's."""
    ratios: dict[str, dict[str, float]] = {}
    for wanted in (0.8, 0.9, 0.95, 0.99):
        best: dict[str, float] = {}
        for p in points:
            if p["recall"] >= wanted:
                best[p["engine"]] = max(best.get(p["engine"], 0.0), p["queries_per_second"])
        if "ScaNN" in best:
            ratios[f"recall >= {wanted}"] = {name: rate / best["ScaNN"] for name, rate in best.items()}
    for wanted, found in ratios.items():
        print(f"{wanted}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()))
    return ratios


def scann_engine(keys: np.ndarray, seed: int) -> tuple[float, int, Callable[[np.ndarray, int], np.ndarray]]:
    """Leaves, asymmetric hashing and re-ranking of 100: seconds to build, leaves, search(queries, leaves probed).

    ScaNN draws its samples by a seed of its own.
    """
    import scann

    leaves, sample = round(len(keys) ** 0.5), min(100_000, len(keys))
    builder = scann.scann_ops_pybind.builder(keys, K, "dot_product").set_n_training_threads(0)
    builder = builder.tree(leaves, max(1, leaves // 10), sample, quantize_centroids=False)
    per_block = max(2, -(-keys.shape[1] // 256))
    builder = builder.score_ah(per_block, anisotropic_quantization_threshold=0.2, training_sample_size=sample)
    seconds, searcher = timed(builder.reorder(100).build)

    def search(queries: np.ndarray, probed: int) -> np.ndarray:
        return searcher.search_batched(queries, K, 100, probed)[0].astype(np.int64)

    return seconds, leaves, search


def faiss_engine(keys: np.ndarray, seed: int, bits: int) -> tuple[float, int, Callable[[np.ndarray, int], np.ndarray]]:
    """As many leaves and bytes of code as ScaNN has, of 4 bits (fast scan) or 8, and re-ranking of 100 whole keys."""
    import faiss

    rows, dim = keys.shape
    leaves = round(rows**0.5)
    started = time.perf_counter()
    kind = faiss.IndexIVFPQFastScan if bits == 4 else faiss.IndexIVFPQ
    index = kind(faiss.IndexFlatL2(dim), dim, leaves, dim // 2 * 4 // bits, bits)
    sample = np.sort(np.random.default_rng(seed).choice(rows, min(rows, max(100_000, 40 * leaves)), replace=False))
    refined = faiss.IndexRefineFlat(index)
    refined.train(keys[sample])
    refined.add(keys)
    refined.k_factor = 100 / K
    seconds = time.perf_counter() - started

    def search(queries: np.ndarray, probed: int) -> np.ndarray:
        index.nprobe = probed
        return refined.search(queries, K)[1]

    return seconds, leaves, search


ENGINES = {
    "ScaNN": scann_engine,
    "faiss IVF-PQ, 4 bits": partial(faiss_engine, bits=4),
    "faiss IVF-PQ, 8 bits": partial(faiss_engine, bits=8),
}


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a query of a Retriever and of its engine, by wall clock and by CPU time of the process.

    Both search the same files for the same ready keys, as far, for the same k, which ScaNN orders by its copy of the
    keys. What else is in each column:

        index       scores by the stored keys, merged
        keys        the Retriever given keys: also the tokens and masks of the neighbors
        sources     the same, and the sources looked at
        texts       the Retriever given texts, whose embedding costs nothing here (see `embed`), without the sources
        tokens      the same given token ids, which are decoded first
    """
    store = made_store(arguments, arguments.rows)
    index = build_index(store, "scann")
    engine, k, lines, results = engine_of(index), 2, [], {}
    for batch in (1, 64, 1024):
        ready = queries_of(arguments, arguments.rows, batch)
        retriever = Retriever(store, "scann", MadeUpEmbedder(arguments.dim, ready), num_neighbors=k)
        tokens, texts, repeats = store.chunks(np.arange(batch)), store.text(np.arange(batch)), max(1, 256 // batch)
        calls = {
            "ScaNN": partial(engine, ready, k),
            "index": partial(index.search, ready, k),
            "keys": partial(retriever, None, keys=ready),
            "sources": lambda: retriever(None, keys=ready).sources[0],  # noqa: B023
            "texts": partial(retriever, texts),
            "tokens": partial(retriever, tokens),
        }
        cases = {name: partial(repeated, call, repeats) for name, call in calls.items()}
        for clock in (time.perf_counter, time.process_time):
            seconds = in_turns(cases, arguments.rounds, clock)
            found = {name: 1000 * s / repeats / batch for name, s in seconds.items()}
            over = {name: ms / found["ScaNN"] - 1 for name, ms in found.items() if name != "ScaNN"}
            results[f"{batch}, {clock.__name__}"] = {"milliseconds": found, "overhead": over}
            lines.append([f"batches of {batch}, {clock.__name__}", *found.values()])
            lines.append(["    above ScaNN", "", *(f"{100 * share:.1f}%" for share in over.values())])
    show(f"{arguments.rows:,} keys, k = 2, ms a query", list(calls), lines)
    return {"rows": arguments.rows, "batches": results}


def repeated(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def engine_of(index: Any) -> Callable[[np.ndarray, int], Any]:
    """ScaNN itself on the files of an index of one segment, searched as far as the index is."""
    import scann

    (segment,) = index.segments
    effort, searcher = segment.effort, scann.scann_ops_pybind.load_searcher(str(segment.folder / "scann"))

    def search(queries: np.ndarray, k: int) -> Any:
        queries = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
        name = "search_batched_parallel" if len(queries) > 256 else "search_batched"
        considered = effort.considered(k, segment.num_rows)
        return getattr(searcher, name)(queries, k, considered, effort.lists or None)

    return search


# The neighbor table


def join(arguments: argparse.Namespace) -> dict[str, Any]:
    store, lines, rates = made_store(arguments, arguments.join_rows), [], {}
    for kind in arguments.join_kinds:
        building, _ = built(store, kind)
        seconds, table = timed(lambda: build_neighbors(store, 2, index=kind))  # noqa: B023
        rates[kind] = {"chunks_per_second": store.num_chunks / seconds, "build_seconds": building}
        rates[kind]["recall"] = table.record["recall"]
        lines.append([kind, rates[kind]["chunks_per_second"], building, rates[kind]["recall"]])
    show(f"join of {store.num_chunks:,} chunks, k = 2", ["chunks / s", "index built, s", "recall@2"], lines)
    return {"rows": store.num_chunks, "kinds": rates}


# Size


def size(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a store weighs; opened by a process of its own, which says what it took."""
    seconds, store = timed(lambda: made_store(arguments, arguments.size_rows))
    files: dict[str, int] = {}
    for record in store.manifest["shards"]:
        for name, file in record["files"].items():
            files[name] = files.get(name, 0) + file["bytes"]
    per_chunk = {name: count / store.num_chunks for name, count in files.items()}
    opened = [in_own_process(store.path) for _ in range(arguments.rounds)]
    middle = {name: median(found[name] for found in opened) for name in opened[0]}
    show(
        f"{store.num_chunks:,} chunks, keys {arguments.dim} x {arguments.key_dtype}",
        ["bytes / chunk"],
        [*([name, count] for name, count in per_chunk.items()), ["all", sum(per_chunk.values())]],
    )
    show("one process", ["seconds", "resident MB"], [[n, middle[f"{n} seconds"], middle[f"{n} MB"]] for n in STEPS])
    return {"rows": store.num_chunks, "bytes_per_chunk": per_chunk, "write_seconds": seconds, "opened": middle}


STEPS = ("imports", "open", "10,000 random values", "a document's source", "searchable rows")
OPENER = """
import json, resource, sys, time
import numpy as np
from retro.retrieval import Store
found, at = {}, time.perf_counter()
def note(step):
    global at
    pages = int(open("/proc/self/statm").read().split()[1])  # resident
    found[step + " seconds"], found[step + " MB"] = time.perf_counter() - at, pages * resource.getpagesize() / 2**20
    at = time.perf_counter()
note("imports")
store = Store.open(sys.argv[1])
note("open")
rows = np.random.default_rng(0).integers(0, store.num_chunks, 10_000)
store.values(rows, 128)
note("10,000 random values")
store.document(store.num_documents // 2)
note("a document's source")
len(store.searchable_rows)
note("searchable rows")
print(json.dumps(found))
"""


def in_own_process(folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", OPENER, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# Growth


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to build and milliseconds a query by rows; exponents are slopes between the logarithms."""
    points, segments = [], {"max_segment_rows": arguments.segment_rows}
    for rows in sorted(arguments.growth_rows):
        store = made_store(arguments, rows)
        for kind in arguments.growth_kinds:
            building, index = built(store, kind, **({} if kind == "exact" else segments))
            queries = queries_of(arguments, rows, 64)
            seconds = in_turns({"search": lambda: index.search(queries, K)}, arguments.rounds)["search"]  # noqa: B023
            point = {
                "rows": rows,
                "kind": kind,
                "build_seconds": 0.0 if kind == "exact" else building,
                "ms_per_query": 1000 * seconds / len(queries),
            }
            points.append(point | {"recall": getattr(index, "recall", 1.0)})
            show(
                f"{kind}, {rows:,} keys", ["build s", "ms / query", "recall@10"], [["", *list(points[-1].values())[2:]]]
            )
            del index
    exponents = {kind: exponents_of([p for p in points if p["kind"] == kind]) for kind in arguments.growth_kinds}
    show("exponents", ["build", "search"], [[kind, *found.values()] for kind, found in exponents.items()])
    if arguments.plot:
        draw(points, arguments.plot)
    return {"points": points, "exponents": exponents}


def exponents_of(points: list[dict[str, Any]]) -> dict[str, float]:
    """How time grows with rows: the slope of a line through the logarithms."""
    found = {}
    for name in ("build_seconds", "ms_per_query"):
        known = [(p["rows"], p[name]) for p in points if p[name] > 0]
        found[name] = float(np.polyfit(*np.log(known).T, 1)[0]) if len(known) > 1 else float("nan")
    return found


def draw(points: list[dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with picture(file, columns=2, size=(7.0, 3.4)) as panels:
        for axes, name, label in zip(
            panels, ("build_seconds", "ms_per_query"), ("build, s", "search, ms a query"), strict=True
        ):
            for look, kind in zip(cycle(OTHER_LOOKS), dict.fromkeys(p["kind"] for p in points)):
                known = [(p["rows"], p[name]) for p in points if p["kind"] == kind and p[name] > 0]
                if known:
                    axes.plot(*zip(*known, strict=True), label=kind, **look)
            axes.set(xlabel="keys", ylabel=label, xscale="log", yscale="log")
            axes.xaxis.set_major_formatter(lambda number, _: short(number))
            axes.yaxis.set_major_formatter("{x:g}")


PARTS = {
    "embed": embed,
    "curve": curve,
    "overhead": overhead,
    "join": join,
    "size": size,
    "growth": growth,
    "shards": shards,
    "text": text,
    "large": large,
}

if __name__ == "__main__":
    main()
