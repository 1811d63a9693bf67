"""Seconds of a training step: RETRO[ON], RETRO[OFF], the same decoder alone, RETRO-pytorch 0.3.9, labml's RETRO.

A step is forward, backward and AdamW over random tokens; nothing is searched. All have the same width, layers, heads of
the same size, feed-forward width, vocabulary, and input embeddings that encoder and decoder share; what they add of
their own (biases, null keys, projections) is in the column of parameters. Each runs in a process of its own and they
take turns, as does a square matrix product, whose rate bounds what the counted operations could take:

    share of the bound = operations counted / rate of the product / seconds

Operations are those of matrix products and attention, forward and backward, the masked half of causal attention left
out. Peak memory is the resident peak of the process less what it held before the model was made. Ours run as `retro
train` runs them: freed memory is kept (retro.training.memory), float32 products are oneDNN's where that is as exact
(retro.common.products), and so is the product of the bound. The peers run as they come; what that alone is worth is
seen in the rows "as torch comes" and "tuned as ours", and what attention by blocks is worth (retro.modules.blockwise)
in "fused attention". Packed documents are of 320 tokens each, and see nothing of each other.

    python benchmarks/training.py --json training.json
    python benchmarks/training.py --shapes 256x512 --rounds 3
    python benchmarks/training.py --shapes 256x512 --profile
    python benchmarks/training.py --shapes 256x512 --only ON --also before=../other-checkout

The peers are left out where they are not installed: pip install retro-pytorch==0.3.9; pip install labml-nn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from contestants import CONTESTANTS, PEERS, Contestant, Shape, installed

# Processes


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def restart_peak() -> int:
    """Let the peak count from what is resident now, and give that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def serve(given: dict) -> None:
    """A process of one contestant: a line of JSON for each line that asks."""
    with tuned() if given["tuned"] else contextlib.nullcontext():
        _serve(given)


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """The process as `retro train` has it."""
    from retro.common.products import fast_products
    from retro.training.memory import keep_freed_memory

    keep_freed_memory()
    with fast_products():
        yield


def _serve(given: dict) -> None:
    if given["name"] == "product":
        dtype = torch.bfloat16 if given["precision"] == "bf16" else torch.float32
        a, b = torch.randn(2, given["product"], given["product"]).to(dtype)
        answers = {"step": lambda: {"rate": 2 * given["product"] ** 3 / _seconds(lambda: a @ b, given["clock"])}}
    else:
        _ = torch.randn(64, 64) @ torch.randn(64, 64)
        before = restart_peak()
        options = given["seed"], given["optimizer"], given["precision"], given["compile"]
        one = Contestant(given["name"], Shape(**given["shape"]), *options)
        answers = {
            "step": lambda: _timed(one.step, given["clock"]),
            "memory": lambda: {"peak_bytes": resident("VmHWM") - before},
            "count": lambda: {
                "parameters": one.parameters(),
                "operations": one.counted(),
                "operations_by_formula": one.by_formula(),
            },
        }
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def _timed(step: Callable[[], float], clock: str) -> dict[str, float]:
    found = []
    seconds = _seconds(lambda: found.append(step()), clock)
    return {"seconds": seconds, "loss": found[0].item()}


def _seconds(function: Callable[[], object], clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    started = now()
    function()
    return now() - started


class Process:
    """A contestant's process, asked and answered in turn."""

    def __init__(self, given: dict, source: Path | None = None):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if source is not None:
            paths = [str(source.resolve()), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(given)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._answer()

    def ask(self, what: str) -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with code {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def running(shape: Shape, arguments: argparse.Namespace) -> Iterator[dict[str, Process]]:
    """The processes of all contestants at a shape, and of the product."""
    shared = {name: getattr(arguments, name) for name in ("seed", "optimizer", "precision", "clock", "product")}
    shared |= {"shape": asdict(shape), "compile": "", "tuned": True}
    wanted: dict[str, tuple[dict, Path | None]] = {"product": ({"name": "product"}, None)}
    for name in arguments.only:
        entry = CONTESTANTS[name]
        if entry.peer and not installed(entry.peer):
            continue
        wanted[entry.label] = {"name": name, "tuned": entry.tuned}, None
        if entry.peer is None:
            for label, source in arguments.also:
                tuned_there = entry.tuned and (source / "retro" / "common" / "products.py").is_file()
                wanted[f"{entry.label} {label}"] = {"name": name, "tuned": tuned_there}, source
            if arguments.compile:
                wanted[f"{entry.label} compiled"] = {"name": name, "compile": arguments.compile}, None
    processes: dict[str, Process] = {}
    try:
        for label, (given, source) in wanted.items():
            processes[label] = Process({**shared, **given}, source)
        yield processes
    finally:
        for process in processes.values():
            process.close()


# Measuring


def measure(shape: Shape, arguments: argparse.Namespace) -> dict:
    """All contestants at one shape: rounds in turn, after one that does not count."""
    with running(shape, arguments) as processes:
        product = processes.pop("product")
        counted = {label: process.ask("count") for label, process in processes.items()}
        rates, seconds, losses = [], {label: [] for label in processes}, {label: [] for label in processes}
        for number in range(arguments.rounds + 1):
            for label, process in processes.items():
                rate, found = product.ask("step")["rate"], process.ask("step")
                losses[label].append(found["loss"])
                if number:
                    rates.append(rate)
                    seconds[label].append(found["seconds"])
        memory = {label: process.ask("memory") for label, process in processes.items()}
    tokens, rate = shape.batch * shape.n, median(rates)
    rows = {}
    for label, times in seconds.items():
        middle = median(times)
        rows[label] = {
            **counted[label],
            **memory[label],
            "seconds": {"min": min(times), "median": middle, "max": max(times)},
            "tokens_per_second": tokens / middle,
            "share_of_bound": counted[label]["operations"] / rate / middle,
            "losses": losses[label],
        }
    return {
        "shape": asdict(shape),
        "product_rate": {"min": min(rates), "median": rate, "max": max(rates)},
        "contestants": rows,
        "ratios": ratios(rows),
    }


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    """Of seconds, operations and memory; those whose parts were not run are left out."""
    on, off = rows.get("RETRO[ON]"), rows.get("RETRO[OFF]")
    found = {}
    for label, row in rows.items():
        if on is not None and row is not on:
            found[f"seconds, {label} / ON"] = row["seconds"]["median"] / on["seconds"]["median"]
            found[f"peak memory, ON / {label}"] = on["peak_bytes"] / row["peak_bytes"]
    if on is not None and off is not None:
        found["operations, ON / OFF"] = on["operations"] / off["operations"]
        found["seconds, ON / OFF"] = on["seconds"]["median"] / off["seconds"]["median"]
    return found


def show(result: dict) -> None:
    rate = result["product_rate"]["median"]
    shape = Shape(**result["shape"])
    print(f"\n{shape}: a product of matrices runs at {rate / 1e9:.1f} billion operations a second")
    heads = ["parameters", "min", "median", "max", "tokens/s", "x ON", "operations", "of bound", "peak"]
    units = ["M", "ms", "ms", "ms", "", "", "billion", "%", "MB"]
    print(f"{'':28}" + "".join(f"{head:>11}" for head in heads))
    print(f"{'':28}" + "".join(f"{unit:>11}" for unit in units))
    rows = result["contestants"]
    for label, row in rows.items():
        seconds = row["seconds"]
        times = result["ratios"].get(f"seconds, {label} / ON", 1.0)
        numbers = [
            f"{row['parameters'] / 1e6:.1f}",
            *(f"{1000 * seconds[one]:.0f}" for one in ("min", "median", "max")),
            f"{row['tokens_per_second']:,.0f}",
            f"{times:.2f}",
            f"{row['operations'] / 1e9:.0f}",
            f"{100 * row['share_of_bound']:.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        print(f"{label:28}" + "".join(f"{number:>11}" for number in numbers))
    for name in ("operations, ON / OFF", "seconds, ON / OFF"):
        if name in result["ratios"]:
            print(f"{name:28}{result['ratios'][name]:.2f}")
    both = {label: (row["operations"], row["operations_by_formula"]) for label, row in rows.items()}
    shares = [f"{label} {counted / known:.3f}" for label, (counted, known) in both.items() if known]
    print(f"{'operations / formula':28}{', '.join(shares)}")


def profile(shape: Shape, arguments: argparse.Namespace) -> list[dict]:
    """Where the time of RETRO[ON] goes: operations by the time spent in themselves, over three steps."""
    one = Contestant("ON", shape, arguments.seed, arguments.optimizer, arguments.precision)
    with tuned():
        one.step(), one.step()
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                one.step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        {
            "operation": event.key,
            "share": event.self_cpu_time_total / total,
            "milliseconds": event.self_cpu_time_total / 3000,
            "calls": event.count / 3,
        }
        for event in events
        if event.self_cpu_time_total > total / 500
    ]
    print(f"\n{shape}: RETRO[ON], time in each operation")
    print(f"{'':56}{'%':>8}{'ms':>10}{'calls':>8}")
    for row in rows:
        print(f"{row['operation'][:54]:56}{100 * row['share']:8.1f}{row['milliseconds']:10.2f}{row['calls']:8.0f}")
    return rows


def about() -> dict:
    """Machine and versions; None for a peer that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    from machine import machine

    found = {**machine(), "threads": torch.get_num_threads()}
    for peer, (_, package) in PEERS.items():
        try:
            found["versions"][peer] = version(package.split("==")[0])
        except PackageNotFoundError:
            found["versions"][peer] = None
    return found


def shape_of(text: str) -> Shape:
    """256x512 or 256x512x4: d, n and the batch."""
    return Shape(*map(int, text.split("x")))


def source_of(text: str) -> tuple[str, Path]:
    label, _, folder = text.partition("=")
    if not (Path(folder) / "retro").is_dir():
        raise argparse.ArgumentTypeError(f"{folder} holds no folder retro; give NAME=FOLDER of another checkout")
    return label, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", metavar="DxN[xB]",
        default=[Shape(256, 512, 4), Shape(512, 512, 2), Shape(256, 2048), Shape(512, 2048)],
        help="width, length and batch",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS,
                        default=[name for name, entry in CONTESTANTS.items() if entry.cpu])  # fmt: skip
    parser.add_argument("--also", type=source_of, action="append", default=[], metavar="NAME=FOLDER",
                        help="run ours from another checkout as well, as it trains there")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", choices=("fused", "foreach", "loop"), default="fused", help="AdamW of all")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16: autocast, for all")
    parser.add_argument("--compile", default="", metavar="MODE", help='also under torch.compile: "default" ...')
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: of the process alone, on a busy machine; with OMP_NUM_THREADS=1")  # fmt: skip
    parser.add_argument("--product", type=int, default=2048, help="rows and columns of the matrices of the bound")
    parser.add_argument("--profile", action="store_true", help="RETRO[ON] by operation, in place of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(json.loads(arguments.serve))
    for name in {CONTESTANTS[name].peer for name in arguments.only} - {None}:
        if not installed(name):
            print(f"{CONTESTANTS[name].label} is not installed and is left out; pip install {PEERS[name][1]}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    results = {"machine": about(), "settings": settings}
    if arguments.profile:
        results["profiles"] = [
            {"shape": asdict(shape), "operations": profile(shape, arguments)} for shape in arguments.shapes
        ]
    else:
        results["tables"] = []
        for shape in arguments.shapes:
            results["tables"].append(measure(shape, arguments))
            show(results["tables"][-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
