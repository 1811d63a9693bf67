"""Where models run, and in which type: the one place that turns names into what torch takes.

A call's own `device` or `dtype` goes first, then the environment's RETRO_DEVICE and RETRO_DTYPE, which --device and
--dtype set for a verb and the processes that it starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
DEVICE, DTYPE = "RETRO_DEVICE", "RETRO_DTYPE"


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where models run, and in which type.

    Arguments:
        device: Where models and exact search run, such as cpu, cuda or cuda:1. Default: the environment's RETRO_DEVICE,
            else the accelerator of this machine if there is one, else the CPU.
        dtype: Type of models' weights, the embedder's included. Default: the environment's RETRO_DTYPE, else that in
            which a language model was saved, and for an embedder float32 on a CPU and bfloat16 on a GPU.
    """

    device: str | None = None
    dtype: Dtype | None = None

    def use(self) -> None:
        """Make them those of this process and of the processes that it starts; ValueError for what is not there."""
        for name, value, check in ((DEVICE, self.device, find_device), (DTYPE, self.dtype, find_dtype)):
            if value is not None:
                check(value)
                os.environ[name] = value


def find_device(device: Any = None) -> torch.device:
    """The device that is asked for, here or by the environment, else the accelerator if there is one, else the CPU.

    Raises ValueError, in one sentence, for a device that torch does not know or this machine does not have.
    """
    import torch

    asked = os.environ.get(DEVICE) or None if device is None else device
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked is None:
        return there or torch.device("cpu")
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"device: {asked!r} is no device that torch knows; give for example cpu or cuda:0") from None
    counts = {"cpu": 1} | ({there.type: torch.accelerator.device_count()} if there else {})
    if (found.index or 0) >= counts.pop(found.type, 0):
        known = ["cpu", *(f"{there.type}:{i}" for i in range(torch.accelerator.device_count()) if there)]
        raise ValueError(f"device: {asked} is not there; this machine has {', '.join(known)}")
    return found


def find_dtype(dtype: Any = None) -> Any:
    """The type that is asked for, here or by the environment, as torch's; None if none is.

    Raises ValueError for an unknown name; "auto" and torch's own types stay as they are.
    """
    import torch

    asked = os.environ.get(DTYPE) or None if dtype is None else dtype
    if not isinstance(asked, str) or asked == "auto":
        return asked
    if asked not in DTYPES:
        raise ValueError(f"dtype: {asked} is unknown; give one of {', '.join(DTYPES)}")
    return getattr(torch, asked)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run torch on so many threads; None leaves it as it is."""
    if count is None or "torch" not in sys.modules:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
