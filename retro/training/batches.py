"""What a step counts of its batches, over all processes."""

from __future__ import annotations

from functools import cache

import torch
from accelerate import Accelerator
from torch import distributed

from retro.training.windows import IGNORED, Batch


def count_targets(batch: Batch) -> int:
    """Predicted tokens of a batch; the first of a window never is one."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all processes, in float64, from host to host: no device is waited for."""
    sums = torch.tensor(values, dtype=torch.float64)
    if accelerator.num_processes > 1:
        distributed.all_reduce(sums, group=_between_hosts(distributed.group.WORLD))
    return sums.tolist()


@cache
def _between_hosts(everyone: distributed.ProcessGroup) -> distributed.ProcessGroup | None:
    """A group that takes tensors in main memory; None is the default one. All processes first ask for it together."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; of pinned memory the host does not wait for the copy."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
