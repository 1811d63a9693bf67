"""An executor by name."""

from __future__ import annotations

import os
from typing import Literal, get_args

from retro.common.extras import check_installed
from retro.retrieval.executors.local import LocalExecutor
from retro.retrieval.executors.ranks import RankExecutor, rank_of
from retro.retrieval.executors.ray_cluster import RayExecutor
from retro.retrieval.executors.tasks import Executor

ExecutorName = Literal["local", "ranks", "ray"]
EXECUTORS = get_args(ExecutorName)


def open_executor(name: str = "local", workers: int | None = None) -> Executor:
    """An executor by name.

    Arguments:
        name: "local" (processes of this machine), "ranks" (every rank of a Slurm array, srun or torchrun runs the same
            program over one shared folder), or "ray" (tasks on a Ray cluster with one shared folder; extra `ray`).
        workers: processes, or for "ray" tasks at a time. None is two for each GPU, or else one for each core. The
            number of ranks comes from their launcher.

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
    check_installed("ray", "the executor ray")
    return RayExecutor(workers)
