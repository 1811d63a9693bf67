"""Constants of this machine, for plans: measured in about a minute or two and kept in the user's cache folder.

Each is measured through the library's own functions on a small sample: reading and tokenizing text, embedding in as
many processes as a build would run, exact search, building and searching an index, writing and checksums.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from retro.common.files import load_json, save_json, sha256_file, sync
from retro.retrieval.building.tasks import load_tokenizer
from retro.retrieval.embedding.embedder import NO_EMBEDDER, embed_chunks, load_embedder
from retro.retrieval.executors.local import LocalExecutor, default_workers
from retro.retrieval.executors.tasks import Task
from retro.retrieval.planning.shapes import embedder_shape
from retro.retrieval.planning.synthetic import SyntheticKeys, write_synthetic_store
from retro.retrieval.search.index import build_index, exact_search, resolve_kind
from retro.text.chunks import decode_chunks, tokenize_ids
from retro.text.corpus import expand_inputs, read_input
from retro.text.documents import Document

log = logging.getLogger(__name__)

TEXT = "package:numpy"  # read where no inputs are given
SAMPLE_BYTES = 2_000_000
EMBED_BLOCK = 256  # chunks embedded between two looks at the clock
READY_SECONDS = 300.0  # that a worker waits for the others
PRODUCT_ROWS, PRODUCT_QUERIES, PRODUCT_DIMS = 65_536, 1024, (64, 768)
INDEX_ROWS, INDEX_DIM, INDEX_QUERIES = (20_000, 60_000), 384, 1024
DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Calibration:
    """Constants of one machine. Rates of text are bytes of UTF-8 text a second of one process.

    Arguments:
        processes: how many embedded at once for `chunks_per_second_all`.
        embedder_tokens, embedder_flops: what it then read of a chunk on average, and the operations of that.
        worker_bytes: resident memory of a process that embeds; start_seconds: until it is ready.
        pair_seconds, pair_dim_seconds: exact search takes a + b d for each pair of a query and a key of width d.
        index_seconds, codebook_seconds, encode_seconds: a segment of an index takes the first, the second for each
            number of its training sample and the third for each number of its keys, besides comparing them with leaves.
        queries_per_second: of the index of 60,000 keys of width 384, in one batch.
    """

    machine: dict[str, Any]
    measured_at: str
    tokenizer: str
    reading_rate: float
    tokenizing_rate: float
    embedder: str
    device: str
    processes: int
    embedder_tokens: float
    embedder_flops: float
    chunks_per_second_one: float
    chunks_per_second_all: float
    worker_bytes: int
    start_seconds: float
    pair_seconds: float
    pair_dim_seconds: float
    index_kind: str
    index_seconds: float
    codebook_seconds: float
    encode_seconds: float
    queries_per_second: float
    write_rate: float
    checksum_rate: float

    def save(self, file: Path) -> None:
        """Write as JSON; the folder is made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        save_json(file, {"format": "retro-calibration", **asdict(self)})

    @classmethod
    def load(cls, file: Path) -> Calibration:
        """Read one back; ValueError names what is wrong with it."""
        if not file.is_file():
            raise ValueError(f"{file} is not there; measure this machine with `retro plan --calibrate`")
        found = load_json(file)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if not isinstance(found, dict) or name not in found]
        if missing:
            raise ValueError(f"{file} has no {missing[0]}; measure this machine again with `retro plan --calibrate`")
        return cls(**{name: found[name] for name in names})

    def describe(self) -> str:
        """Which machine, in words."""
        machine = self.machine
        return f"{machine['name']}, {machine['cores']} cores, {machine['processor']}, {self.measured_at}"


def calibration_file() -> Path:
    """Where the constants of this machine are kept: in the user's cache folder."""
    home = Path.home()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = home / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return cache / "retro-lm" / "calibration.json"


def calibrate(
    inputs: list[str] | None = None,
    tokenizer: str | None = None,
    embedder: str = "minilm",
    workers: int | None = None,
    chunk_len: int = 64,
    seconds: float = 10.0,
    report: Callable[[str], Any] = log.info,
) -> Calibration:
    """Measure this machine.

    Arguments:
        inputs, tokenizer, embedder: what a build would read and use; None is the documentation of numpy, and the
            embedder's own tokenizer.
        workers: processes that embed at once; None is one a GPU, or one a core.
        seconds: how long each rate of embedding is measured.
        report: is told what is measured next.
    """
    workers = workers or default_workers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report("reading and tokenizing")
        loaded = _tokenizer(tokenizer, embedder)
        found: dict[str, Any] = {"tokenizer": tokenizer or f"of {embedder}"}
        texts, found["reading_rate"] = _read(inputs, folder)
        chunks, found["tokenizing_rate"] = _tokenize(loaded, texts, chunk_len)
        loaded.save_pretrained(folder)
        found |= _embedding(embedder, folder, chunks, workers, seconds, report)
        report("exact search")
        found["pair_seconds"], found["pair_dim_seconds"] = _product(folder)
        report("index")
        found |= _index(folder)
        report("disk")
        found["write_rate"], found["checksum_rate"] = _disk(folder)
    stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC"
    return Calibration(machine=machine(), measured_at=stamp, **found)


def machine() -> dict[str, Any]:
    """What a measurement records of where it was made."""
    import psutil

    return {
        "name": platform.node() or "unnamed",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "versions": {name: found for name in _MEASURED_WITH if (found := _version(name))},
    }


_MEASURED_WITH = ("retro-lm", "torch", "transformers", "numpy", "scann", "faiss-cpu", "faiss-gpu")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


# Text


def _tokenizer(tokenizer: str | None, embedder: str) -> Any:
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if embedder == NO_EMBEDDER:
        raise ValueError("without an embedder there is no tokenizer to measure; name one with tokenizer")
    return load_embedder(embedder).tokenizer


def _read(inputs: list[str] | None, folder: Path) -> tuple[list[str], float]:
    """The first texts of the inputs, and how many bytes of text a second they were read with.

    The documentation of a package is slow to find, so that it is read as JSON Lines.
    """
    if inputs is None:
        documents = (d for item in expand_inputs([TEXT]) for d in read_input(item))
        lines = (json.dumps({"text": d.text}) + "\n" for d in _first(documents))
        (folder / "sample.jsonl").write_text("".join(lines), encoding="utf-8")
        inputs = [str(folder / "sample.jsonl")]
    started = time.perf_counter()
    found = [d.text for d in _first(d for item in expand_inputs(inputs) for d in read_input(item))]
    elapsed = time.perf_counter() - started
    if not found:
        raise ValueError(f"the inputs {', '.join(inputs)} hold no text to measure with; give others")
    return found, sum(len(text.encode()) for text in found) / elapsed


def _first(records: Iterator[Any]) -> Iterator[Document]:
    """Documents with text, until there is enough of it."""
    size = 0
    for record in records:
        if isinstance(record, Document) and record.text.strip():
            yield record
            size += len(record.text.encode())
            if size >= SAMPLE_BYTES:
                return


def _tokenize(tokenizer: Any, texts: list[str], chunk_len: int) -> tuple[list[list[int]], float]:
    """Chunks of the texts in a seeded order, and bytes of text tokenized a second."""
    with _one_tokenizer_thread():
        tokenize_ids(tokenizer, texts[:1])  # what is loaded at the first call
        started = time.perf_counter()
        ids = tokenize_ids(tokenizer, texts)
        elapsed = time.perf_counter() - started
    chunks = [line[i : i + chunk_len].tolist() for line in ids for i in range(0, len(line), chunk_len)]
    order = np.random.default_rng(0).permutation(len(chunks))
    return [chunks[i] for i in order], sum(len(text.encode()) for text in texts) / elapsed


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    """As in the workers of a build."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# Embedding


def _embedding(
    name: str, folder: Path, chunks: list[list[int]], workers: int, seconds: float, report: Callable[[str], Any]
) -> dict[str, Any]:
    if name == NO_EMBEDDER:
        rates = ("embedder_tokens", "embedder_flops", "chunks_per_second_one", "chunks_per_second_all")
        none = {"embedder": name, "device": "cpu", "processes": workers, "worker_bytes": 0}
        return none | dict.fromkeys(rates, 0.0) | {"start_seconds": _start_seconds(folder)}
    save_json(folder / "chunks.json", chunks)
    report("embedding in one process")
    (one,) = _embed_at_once(name, folder, 1, seconds)
    together = [one]
    if workers > 1:
        report(f"embedding in {workers} processes")
        together = _embed_at_once(name, folder, workers, seconds)
    return {
        "embedder": name,
        "device": one["device"],
        "processes": workers,
        "embedder_tokens": one["tokens"],
        "embedder_flops": embedder_shape(name).flops(one["tokens"]),
        "chunks_per_second_one": one["rate"],
        "chunks_per_second_all": sum(found["rate"] for found in together),
        "worker_bytes": max(found["bytes"] for found in together),
        "start_seconds": max(found["start_seconds"] for found in together),
    }


def _start_seconds(tokenizer: Path) -> float:
    """Until a process that does not embed has loaded what it needs."""
    code = "import sys; from retro.retrieval.building.tasks import load_tokenizer; load_tokenizer(sys.argv[1])"
    return _seconds(lambda: subprocess.run([sys.executable, "-c", code, str(tokenizer)], check=True))


def _embed_at_once(name: str, folder: Path, workers: int, seconds: float) -> list[dict[str, Any]]:
    """What each of several worker processes of a build reached while all of them embedded."""
    job = folder / f"embedding{workers}"
    job.mkdir()
    spec = {"embedder": name, "folder": str(folder), "job": str(job), "workers": workers, "seconds": seconds}
    function, found = f"{__name__}:embed_for", []
    tasks = [Task(f"worker{number}", function, {**spec, "number": number}) for number in range(workers)]
    LocalExecutor(workers).run(job, tasks, lambda task, record: found.append(record))
    return found


def embed_for(spec: dict[str, Any]) -> dict[str, Any]:
    """The task of one worker: embed blocks of chunks for some seconds, once all workers are ready; what was reached."""
    import psutil
    import torch

    threads, started = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        chunks, tokenizer = load_json(Path(spec["folder"]) / "chunks.json"), load_tokenizer(str(spec["folder"]))
        embedder = load_embedder(spec["embedder"])
        embed_chunks(embedder, tokenizer, chunks[:8])
        start_seconds = time.perf_counter() - started
        _wait_for_all(Path(spec["job"]), spec["number"], spec["workers"])
        started, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < spec["seconds"]:
            embed_chunks(embedder, tokenizer, [chunks[i % len(chunks)] for i in range(done, done + EMBED_BLOCK)])
            done += EMBED_BLOCK
    finally:
        torch.set_num_threads(threads)
    tokens = embedder_tokens(embedder, decode_chunks(tokenizer, chunks[:1024]))
    record = {
        "rate": done / elapsed,
        "start_seconds": start_seconds,
        "device": str(embedder.passages.device),
        "tokens": tokens,
    }
    return record | {"bytes": psutil.Process().memory_info().rss}


def _wait_for_all(job: Path, number: int, workers: int) -> None:
    """Until every worker has come here, so that all are busy while each is measured."""
    (job / f"ready{number}").touch()
    until = time.monotonic() + READY_SECONDS
    while len(list(job.glob("ready*"))) < workers and time.monotonic() < until:
        time.sleep(0.05)


def embedder_tokens(embedder: Any, texts: list[str]) -> float:
    """What the embedder reads of a passage on average, special tokens and prefix included."""
    prefix = getattr(getattr(embedder, "chosen", None), "passage_prefix", "")
    ids = embedder.tokenizer([prefix + text for text in texts], verbose=False)["input_ids"]
    return sum(map(len, ids)) / max(len(ids), 1)


# Search


def _product(folder: Path) -> tuple[float, float]:
    """Seconds a pair of exact search costs: a part for each, a part for each dimension."""
    pairs, seconds = PRODUCT_ROWS * PRODUCT_QUERIES, []
    for dim in PRODUCT_DIMS:
        store = write_synthetic_store(folder / f"product{dim}", PRODUCT_ROWS, dim)
        queries = SyntheticKeys(PRODUCT_ROWS, dim).queries(PRODUCT_QUERIES)
        exact_search(store, queries[:8], 3)
        seconds.append(min(_seconds(lambda: exact_search(store, queries, 3)) for _ in range(3)))  # noqa: B023
    slope = max(seconds[1] - seconds[0], 0.0) / (PRODUCT_DIMS[1] - PRODUCT_DIMS[0])
    return max(seconds[0] - slope * PRODUCT_DIMS[0], 0.0) / pairs, slope / pairs


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _index(folder: Path) -> dict[str, Any]:
    """Three builds tell the time of the training sample and of the codes from what every build takes."""
    kind, (few, many) = resolve_kind("auto"), INDEX_ROWS
    if kind == "exact":
        none = ("index_seconds", "codebook_seconds", "encode_seconds", "queries_per_second")
        return {"index_kind": kind, **dict.fromkeys(none, 0.0)}
    stores = {rows: write_synthetic_store(folder / f"index{rows}", rows, INDEX_DIM) for rows in INDEX_ROWS}
    build = lambda rows, sample: _seconds(lambda: build_index(stores[rows], kind, training_sample=sample))  # noqa: E731
    small, whole, large = build(few, few // 4), build(few, few), build(many, few)
    encode, codebook = max(large - whole, 0.0) / (many - few), max(whole - small, 0.0) / (few - few // 4)
    index, queries = build_index(stores[many], kind, training_sample=few), SyntheticKeys(many, INDEX_DIM)
    asked = queries.queries(INDEX_QUERIES)
    searching = min(_seconds(lambda: index.search(asked, 10)) for _ in range(3))
    return {
        "index_kind": kind,
        "index_seconds": max(whole - few * (encode + codebook), 0.0),
        "codebook_seconds": codebook / INDEX_DIM,
        "encode_seconds": encode / INDEX_DIM,
        "queries_per_second": INDEX_QUERIES / searching,
    }


# Disk


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes written (and made durable) and bytes checked a second."""
    block, file = np.random.default_rng(0).bytes(1 << 20), folder / "written"
    started = time.perf_counter()
    with open(file, "wb") as handle:
        for _ in range(DISK_BYTES >> 20):
            handle.write(block)
    sync(file)
    written = time.perf_counter()
    sha256_file(file)
    return DISK_BYTES / (written - started), DISK_BYTES / (time.perf_counter() - written)
