"""Who does the tasks of a long job: processes of this machine, ranks of a Slurm array or torchrun, or a Ray cluster.

A task names a module-level function and a spec that JSON can hold. The function writes its files aside, fsyncs and
renames them, and returns its record; then `<folder>/<name>.json` is written. A task whose record is there, with files
of the recorded sizes, is not run again: this is the whole of resuming. What a job writes must not depend on who did
which task, nor on the order in which they were done.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

from retro.retrieval.files import check_files, load_json, save_json, stable_hash

EXECUTORS = ("local", "ranks", "ray")
_RETRIES = 5  # of a Ray task whose node or process died
_POLL_SECONDS = 0.2
_POLL_PAUSE = 10  # times as long as it took to look: a folder of a million records takes seconds
_BEAT_SECONDS = 10.0  # between two signs of life of a rank
_SILENT_SECONDS = 1800.0  # without one, after which a rank is given up; a library may hold Python's lock for long
_BEGIN_SECONDS = 24 * 3600.0  # within which every rank of a launch begins, as its queue lets it
_TAKE_BACK_SECONDS = 60.0  # within which a rank that is started again removes the error it left the time before
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Task:
    """One piece of a job: `function` ("package.module:name") called with `spec` gives its record, a JSON object.

    `name` is unique in the job and fit for a file name. The record's "files" are {path: `file_record`}, relative to
    the job's folder. `here`: the task needs objects of the calling process and runs in it. `light`: it takes less time
    than to start a process for it. `gpu`: it takes a GPU of a Ray cluster that has some.
    """

    name: str
    function: str
    spec: dict[str, Any] = field(hash=False)
    here: bool = False
    light: bool = False
    gpu: bool = False


OnDone = Callable[[Task, dict[str, Any]], Iterable[Task] | None]


@runtime_checkable
class Executor(Protocol):
    """Runs the tasks of a job.

    `leads`: this process writes what belongs to the whole job (manifests), as all do but the ranks above 0.
    `shared`: other processes read the records too, so that none may be deleted before the job ends.
    """

    leads: bool
    shared: bool

    def run(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None = None) -> None:
        """Do all tasks that are not done yet and those that `on_done(task, record)` returns, which go first.

        `on_done` is called in this process once for every task, resumed ones included; all it returns together must
        not depend on the order of the calls. The error of a task is raised: ValueError for what the user can mend.
        """
        ...


def open_executor(name: str = "local", workers: int | None = None) -> Executor:
    """An executor by name.

    Arguments:
        name: "local" (processes of this machine), "ranks" (every rank of a Slurm array, srun or torchrun runs the same
            program over one shared folder), or "ray" (tasks on a Ray cluster with one shared folder; extra `ray`).
        workers: processes, or for "ray" tasks at a time. None is one for each GPU, or else for each core. The number
            of ranks comes from their launcher.

    Raises ValueError for another name, fewer than 1 worker, ranks without their variables, and Ray not installed.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, not {name!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if name == "ranks":
        rank, count = rank_of(os.environ)
        if workers not in (None, count):
            raise ValueError(f"workers is {workers}, but the launcher started {count} ranks; leave workers out")
        return RankExecutor(rank, count)
    if name == "local":
        return LocalExecutor(workers)
    if find_spec("ray") is None:
        raise ValueError("the executor ray needs Ray; pip install retro-lm[ray]")
    return RayExecutor(workers)


# One task


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a task that is done and whose files have the recorded sizes, else None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = load_json(path)
        check_files(folder, record.get("files", {}), checksums=False)
    except ValueError:
        return None
    return record


def run_task(folder: Path, task: Task) -> dict[str, Any]:
    """Do one task in this process and write its record."""
    module, _, name = task.function.partition(":")
    record = getattr(import_module(module), name)(task.spec)
    save_json(folder / f"{task.name}.json", record)
    return json.loads(json.dumps(record))  # as one that is read back


def _attempt(folder: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run one task for another process: {"record": ...}, or {"error": ...} that `_raise` raises there."""
    try:
        return {"record": run_task(Path(folder), Task(**task))}
    except Exception as error:
        return {"error": _error_record(error)}


def _error_record(error: BaseException) -> dict[str, str]:
    kinds = (kind.__name__ for kind in type(error).__mro__)
    kind = next(name for name in kinds if hasattr(builtins, name))
    kind = "ValueError" if isinstance(error, ValueError) else kind
    shown = str(error) if isinstance(error, (ValueError, OSError)) else "".join(traceback.format_exception(error))
    return {"kind": kind, "message": shown}


def _raise(error: dict[str, str]) -> None:
    kind = getattr(builtins, error["kind"], RuntimeError)
    raise (kind if kind is ValueError or issubclass(kind, OSError) else RuntimeError)(error["message"])


class _Work:
    """The tasks of a job: those that wait, and what the finished ones bring."""

    def __init__(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None) -> None:
        self.folder, self.on_done = folder, on_done
        self.waiting: deque[Task] = deque(tasks)

    def next(self) -> Task | None:
        """The next task to do; those that are done already are taken in on the way."""
        while self.waiting:
            task = self.waiting.popleft()
            record = finished(self.folder, task.name)
            if record is None:
                return task
            self.done(task, record)
        return None

    def done(self, task: Task, record: dict[str, Any]) -> None:
        """Take in what a finished task leads to, ahead of what waits."""
        led_to = self.on_done(task, record) if self.on_done else None
        self.waiting.extendleft(reversed(list(led_to or ())))

    def do(self, task: Task) -> None:
        """Do a task in this process."""
        self.done(task, run_task(self.folder, task))


# Processes of this machine


class LocalExecutor:
    """Worker processes of one thread each, started once two tasks wait that are not light.

    The calling process does what waits before, and what is marked `here`.

    The workers are plain subprocesses that take tasks as lines of JSON: nothing is forked, and the caller's main
    module is not imported again. They end with the process that started them, however it ends.
    """

    leads, shared = True, False

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None = None) -> None:
        """See `Executor.run`."""
        work, here = _Work(folder, tasks, on_done), deque[Task]()
        pool = _Pool(folder, self.workers or default_workers())
        try:
            while True:
                self._hand_out(work, here, pool)
                if here:
                    work.do(here.popleft())
                elif not pool.running and not work.waiting:
                    return
                self._take_in(work, pool, wait=not here)
        finally:
            pool.close()

    def _take_in(self, work: _Work, pool: _Pool, wait: bool) -> None:
        """Take in what the workers have finished; with `wait`, at least one task."""
        while pool.running and (answer := pool.answer(wait)) is not None:
            work.done(*answer)
            wait = False

    def _hand_out(self, work: _Work, here: deque[Task], pool: _Pool) -> None:
        """Give every idle worker a task; do the tasks here for which none is started."""
        ready: list[Task] = []
        while len(ready) < pool.limit - len(pool.running) and (task := work.next()) is not None:
            (here if task.here else ready).append(task)
        if not pool.workers and sum(not task.light for task in ready) < 2:
            here.extend(ready)
        else:
            for task in ready:
                pool.give(task)


def default_workers() -> int:
    """One for each GPU, or else for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(_gpus()) or cores


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "torch" not in sys.modules and not Path("/proc/driver/nvidia").exists():
        return []
    import torch

    count = torch.cuda.device_count()
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(
        map(str, range(count))
    )


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
            _raise(answer["error"])
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
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        code = "from retro.retrieval.building.executors import serve_tasks; serve_tasks()"
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
        answers.write(json.dumps(_attempt(*json.loads(tasks.get()))).encode("ascii") + b"\n")
        answers.flush()


def _receive(tasks: SimpleQueue[bytes]) -> None:
    """Read tasks; when whoever sends them is gone, end the process in the middle of whatever it does."""
    while line := sys.stdin.buffer.readline():
        tasks.put(line)
    os._exit(0)


# Ranks over a shared folder


def rank_of(environment: Any) -> tuple[int, int]:
    """Rank and number of ranks, from the variables of torchrun, a Slurm array or srun; ValueError if there are none."""
    if "RANK" in environment:
        rank, count = int(environment["RANK"]), int(environment.get("WORLD_SIZE", 0))
    elif "SLURM_ARRAY_TASK_ID" in environment:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", 1)) for name in ("MIN", "STEP"))
        rank = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        count = int(environment.get("SLURM_ARRAY_TASK_COUNT", 0))
    elif "SLURM_PROCID" in environment:
        rank, count = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_NTASKS", 0))
    else:
        raise ValueError(
            "the executor ranks needs SLURM_ARRAY_TASK_ID, SLURM_PROCID or RANK in the environment; "
            "start it as a Slurm array, with srun or with torchrun"
        )
    if not 0 <= rank < count:
        raise ValueError(f"the environment says rank {rank} of {count}; ranks must count from 0 without gaps")
    return rank, count


class RankExecutor:
    """Every rank runs the same program and does the tasks whose name hashes to it; rank 0 leads."""

    shared = True

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.leads = rank, count, rank == 0

    def run(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None = None) -> None:
        """See `Executor.run`. An error of one rank is raised by all; rank 0 waits a little until they have stopped.

        ChildProcessError if another rank gives no sign of life for half an hour, or does not begin within a day.
        Returns early in a rank above 0 when rank 0, done or stopped, has removed the folder.
        """
        _error_file(folder, self.rank).unlink(missing_ok=True)
        errors = _Errors(folder, self.count, self.rank)
        try:
            with _beating(_beat_file(folder, self.rank)):
                self._run(_Work(folder, tasks, on_done), errors)
        except Exception as error:
            if not self.leads and not folder.is_dir():
                return  # what it was about to read has gone with the folder
            if folder.is_dir():
                save_json(_error_file(folder, self.rank), _error_record(error) | {"launch": _launch()})
                if self.leads:
                    errors.wait_for_all()
            raise

    def _run(self, work: _Work, errors: _Errors) -> None:
        others: dict[str, Task] = {}
        look_at = 0.0
        while work.waiting or others:
            if (began := time.monotonic()) > look_at:
                if not work.folder.is_dir() and not self.leads:
                    return
                errors.check()
                self._take_in(work, others)
                took = time.monotonic() - began
                look_at = began + took + max(_POLL_SECONDS, _POLL_PAUSE * took)
            task = work.next()
            if task is None:
                time.sleep(_POLL_SECONDS if others else 0)
            elif int(stable_hash(task.name), 16) % self.count == self.rank:
                work.do(task)
            else:
                others[task.name] = task

    def _take_in(self, work: _Work, others: dict[str, Task]) -> None:
        """Take in what other ranks have finished."""
        for name in sorted(others.keys() & {path.name.removesuffix(".json") for path in _listed(work.folder)}):
            if (record := finished(work.folder, name)) is not None:
                work.done(others.pop(name), record)


@contextmanager
def _beating(file: Path) -> Iterator[None]:
    """Write a file with the launch in it, and touch it every few seconds until the rank ends, when it is removed."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            with suppress(OSError):  # rank 0 has removed the folder, or it cannot be reached for a while
                os.utime(file)

    file.write_text(_launch())
    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        file.unlink(missing_ok=True)


class _Silence:
    """For how long another rank has given no sign of life, by this process's clock and in this process's presence: a
    time in which nobody looked (for a task that took long, or a stopped process) counts as one beat."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file, self.rank = _beat_file(folder, rank), rank
        self.seconds, self.looked_at, self.sign = 0.0, time.monotonic(), self._sign()
        self.has_begun = self.sign is not None and self._is_of_this_launch()  # else it may be left of an earlier one

    def _sign(self) -> int | None:
        """What changes with every beat; None where there is no file, or it cannot be reached for a while."""
        try:
            return self.file.stat().st_mtime_ns
        except OSError:
            return None

    def _is_of_this_launch(self) -> bool:
        try:
            return self.file.read_text() == _launch()
        except OSError:
            return False

    def check(self) -> None:
        """ChildProcessError if it is too long. A rank that has ended in peace has no file any more."""
        now, sign = time.monotonic(), self._sign()
        self.seconds += min(now - self.looked_at, _BEAT_SECONDS)
        self.looked_at = now
        if sign != self.sign:
            self.seconds, self.sign, self.has_begun = 0.0, sign, sign is not None
        if self.is_gone:
            did = "given no sign of life for" if self.has_begun else "not begun within"
            raise ChildProcessError(
                f"rank {self.rank} has {did} {self._limit:.0f} seconds (its process or node is gone?); "
                "start the same command again, which goes on from here"
            )

    @property
    def is_gone(self) -> bool:
        return self.seconds > self._limit

    @property
    def _limit(self) -> float:
        return _SILENT_SECONDS if self.has_begun else _BEGIN_SECONDS


class _Errors:
    """The errors that ranks leave in the folder of a job, and the silence of those that could leave none."""

    def __init__(self, folder: Path, count: int, own: int) -> None:
        self.files = [_error_file(folder, rank) for rank in range(count)]
        self.others = [_Silence(folder, rank) for rank in range(count) if rank != own]
        self.began = time.monotonic()
        self.old = {file: file.stat().st_mtime_ns for file in self.files if file.exists()}

    def check(self) -> None:
        """Raise the error of another rank, or that it is silent; an error of an earlier launch only if its rank does
        not take it back."""
        for file in self.files:
            try:
                changed = file.stat().st_mtime_ns
                error = load_json(file)
            except FileNotFoundError:
                continue
            waiting = time.monotonic() - self.began < _TAKE_BACK_SECONDS
            if error["launch"] == _launch() and not (self.old.get(file) == changed and waiting):
                _raise(error)
        for other in self.others:
            other.check()

    def wait_for_all(self, seconds: float = 30.0) -> None:
        """Wait until every rank that is not silent has stopped, each leaving an error."""
        end, silent = time.monotonic() + seconds, {other.rank for other in self.others if other.is_gone}
        files = [file for rank, file in enumerate(self.files) if rank not in silent]
        while time.monotonic() < end and not all(file.exists() for file in files):
            time.sleep(_POLL_SECONDS)


def await_leader(executor: Executor, ready: Callable[[], bool], what: str, seconds: float = 3600.0) -> None:
    """In a rank above 0, wait until rank 0 has done its part; ChildProcessError if it takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not executor.leads and not ready():
        if time.monotonic() > end:
            raise ChildProcessError(
                f"rank 0 has not {what} within {seconds:.0f} seconds; see what it says, start again"
            )
        time.sleep(_POLL_SECONDS)


def _listed(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"error-of-rank-{rank}.json"


def _beat_file(folder: Path, rank: int) -> Path:
    return folder / f"sign-of-rank-{rank}"


def _launch() -> str:
    """What tells one start of the ranks from the next, as far as their launcher says."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "SLURM_ARRAY_JOB_ID" in found:
        found.pop("SLURM_JOB_ID", None)  # of this one task of the array
    return stable_hash(found)


# Ray


class RayExecutor:
    """Tasks of Ray Core, spread over the nodes; those of a node that dies run again on another."""

    leads, shared = True, False

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(self, folder: Path, tasks: Iterable[Task], on_done: OnDone | None = None) -> None:
        """See `Executor.run`. Joins the Ray cluster there is (RAY_ADDRESS, or one started on this machine), or starts
        one; `folder` must be the same on every node."""
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        work, here = _Work(folder.absolute(), tasks, on_done), deque[Task]()
        running: dict[Any, Task] = {}
        try:
            while True:
                limit = self.workers or 2 * int(ray.cluster_resources().get("CPU", 1))
                while len(running) < limit and (task := work.next()) is not None:
                    if task.here:
                        here.append(task)
                    else:
                        running[_submit(ray, work.folder, task)] = task
                if here:
                    work.do(here.popleft())
                elif not running and not work.waiting:
                    return
                for done in ray.wait(list(running), timeout=0 if here else 1.0)[0] if running else ():
                    work.done(running.pop(done), _ray_record(ray, done))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _submit(ray: Any, folder: Path, task: Task) -> Any:
    gpus = 1 if task.gpu and ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(max_retries=_RETRIES, scheduling_strategy="SPREAD", num_cpus=1, num_gpus=gpus)(_attempt)
    return remote.options(name=task.name).remote(str(folder), asdict(task))


def _ray_record(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        answer = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ChildProcessError(
            f"Ray gave a task up after {_RETRIES} tries ({reason}); the same command goes on from here"
        ) from None
    if "error" in answer:
        _raise(answer["error"])
    return answer["record"]
