"""Float32 matrix products of a CPU by oneDNN, where that is as exact.

PyTorch gives them to MKL, which on AMD processors is less than half as fast (EPYC with AVX-512, one thread, a Linear of
384 x 1,536 over 2,000 rows: 98 GFLOP/s and 227, forward and backward). What hands them to oneDNN is the precision
"medium", which allows bfloat16 inside: a processor with matrix units for it then rounds to it, and there the products
are left as they are. Those of a few rows are slower by oneDNN, so that token-by-token sampling does without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

_LARGEST_ERROR = 1e-5  # of a product of 512 terms, relative to its largest value; bfloat16 has 1e-3, float32 1e-6
_lock, _inside = Lock(), 0


@contextmanager
def fast_products() -> Iterator[None]:
    """Within (and in functions decorated with `@fast_products()`), products are as exact and on some CPUs faster.

    The switch is the process's own (`torch.set_float32_matmul_precision`): other threads have it too meanwhile. Where a
    GPU is at hand, or the user has chosen a precision, nothing changes.
    """
    if not (_inside or _is_untouched()) or not _is_exact():
        yield
        return
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    global _inside
    with _lock:
        _inside += step
        torch.set_float32_matmul_precision("medium" if _inside else "highest")


def _is_untouched() -> bool:
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer interface
        return False


@cache
def _is_exact() -> bool:
    """Whether the precision "medium" keeps float32's on this processor, tried on one product."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = left @ right
    finally:
        torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    return bool((found - exact).abs().max() <= _LARGEST_ERROR * exact.abs().max())
