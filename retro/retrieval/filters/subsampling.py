"""Nested subsampling: a document is drawn or not, whichever shard, order, worker or query asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt64

from retro.retrieval.filters.records import removed


def document_hashes(document_ids: Sequence[str], seed: int) -> UInt64[np.ndarray, " d"]:
    """hash64(seed, id): 64 bits for each document, uniform."""
    digests = [hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in document_ids]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def drawn(document_ids: Sequence[str], share: float, seed: int) -> Bool[np.ndarray, " d"]:
    """Which documents are among a share p: hash64(seed, id) < p 2^64. Those of a smaller p are among those of a larger
    one of the same seed."""
    bound = math.ceil(share * 2.0**64)
    hashes = document_hashes(document_ids, seed)
    return hashes < np.uint64(bound) if bound < 1 << 64 else np.ones(len(hashes), bool)


def check_subsample(subsample: Sequence[float | int]) -> tuple[float, int]:
    """(p, seed); ValueError unless 0 < p <= 1 and the seed is a whole number."""
    try:
        share, seed = float(subsample[0]), int(subsample[1])
        good = len(subsample) == 2 and seed == subsample[1] and 0 < share <= 1
    except (TypeError, ValueError, IndexError):
        good = False
    if not good:
        raise ValueError(f"subsample must be a share above 0 and at most 1, and a seed, as (0.1, 0); not {subsample!r}")
    return share, seed


class SubsampleFilter:
    """Keeps a share p of the documents; see `drawn`."""

    name = "subsample"

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = check_subsample((share, seed))

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None, or the record of a document that was not drawn."""
        if drawn([document.id], self.share, self.seed)[0]:
            return None
        return removed(self, document, f"not drawn with p = {self.share:g}, seed {self.seed}")
