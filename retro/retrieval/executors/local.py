"""Tasks in processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from retro.common.devices import DEVICE
from retro.retrieval.executors.tasks import OnDone, Task, TaskQueue, attempt, raise_error

_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class LocalExecutor:
    """Worker processes, started once two tasks wait that are not light: of one thread each, but for the tokenizers of
    those that have a GPU, which share the cores.

    The calling process does what waits before, and what is marked `here`.

    The workers are plain subprocesses that take tasks as lines of JSON: nothing is forked, and the caller's main
    module is not imported again. They end with the process that started them, however it ends.
    """

    leads, shared = True, False

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None = None) -> None:
        """See `Executor.run`."""
        queue, here = TaskQueue(folder, tasks, on_done), deque[Task]()
        pool = _Pool(folder, self.workers or default_workers())
        try:
            while True:
                self._hand_out(queue, here, pool)
                if here:
                    queue.do(here.popleft())
                elif not pool.running and not queue.waiting:
                    return
                self._take_in(queue, pool, wait=not here)
        finally:
            pool.close()

    def _take_in(self, queue: TaskQueue, pool: _Pool, wait: bool) -> None:
        """Take in what the workers have finished; with `wait`, at least one task."""
        while pool.running and (answer := pool.answer(wait)) is not None:
            queue.done(*answer)
            wait = False

    def _hand_out(self, queue: TaskQueue, here: deque[Task], pool: _Pool) -> None:
        """Give every idle worker a task; do the tasks here for which none is started."""
        ready: list[Task] = []
        while len(ready) < pool.limit - len(pool.running) and (task := queue.next()) is not None:
            (here if task.here else ready).append(task)
        heavy = [task for task in ready if not task.light]
        if not pool.workers and len(heavy) < 2:
            light = [task for task in ready if task.light]
            here.extend(light or heavy)
            queue.waiting.extendleft(heavy if light else ())  # what is light may lead to a second one
        else:
            for task in ready:
                pool.give(task)


def default_workers() -> int:
    """Two for each GPU, one of which reads and tokenizes while it computes for the other, or else one for each core."""
    return 2 * len(_gpus()) or _num_cores()


def num_devices() -> int:
    """GPUs, or else cores, that this process may use."""
    return len(_gpus()) or _num_cores()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; of one that was asked for, its own."""
    if "torch" not in sys.modules and not Path("/proc/driver/nvidia").exists():
        return []
    import torch

    kind, _, number = os.environ.get(DEVICE, "").partition(":")
    if kind == "cpu":
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = named or list(map(str, range(torch.cuda.device_count())))
    return [names[int(number)]] if number else names


class _Pool:
    """Worker processes, started when they are needed."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.workers: list[subprocess.Popen] = []
        self.running: dict[int, Task] = {}  # by the worker's number
        self._idle: list[int] = []
        self._answers: SimpleQueue[tuple[int, bytes]] = SimpleQueue()

    def give(self, task: Task) -> None:
        """Let an idle worker, or a new one, do a task."""
        number = self._idle.pop() if self._idle else self._start()
        self.running[number] = task
        line = json.dumps([str(self.folder), asdict(task)]) + "\n"
        try:
            self.workers[number].stdin.write(line.encode("ascii"))  # type: ignore[union-attr]
            self.workers[number].stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it has died: its output ends, which `answer` reports

    def answer(self, wait: bool) -> tuple[Task, dict[str, Any]] | None:
        """A finished task and its record; None if none is there and `wait` is not asked. Raises a task's error."""
        while True:
            try:
                number, line = self._answers.get(block=wait)
            except Empty:
                return None
            if line.endswith(b"\n"):
                break
            if number in self.running:
                code = self.workers[number].wait()
                raise ChildProcessError(
                    f"a worker process ended with exit code {code} during {self.running[number].name} "
                    "(out of memory?); the same command goes on from here"
                )
            self._idle.remove(number)  # it has ended while it had nothing to do; another one is started if need be
        task = self.running.pop(number)
        self._idle.append(number)
        answer = json.loads(line)
        if "error" in answer:
            raise_error(answer["error"])
        return task, answer["record"]

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
            worker.stdin.close()  # type: ignore[union-attr]

    def _start(self) -> int:
        number, gpus = len(self.workers), _gpus()
        environment = {**os.environ, **_THREADS, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if gpus:  # what it tokenizes must keep up with it
            threads = max(1, _num_cores() // self.limit)
            environment |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            environment.pop(DEVICE, None)  # the only one there
        code = "from retro.retrieval.executors.local import serve_tasks; serve_tasks()"
        worker = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(number, worker.stdout), daemon=True).start()
        return number

    def _listen(self, number: int, output: Any) -> None:
        with output:
            for line in output:
                self._answers.put((number, line))
        self._answers.put((number, b""))


def serve_tasks() -> None:
    """What a worker process does: tasks from standard input, answers to standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints is no answer
    while True:
        answers.write(json.dumps(attempt(*json.loads(tasks.get()))).encode("ascii") + b"\n")
        answers.flush()


def _receive(tasks: SimpleQueue[bytes]) -> None:
    """Read tasks; when whoever sends them is gone, end the process in the middle of whatever it does."""
    while line := sys.stdin.buffer.readline():
        tasks.put(line)
    os._exit(0)
