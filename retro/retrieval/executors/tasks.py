"""Who does the tasks of a long job: processes of this machine, ranks of a Slurm array or torchrun, or a Ray cluster.

A task names a module-level function and a spec that JSON can hold. The function writes its files aside, fsyncs and
renames them, and returns its record; then `<folder>/<name>.json` is written. A task whose record is there, with files
of the recorded sizes, is not run again: this is the whole of resuming. What a job writes must not depend on who did
which task, nor on the order in which they were done.
"""

from __future__ import annotations

import builtins
import json
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from retro.common.files import check_files, os_error_text
from retro.common.records import load_record, save_record


@dataclass(frozen=True)
class Task:
    """One piece of a job: `function` ("package.module:name") called with `spec` gives its record, a JSON object.

    `name` is unique in the job and fit for a file name. The record's "files" are {path: `file_record`}, relative to
    the job's folder, those beside it with "../". `here`: the task needs objects of the calling process and runs in it.
    `light`: it takes less time than to start a process for it. `gpu`: it takes a GPU of a Ray cluster that has some.
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


# One task


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a task that is done and whose files have the recorded sizes, else None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = load_record(path)
        beside, files = {}, dict(record.get("files", {}))
        for file in [name for name in files if name.startswith("../")]:
            beside[file.removeprefix("../")] = files.pop(file)
        check_files(folder, files, checksums=False)
        check_files(folder.parent, beside, checksums=False)
    except ValueError:
        return None
    return record


def run_task(folder: Path, task: Task) -> dict[str, Any]:
    """Do one task in this process and write its record."""
    module, _, name = task.function.partition(":")
    record = getattr(import_module(module), name)(task.spec)
    save_record(folder / f"{task.name}.json", record)
    return json.loads(json.dumps(record))  # as one that is read back


def attempt(folder: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run one task for another process: {"record": ...}, or {"error": ...} that `raise_error` raises there."""
    try:
        return {"record": run_task(Path(folder), Task(**task))}
    except Exception as error:
        return {"error": error_record(error)}


def error_record(error: BaseException) -> dict[str, str]:
    kinds = (kind.__name__ for kind in type(error).__mro__)
    kind = next(name for name in kinds if hasattr(builtins, name))
    kind = "ValueError" if isinstance(error, ValueError) else kind
    if isinstance(error, OSError):
        return {"kind": kind, "message": os_error_text(error)}
    shown = str(error) if isinstance(error, ValueError) else "".join(traceback.format_exception(error))
    return {"kind": kind, "message": shown}


def raise_error(error: dict[str, str]) -> None:
    kind = getattr(builtins, error["kind"], RuntimeError)
    raise (kind if kind is ValueError or issubclass(kind, OSError) else RuntimeError)(error["message"])


class TaskQueue:
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
