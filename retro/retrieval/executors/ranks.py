"""Tasks in the ranks of a Slurm array, srun or torchrun, over a shared folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retro.common.files import load_json, save_json, stable_hash
from retro.retrieval.executors.tasks import Executor, OnDone, Task, TaskQueue, error_record, finished, raise_error

_POLL_SECONDS = 0.2
_POLL_PAUSE = 10  # times as long as it took to look: a folder of a million records takes seconds
_BEAT_SECONDS = 10.0  # between two signs of life of a rank
_SILENT_SECONDS = 1800.0  # without one, after which a rank is given up; a library may hold Python's lock for long
_BEGIN_SECONDS = 24 * 3600.0  # within which every rank of a launch begins, as its queue lets it
_TAKE_BACK_SECONDS = 60.0  # within which a rank that is started again removes the error it left the time before


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
                self._run(TaskQueue(folder, tasks, on_done), errors)
        except Exception as error:
            if not self.leads and not folder.is_dir():
                return  # what it was about to read has gone with the folder
            if folder.is_dir():
                save_json(_error_file(folder, self.rank), error_record(error) | {"launch": _launch()})
                if self.leads:
                    errors.wait_for_all()
            raise

    def _run(self, queue: TaskQueue, errors: _Errors) -> None:
        others: dict[str, Task] = {}
        look_at = 0.0
        while queue.waiting or others:
            if (began := time.monotonic()) > look_at:
                if not queue.folder.is_dir() and not self.leads:
                    return
                errors.check()
                self._take_in(queue, others)
                took = time.monotonic() - began
                look_at = began + took + max(_POLL_SECONDS, _POLL_PAUSE * took)
            task = queue.next()
            if task is None:
                time.sleep(_POLL_SECONDS if others else 0)
            elif int(stable_hash(task.name), 16) % self.count == self.rank:
                queue.do(task)
            else:
                others[task.name] = task

    def _take_in(self, queue: TaskQueue, others: dict[str, Task]) -> None:
        """Take in what other ranks have finished."""
        for name in sorted(others.keys() & {path.name.removesuffix(".json") for path in _listed(queue.folder)}):
            if (record := finished(queue.folder, name)) is not None:
                queue.done(others.pop(name), record)


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


class _Heartbeat:
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
        self.others = [_Heartbeat(folder, rank) for rank in range(count) if rank != own]
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
                raise_error(error)
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
