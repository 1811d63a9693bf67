"""What a step counts of its batches, over all processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from retro.training.windows import IGNORED, Batch


def count_targets(batch: Batch) -> int:
    """Predicted tokens of a batch; the first of a window never is one."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all processes, in float64."""
    device = accelerator.device if accelerator.num_processes > 1 else "cpu"
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum").tolist()


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
