"""From text to a trained and measured model, seconds by stage; and how each cost grows when its cause doubles.

    stages    read, tokenize and embed; index; neighbors; training; bits per byte of held-out documents
    corpus    the first three over a corpus of doubling size
    k, n, l   a training step (benchmarks/training.py) with twice the neighbors, twice the window, chunks half as long;
              the operations counted beside the seconds

An exponent is the slope of the seconds over the size, both as logarithms: 1 where twice the size takes twice the time.
Rounds take turns; a point is their median. With --demo the stages are those that `retro demo` recorded.

    python benchmarks/end_to_end.py --json end_to_end.json --plot growth.png
    python benchmarks/end_to_end.py --parts stages --inputs train.jsonl.gz --held-out valid.jsonl.gz --tokenizer gpt2
    python benchmarks/end_to_end.py --parts stages --demo demo
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Shape
from machine import machine

from retro.common.settings import find_config, read_yaml
from retro.evaluation.plots import OTHER_LOOKS, curve, picture
from retro.retrieval import BuildSettings, Store, build_index, build_neighbors, build_store
from retro.text.corpus import read_documents
from retro.text.tokenizer import train_tokenizer
from retro.training.memory import keep_freed_memory

Seconds = dict[str, float]
DATASTORE = ("read, tokenize, embed", "index", "neighbors")


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
    print(f"  {stage:28}{seconds[stage]:10.1f} s", flush=True)


# Stages


def write_texts(inputs: list[str], file: Path, num_bytes: int | None) -> int:
    """The documents of the inputs, or the first of them with so many bytes of text, as JSONL; bytes written of text."""
    total = 0
    with open(file, "w", encoding="utf-8") as out:
        for document in read_documents(inputs):
            if num_bytes is not None and total >= num_bytes:
                break
            out.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
            total += len(document.text.encode())
    return total


def make_datastore(folder: Path, texts: Path, tokenizer: str, arguments: argparse.Namespace) -> tuple[Store, Seconds]:
    """A datastore with index and neighbors, and what each took."""
    seconds: Seconds = {}
    settings = BuildSettings(str(folder), [str(texts)], tokenizer, embedder=arguments.embedder, index="none")
    with timed(seconds, DATASTORE[0]):
        store = build_store(settings)
    with timed(seconds, DATASTORE[1]):
        build_index(store)
    with timed(seconds, DATASTORE[2]):
        build_neighbors(store, k=read_yaml(find_config(arguments.config))["num_neighbors"])
    return store, seconds


def tokenizer_of(arguments: argparse.Namespace, texts: Path, folder: Path) -> str:
    """The one named, or one trained on the texts."""
    if arguments.tokenizer:
        return arguments.tokenizer
    train_tokenizer(folder / "tokenizer", [str(texts)], vocab_size=arguments.vocab_size)
    return str(folder / "tokenizer")


def stages(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds by stage, and the sizes of what was made."""
    from retro.training.pretrain import main as pretrain

    if arguments.demo:
        return recorded(arguments.demo)
    seconds: Seconds = {}
    texts = work / "train.jsonl"
    with timed(seconds, "reading text"):
        num_bytes = write_texts(arguments.inputs, texts, arguments.bytes)
    with timed(seconds, "tokenizer"):
        tokenizer = tokenizer_of(arguments, texts, work)
    store, of_datastore = make_datastore(work / "store", texts, tokenizer, arguments)
    seconds |= of_datastore
    given = [f"store={work / 'store'}", f"output={work / 'model'}", f"max_tokens={arguments.tokens}"]
    with timed(seconds, "training"):
        pretrain(arguments.config, given)
    found = {"bytes": num_bytes, "chunks": store.num_chunks, "tokens_trained": arguments.tokens}
    if arguments.held_out:
        with timed(seconds, "bits per byte"):
            found["bpb"] = measured(work / "model", store, arguments)
    return {**found, "seconds": seconds, "metrics": last_metrics(work / "model")}


def measured(model: Path, store: Store, arguments: argparse.Namespace) -> dict[str, float]:
    from retro.evaluation import bits_per_byte
    from retro.loading import load

    documents = list(islice(read_documents(arguments.held_out), arguments.documents))
    opened, _, retriever = load(model, store)
    return bits_per_byte(opened, documents, retriever)["bpb"]


def recorded(demo: Path) -> dict[str, Any]:
    """What `retro demo` wrote."""
    results = json.loads((demo / "results.json").read_text())
    counts = json.loads((demo / "store" / "manifest.json").read_text())["counts"]
    for stage, seconds in results["seconds_of_stage"].items():
        print(f"  {stage:28}{seconds:10.1f} s")
    return {
        "bytes": counts["bytes"],
        "chunks": counts["chunks"],
        "seconds": results["seconds_of_stage"],
        "bpb": results["bpb"],
        "metrics": last_metrics(demo / "retro"),
    }


def last_metrics(model: Path) -> dict[str, float]:
    """The last line that tells the speed of training."""
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "tokens_per_second" in line][-1]


# Growth


def corpus(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds of the datastore's stages by the bytes of the corpus, each size built anew in each round."""
    largest = work / "largest.jsonl"
    write_texts(arguments.inputs, largest, arguments.corpus_bytes[-1])
    tokenizer = tokenizer_of(arguments, largest, work)
    points: dict[str, dict[int, list[float]]] = {}
    for number in range(arguments.rounds + 1):  # the first, of the smallest alone, loads what later ones find loaded
        for wanted in arguments.corpus_bytes if number else arguments.corpus_bytes[:1]:
            texts = work / f"{wanted}.jsonl"
            size = write_texts([str(largest)], texts, wanted)
            print(f"{size:,} bytes")
            _, seconds = make_datastore(work / "growing", texts, tokenizer, arguments)
            shutil.rmtree(work / "growing")
            for stage, value in seconds.items() if number else ():
                points.setdefault(stage, {}).setdefault(size, []).append(value)
    return {stage: summary(sizes) for stage, sizes in points.items()}


def steps(cause: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step of RETRO[ON], and the operations counted in it, by k, n or l."""
    base = Shape(arguments.width, arguments.window, layers=4, cca_layers=(2, 4))
    make: Callable[[int], Shape] = {
        "k": lambda k: Shape(**{**vars(base), "k": k}),
        "n": lambda n: Shape(**{**vars(base), "n": n}),
        "l": lambda chunks: Shape(**{**vars(base), "m": base.n // chunks}),
    }[cause]
    sizes = {"k": arguments.k, "n": arguments.n, "l": arguments.l}[cause]
    contestants = {size: Contestant("ON", make(size), arguments.seed, "fused") for size in sizes}
    counted = {size: [one.counted()] for size, one in contestants.items()}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    now = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for number in range(arguments.rounds + 1):
        for size, one in contestants.items():
            started = now()
            one.step()
            if number:
                seconds[size].append(now() - started)
    return {"seconds": summary(seconds), "operations": summary(counted)}


def summary(points: dict[int, list[float]]) -> dict[str, Any]:
    """Medians by size, the slope over all sizes and that of the last doubling."""
    sizes, values = list(points), [median(found) for found in points.values()]
    logs = np.log2(sizes), np.log2(values)
    return {
        "sizes": sizes,
        "values": values,
        "min": [min(found) for found in points.values()],
        "max": [max(found) for found in points.values()],
        "exponent": float(np.polyfit(*logs, 1)[0]),
        "last_exponent": float((logs[1][-1] - logs[1][-2]) / (logs[0][-1] - logs[0][-2])),
    }


CAUSES = {"corpus": "bytes of text", "k": "neighbors, k", "n": "window, n tokens", "l": "chunks of a window, l"}


def show(results: dict[str, Any]) -> None:
    for cause in CAUSES:
        for what, found in results.get(cause, {}).items():
            slopes = f"exponent {found['exponent']:.2f}, of the last doubling {found['last_exponent']:.2f}"
            points = zip(found["sizes"], found["values"], strict=True)
            print(f"{cause:8}{what:24}{slopes}  ({', '.join(f'{size:,}: {value:.3g}' for size, value in points)})")


def plot(results: dict[str, Any], file: Path) -> None:
    causes = [cause for cause in CAUSES if cause in results]
    if not causes:
        raise SystemExit("there is nothing to draw: give --parts of corpus, k, n and l")
    with picture(file, rows=len(causes), size=(6.5, 2.6 * len(causes))) as rows:
        for cause, axes in zip(causes, rows if len(causes) > 1 else [rows], strict=True):
            draw(axes, {what: found for what, found in results[cause].items() if what != "operations"})
            axes.set(xlabel=CAUSES[cause], ylabel="seconds")
        axes.figure.suptitle("median; bars: least and greatest", fontsize=9)


def draw(axes: Any, lines: dict[str, Any]) -> None:
    for look, (what, found) in zip(OTHER_LOOKS, lines.items(), strict=False):
        values = list(zip(found["values"], found["min"], found["max"], strict=True))
        curve(axes, found["sizes"], values, f"{what}, exponent {found['exponent']:.2f}", look)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["stages", *CAUSES], default=["stages", *CAUSES])
    parser.add_argument("--inputs", nargs="+", default=["package:numpy"], help="text of the corpus")
    parser.add_argument("--bytes", type=int, default=300_000, help="of the inputs, in stages; 0 takes all")
    parser.add_argument("--held-out", nargs="+", help="documents whose bits per byte are measured")
    parser.add_argument("--documents", type=int, default=8, help="of these, at most")
    parser.add_argument("--tokenizer", help="default: one trained on the corpus")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of that one")
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--config", default="train_small", help="recipe of the training")
    parser.add_argument("--tokens", type=int, default=100_000, help="trained on")
    parser.add_argument("--demo", type=Path, help="a folder that `retro demo` wrote")
    parser.add_argument("--corpus-bytes", type=int, nargs="+", default=[100_000, 200_000, 400_000, 800_000])
    parser.add_argument("--width", type=int, default=128, help="d of the steps")
    parser.add_argument("--window", type=int, default=512, help="n of the steps for k and l")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--n", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--l", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the steps; cpu: of this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of what is made; default: a temporary one")
    parser.add_argument("--plot", type=Path, help="draw growth (.png, .svg, .pdf)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.bytes = arguments.bytes or None
    keep_freed_memory()
    about = {**machine(), "threads": torch.get_num_threads()}
    results: dict[str, Any] = {"machine": about, "settings": {n: str(v) for n, v in vars(arguments).items()}}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts:
            print(part)
            if part == "stages":
                results[part] = stages(arguments, work)
            else:
                results[part] = corpus(arguments, work) if part == "corpus" else steps(part, arguments)
    show(results)
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
