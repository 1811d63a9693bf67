"""How a process on CPUs keeps its memory."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process use freed memory again, rather than give it back to the system; True if it could be asked to.

    Every step of training frees and takes the same large tensors. glibc maps each of them anew, and the system clears
    it page by page on first use, which takes longer than most operations on it. Only Linux with glibc is asked.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _NEVER) and mallopt(_TRIM_THRESHOLD, _NEVER))
