"""What a section of benchmarks/gpu.py measures with, in its own process: device, clock, memory, and who is told."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

Figures = dict[str, Any]


@dataclass
class Bench:
    """One section's process.

    tell: takes a case and its figures, or {"error": why there are none}.
    found: the figures of the section `product`, {"rate", "float32_rate", "bandwidth"}; none in that section itself.
    deadline: when the process is stopped, by time.monotonic.
    """

    tell: Callable[[str, Figures], None]
    found: Figures
    deadline: float
    smoke: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.smoke or torch.cuda.is_available()):
            raise ValueError("torch sees no GPU here; with --smoke every section runs on the CPU at tiny sizes")
        self.device = torch.device("cpu" if self.smoke else "cuda")

    def case(self, name: str, measure: Callable[[], Figures]) -> Figures | None:
        """Tell the figures of one case; one that fails is told with its error, and gives None."""
        torch.manual_seed(self.seed)
        try:
            with self.memory() as peak:
                figures = measure()
            figures = {**figures, **peak}
        except Exception as error:
            self.tell(name, {"error": one_line(error)})
            return None
        self.tell(name, figures)
        return figures

    @contextmanager
    def memory(self) -> Iterator[Figures]:
        """Begins with nothing compiled or cached; gives `peak_bytes` in the end, of what was timed last, on a GPU."""
        torch.compiler.reset()
        peak: Figures = {}
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield peak
        if self.device.type == "cuda":
            peak["peak_bytes"] = torch.cuda.max_memory_allocated()

    # Time

    def wait(self) -> None:
        """For what the device has been given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 10, warm_up: int = 2, at_most: float = 15.0) -> float:
        """The median of rounds that follow each other, after those that do not count.

        On a GPU by events between them, so that the host may run ahead as it does in use. Fewer rounds, at least one,
        where they would take longer than `at_most` seconds.
        """
        warm_up = 1 if self.smoke else warm_up
        for _ in range(warm_up):
            last = self.once(run)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # compiling is over
        rounds = 1 if self.smoke else max(1, min(rounds, int(at_most / last)))
        marks = [self._mark()]
        for _ in range(rounds):
            run()
            marks.append(self._mark())
        self.wait()
        return median(self._between(first, last) for first, last in pairwise(marks))

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of a single call, until the device has done it."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return last - first if self.device.type == "cpu" else first.elapsed_time(last) / 1000

    # Sizes

    def pick(self, real: Any, tiny: Any) -> Any:
        """The second under --smoke."""
        return tiny if self.smoke else real

    @property
    def compiler(self) -> dict[str, Any]:
        """Options of torch.compile: with --smoke it traces, but generates no code."""
        return {"dynamic": False, **({"backend": "eager"} if self.smoke else {})}

    def share(self, operations: float, seconds: float) -> float:
        """Of the rate of the device's bf16 product."""
        return operations / seconds / self.found["rate"]


def one_line(error: BaseException) -> str:
    """The kind of an error and its first line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]
