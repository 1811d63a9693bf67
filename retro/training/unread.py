"""What steps gave and nobody has looked at yet: to look at a number is to wait until the device has computed it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StepResult(NamedTuple):
    """One step: its number from 1, and what it gave on this process.

    losses: of each micro-batch the mean, in nats, and over how many tokens. num_targets: those of all processes.
    """

    step: int
    losses: list[tuple[Tensor, int]]
    grad_norm: Tensor
    num_targets: int


class ReadStep(NamedTuple):
    """The same as numbers; loss_sum: of this process's tokens, in nats."""

    step: int
    loss_sum: float
    grad_norm: float
    num_targets: int

    @property
    def wrong(self) -> str | None:
        """What is not finite; None if all is well. The loss is named before the gradient that comes of it."""
        if not math.isfinite(self.loss_sum):
            return f"the loss is {self.loss_sum / max(1, self.num_targets)}"
        return None if math.isfinite(self.grad_norm) else f"the gradient norm is {self.grad_norm}"


@dataclass
class Unread:
    """Results of the steps since they were last read."""

    results: list[StepResult] = field(default_factory=list)

    def read(self) -> list[ReadStep]:
        """All of them as numbers, in one transfer, and forgotten."""
        results, self.results = self.results, []
        if not results:
            return []
        tensors = [loss for result in results for loss, _ in result.losses] + [result.grad_norm for result in results]
        values = iter(torch.stack([tensor.detach().float() for tensor in tensors]).tolist())
        sums = [sum(next(values) * count for _, count in result.losses) for result in results]
        return [
            ReadStep(result.step, loss_sum, next(values), result.num_targets)
            for result, loss_sum in zip(results, sums, strict=True)
        ]
