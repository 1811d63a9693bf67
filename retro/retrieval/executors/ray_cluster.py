"""Tasks on a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retro.retrieval.executors.tasks import OnDone, Task, TaskQueue, attempt, raise_error

_RETRIES = 5  # of a Ray task whose node or process died


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
        queue, here = TaskQueue(folder.absolute(), tasks, on_done), deque[Task]()
        running: dict[Any, Task] = {}
        try:
            while True:
                limit = self.workers or 2 * int(ray.cluster_resources().get("CPU", 1))
                while len(running) < limit and (task := queue.next()) is not None:
                    if task.here:
                        here.append(task)
                    else:
                        running[_submit(ray, queue.folder, task)] = task
                if here:
                    queue.do(here.popleft())
                elif not running and not queue.waiting:
                    return
                for done in ray.wait(list(running), timeout=0 if here else 1.0)[0] if running else ():
                    queue.done(running.pop(done), _ray_record(ray, done))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _submit(ray: Any, folder: Path, task: Task) -> Any:
    gpus = 1 if task.gpu and ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(max_retries=_RETRIES, scheduling_strategy="SPREAD", num_cpus=1, num_gpus=gpus)(attempt)
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
        raise_error(answer["error"])
    return answer["record"]
