"""Everything on one GPU: training, generation, embedding and search, each beside its peers and beside what bounds it.

    product      rates of a bf16 and a float32 product and of a copy; the bounds of all that follows
    agreement    whether card and CPU compute the same: logits, gradients, greedy text
    training     a step of RETRO[ON] and [OFF], packed, with relative positions, in the paper's form; eager and
                 compiled; beside RETRO-pytorch, labml and transformers' Llama of equal size
    run          `retro train` itself, from a store
    profile      a step kernel by kernel, the time in which the card is idle, the calls that make the host wait
    generation   milliseconds per token of ours, fitted and not, and of the Llama, at batch 1 and 16
    embedding    chunks a second of the embedder and of sentence-transformers
    search       exact search and the kNN join, beside torch's bare product and top-k, and faiss

What is wanted is torch, transformers and this checkout; peers that are not installed are left out, and there is no
network, no model and no store but what is made here. A section runs in a process of its own and is stopped when its
share of the minutes is over: what it found by then is kept, and so it is where it fails. Rows are printed as they
come, and --json is written anew with each. Times of the card are by its own events, the median of rounds after a
warm-up; peak memory is that of the rounds.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only training --minutes 20
    python benchmarks/gpu.py --smoke
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # a checkout that is not installed

import torch
from gpu_sections.bench import Bench, Figures, one_line
from gpu_sections.card import agreement, product
from gpu_sections.datastore import embedding, search
from gpu_sections.generating import generation
from gpu_sections.training import profile, run, training
from machine import machine

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rate": ("TFLOP/s", lambda value: f"{value / 1e12:,.1f}"),
    "float32_rate": ("TFLOP/s", lambda value: f"{value / 1e12:,.1f}"),
    "bandwidth": ("GB/s", lambda value: f"{value / 1e9:,.0f}"),
    "seconds": ("ms", lambda value: f"{1000 * value:,.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "chunks_per_second": ("chunks/s", "{:,.0f}".format),
    "queries_per_second": ("queries/s", "{:,.0f}".format),
    "share_of_product": ("of product", "{:.1%}".format),
    "share_of_bound": ("of bound", "{:.1%}".format),
    "share_of_step": ("of step", "{:.1%}".format),
    "calls": ("calls", "{:,.1f}".format),
    "recall": ("recall@10", "{:.4f}".format),
    "difference": ("difference", "{:.1e}".format),
    "equal_tokens": ("equal tokens", str),
    "prompt_seconds": ("prompt ms", lambda value: f"{1000 * value:,.1f}"),
    "first_seconds": ("first s", "{:.1f}".format),
    "parameters": ("parameters M", lambda value: f"{value / 1e6:.1f}"),
    "peak_bytes": ("peak GB", lambda value: f"{value / 1e9:.2f}"),
}
WIDTH = 58  # of the names of cases


@dataclass(frozen=True)
class Section:
    """What is run, the part of the minutes it may take, and which of the figures are printed."""

    run: Callable[[Bench], None]
    part: int
    columns: tuple[str, ...]


STEP = ("seconds", "tokens_per_second", "share_of_product", "peak_bytes")
SECTIONS = {
    "product": Section(product, 4, ("rate", "float32_rate", "bandwidth")),
    "agreement": Section(agreement, 8, ("difference", "equal_tokens")),
    "training": Section(training, 45, (*STEP, "parameters", "first_seconds")),
    "run": Section(run, 10, STEP),
    "profile": Section(profile, 8, ("seconds", "share_of_step", "calls")),
    "generation": Section(
        generation,
        14,
        ("seconds", "tokens_per_second", "share_of_bound", "peak_bytes", "prompt_seconds", "first_seconds"),
    ),
    "embedding": Section(
        embedding, 5, ("seconds", "chunks_per_second", "share_of_product", "peak_bytes", "difference")
    ),
    "search": Section(search, 10, ("seconds", "queries_per_second", "recall", "peak_bytes")),
}


# A section's process


def serve(pipe: Any, section: Section, given: dict[str, Any]) -> None:
    """Tell each case as it is measured, and in the end what stopped the section, if anything did."""
    os.setsid()  # what it starts is stopped with it
    error = None
    try:
        section.run(Bench(tell=lambda case, figures: pipe.send((case, figures)), **given))
    except Exception as raised:
        error = one_line(raised)
    pipe.send((None, {"error": error}))


def can_fork() -> bool:
    """Whether a fork, which spares a section its imports, can use the card: not if an import has woken CUDA here."""
    asked = get_context("fork").Process(target=lambda: os._exit(torch.cuda._is_in_bad_fork()))
    asked.start()
    asked.join()
    return asked.exitcode == 0


@contextmanager
def started(section: Section, given: dict[str, Any], method: str) -> Iterator[tuple[Any, Any]]:
    context = get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    gc.freeze()  # what is imported is no garbage, in the fork neither
    process = context.Process(target=serve, args=(theirs, section, given))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        with suppress(ProcessLookupError):  # of a process that has not got so far, or is gone
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def measured(section: Section, given: dict[str, Any], method: str) -> Iterator[tuple[str | None, Figures]]:
    """The cases of a section as they come; last None, and the error that ended it or None."""
    with started(section, given, method) as (process, pipe):
        while True:
            left = given["deadline"] - time.monotonic()
            if not pipe.poll(max(0.0, left)):
                yield None, {"error": "stopped, its time is over; give more --minutes, or choose sections by --only"}
                return
            try:
                case, figures = pipe.recv()
            except EOFError:
                process.join()
                case, figures = None, {"error": f"its process ended with code {process.exitcode}"}
            yield case, figures
            if case is None:
                return


# The whole


def head(name: str, section: Section) -> str:
    titles = dict.fromkeys(COLUMNS[column][0] for column in section.columns)
    return f"\n{name:{WIDTH}}" + "".join(f"{title:>14}" for title in titles)


def line(case: str, figures: Figures, section: Section) -> str:
    """The figures under the titles of `head`, or the error."""
    if "error" in figures:
        return f"  {case:{WIDTH - 2}}  {figures['error']}"
    cells: dict[str, str] = {}
    for column in section.columns:
        title, form = COLUMNS[column]
        cells[title] = form(figures[column]) if column in figures else cells.get(title, "")
    return f"  {case[: WIDTH - 3]:{WIDTH - 2}}" + "".join(f"{cell:>14}" for cell in cells.values())


def run_all(names: list[str], arguments: argparse.Namespace, sections: dict[str, Section] = SECTIONS) -> dict[str, Any]:
    """All sections in turn. What one does not need of its time is the next ones'."""
    settings = {name: str(value) for name, value in vars(arguments).items()}
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "sections": {}}
    until, method = time.monotonic() + 60 * arguments.minutes, "fork" if can_fork() else "spawn"
    found: Figures = {}
    for number, name in enumerate(names):
        section, started_at = sections[name], time.monotonic()
        share = section.part / sum(sections[later].part for later in names[number:])
        given = {"found": found, "deadline": started_at + share * (until - started_at)}
        given |= {"smoke": arguments.smoke, "seed": arguments.seed}
        result = results["sections"][name] = {"error": None, "cases": {}, "seconds": 0.0}
        print(head(name, section), flush=True)
        for case, figures in measured(section, given, method):
            if case is not None:
                result["cases"][case] = figures
                print(line(case, figures, section), flush=True)
            elif figures["error"]:
                result["error"] = figures["error"]
                print(f"  {name}: {figures['error']}", flush=True)
            result["seconds"] = time.monotonic() - started_at
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        if name == "product":
            found = {key: value for figures in result["cases"].values() for key, value in figures.items()}
            if not {"rate", "bandwidth"} <= found.keys():
                break  # there is nothing to compare with
    return results


def has_failed(results: dict[str, Any]) -> bool:
    sections = results["sections"].values()
    return any(one["error"] or any("error" in case for case in one["cases"].values()) for one in sections)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="all sections end within these")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="product is always run")
    parser.add_argument("--smoke", action="store_true", help="all sections on the CPU, at sizes that measure nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = [name for name in SECTIONS if name == "product" or name in arguments.only]
    return int(has_failed(run_all(names, arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
